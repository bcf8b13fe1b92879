"""The operator's benchmark runs, checks before it measures, and keeps where its figures come from.

Of the benchmark on a GPU: the work that it gives its candidates, its check and its table; no figure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from theria.ops import sdpa
from theria.testing import difference

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench.py"


def test_a_small_run_keeps_its_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    small = ["--shape", "1,2,64,8", "--causal", "yes", "--orders", "jvp", "double backward", "--repeats", "1"]
    command = [sys.executable, str(SCRIPT), *small, "--out", str(out)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(out.read_text())
    assert [(r["order"], r["candidate"]) for r in result["rows"]] == [
        (order, candidate) for order in ("jvp", "double backward") for candidate in ("math", "custom")
    ]
    assert all(r["error"] < 1e-5 and r["median_s"] > 0 for r in result["rows"])
    assert result["machine"]["torch"]
    assert "double backward" in shown


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of the benchmark on a GPU, imported as the script imports them, with small inputs on the CPU."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(SCRIPT.parent)
    names = ("bench_peers", "bench_cases", "bench_gpu")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    peers, cases, run = (import_module(name) for name in names)
    custom = replace(peers.TRUTH, name="theria")
    monkeypatch.setattr(run, "make_inputs", lambda shape, dtype: peers.make_inputs((1, 2, 24, 8), dtype, "cpu"))
    monkeypatch.setattr(run, "timed", lambda work, milliseconds: (work(), 2.0, 1.0, 3.0)[1:])
    monkeypatch.setattr(run, "PeakMemory", lambda device: run_memory("cpu"))
    monkeypatch.setattr(run, "replays", lambda case, inputs: 1.5)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    run_memory = import_module("theria.testing.memory").PeakMemory
    return SimpleNamespace(peers=peers, cases=cases, run=run, custom=custom)


@pytest.mark.parametrize("causal", [False, True])
def test_every_candidate_does_the_same_work(gpu: SimpleNamespace, causal: bool) -> None:
    peers = gpu.peers
    inputs = peers.make_inputs((1, 2, 24, 8), torch.float64, "cpu")
    for order in peers.ORDERS:
        exact = peers.prepare(peers.TRUTH, order, inputs, causal)()
        for candidate in (peers.MATH, *((peers.EAGER,) if order == "double backward" else ())):
            results = peers.prepare(candidate, order, inputs, causal)()
            assert len(results) == len(exact)
            for x, y in zip(results, exact, strict=True):
                assert difference((x,), (y,)) < 1e-12


def test_a_wrong_result_is_an_error_and_no_figure(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(attend: Callable[..., torch.Tensor]) -> dict[str, Any]:
        candidate = replace(gpu.custom, attend=attend)
        monkeypatch.setattr(gpu.run, "THERIA", candidate)
        case = gpu.cases.Case("double backward", "double backward", candidate, (1, 2, 24, 8), torch.float32)
        return gpu.run.guarded(partial(gpu.run.measure, case), gpu.run.name_of(case))

    right = measured(partial(sdpa, backend="custom"))
    assert right["ms"] == 2.0
    assert right["error"] < 1e-6
    assert right["tflops"] == pytest.approx(17 * 2 * 2 * 24 * 24 * 8 / 2e-3 / 1e12)
    wrong = measured(lambda *x, **options: 1.001 * sdpa(*x, backend="custom", **options))
    assert "against float64" in wrong["failure"]
    assert "ms" not in wrong
    assert "theria: ArithmeticError" in gpu.run.table([right, wrong])


def test_running_out_of_memory_is_a_result(gpu: SimpleNamespace) -> None:
    def measure() -> dict[str, Any]:
        raise torch.cuda.OutOfMemoryError

    assert gpu.run.guarded(measure, {"section": "memory"}) == {"section": "memory", "failure": "out of memory"}


def test_every_row_has_a_name_of_its_own_and_a_floor(gpu: SimpleNamespace) -> None:
    names = [json.dumps({**name, "failure": None}) for name, _ in gpu.run.everything()]
    assert len(set(names)) == len(names)
    cases = [*gpu.cases.cases(), *gpu.cases.slow_to_start()]
    assert {case.order for case in cases} == set(gpu.peers.ORDERS)
    whole = next(case for case in cases if case.shape == (4, 16, 4096, 64) and case.section == "double backward")
    assert whole.floor_ms == pytest.approx(1e3 * 15 * 2 * 64 * 4096**2 * 64 / 672e12)
    small = next(case for case in cases if case.shape == (8192, 4, 16, 16))
    assert small.floor_ms == pytest.approx(1e3 * 11 * 8192 * 4 * 16 * 16 * 2 / 4.28e12)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, str(SCRIPT), "--gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("no CUDA device")
