"""The average of the parameters: closed forms, the same bits after a resumption, and that it is what is evaluated."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments import averaging, build, checkpoint, store, tracking
from experiments.averaging import Average
from experiments.config import EvaluateConfig
from experiments.errors import UserError
from experiments.evaluate import evaluate_checkpoint
from experiments.evaluation import evaluate

CLOSED = 1e-14  # float64, a few hundred updates of numbers near 1
EMA = "trainer.ema=0.9"


class Point(nn.Module):
    """One parameter of any shape, and a buffer."""

    seen: torch.Tensor

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())
        self.register_buffer("seen", torch.zeros(()))

    def set(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.value.copy_(value)


def average_of(learner: nn.Module, decay: float) -> tuple[Average, list[torch.Tensor]]:
    """And its parameters."""
    average = Average(learner, decay)  # pyright: ignore[reportArgumentType]
    return average, list(average.learner.parameters())


def final(run_dir) -> dict:
    return checkpoint.load(checkpoint.saved(run_dir)[-1])


@pytest.mark.parametrize("updates", [1, 2, 10, 150])
def test_what_is_left_of_the_beginning_while_the_decay_ramps_up(updates):
    """Parameters jump from 1 to 0 before the first update: the average is prod (1 + s)/(10 + s) = 1/C(t + 9, 9)."""
    point = Point(torch.ones(3, dtype=torch.float64))
    average, (value,) = average_of(point, 0.999)
    point.set(torch.zeros(3, dtype=torch.float64))
    for _ in range(updates):
        average.update()
    left = value.detach()
    torch.testing.assert_close(left, torch.full_like(left, 1 / math.comb(updates + 9, 9)), rtol=CLOSED, atol=0)


def test_after_the_ramp_it_is_the_geometric_average():
    """Of the line 1, 2, ..., n it lags behind by d/(1 - d), the mean age of the terms (1 - d) d^i, as n grows."""
    decay, n = 0.5, 400
    point = Point(torch.zeros((), dtype=torch.float64))
    average, (value,) = average_of(point, decay)
    for t in range(1, n + 1):
        point.set(torch.tensor(float(t), dtype=torch.float64))
        average.update()
    assert float(value.detach()) == pytest.approx(n - decay / (1 - decay), rel=CLOSED)
    assert float(average.count) == n


def test_a_decay_of_zero_is_the_parameters_themselves():
    point = Point(torch.ones(2))
    average, (value,) = average_of(point, 0.0)
    point.set(torch.tensor([3.0, -7.0]))
    average.update()
    assert torch.equal(value, point.value)


def test_dtypes_keep_to_themselves_and_buffers_are_copied():
    dtypes = (torch.float32, torch.float64)
    points = [Point(torch.ones(2, dtype=dtype)) for dtype in dtypes]
    average, values = average_of(nn.ModuleList(points), 0.999)
    for point in points:
        point.set(torch.zeros(2))
        point.seen.fill_(5)
    average.update()
    for value, dtype in zip(values, dtypes, strict=True):
        torch.testing.assert_close(value.detach(), torch.full((2,), 0.1, dtype=dtype))
    for point, seen in zip(points, average.learner.buffers(), strict=True):
        assert seen is not point.seen
        assert float(seen) == 5


def test_an_update_writes_in_place_and_reads_nothing_from_the_device(monkeypatch):
    """What a CUDA graph forbids: other addresses, and numbers that Python sees."""
    point = Point(torch.ones(4))
    average, (value,) = average_of(point, 0.99)
    places = [t.data_ptr() for t in (value, average.count)]

    def seen(*_):
        raise AssertionError("the host waited for a value")

    for name in ("item", "__float__", "__bool__", "__int__", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, seen)
    average.update()
    monkeypatch.undo()
    assert [t.data_ptr() for t in (value, average.count)] == places
    assert value.requires_grad
    assert value.grad_fn is None


LEARNERS = sorted(path.stem for path in Path(store.CONFIG_DIR, "learner").glob("*.yaml"))
WITH = {"incontext": ["model=incontext"], "imaml": ["adjoint=implicit"]}


@pytest.mark.parametrize("kind", LEARNERS)
def test_every_learner_has_an_average_that_predicts(compose_config, kind):
    """With a decay of 0 the copy is the learner: it predicts the same, from tensors of its own."""
    small = ["task=digits", "task.tasks=2", "inner=sgd", "model.d_model=8", "model.n_heads=2", "model.n_layers=1"]
    config = compose_config(f"learner={kind}", *WITH.get(kind, []), *small)
    learner = build.build_learner(config)
    average = Average(learner, 0.0)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter += 0.01 * torch.rand_like(parameter)
    episode = build.build_source(config, "train", tasks=2).sample(0)
    before = average.learner.predict(episode).detach()
    average.update()
    expected = learner.predict(episode).detach()
    torch.testing.assert_close(average.learner.predict(episode).detach(), expected)
    assert not torch.allclose(before, expected)
    own = {parameter.data_ptr() for parameter in learner.parameters()}
    assert not own & {parameter.data_ptr() for parameter in average.learner.parameters()}


def test_a_resumed_run_has_the_same_average_bit_by_bit(run_here, tmp_path):
    options = [EMA, "trainer.schedule=constant"]
    run_here(tmp_path / "whole", *options)
    run_here(tmp_path / "parts", *options, "trainer.steps=4")
    run_here(tmp_path / "parts", *options, "trainer.resume=true")
    one, other = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert float(one["average"]["count"]) == float(other["average"]["count"]) == 6
    for key, value in one["average"]["learner"].items():
        assert torch.equal(other["average"]["learner"][key], value), key
        assert not torch.equal(one["learner"][key], value) or not value.is_floating_point(), key


def test_training_itself_is_the_same_with_it(run_here, tmp_path):
    run_here(tmp_path / "with", EMA)
    run_here(tmp_path / "without")
    for key, value in final(tmp_path / "without")["learner"].items():
        assert torch.equal(final(tmp_path / "with")["learner"][key], value), key


def test_validation_and_test_are_of_the_average(run_here, compose_config, tiny, tmp_path):
    result = run_here(tmp_path, EMA, "trainer.lr=0.05")
    state, config = final(tmp_path), compose_config(*tiny, EMA, "trainer.lr=0.05")
    found = {}
    for name, parameters in (("average", averaging.evaluated(state)), ("last", state["learner"])):
        learner = build.build_learner(config)
        learner.load_state_dict(parameters)
        for subset in ("val", "test"):
            source = build.build_source(config, subset, tasks=4)
            done = evaluate(learner, source, episodes=8, steps=1, subset=subset, alive=lambda: None)
            found[name, subset] = done.after.mean
    rows = [row for row in tracking.read(tmp_path / "metrics.jsonl") if "val/mse" in row]
    assert result.after.mean == found["average", "test"] != found["last", "test"]
    assert rows[-1]["val/mse"] == found["average", "val"] != found["last", "val"]


def test_evaluating_a_checkpoint_takes_the_average(run_here, tmp_path):
    result = run_here(tmp_path / "run", EMA, "trainer.lr=0.05")
    (tmp_path / "out").mkdir()
    settings = EvaluateConfig(checkpoint=str(tmp_path / "run"), episodes=8, tasks=4, run_dir="unused")
    evaluate_checkpoint(settings, tmp_path / "out")
    assert json.loads((tmp_path / "out/evaluation_test_5s.json").read_text())["mean"] == result.after.mean


def test_a_checkpoint_that_is_written_during_an_evaluation_holds_both(run_here, tmp_path, monkeypatch):
    """A signal in the middle of the validation at step 3 must not save the average as the parameters."""
    from experiments.errors import Interrupted
    from experiments.trainer import Trainer

    run_here(tmp_path / "whole", EMA)
    stop = Trainer.validate

    def stopped(self):
        if self.step == 3:
            self.parts.watch.received = 2
        stop(self)

    monkeypatch.setattr(Trainer, "validate", stopped)
    with pytest.raises(Interrupted):
        run_here(tmp_path / "parts", EMA)
    monkeypatch.undo()
    assert final(tmp_path / "parts")["step"] == 3
    run_here(tmp_path / "parts", EMA, "trainer.resume=true")
    for part in ("learner", "average"):
        one, other = (final(tmp_path / name)[part] for name in ("whole", "parts"))
        for key, value in (one if part == "learner" else one["learner"]).items():
            assert torch.equal((other if part == "learner" else other["learner"])[key], value), key


@pytest.mark.parametrize("ema", ["1", "1.5", "-0.1", "nan"])
def test_a_decay_outside_its_range_is_refused(compose_config, tiny, ema):
    with pytest.raises(UserError, match=r"trainer\.ema=.*needed is"):
        build.check(compose_config(*tiny, f"trainer.ema={ema}"))
