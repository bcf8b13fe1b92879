"""`trainer.capture`: the same steps where nothing can be recorded, and a reason wherever something is not."""

from functools import partial

import pytest
import torch

from experiments import build, capture, checkpoint
from experiments.config import Precision, TrainerConfig
from experiments.errors import UserError
from theria.meta import compiled
from theria.meta.distributed import ALONE
from theria.meta.fused import Fused
from theria.testing import difference


@pytest.fixture
def config_of(compose_config, tiny):
    return lambda *overrides: compose_config(*tiny, "inner.steps=2", *overrides)


@pytest.fixture
def learner_of(config_of):
    return lambda *overrides: build.build_learner(config_of(*overrides))


def outer_step(wanted, learner, ranks=ALONE, **settings):
    """The step and what was said."""
    said: list[str] = []
    trainer = TrainerConfig(capture=wanted, **settings)
    return capture.outer_step(trainer, learner, list(learner.parameters()), ranks, said.append), said


def state(run_dir):
    return checkpoint.load(checkpoint.saved(run_dir)[-1])


def test_without_a_gpu_the_trajectory_is_the_same_to_the_bit(run_here, tmp_path):
    finals = {}
    for wanted in ("auto", "false", "true"):
        result = run_here(tmp_path / wanted, f"trainer.capture={wanted}", "trainer.clip=1", "trainer.device=cpu")
        finals[wanted] = state(tmp_path / wanted)["learner"], result
    for wanted in ("false", "true"):
        assert finals[wanted][1] == finals["auto"][1]
        for name, value in finals["auto"][0].items():
            assert torch.equal(value, finals[wanted][0][name])


def test_what_is_not_recorded_is_said(learner_of):
    assert outer_step("auto", learner_of())[1] == []
    assert outer_step(False, learner_of())[1] == []
    said = outer_step(True, learner_of())[1]
    if torch.cuda.is_available():
        assert said == []
    else:
        assert "nothing is recorded without a CUDA device" in said[0]


OBSTACLES = [
    (["learner=imaml", "adjoint=implicit"], "residuals"),
    (["learner=imaml"], "learner.tol"),
    (["adjoint=higher"], "higher"),
]


@pytest.mark.parametrize(("overrides", "words"), OBSTACLES)
def test_what_cannot_be_recorded_is_refused(learner_of, overrides, words):
    with pytest.raises(UserError, match=rf"{words}.*trainer\.capture=false"):
        outer_step(True, learner_of(*overrides))
    with pytest.raises(UserError, match=rf"{words}.*trainer\.compile=false"):
        outer_step(False, learner_of(*overrides), compile=True)


def test_a_step_that_changes_with_the_epoch_is_recorded_and_not_compiled(learner_of):
    learner = learner_of("learner=maml_plus_plus")
    outer_step(True, learner)
    with pytest.raises(UserError, match=r"epoch.*trainer\.compile=false"):
        outer_step(False, learner, compile=True)


IMAML = ["learner=imaml", "adjoint=implicit", "adjoint.iterations=5"]


@pytest.mark.parametrize("overrides", [[], ["adjoint=mixed_mode"], ["adjoint=truncated"], ["learner=reptile"], IMAML])
def test_nothing_is_against_the_plain_learners(learner_of, overrides):
    assert capture.obstacle(learner_of(*overrides)) is None


def test_bfloat16_is_another_gradient_near_the_float32_one_and_leaves_everything_float32(learner_of, config_of):
    """The factors of products keep 8 bits, 4e-3; the parameters, their gradients and the loss keep theirs."""
    gradients = {}
    for precision in Precision:
        learner = learner_of()
        source = build.build_source(config_of(), "train", tasks=3)
        step, _ = outer_step(False, learner, precision=precision)
        assert step(source.sample(0)).dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in learner.parameters())
        gradients[precision] = [p.grad for p in learner.parameters()]
    assert 1e-5 < difference(*(gradients[precision] for precision in reversed(Precision))) < 3e-2


def test_a_run_compiled_reaches_the_same_parameters(run_here, tmp_path, monkeypatch):
    """Pieces as they were traced, without the minutes of a compiler: to the last bit but for the order of sums."""
    monkeypatch.setattr(compiled, "Fused", partial(Fused, compiler=lambda piece, inputs: piece))
    for wanted in ("false", "true"):
        run_here(tmp_path / wanted, f"trainer.compile={wanted}", "trainer.device=cpu")
    plain, other = (state(tmp_path / wanted)["learner"] for wanted in ("false", "true"))
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def test_a_recording_that_fails_names_the_setting(learner_of, config_of, monkeypatch):
    class Fails(capture.CapturedStep):
        def __call__(self, episode):
            raise RuntimeError(message)

    monkeypatch.setattr(capture, "CapturedStep", Fails)
    step, _ = outer_step(True, learner_of())
    episode = build.build_source(config_of(), "train", tasks=2).sample(0)
    message = "the step cannot be recorded as a CUDA graph: it waits for the device"
    with pytest.raises(UserError, match=r"trainer\.capture=false"):
        step(episode)
    message = "after 5 inner steps the gradient of the inner problem is large"
    with pytest.raises(RuntimeError, match=r"^after 5 inner steps"):
        step(episode)


def test_a_wrong_value_is_refused(compose_config):
    with pytest.raises(UserError, match=r"trainer\.capture=maybe: needed is auto, true or false"):
        build.check(compose_config("trainer.capture=maybe"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a CUDA device")
@pytest.mark.parametrize(
    "overrides", [[], [*IMAML, "learner.adapt=[head]", "trainer.health_every=0"]], ids=["maml", "imaml"]
)
def test_on_a_gpu_the_recorded_steps_reach_the_same_parameters(run_here, tmp_path, overrides):
    """To rounding: cuBLAS may choose other kernels inside a graph."""
    for wanted in ("false", "true"):
        run_here(tmp_path / wanted, f"trainer.capture={wanted}", "trainer.device=cuda", *overrides)
    plain, recorded = (state(tmp_path / wanted)["learner"] for wanted in ("false", "true"))
    for name, value in plain.items():
        torch.testing.assert_close(recorded[name], value, rtol=1e-4, atol=1e-5)
