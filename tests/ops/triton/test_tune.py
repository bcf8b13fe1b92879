"""The tuner's decisions, with figures in place of a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from theria.ops.triton.tile_table import TABLE
from theria.ops.triton.tiles import DTYPES, Key, Tile, is_short
from theria.testing.kernels import RULES, make_problem

SCRIPT = Path(__file__).parents[3] / "scripts" / "tune.py"
JVP = Key("jvp", 64, "half", False, 90)


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    specification = importlib.util.spec_from_file_location("tune", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "tune", module)
    specification.loader.exec_module(module)
    monkeypatch.setattr(
        module, "problem_for", lambda shape, kind, causal: make_problem(shape, DTYPES[kind], causal, "meta")
    )
    monkeypatch.setattr(module.torch.cuda, "synchronize", lambda: None)
    return module


def compiled(faults: tuple[str, ...] = (), stack: int = 0) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result([{"registers": 100, "stack": stack, "shared": 1024, "faults": list(faults)}])
    return future


def measured(
    tune: ModuleType, monkeypatch: pytest.MonkeyPatch, cases: list[tuple[float, Any, float]]
) -> dict[str, Any]:
    """The row from (milliseconds, compiled, inaccuracy) of each candidate."""
    tiles = [Tile(64, 64, 4, stages) for stages in range(1, len(cases) + 1)]
    times = iter([ms for ms, _, _ in cases if ms])
    monkeypatch.setattr(tune, "timed", lambda run, best: next(times))
    monkeypatch.setattr(tune, "inaccuracy", lambda key, tile: cases[tile.stages - 1][2])
    work = [(tile, future) for tile, (_, future, _) in zip(tiles, cases, strict=True)]
    return tune.measure(JVP, work, 60.0)


def test_the_fastest_that_is_right_and_spills_nothing_wins(tune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    too_large: Future[Any] = compiled(("needs 300000 bytes of shared memory, sm_90 has 232448",))
    spilling = compiled(("spills registers (8 bytes of stack)",), 8)
    heavy = compiled(("spills registers (999 bytes of stack)",), 999)
    broken: Future[Any] = Future()
    broken.set_exception(RuntimeError("does not compile"))
    cases = [(3.0, compiled(), 0.5), (1.0, spilling, 0.5), (2.0, compiled(), 1.5), (2.5, compiled(), 0.9)]
    cases += [(0.0, too_large, 0.0), (0.0, heavy, 0.0), (0.0, broken, 0.0)]
    row = measured(tune, monkeypatch, cases)
    assert row["best"]["ms"] == 2.5
    assert [c.get("ms") for c in row["candidates"]] == [3.0, 1.0, 2.0, 2.5, None, None, None]
    assert row["candidates"][6]["error"] == "RuntimeError: does not compile"
    assert "faster but spills registers" in tune.line(row)
    assert json.loads(json.dumps(row)) is not None


def test_no_entry_where_nothing_is_right(tune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    row = measured(tune, monkeypatch, [(1.0, compiled(), 2.0), (2.0, compiled(), float("inf"))])
    assert row["best"] is None
    assert tune.table([row]) == tune.table([])


def test_the_table_keeps_what_was_not_measured_again(
    tune: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = measured(tune, monkeypatch, [(1.0, compiled(), 0.5)])
    tune.save(tmp_path, {"machines": [], "rows": [row]})
    scope: dict[str, Any] = {}
    exec((tmp_path / "tile_table.py").read_text(), scope)
    assert scope["TABLE"] == TABLE | {JVP: tuple(Tile(64, 64, 4, 1))}


def test_the_table_in_the_package_is_as_the_tuner_writes_it(tune: ModuleType) -> None:
    assert tune.table([]) == tune.TABLE_FILE.read_text()


def test_merging_takes_the_later_figures(tune: ModuleType, tmp_path: Path) -> None:
    for name, ms in (("a", 1.0), ("b", 2.0)):
        rows = [{"key": list(JVP), "best": {"ms": ms}}, {"key": [*JVP[:1], name], "best": None}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "tune.json").write_text(json.dumps({"machines": [{"gpu": "g"}], "rows": rows}))
    result = tune.load([tmp_path / "a", tmp_path / "b"])
    assert result["machines"] == [{"gpu": "g"}]
    assert [row["best"] for row in result["rows"]] == [{"ms": 2.0}, None, None]


def test_every_kernel_has_candidates_of_its_own(tune: ModuleType) -> None:
    everything = argparse.Namespace(
        kernels=list(RULES), widths=tune.WIDTHS, kinds=list(DTYPES), causal=[False, True], lengths=list(tune.SHORT_ROWS)
    )
    keys = list(tune.wanted(everything, 90))
    assert {key.kernel for key in keys} == set(RULES)
    assert len(set(keys)) == len(keys)
    for key in keys:
        tiles = tune.candidates(key)
        assert len(tiles) == len(set(tiles)) > 3
        assert all(tile.keys == key.keys for tile in tiles) or not is_short(key.kernel)
        assert "dkv" in key.kernel or key.keys > 64 or not any(tile.split for tile in tiles)


def test_accuracy_is_in_units_of_what_is_allowed(tune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 is ACCURACY errors of the formulas in the same dtype, and FLOOR roundings."""
    problem = make_problem((1, 2, 40, 40, 16, 16), torch.float32)
    monkeypatch.setattr(tune, "problem_for", lambda shape, kind, causal: problem)
    key = JVP._replace(width=16, kind="float")

    def off_by(error: float) -> float:
        exact = tune.truth("jvp", problem.map(torch.Tensor.double))
        monkeypatch.setattr(tune, "call", lambda kernel, problem: tuple(x * (1 + error) for x in exact))
        return tune.inaccuracy(key, Tile(16, 16, 1, 1))

    assert off_by(0.0) == 0.0
    assert off_by(1e-7) < 1.0
    assert off_by(1e-4) > 10.0
    assert off_by(float("nan")) == float("inf")
