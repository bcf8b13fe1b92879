"""The comparison with other libraries, on what is installed here."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
EXACT = 1e-10  # closed forms in float64, condition 10 at most, after some hundred steps
TINY = ["ways=2", "queries=1", "tasks=2", "steps=1", "layers=1", "width=16"]

Here = Callable[[str], Path]


@pytest.fixture
def compare_peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("compare_peers")


@pytest.fixture
def environments(tmp_path: Path) -> Here:
    """(peer) -> a folder in which the peer's environment is the one of this test."""

    def make(peer: str) -> Path:
        python = tmp_path / "environments" / peer / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        return tmp_path / "environments"

    return make


def test_theria_is_exact_and_who_is_absent_is_said_to_be(compare_peers, tmp_path, capsys):
    out = tmp_path / "results.json"
    problems = ["--problems", "quadratic", "hyper_cleaning", "imaml", "neumann"]
    arguments = ["--environments", str(tmp_path), *problems, "--peers", "theria", "torchopt", "--repeats", "1"]
    compare_peers.main([*arguments, "--out", str(out)])
    results = json.loads(out.read_text())
    assert results["absent"] == {"torchopt": "not installed"}
    assert results["versions"]["theria"]["torch"].startswith("2.")
    rows = [row for row in results["rows"] if row["method"] in ("Unrolled", "Implicit(CG)", "Implicit(Neumann)")]
    ways = {(row["problem"], row["method"]) for row in rows}
    solved = ["quadratic", "hyper_cleaning", "imaml"]
    assert ways >= {(name, "Implicit(CG)") for name in solved} | {("neumann", "Implicit(Neumann)")}
    assert all(row["error"] < EXACT and row["seconds"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "| theria: Unrolled |" in printed
    assert "torchopt: not installed" in printed


@pytest.mark.skipif(find_spec("higher") is None, reason="higher is not installed")
def test_higher_gives_the_same_answers_through_the_same_road(compare_peers, environments):
    folder = str(environments("higher"))
    results = compare_peers.main(["--environments", folder, "--peers", "higher", "--problems", "maml", "ridge"])
    assert [(row["peer"], row["problem"]) for row in results["rows"]] == [("higher", "maml"), ("higher", "ridge")]
    assert all(row["error"] < EXACT for row in results["rows"])


@pytest.mark.skipif(find_spec("higher") is None, reason="higher is not installed")
def test_speed_is_measured_at_equal_gradients(compare_peers, environments, capsys):
    arguments = ["--environments", str(environments("higher")), "--peers", "theria", "higher", "--speed"]
    results = compare_peers.main([*arguments, "--repeats", "1", "--sizes", *TINY])
    assert [row["method"] for row in results["rows"]] == [
        *[name for name in compare_peers.SPEED if "theria" in name],
        "higher",
    ]
    assert all(row["difference"] < compare_peers.SAME and row["steps_per_second"] > 0 for row in results["rows"])
    assert "torchopt: not installed" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("torchopt") is not None, reason="torchopt is installed")
def test_a_library_that_cannot_be_imported_is_reported_with_its_reason(compare_peers, environments):
    folder = str(environments("torchopt"))
    results = compare_peers.main(["--environments", folder, "--peers", "torchopt", "--problems", "textbook"])
    assert results["rows"] == []
    assert "No module named 'torchopt'" in results["absent"]["torchopt"]


def test_an_error_is_relative_to_the_exact_answer(compare_peers):
    exact = np.array([3.0, 4.0])
    row = compare_peers.judged("a", {"problem": "p", "method": "m", "gradient": [3.0, 4.5]}, exact)
    assert row == {"peer": "a", "problem": "p", "method": "m", "error": 0.1}
    assert "error" not in compare_peers.judged("a", {"problem": "p", "method": "m", "failed": "no"}, exact)


def test_losses_that_are_not_the_problems_own_are_refused(compare_peers, monkeypatch, tmp_path):
    exchange = importlib.import_module("peers.exchange")
    inner, outer = exchange.LOSSES["ridge"]
    monkeypatch.setitem(exchange.LOSSES, "ridge", (inner, lambda *given: 1.001 * outer(*given)))
    with pytest.raises(ValueError, match=r"ridge: scripts/peers/losses\.py gives"):
        exchange.export("ridge", tmp_path / "ridge.npz")


def test_every_problem_can_be_sent(compare_peers, tmp_path):
    exchange = importlib.import_module("peers.exchange")
    for name in exchange.PROBLEMS:
        exchange.export(name, tmp_path / f"{name}.npz")
    assert len(os.listdir(tmp_path)) == len(exchange.PROBLEMS) == len(exchange.LOSSES)
