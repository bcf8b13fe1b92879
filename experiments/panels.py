"""What a run shows beside its loss, every `trainer.health_every` steps.

| group | what |
|---|---|
| `gradient/` | the share of second order in the meta-gradient, its cosine with first order; mixed precision's error |
| `rates/`, `inner/lr_*` | learned inner rates, by layer and over all |
| `steps/` | loss and accuracy after each inner step, on support and query set of validation tasks |
| `curvature/` | of the inner loss of one task, where its inner steps begin |
| `attention/` | how spread the attention of each layer is |
| `pictures/` | an episode with its predictions, the attention of a query |

Numbers return to the trainer, which writes them to metrics.jsonl; pictures go to the run's folder and the tracker.
A panel that fails says so once and is left out from then on; panels that take too long of a run are skipped until they
do not. Neither they nor their failures change a parameter, a gradient or a random number of the training.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from experiments import attention_maps, health, pictures
from experiments.capture import AUTOCAST
from experiments.evaluation import metric_name, predictions, task_metric
from experiments.learners import Learner, attributes, takes_steps
from theria.curvature import extreme_eigenvalues, hvp, second_order
from theria.data import Episode
from theria.meta.adjoint import Adjoint, Context, InnerLoss
from theria.meta.bilevel import trees
from theria.meta.distributed import LostProcess
from theria.meta.learner import GradientLearner
from theria.meta.maml_plus_plus import MAMLPlusPlus
from theria.meta.optimisers import Hyper, InnerOptimiser, Params

if TYPE_CHECKING:
    from experiments.trainer import Parts

Figures = dict[str, float]
TASKS = 8  # validation tasks of the inner curves
PRODUCTS = 8  # Hessian-vector products for the ends of the spectrum
ALLOWANCE = 10.0  # seconds that the panels of a run may take whatever their share


class Panels:
    """Measures; a failure or a long duration of it stops nothing."""

    def __init__(self, parts: "Parts") -> None:
        self.parts, self.learner = parts, parts.learner
        self.say, self.ranks = parts.progress.say, parts.ranks
        self.spent = 0.0  # seconds of all panels so far
        self.off: set[str] = set()  # panels that failed

    def measure(self, step: int, episode: Episode, elapsed: float, evaluated: Learner) -> Figures:
        """The figures of a step. All processes call it, each with all tasks; they share the work of `gradient`.

        Args:
            episode: of the training classes, T tasks.
            elapsed: seconds of the run so far.
            evaluated: what is validated: the learner, or one with the average of its parameters.
        """
        allowed = ALLOWANCE + self.parts.config.trainer.health_share * elapsed
        if self.ranks.most([self.spent - allowed])[0] > 0:
            return {}
        begun, found = time.monotonic(), {}
        with _aside(self.learner), _aside(evaluated):
            found |= self._guarded("gradient", lambda: gradient(self.learner, episode, self.ranks))
            if self.ranks.is_first:
                found |= self._alone(step, episode, evaluated)
        self.spent += time.monotonic() - begun
        return {**found, "system/panel_seconds": self.spent}

    def _alone(self, step: int, episode: Episode, evaluated: Learner) -> Figures:
        """The panels of one process, on tasks of which it has all."""
        steps = self.parts.config.inner.evaluated_steps
        tasks = cache(lambda: Episode(*(field[:TASKS] for field in self.parts.sources["val"].sample(0))))
        panels: dict[str, Callable[[], Figures]] = {
            "rates": lambda: rates(self.learner),
            "precision": lambda: precision(self.learner, episode, AUTOCAST[self.parts.config.trainer.precision]),
            "curvature": lambda: curvature(self.learner, episode),
            "steps": lambda: inner_curves(evaluated, tasks(), steps),
            "attention": lambda: self._attention(step, evaluated, tasks()),
            "episode": lambda: self._episode(step, evaluated, tasks(), steps),
        }
        self.learner.eval()
        evaluated.eval()
        return {key: value for name, panel in panels.items() for key, value in self._guarded(name, panel).items()}

    def _attention(self, step: int, learner: Learner, tasks: Episode) -> Figures:
        task = Episode(*(field[0] for field in tasks))
        seen = attention_maps.query_attention(learner, task)
        if seen is None:
            return {}
        if self.parts.config.trainer.pictures:
            self._shown(step, pictures.attention(seen, task, self.parts.run_dir / "pictures/attention.png"))
        return {f"attention/entropy_layer{i}": value for i, value in enumerate(seen.entropies)}

    def _episode(self, step: int, learner: Learner, tasks: Episode, steps: int) -> Figures:
        if self.parts.config.trainer.pictures:
            self._shown(step, pictures.episode(learner, tasks, steps, self.parts.run_dir / "pictures/episode.png"))
        return {}

    def _shown(self, step: int, path: Path) -> None:
        self.parts.tracker.picture(step, path.stem, path)

    def _guarded(self, name: str, panel: Callable[[], Figures]) -> Figures:
        if name in self.off:
            return {}
        try:
            return panel()
        except LostProcess:
            raise
        except Exception as error:
            self.off.add(name)
            reason = (str(error).splitlines() or [""])[0]
            self.say(f"panel {name} failed ({type(error).__name__}: {reason}): it is left out from here on")
            return {}


# ----------------------------------------------------------------------------------------------------------- the panels
def gradient(learner: Learner, episode: Episode, processes: health.Processes = health.ALONE) -> Figures:
    """The share of second order in the meta-gradient, and the cosine between it and the first-order one."""
    pair = health.meta_gradients(learner, episode, processes)
    if pair is None:
        return {}
    found = {"gradient/second_order": health.share(*pair), "gradient/cosine": health.cosine(*pair)}
    return {name: value for name, value in found.items() if value is not None}


def precision(learner: Learner, episode: Episode, dtype: torch.dtype | None) -> Figures:
    """What mixed precision changes of the meta-gradient of a few tasks; nothing where there is none."""
    if dtype is None:
        return {}
    error = health.rounding(learner, Episode(*(field[:TASKS] for field in episode)), dtype)
    return {} if error is None else {"gradient/rounding": error}


def rates(learner: Learner) -> Figures:
    """The learned inner rates: their mean and least, and the mean of each layer."""
    ends = health.inner_rates(learner)
    if ends is None:
        return {}
    layers = {f"rates/{layer}": value for layer, value in health.layer_rates(learner).items()}
    return {"inner/lr_mean": ends[0], "inner/lr_min": ends[1], **layers}


def inner_curves(learner: Learner, episode: Episode, steps: int) -> Figures:
    """Means over T tasks after 0 to `steps` inner steps, on the support and on the query set: the loss and, where it
    is another figure, the accuracy. {} for a learner without inner steps."""
    if not takes_steps(learner):
        return {}
    loss_fn, metric = torch.func.vmap(learner.loss_fn), metric_name(episode)
    sets = {"support": episode._replace(query_x=episode.support_x, query_y=episode.support_y), "query": episode}
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, asked in sets.items():
            for step, prediction in enumerate(predictions(learner, asked, steps)):
                found[f"steps/{name}_loss_{step}"] = loss_fn(prediction, asked.query_y).mean()
                if metric != "mse":
                    found[f"steps/{name}_{metric}_{step}"] = task_metric(prediction, asked.query_y).mean()
    return {name: float(value) for name, value in found.items()}


def curvature(learner: Learner, episode: Episode, products: int = PRODUCTS) -> Figures:
    """Second derivatives of the inner loss of the first task at the start of its inner steps, in what they change.

    With g the inner gradient, u = g / |g| and H the Hessian: |g|, |H u|, u'Hu (the curvature that the first step
    meets), and the ends of H's spectrum after `products` steps of Lanczos, which lie inside the true ones by at most
    what `eigenvalue_error` says for an eigenvalue near each.
    """
    if not isinstance(learner, GradientLearner):
        return {}
    loss, start = inner_problem(learner, episode.support_x[0], episode.support_y[0])
    g = torch.func.grad(second_order(loss))(start)
    norm = trees.norm(g)
    product = partial(hvp, loss, start, mode="reverse_over_reverse")  # fewer operations lack it
    ends = extreme_eigenvalues(product, start, steps=products)
    found = {
        "inner_gradient": norm,
        "largest_eigenvalue": ends.largest,
        "smallest_eigenvalue": ends.smallest,
        "eigenvalue_error": torch.maximum(ends.largest_error, ends.smallest_error),
    }
    if float(norm) > 0:
        u = {name: value / norm for name, value in g.items()}
        Hu = product(u)
        found |= {"hvp_norm": trees.norm(Hu), "along_gradient": trees.dot(u, Hu)}
    return {f"curvature/{name}": float(value) for name, value in found.items()}


def inner_problem(learner: GradientLearner, x: Tensor, y: Tensor) -> tuple[Callable[[Params], Tensor], Params]:
    """The inner loss of a task as a function of what the inner steps change, and where they begin; iMAML's is with its
    proximal term."""
    recorder = _Recorder()
    changes = {"first_order_epochs": 0} if isinstance(learner, MAMLPlusPlus) else {}  # in them it uses another adjoint
    with attributes(learner, adjoint=recorder, **changes), torch.no_grad():
        learner.adapt(x, y)
    loss, start, context = recorder.seen
    return lambda p: loss(p, context), start


class _Recorder(Adjoint):
    """Takes no step and keeps what it was to solve, as constants."""

    seen: tuple[InnerLoss, Params, Context]

    def solve(
        self,
        inner_loss: InnerLoss,
        params: Params,
        context: Context,
        optimiser: InnerOptimiser,
        hyper: Hyper,
        steps: int,
    ) -> Params:
        self.seen = (inner_loss, *tree_map_only(Tensor, Tensor.detach, (params, context)))
        return params


@contextmanager
def _aside(learner: Learner) -> Iterator[None]:
    """The learner's mode and torch's random numbers are afterwards what they were."""
    training = learner.training
    device = next(learner.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            learner.train(training)
