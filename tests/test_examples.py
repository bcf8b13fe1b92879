"""The examples and the smoke test, run as a user runs them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from theria.ops import CAPABILITIES

ROOT = Path(__file__).resolve().parents[1]
DECODER = "examples/minimal_decoder_transformer.py"
CPU = ("--device", "cpu", "--backend")


def load(path: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run(path: str, *arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of a program's `main`; the start of an interpreter is tested once, below."""
    out, err = io.StringIO(), io.StringIO()
    state = torch.get_rng_state()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = load(path).main(*([list(arguments)] if arguments else []))
    torch.set_rng_state(state)
    return status or 0, out.getvalue(), err.getvalue()


def losses(*arguments: str) -> list[float]:
    status, out, err = run(DECODER, *arguments)
    assert status == 0, err
    found = re.findall(r"^step +(\d+)  loss ([\d.]+)$", out, re.MULTILINE)
    assert [int(step) for step, _ in found] == list(range(len(found)))
    return [float(loss) for _, loss in found]


@pytest.fixture(scope="module")
def reference() -> list[float]:
    return losses(*CPU, "reference", "--steps", "5")


def test_the_decoder_learns_its_batch_by_heart(reference: list[float]) -> None:
    assert len(reference) == 5
    assert reference == sorted(reference, reverse=True)


def test_backends_give_the_same_losses(reference: list[float]) -> None:
    # float32, 5 steps of an optimizer: rounding differences of 1e-7 grow, to far below the 1e-3 that a user compares
    assert losses(*CPU, "custom", "--steps", "5") == pytest.approx(reference, abs=1e-4)


def test_the_kernels_give_the_same_losses_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("this machine compiles the kernels: the test below")
    sizes = ("--n_layers", "1", "--seq_len", "16", "--batch_size", "2", "--steps", "10", "--seed", "42")
    expected = losses(*CPU, "reference", *sizes)
    assert losses(*CPU, "triton_full_fused", *sizes) == pytest.approx(expected, abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_default_and_the_reference_give_the_same_losses_on_a_gpu() -> None:
    commands = ((), ("--backend", "triton"), ("--backend", "custom"), ("--backend", "reference"))
    found = [losses(*command, "--steps", "10", "--seed", "42") for command in commands]
    assert found[1] == found[0]  # two names of one backend, bitwise repeatable
    assert found[0] == pytest.approx(found[3], abs=1e-3)
    assert found[2] == pytest.approx(found[3], abs=1e-3)


def test_the_seed_decides_weights_and_data(reference: list[float]) -> None:
    assert losses(*CPU, "reference", "--steps", "1") == reference[:1]
    assert losses(*CPU, "reference", "--steps", "1", "--seed", "1") != reference[:1]


def test_attention_learns_the_synthetic_task() -> None:
    sizes = ("--n_layers", "1", "--seq_len", "4", "--vocab_size", "8", "--batch_size", "32", "--d_ff", "64")
    found = losses(*CPU, "custom", "--steps", "100", "--lr", "1e-2", "--use-synthetic-task", *sizes)
    # without attention from the last token to the first, no better than log 4 = 1.386 on new batches
    assert sum(found[-10:]) / 10 < 0.3


def test_verbose_prints_shapes_and_gradient_norms() -> None:
    sizes = ("--d_model", "12", "--n_heads", "3", "--n_layers", "1", "--seq_len", "5", "--batch_size", "2")
    _, out, _ = run(DECODER, *CPU, "custom", "--steps", "2", "--verbose", *sizes)
    shapes = dict(re.findall(r"^  shape  (.+?)  +(\(.*\))$", out, re.MULTILINE))
    assert shapes == {
        "tokens": "(2, 5)",
        "embedded": "(2, 5, 12)",
        "q, k, v": "(2, 3, 5, 4)",
        "attention": "(2, 3, 5, 4)",
        "block": "(2, 5, 12)",
        "last token": "(2, 12)",
        "logits": "(2, 4)",
    }
    norms = re.findall(r"^  gradient norm  (\S+) +(\S+)$", out, re.MULTILINE)
    assert len(norms) == 2 * len({name for name, _ in norms}) == 2 * 18
    assert all(0 < float(norm) < 100 for _, norm in norms)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_the_default_says_what_to_do() -> None:
    command = [sys.executable, DECODER]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "--device cuda: this machine has 0 CUDA devices" in result.stderr
    assert "--backend reference --device cpu" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "--steps 0: must be at least 1."),
        (("--batch_size", "-3"), "--batch_size -3: must be at least 1."),
        (("--n_heads", "5"), "--d_model 64 is not divisible by --n_heads 5."),
        (("--d_model", "2048"), "head dim of 512; the fused backend takes at most 256"),
        (("--lr", "0"), "--lr 0.0: must be above 0."),
        (("--device", "abacus"), "--device abacus: not a device"),
        (("--device", "cpu"), "--backend triton_full_fused runs on CUDA, not on cpu."),
    ],
)
def test_limits_are_named(arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status, out, err = run(DECODER, *arguments)
    assert status == 1
    assert message in err
    assert out == ""


def test_what_the_example_does_not_check_the_operator_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    decoder = load(DECODER)
    monkeypatch.setattr(decoder, "check_limits", lambda options: torch.device("cpu"))
    assert decoder.main([]) == 1
    assert "backend 'triton' cannot compute this call" in capsys.readouterr().err


def test_the_limit_of_the_fused_backend_is_the_operators() -> None:
    assert CAPABILITIES["triton"].max_head_dim == load(DECODER).MAX_FUSED_HEAD_DIM


def test_a_wide_head_is_no_limit_elsewhere() -> None:
    assert len(losses(*CPU, "custom", "--steps", "1", "--d_model", "512", "--n_heads", "1", "--n_layers", "1")) == 1


def maml_errors(*arguments: str) -> list[float]:
    """Errors on new sinusoids after 0, 1 and 10 inner steps."""
    _, out, _ = run("examples/maml_sinusoid.py", *arguments)
    return [float(error) for error in re.findall(r"mean squared error ([\d.]+)", out)]


def test_maml_on_sinusoids_adapts() -> None:
    before, after_one, _ = maml_errors("--steps", "150")
    assert after_one < 0.95 * before


def test_the_exact_adjoints_of_maml_give_the_same_training_and_the_first_order_one_does_not() -> None:
    unrolled, mixed, first_order = (
        maml_errors("--steps", "5", "--adjoint", name) for name in ("unrolled", "mixed_mode", "first_order")
    )
    assert mixed == pytest.approx(unrolled, rel=1e-3)  # three printed digits
    assert first_order != unrolled


def test_second_order_attention_runs_and_its_modes_agree() -> None:
    _, out, _ = run("examples/second_order_attention.py")
    values = [float(value) for value in re.findall(r"v\.Hv = (\S+)", out)]
    assert len(values) == 3
    assert values[1:] == pytest.approx(values[:2], rel=1e-12)


def test_the_smoke_test_passes() -> None:
    status, out, _ = run("scripts/smoke_sdpa.py")
    assert status == 0, out
    assert "all available backends agree" in out
    assert out.count("  ok") >= 6


def test_the_smoke_test_notices_a_wrong_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke = load("scripts/smoke_sdpa.py")
    right = smoke.sdpa
    monkeypatch.setattr(smoke, "sdpa", lambda *x, **options: right(*x, **options | {"backend": "custom"}) * 1.001)
    assert smoke.main() == 1
    assert "FAILED: above" in capsys.readouterr().out
