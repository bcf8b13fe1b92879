"""The outer loop: steps, figures, validation, checkpoints, and every way it can end."""

import math
import resource as system
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments import build, checkpoint, health, protocols, resume, store
from experiments.averaging import Average
from experiments.capture import outer_step
from experiments.config import Config, Schedule, TrainerConfig
from experiments.errors import Interrupted, NonFiniteError, unsolved
from experiments.evaluation import Copies, Evaluation, evaluate, metric_name, task_metric
from experiments.interrupt import SignalWatch
from experiments.learners import Learner, set_epoch
from experiments.panels import Panels
from experiments.progress import Progress
from experiments.tracking import Tracker
from theria.data import Episode, TaskSource
from theria.meta.distributed import ALONE, LostProcess, Processes


@dataclass
class Parts:
    """What a trainer works with; `resume_command` is told to whoever stops it."""

    config: Config
    run_dir: Path
    learner: Learner
    sources: dict[str, TaskSource]
    tracker: Tracker
    progress: Progress
    watch: SignalWatch
    resume_command: str
    ranks: Processes = ALONE  # the processes that share the tasks of a step


def learning_rate(config: TrainerConfig, step: int) -> float:
    """The outer rate of a step, counted from 0: a linear warm-up, then constant or half a cosine to 0 at `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule is Schedule.constant:
        return config.lr
    share = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


class Trainer:
    """Adam on the mean query loss of an episode a step; a step is a pure function of the state before it.

    Several processes draw the same episodes and take the same steps, each with the gradients of its own tasks summed
    over all; every decision (a signal, the wall clock, what is not finite) is taken together.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts, self.config, self.trainer = parts, parts.config, parts.config.trainer
        self.learner, self.say, self.ranks = parts.learner, parts.progress.say, parts.ranks
        self.parameters = [p for p in self.learner.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=self.trainer.lr, weight_decay=self.trainer.weight_decay, foreach=True
        )
        self.outer_step = outer_step(self.trainer, self.learner, self.parameters, self.ranks, self.say)
        ema = self.trainer.ema
        self.average = None if ema is None else Average(self.learner, ema)
        self.step = 0  # outer steps done; also the state of the sampler, whose episodes are pure in the step
        self.validated = -1  # the last step that was validated
        self._before, self._begun = 0.0, time.monotonic()
        self._peaks: dict[str, float] = {}  # of memory, before a resumption
        self._saved = (-1, self._begun)  # step of the newest checkpoint, and when it was written
        self._mark, self._tasks_per_second = (0, time.monotonic()), 0.0
        self.panels = Panels(parts)
        self._drawn: Any = (None, None)  # a step and its episode
        self._measured: dict[str, float] = {}  # the newest figures, shown until there are newer ones

    # ------------------------------------------------------------------------------------------------------- state
    @property
    def evaluated(self) -> Learner:
        """What validation and test measure: the average of the parameters where there is one."""
        return self.learner if self.average is None else self.average.learner

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before a resumption included."""
        return self._before + time.monotonic() - self._begun

    @property
    def peaks(self) -> dict[str, float]:
        """`peak_memory` of training, that before a resumption included."""
        now = peak_memory(self.parameters[0].device)
        return {name: max(value, self._peaks.get(name, 0)) for name, value in now.items()}

    def save(self) -> Path:
        """Write a checkpoint; of several processes the first one does, and the others wait for it.

        Raises:
            NonFiniteError: a parameter is not finite, so that no figure could follow from the checkpoint.
        """
        if not self._finite():
            raise NonFiniteError(
                f"step {self.step}: a parameter is not finite after the last update; nothing was written.\n"
                f"{self._advice(self._last_good())}"
            )
        keep, self._saved = self.trainer.keep, (self.step, time.monotonic())
        return self.ranks.first(lambda: checkpoint.save(self.parts.run_dir, self._state(), keep))

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "elapsed": self.elapsed,
            "peaks": self.peaks,
            "learner": self.learner.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "config": store.container(self.config),
        }

    def restore(self, state: dict[str, Any], validated: int) -> None:
        self.learner.load_state_dict(state["learner"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        checkpoint.restore_rng(state["rng"])
        self.step, self._before, self.validated = state["step"], state["elapsed"], validated
        self._begun, self._peaks = time.monotonic(), state.get("peaks", {})  # older checkpoints have none
        self._mark = self._saved = (self.step, self._begun)

    # -------------------------------------------------------------------------------------------------------- loop
    def run(self) -> Evaluation:
        """Train to the end and evaluate on the test classes.

        Raises:
            Interrupted: after a signal; the checkpoint is written and the message says how to go on.
            NonFiniteError: a loss or gradient that is not finite, and nothing was updated with it; or a parameter
                that is not finite when a checkpoint is due; or a prediction of the test.
            LostProcess: another process is gone or hangs.
        """
        if self.step == 0:
            self.save()
        while True:
            if self._due(self.trainer.val_every) and self.validated < self.step:
                self.validate()
            if self.step >= self.trainer.steps or self._out_of_time():
                break
            self._train_step()
            if self._due(self.trainer.checkpoint_every):
                self.save()
            self.alive()
        self.save()
        if self.trainer.val_every and self.validated < self.step:  # wherever training ended: the last is of its end
            self.validate()
        return self.test()

    def alive(self) -> None:
        """Stop here if a signal came, to whichever process; write a checkpoint if the last one is too long ago."""
        step, then = self._saved
        signum, waited = self.ranks.most([self.parts.watch.received or 0, time.monotonic() - then])
        if signum:
            path = self.save()
            message = f"stopped at step {self.step}: {path} is written\nresume: {self.parts.resume_command}"
            raise Interrupted(message, int(signum))
        minutes = self.trainer.checkpoint_minutes
        if minutes is not None and waited >= 60 * minutes and step < self.step:
            self.save()

    def lost(self, error: LostProcess) -> str:
        """What to tell when another process is gone: nothing can be saved together any more."""
        return f"step {self.step}: {error}\nlast checkpoint: {self._last_good()}\nresume: {self.parts.resume_command}"

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _out_of_time(self) -> bool:
        budget = self.trainer.max_minutes
        if budget is None or self.ranks.most([self.elapsed])[0] < 60 * budget:
            return False
        self.say(f"trainer.max_minutes={budget:g} is used up at step {self.step} of {self.trainer.steps}")
        return True

    # -------------------------------------------------------------------------------------------------------- step
    def _train_step(self) -> None:
        episode = self._episode()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.trainer, self.step)
        set_epoch(self.learner, self.config.learner, self.step)
        self.optimiser.zero_grad()
        loss = self.outer_step(episode)
        self._draw(self.step + 1)  # while a GPU is at work: the next line waits for it
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not bool(loss.isfinite() & norm.isfinite()):
            self._stop_nonfinite(episode, loss, norm)
        if self.trainer.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.trainer.clip, norm)
        logged = (self.step + 1) % self.trainer.log_every == 0
        measured = self._measure(episode) if logged else {}
        self.optimiser.step()
        if self.average is not None:
            self.average.update()
        time.sleep(self.config.debug.step_seconds)
        self.step += 1
        self._show(float(loss), float(norm), measured, logged)

    def _episode(self) -> Episode:
        """The training episode of this step."""
        if self._drawn[0] != self.step:
            self._draw(self.step)
        return self._drawn[1]

    def _draw(self, step: int) -> None:
        debug = self.config.debug
        episode = self.parts.sources["train"].sample(0 if debug.repeat_episode else step)
        if debug.nan_step == step:
            episode.query_x[debug.nan_task] = math.nan
        self._drawn = step, episode

    def _measure(self, episode: Episode) -> dict[str, float]:
        """Figures of the training episode before the update that it causes."""
        mine = self.ranks.part(episode)
        figures = torch.empty(0)
        if mine.query_y.shape[0]:
            with torch.no_grad():
                figures = task_metric(self.learner.predict(mine), mine.query_y).cpu()
        values = [part for part in self.ranks.gather(figures) if part.numel()]
        return {f"train/{metric_name(episode)}": float(torch.cat(values).mean())}

    def _stop_nonfinite(self, episode: Episode, loss: Tensor, norm: Tensor) -> None:
        bad = self._bad_task(episode)
        where = "no single task (only their sum)" if bad is None else f"task {bad.task}"
        what = f"loss {float(loss)}" if not bool(loss.isfinite()) else f"gradient norm {float(norm)}"
        self.parts.tracker.scalars(self.step, {"gradient/nonfinite": health.nonfinite_count(self.learner)})
        good = self.save() if self._finite() else self._last_good()
        lines = [f"step {self.step}, {where}: {what} is not finite; the parameters were not updated with it."]
        if bad and bad.reason:
            lines.append(unsolved(bad.reason))
        raise NonFiniteError("\n".join([*lines, self._advice(good)]))

    def _bad_task(self, episode: Episode) -> health.BadTask | None:
        """The first task that is not finite by itself, of all processes' tasks."""
        found = health.bad_task(self.learner, self.ranks.part(episode))
        if found is not None:
            found = found._replace(task=self.ranks.share(episode.query_y.shape[0]).start + found.task)
        return next((bad for bad in self.ranks.gather(found) if bad is not None), None)

    def _finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.parameters)

    def _last_good(self) -> Path | None:
        return next(reversed(checkpoint.saved(self.parts.run_dir)), None)

    def _advice(self, good: Path | None) -> str:
        return (
            f"last good checkpoint: {good or 'the one that this run began from'}\n"
            "Lower trainer.lr or inner.lr, or bound the gradient with trainer.clip=1."
        )

    # ----------------------------------------------------------------------------------------------------- figures
    def _show(self, loss: float, norm: float, measured: dict[str, float], logged: bool) -> None:
        self._measured |= measured
        if logged:
            self._tasks_per_second = self._speed()
        figures = {"loss": f"{loss:.3f}"}
        figures |= {name.split("/")[1]: f"{value:.3f}" for name, value in self._measured.items()}
        self.parts.progress.update(self.step, figures | {"tasks/s": f"{self._tasks_per_second:.0f}"})
        if not logged:
            return
        values = {
            "train/loss": loss,
            **measured,
            "train/lr": self.optimiser.param_groups[0]["lr"],
            "gradient/norm": norm,
            "gradient/nonfinite": 0,
            "system/tasks_per_second": self._tasks_per_second,
            "system/steps_per_second": self._tasks_per_second / self.config.task.tasks,
            "system/seconds": self.elapsed,
            **self.peaks,
        }
        self.parts.tracker.scalars(self.step, values | self._panels())

    def _speed(self) -> float:
        """Tasks per second since the last call, validation left out."""
        (step, then), self._mark = self._mark, (self.step, time.monotonic())
        return (self.step - step) * self.config.task.tasks / max(self._mark[1] - then, 1e-9)

    def _panels(self) -> dict[str, float]:
        """What else a run shows, every `health_every` steps, on tasks of the next step; see `experiments.panels`."""
        if not self._due(self.trainer.health_every):
            return {}
        begun = time.monotonic()
        found = self.panels.measure(self.step, self._episode(), self.elapsed, self.evaluated)
        self._mark = (self._mark[0], self._mark[1] + time.monotonic() - begun)  # no part of the tasks per second
        return found

    # -------------------------------------------------------------------------------------------------- evaluation
    def validate(self) -> None:
        begun = time.monotonic()
        result = self._evaluate("val", self.trainer.val_episodes)
        self._mark = (self._mark[0], self._mark[1] + time.monotonic() - begun)
        self.validated = self.step
        self.say(f"step {self.step}: {result.text()}")
        if lost := result.nonfinite():
            self.say(f"step {self.step}: {lost}" + (", and count as wrong" if result.metric == "accuracy" else ""))

    def test(self) -> Evaluation:
        self.say(f"evaluating on {self.trainer.test_episodes} test episodes")
        copies = build.build_copies(self.config, self.trainer.test_augment)
        result = self._evaluate("test", self.trainer.test_episodes, copies)
        return replace(result, protocols={name: self._one_shot(copies) for name in self.trainer.protocols})

    def _one_shot(self, copies: Copies | None) -> dict[str, Any]:
        """The record of the official test; `protocols.FURTHER` knows no other."""
        learner = build.for_ways(self.config, self.evaluated.state_dict(), protocols.WAYS).eval()
        runs = cast(protocols.FixedTasks, self.parts.sources[protocols.ONE_SHOT])
        result = protocols.one_shot(learner, runs, copies=copies, **self._options())
        self.say(result.text())
        self.parts.tracker.scalars(self.step, result.scalars())
        return result.record()

    def _evaluate(self, subset: str, episodes: int, copies: Copies | None = None) -> Evaluation:
        learner = self.evaluated
        learner.eval()
        try:
            source = self.parts.sources[subset]
            result = evaluate(learner, source, episodes=episodes, subset=subset, copies=copies, **self._options())
        finally:
            learner.train()
        if subset == "test":
            result.require_finite(
                f"The parameters are in {self._last_good()}. Lower inner.lr or inner.eval_steps, or evaluate them "
                f"after fewer inner steps: {resume.evaluation(self.parts.run_dir)} inner_steps=..."
            )
        self.parts.tracker.scalars(self.step, result.scalars())
        return result

    def _options(self) -> dict[str, Any]:
        """What every evaluation of the run has."""
        return {"steps": self.config.inner.evaluated_steps, "alive": self.alive, "processes": self.ranks}


def peak_memory(device: torch.device) -> dict[str, float]:
    """The largest resident memory of this process so far in MiB, and that of the allocator of a CUDA device."""
    peak = system.getrusage(system.RUSAGE_SELF).ru_maxrss
    found = {"system/peak_memory_mb": peak / 2**20 if sys.platform == "darwin" else peak / 2**10}
    if device.type == "cuda":
        found["system/peak_cuda_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found


def memory_record(peaks: dict[str, float]) -> dict[str, int]:
    """`peak_memory` for results.json: by names without a group, whole MiB."""
    return {name.split("/")[1]: round(value) for name, value in peaks.items()}
