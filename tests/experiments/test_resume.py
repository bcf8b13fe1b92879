"""Long runs: checkpoints by the clock, damaged ones, other machines, settings that are younger than the checkpoint."""

import json
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from experiments import build, checkpoint, resume, store, tracking, trainer
from experiments.config import TrainerConfig
from experiments.errors import UserError

SLOW = ("trainer.val_every=0", "trainer.health_every=0", "trainer.schedule=constant")


def final(run_dir: Path) -> dict:
    return checkpoint.load(checkpoint.saved(run_dir)[-1])


def steps_of(run_dir: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.saved(run_dir)]


def assert_same_parameters(one: Path, other: Path) -> None:
    a, b = final(one), final(other)
    assert a["step"] == b["step"]
    assert a["learner"].keys() == b["learner"].keys()
    for key, value in a["learner"].items():
        assert torch.equal(b["learner"][key], value), key


# ----------------------------------------------------------------------------------------------------- by the clock


@pytest.fixture
def written(monkeypatch) -> list[int]:
    """The steps of all checkpoints that are written."""
    steps: list[int] = []
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda where, state, keep=None: (steps.append(state["step"]), save(where, state, keep))[1]
    )
    return steps


def test_the_clock_asks_for_checkpoints_too(run_here, tmp_path, monkeypatch, written):
    """A step takes a minute of a clock that the test turns; a checkpoint is wanted every two minutes."""
    now, real = [1e6], time.sleep
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda _: (now.__setitem__(0, now[0] + 60), real(0))[1])
    run_here(tmp_path, *SLOW, "trainer.checkpoint_every=1000", "trainer.checkpoint_minutes=2", "trainer.steps=7")
    assert written == [0, 2, 4, 6, 7]  # the first, by the clock, the last
    assert steps_of(tmp_path) == [6, 7]


def test_checkpoints_by_steps_begin_the_clock_anew(run_here, tmp_path, monkeypatch, written):
    now, real = [1e6], time.sleep
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda _: (now.__setitem__(0, now[0] + 60), real(0))[1])
    run_here(tmp_path, *SLOW, "trainer.checkpoint_every=3", "trainer.checkpoint_minutes=2", "trainer.steps=6")
    assert written == [0, 2, 3, 5, 6, 6]  # the last one is written whatever was written before


def test_without_the_setting_steps_alone_decide(run_here, tmp_path, monkeypatch, written):
    now = [1e6]
    monkeypatch.setattr(time, "monotonic", lambda: (now.__setitem__(0, now[0] + 1000), now[0])[1])
    run_here(tmp_path, *SLOW, "trainer.checkpoint_every=4", "trainer.checkpoint_minutes=null", "trainer.steps=6")
    assert written == [0, 4, 6]


def test_several_processes_decide_together(run_here, tmp_path, monkeypatch, written):
    """The clock of another process says that it is time: `most` is what they agree on."""
    from theria.meta.distributed import Processes

    own = Processes.most
    # the second number is the time since the last checkpoint; elsewhere an hour has gone by
    monkeypatch.setattr(Processes, "most", lambda self, values: own(self, [values[0], *(3600 for _ in values[1:])]))
    run_here(tmp_path, *SLOW, "trainer.checkpoint_every=1000", "trainer.checkpoint_minutes=30", "trainer.steps=3")
    assert written == [0, 1, 2, 3, 3]


def test_every_nth_is_kept_for_good(run_here, tmp_path):
    run_here(tmp_path, *SLOW, "trainer.checkpoint_every=1", "trainer.keep=2", "trainer.steps=7")
    assert steps_of(tmp_path) == [2, 4, 6, 7]
    with pytest.raises(UserError, match=r"trainer\.keep=3: needed is a multiple of trainer\.checkpoint_every=2"):
        run_here(tmp_path / "other", "trainer.checkpoint_every=2", "trainer.keep=3")


def test_memory_is_the_peak_of_all_parts_of_a_run(run_here, tmp_path, monkeypatch):
    """The first part takes 900 MiB of a device and the second one 300, of more of the machine's own memory."""
    whole, device = "system/peak_memory_mb", "system/peak_cuda_memory_mb"
    monkeypatch.setattr(trainer, "peak_memory", lambda _: {whole: 100.0, device: 900.0})
    run_here(tmp_path, *SLOW, "trainer.steps=2")
    monkeypatch.setattr(trainer, "peak_memory", lambda _: {whole: 200.0, device: 300.0})
    run_here(tmp_path, *SLOW, "trainer.steps=4", "trainer.resume=true")
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["peak_memory_mb"], results["peak_cuda_memory_mb"]) == (200, 900)
    older = torch.load(checkpoint.saved(tmp_path)[-1], weights_only=True)
    del older["peaks"]  # as those written before it was kept
    torch.save(older, checkpoint.saved(tmp_path)[-1])
    run_here(tmp_path, *SLOW, "trainer.steps=4", "trainer.resume=true")
    assert json.loads((tmp_path / "results.json").read_text())["peak_cuda_memory_mb"] == 300


# ---------------------------------------------------------------------------------------------------------- damaged


def flipped(whole: bytes) -> bytes:
    """One bit of a weight: in the middle of the largest member of the archive."""
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        start = whole.index(archive.read(largest), largest.header_offset)
    place = start + largest.file_size // 2
    return whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :]


DAMAGE = {"flipped": flipped, "cut": lambda whole: whole[: len(whole) * 2 // 3], "empty": lambda _: b""}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_here, tmp_path, capsys, damage):
    run_here(tmp_path / "whole")
    run_here(tmp_path / "parts")
    path = checkpoint.saved(tmp_path / "parts")[-1]
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    capsys.readouterr()
    run_here(tmp_path / "parts", "trainer.resume=true")
    said = capsys.readouterr()
    (line,) = (line for line in said.err.splitlines() if "step_0000" in line)
    assert f"{path} is damaged" in line
    assert line.endswith("trying the checkpoint before it, step_00000004.pt")
    assert "step_00000004.pt at step 4" in said.out
    assert_same_parameters(tmp_path / "whole", tmp_path / "parts")
    rows = [row["step"] for row in tracking.read(tmp_path / "parts/metrics.jsonl") if "train/loss" in row]
    assert rows == [1, 2, 3, 4, 5, 6]  # none twice


@pytest.mark.parametrize("damage", DAMAGE)
def test_when_both_are_damaged_the_run_stops_and_says_why_of_each(run_here, tmp_path, capsys, damage):
    run_here(tmp_path)
    for path in checkpoint.saved(tmp_path):
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    kept = {path: path.read_bytes() for path in checkpoint.saved(tmp_path)}
    with pytest.raises(UserError) as caught:
        run_here(tmp_path, "trainer.resume=true")
    message = str(caught.value)
    assert "can be read" in message
    assert all(f"{path} is damaged" in message for path in kept)
    assert "begin anew in another run_dir" in message
    assert capsys.readouterr().err.count("trying the checkpoint before it") == 1  # before the first there is none
    assert {path: path.read_bytes() for path in checkpoint.saved(tmp_path)} == kept  # nothing was overwritten


def test_after_a_fallback_there_are_two_good_ones_again(tmp_path):
    """A damaged one of a later step is not counted among the last two until the run has passed it."""
    for step in (4, 6):
        checkpoint.save(tmp_path, {"step": step})
    checkpoint.saved(tmp_path)[-1].write_bytes(b"")
    checkpoint.save(tmp_path, {"step": 5})
    assert steps_of(tmp_path) == [4, 5, 6]
    found = checkpoint.newest(tmp_path, lambda _: None)
    assert found is not None
    assert found[1]["step"] == 5
    checkpoint.save(tmp_path, {"step": 7})
    checkpoint.save(tmp_path, {"step": 8})
    assert steps_of(tmp_path) == [7, 8]


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    checkpoint.save(tmp_path, {"step": 1})
    left = checkpoint.directory(tmp_path) / ".step_00000002.pt.12345"
    left.write_bytes(b"half")
    checkpoint.save(tmp_path, {"step": 3})
    assert not left.exists()
    assert steps_of(tmp_path) == [1, 3]


def test_a_step_of_nine_digits_is_later_than_one_of_eight(tmp_path):
    for step in (99_999_999, 100_000_000):
        checkpoint.save(tmp_path, {"step": step})
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 100_000_000


# -------------------------------------------------------------------------------------------------- other machines


def as_written_on_cuda(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrite a checkpoint as a machine with two GPUs would have written it: every tensor's place is cuda:0, and there
    is a state of each GPU's generator."""
    state = torch.load(path, weights_only=True)
    state["rng"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 2
    state["config"]["trainer"]["device"] = "cuda"
    state["config"]["ops"]["backend"] = "triton"
    with monkeypatch.context() as patch:
        registry = [(0, lambda _: "cuda:0", lambda *_: None), *torch.serialization._package_registry]
        patch.setattr(torch.serialization, "_package_registry", registry)
        torch.save(state, path)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)  # it is what it should be


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is needed")
def test_a_checkpoint_of_a_gpu_goes_on_without_one(run_here, tmp_path, monkeypatch):
    run_here(tmp_path / "whole", *SLOW)
    run_here(tmp_path / "parts", *SLOW, "trainer.steps=4")
    for path in checkpoint.saved(tmp_path / "parts"):
        as_written_on_cuda(path, monkeypatch)
    moved = tmp_path / "another" / "machine"
    moved.parent.mkdir()
    (tmp_path / "parts").rename(moved)
    run_here(moved, *SLOW, "trainer.device=cpu", "ops.backend=auto", "trainer.resume=true")
    assert_same_parameters(tmp_path / "whole", moved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_moves_between_devices(run_here, tmp_path, first, second):
    ema = "trainer.ema=0.9"
    run_here(tmp_path / "whole", *SLOW, ema, "trainer.device=cpu")
    run_here(tmp_path / "parts", *SLOW, ema, "trainer.steps=4", f"trainer.device={first}")
    run_here(tmp_path / "parts", *SLOW, ema, f"trainer.device={second}", "trainer.resume=true")
    one, other = final(tmp_path / "whole"), final(tmp_path / "parts")
    for key, value in one["learner"].items():
        torch.testing.assert_close(other["learner"][key], value, rtol=1e-3, atol=1e-5)  # Adam's first steps, tf32 off


@pytest.mark.parametrize("here", [0, 1, 3])
def test_generators_of_gpus_that_are_not_here_are_left_out(monkeypatch, here):
    state = checkpoint.rng_state()
    state["cuda"] = [torch.full((16,), value, dtype=torch.uint8) for value in (1, 2)]
    restored: dict[int, int] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: restored.update({device: int(value[0])}))
    checkpoint.restore_rng(state)
    assert restored == dict(zip(range(here), (1, 2), strict=False))


# --------------------------------------------------------------------------------------------------------- settings


def without(values: dict, *keys: str) -> dict:
    """A checkpoint's settings as a version wrote them that did not have these."""
    copy = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for key in keys:
        *groups, name = key.split(".")
        group = copy
        for part in groups:
            group = group[part]
        del group[name]
    return copy


@pytest.mark.parametrize("keys", [["trainer.ema"], ["trainer.ema", "task.tasks", "model.name"], ["debug"]])
def test_a_setting_younger_than_the_checkpoint_had_its_default(compose_config, keys):
    config = compose_config("task=sinusoid", "model=mlp", "learner=maml")
    before = without(store.container(config), *(key for key in keys if key != "model.name"))
    resume.check_same(config, before, Path("step.pt"))


def test_a_setting_younger_than_the_checkpoint_is_refused_when_it_changes_something(compose_config):
    config = compose_config("task=sinusoid", "model=mlp", "learner=maml", "trainer.ema=0.99", "task.tasks=7")
    before = without(store.container(config), "trainer.ema", "task.tasks")
    with pytest.raises(UserError) as caught:
        resume.check_same(config, before, Path("step.pt"))
    assert "trainer.ema: None in the checkpoint, 0.99 now" in str(caught.value)
    assert "task.tasks: 4 in the checkpoint, 7 now" in str(caught.value)


def test_a_setting_that_is_no_more_is_named(compose_config):
    config = compose_config("task=sinusoid", "model=mlp", "learner=maml")
    before = store.container(config)
    before["trainer"]["momentum"] = 0.5
    with pytest.raises(UserError, match=r"trainer\.momentum: 0\.5 in the checkpoint, absent now"):
        resume.check_same(config, before, Path("step.pt"))


def test_a_checkpoint_of_an_older_version_goes_on(run_here, tmp_path):
    """End to end: no average in it, and none of the settings that this version added."""
    run_here(tmp_path / "whole", *SLOW)
    run_here(tmp_path / "parts", *SLOW, "trainer.steps=4")
    for path in checkpoint.saved(tmp_path / "parts"):
        state = torch.load(path, weights_only=True)
        del state["average"]
        state["config"] = without(
            state["config"], "trainer.ema", "trainer.keep", "trainer.checkpoint_minutes", "trainer.capture"
        )
        torch.save(state, path)
    run_here(tmp_path / "parts", *SLOW, "trainer.resume=true")
    assert_same_parameters(tmp_path / "whole", tmp_path / "parts")


def test_the_device_and_what_fits_it_may_change_and_nothing_else_did(compose_config):
    config = compose_config("task=sinusoid", "model=mlp", "learner=maml")
    before = store.container(config)
    before["trainer"] |= {"device": "cuda:1", "checkpoint_minutes": 3.0, "keep": 200}
    before["ops"]["backend"], before["learner"]["chunk_size"] = "triton", 2
    resume.check_same(config, before, Path("step.pt"))
    before["ops"]["matmul_precision"] = "high"
    with pytest.raises(UserError, match=r"ops\.matmul_precision"):
        resume.check_same(config, before, Path("step.pt"))


def test_every_setting_that_may_change_exists():
    """A name that was mistyped here would be refused for ever without anyone seeing why."""
    known = {f"trainer.{field.name}" for field in fields(TrainerConfig)}
    assert {key for key in resume.FREE if key.startswith("trainer.")} <= known


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("trainer.checkpoint_minutes=-1", "at least 0"),
        ("trainer.checkpoint_minutes=nan", "at least 0"),
        ("trainer.keep=0", "at least 1"),
    ],
)
def test_values_outside_their_range_are_refused(compose_config, tiny, override, needed):
    with pytest.raises(UserError, match=needed):
        build.check(compose_config(*tiny, override))
