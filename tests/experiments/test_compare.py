"""The comparison of an outer step: the same work for all, no figure for a wrong gradient, a word on who is absent."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from experiments import compare, compare_row
from experiments.compare import environments  # pyright: ignore[reportAttributeAccessIssue]
from theria.testing import difference

TINY = ["--ways", "2", "--queries", "1", "--tasks", "2", "--steps", "2", "--layers", "1", "--width", "16"]
CPU = torch.device("cpu")
FLOAT64 = 1e-12  # two steps of a small network in float64, by other formulas and in another order
needs_higher = pytest.mark.skipif(find_spec("higher") is None, reason="higher is not installed")


def sizes(*more: str) -> dict[str, int]:
    return compare.parse([*TINY, *more]).sizes


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THERIA_CACHE", str(tmp_path_factory.getbasetemp() / "theria-cache"))
        return compare.given(sizes(), CPU)


def test_the_gradient_in_float64_is_the_one_of_torch_func(given):
    """Written by hand with torch.func and PyTorch's math attention, all tasks under one vmap."""
    from torch.func import functional_call, grad, vmap
    from torch.nn.functional import cross_entropy

    import theria.nn.attention

    model = compare_row.build(given["sizes"]).double()
    model.load_state_dict(given["model"])
    x, y, q, z = given["episode"]

    def query_loss(params, x, y, q, z):
        for _ in range(given["sizes"]["steps"]):
            grads = grad(lambda p: cross_entropy(functional_call(model, p, x), y))(params)
            params = {name: p - compare_row.speed.RATE * grads[name] for name, p in params.items()}
        return cross_entropy(functional_call(model, params, q), z)

    params = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theria.nn.attention, "sdpa", compare_row.speed.math_attention)
        found = grad(lambda p: vmap(query_loss, (None, 0, 0, 0, 0))(p, x.double(), y, q.double(), z).mean())(params)
    assert difference(list(found.values()), given["gradient"]) < FLOAT64


def test_seeds_decide_parameters_and_tasks(given):
    again, other = compare.given(sizes(), CPU), compare.given(sizes("--seed", "1"), CPU)
    for one, same, different in zip(given["episode"], again["episode"], other["episode"], strict=True):
        assert torch.equal(one, same)
        assert one.shape == different.shape
    assert not torch.equal(given["episode"][0], other["episode"][0])
    assert all(torch.equal(value, again["model"][name]) for name, value in given["model"].items())
    assert not torch.equal(given["model"]["head.weight"], other["model"]["head.weight"])


@pytest.mark.parametrize("adjoint", [name for name in compare_row.ADJOINTS if name != "Higher" or find_spec("higher")])
def test_each_exact_adjoint_is_measured_at_the_right_gradient(given, adjoint):
    row = compare_row.measure(f"theria {adjoint}", given, CPU, repeats=2)
    assert row["error"] < compare_row.SAME
    assert 0 < row["fastest_s"] <= row["wall_s"] <= row["slowest_s"]
    assert row["peak_mib"] is None or row["peak_mib"] >= 0


def test_a_wrong_gradient_gets_no_figure(given, monkeypatch):
    from theria import meta

    timed = []
    monkeypatch.setitem(compare_row.ADJOINTS, "Unrolled", meta.FirstOrder())  # what drops the second order
    monkeypatch.setattr(compare_row, "_timed", lambda *_: timed.append(1))
    with pytest.raises(ArithmeticError, match="off the one in float64"):
        compare_row.measure("theria Unrolled", given, CPU, repeats=1)
    assert not timed


@needs_higher
def test_the_program_measures_and_says_who_is_absent(tmp_path, capsys):
    out = tmp_path / "compare.json"
    methods = ["theria MixedMode", "higher", *(["torchopt"] if find_spec("torchopt") is None else [])]
    compare.main([*TINY, "--repeats", "1", "--out", str(out), "--methods", *methods])
    record = json.loads(out.read_text())
    assert [row["method"] for row in record["rows"]] == methods[:2]
    for row in record["rows"]:
        assert row["error"] < compare_row.SAME
        assert row["tasks_per_second"] == pytest.approx(2 * row["outer_steps_per_second"])
        assert row["outer_steps_per_second"] == pytest.approx(1 / row["cpu_s"])
        assert row["versions"]["torch"] == str(torch.__version__)
    assert record["rows"][1]["versions"]["higher"] == "0.2.1"
    assert record["sizes"]["width"] == 16
    assert {"torch", "python", "cpu", "theria", "load_before"} <= record["machine"].keys()
    assert set(record["absent"]) == set(methods[2:])
    printed = capsys.readouterr().out
    assert "| theria MixedMode |" in printed
    if record["absent"]:
        assert "torchopt: not installed: python -m experiments.compare --environments DIR --install" in printed


def test_a_library_that_fails_is_a_row_with_its_reason(tmp_path, monkeypatch, capsys):
    """An environment in which the library cannot be imported."""
    python = tmp_path / "torchopt" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'ImportError: no torchopt for this Python' >&2\nexit 1\n")
    python.chmod(0o755)
    result = compare.main([*TINY, "--environments", str(tmp_path), "--methods", "torchopt"])
    assert result["rows"] == [{"method": "torchopt", "failed": "ImportError: no torchopt for this Python"}]
    assert "| torchopt | no figure |" in capsys.readouterr().out


def test_when_theria_fails_so_does_the_program(monkeypatch, capsys):
    monkeypatch.setattr(compare, "run", lambda *_: {"failed": "its gradient is wrong"})
    with pytest.raises(SystemExit) as ended:
        compare.main([*TINY, "--methods", "theria Unrolled"])
    assert ended.value.code == 1
    assert "theria Unrolled: its gradient is wrong" in capsys.readouterr().out


def test_where_a_library_is_looked_for(tmp_path):
    own = tmp_path / "higher" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert compare.interpreter(tmp_path, "higher") == own
    assert compare.interpreter(None, "theria") == Path(sys.executable)
    assert compare.interpreter(tmp_path, "a_library_that_nobody_has") is None


def test_a_library_on_the_path_of_this_python_is_no_other_pythons(tmp_path, monkeypatch):
    (tmp_path / "a_library.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "python").symlink_to(sys.executable)
    program = ["-c", "import a_library; print('{}')"]
    assert environments.measured([sys.executable, *program], 60) == {}
    assert "No module named 'a_library'" in environments.measured([str(tmp_path / "python"), *program], 60)["failed"]


def test_the_large_shape_is_that_of_the_published_figures():
    """Those of scripts/bench_outer.py, beside which docs/benchmarks has the figures of a GPU."""
    assert compare.LARGE == {"ways": 20, "shots": 1, "queries": 5, "tasks": 16, "steps": 5} | {
        "layers": 4,
        "width": 128,
        "heads": 4,
    }
    model = compare_row.build({**compare.LARGE, "seed": 0})
    assert model.stem(torch.zeros(1, 1, 28, 28)).shape[-2:] == (16, 128)  # 16 patches of 7 x 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--install"], "--environments DIR"),
        (["--tasks", "0"], "at least 1"),
        (["--repeats", "0"], "at least 1"),
        (["--heads", "0"], "at least 1"),
        (["--width", "10", "--heads", "3"], "a multiple of heads"),
        (["--out", "nowhere/compare.json"], "there is no folder nowhere"),
        *([] if torch.cuda.is_available() else [(["--gpu"], "no CUDA device here")]),
    ],
)
def test_wrong_arguments_say_what_is_needed(capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        compare.parse(arguments)
    assert words in capsys.readouterr().err


def test_the_committed_figures_are_of_right_gradients():
    record = json.loads((compare.ROOT / "docs/benchmarks/compare_cpu.json").read_text())
    assert record["command"].startswith("python -m experiments.compare")
    assert {row["method"] for row in record["rows"]} == {*compare.THERIA, *compare.PEERS}
    assert all(row["error"] <= compare_row.SAME for row in record["rows"] if "failed" not in row)
    assert record["sizes"] == {**compare.SMALL, "seed": 0}
