"""Which test images a trained few-shot classifier answers wrongly, and how much of its error each of them is.

    python -m experiments.wrong_answers RUN_DIR --ways 5 --shots 5 --episodes 10000 --out wrong.json

The episodes are those of `python -m experiments.evaluate` with the same sizes and the run's own seed: --tasks decides
which are drawn. An image and its
quarter turns, where these are classes of their own, are counted as one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import averaging, build, checkpoint, evaluate
from experiments.config import Config, EvaluateConfig, FewShotConfig
from experiments.errors import NonFiniteError, UserError
from experiments.evaluation import predictions
from theria.data import ClassDataset, Episode, EpisodeSampler
from theria.testing.machine import machine

Image = tuple[str, int]  # its class as it was drawn, its number there


def images_of(dataset: ClassDataset) -> dict[bytes, Image]:
    """The images of a data set by their bytes."""
    first: dict[int, str] = {}
    for name, origin in zip(dataset.names, dataset.origins.tolist(), strict=True):
        first.setdefault(origin, name)
    names = [first[origin] for origin in dataset.origins.tolist()]
    every = ((c, i) for c, count in enumerate(dataset.counts.tolist()) for i in range(count))
    return {key(dataset.images[c, i]): (names[c], i) for c, i in every}


def key(image: Tensor) -> bytes:
    """The bytes of a uint8 image, or of one that was scaled to [0, 1]."""
    pixels = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
    return pixels.cpu().numpy().tobytes()


def wrong_answers(run: Config, learned: dict[str, Any], tasks: int, episodes: int) -> tuple[Counter[Image], int]:
    """How often each image was answered wrongly, and the number of answers.

    Raises:
        NonFiniteError: a prediction is not finite.
    """
    source = build.build_source(run, "test", tasks=tasks)
    assert isinstance(source, EpisodeSampler)
    assert isinstance(run.task, FewShotConfig)
    learner = build.for_ways(run, learned, run.task.ways).eval()
    known, wrong, answers = images_of(source.dataset), Counter[Image](), 0
    with torch.no_grad():
        for step in range(-(-episodes // tasks)):
            episode = Episode(*(field[: episodes - step * tasks] for field in source.sample(step)))
            scores = predictions(learner, episode, run.inner.evaluated_steps)[-1]
            if not bool(scores.isfinite().all()):
                raise NonFiniteError(
                    f"predictions after {run.inner.evaluated_steps} inner steps are not finite, so that there are no "
                    "answers: train with a lower inner.lr, or look at fewer steps with experiments.evaluate"
                )
            given = scores.argmax(-1)
            answers += given.numel()
            wrong.update(known[key(x)] for x in episode.query_x[given != episode.query_y])
    return wrong, answers


def configured(state: dict[str, Any], settings: EvaluateConfig) -> Config:
    """The run with the tasks of an evaluation.

    Raises:
        UserError: tasks that classify no images.
    """
    run = evaluate.run_of(settings, state["config"])
    if not isinstance(run.task, FewShotConfig):
        raise UserError(f"task={run.task.name} classifies no images")
    run.task = evaluate.task_of(settings, run)
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 2 for what the caller can mend; 3 for predictions that are not finite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the directory of a run, or a checkpoint")
    parser.add_argument("--ways", type=int, help="default: the run's own")
    parser.add_argument("--shots", type=int, help="default: the run's own")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--tasks", type=int, help="evaluated at once; decides the draws; default: the run's own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--show", type=int, default=12, metavar="N", help="images that are listed")
    parser.add_argument("--out", type=Path, help="a JSON file for all of them")
    options = parser.parse_args(arguments)
    if options.show < 0:
        parser.error(f"--show {options.show}: needed is at least 0")
    if options.out and (options.out.is_dir() or not options.out.parent.is_dir()):
        parser.error(f"--out {options.out}: needed is a file in a folder that is there")
    sizes = {name: getattr(options, name) for name in ("ways", "shots", "episodes", "tasks", "device")}
    settings = EvaluateConfig(checkpoint=str(options.run), **sizes)
    try:
        evaluate.check(settings)
        _, state = checkpoint.find(options.run)
        run = configured(state, settings)
        wrong, answers = wrong_answers(
            run, averaging.evaluated(state), evaluate.tasks_of(settings, run), options.episodes
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    total, ranked = wrong.total(), wrong.most_common()
    print(f"{total:,} of {answers:,} answers are wrong ({100 * total / answers:.3f} %), at {len(wrong):,} images")
    so_far = 0
    for (name, number), count in ranked[: options.show]:
        so_far += count
        print(f"{count:6} {name}, image {number}: with those above {100 * so_far / total:.0f} % of the wrong answers")
    if options.out:
        rows = [{"class": name, "image": number, "wrong": count} for (name, number), count in ranked]
        record = {"step": state["step"], "answers": answers, "wrong": total, "machine": machine(), "images": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
