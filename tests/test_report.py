"""scripts/report.py: the page is sound HTML, loads nothing, says every run's numbers and survives what is missing."""

from __future__ import annotations

import importlib
import json
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
VOID = {"meta", "br", "img"}  # elements of the page that have no end
NASTY = "<script>alert('x')<\\script> \"&amp;"  # a backslash, since a folder's name has no slash

TRAIN = "python -m experiments.train"

Reporter = Callable[..., str]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("report")


@pytest.fixture
def made(report: ModuleType, tmp_path: Path) -> Reporter:
    """(run directories, further arguments) -> the page."""

    def make(*arguments: object) -> str:
        out = tmp_path / "made" / "page.html"
        assert report.main([*map(str, arguments), "--out", str(out)]) == 0
        return out.read_text()

    return make


def png() -> bytes:
    """One grey pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\x80")) + chunk(b"IEND", b"")
    )


def rows(accuracy: float, panels: bool = True, validation: bool = True) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(0, 101, 10):
        if validation and step % 50 == 0:
            found.append({"step": step, "val/accuracy": accuracy * step / 100, "val/accuracy_ci95": 0.01})
        row = {"step": step, "train/loss": 2 - step / 100, "gradient/norm": 1.5, "system/seconds": step * 6.0}
        row |= {"system/tasks_per_second": 40.0 + step, "system/peak_memory_mb": 512.0 + step}
        if panels and step % 50 == 0 and step:
            row |= {f"steps/{name}_loss_{i}": 1.6 - 0.3 * i for name in ("support", "query") for i in range(3)}
            row |= {"rates/head": 0.4 + step / 1000, "rates/body": 0.1, "inner/lr_mean": 0.2}
            row |= {"gradient/second_order": 0.3, "gradient/cosine": 0.97, "attention/entropy_layer0": 0.8}
            row |= {f"curvature/{name}": 3.0 for name in ("hvp_norm", "largest_eigenvalue", "along_gradient")}
        found.append(row)
    return found


def make_run(
    folder: Path,
    accuracy: float = 0.9731,
    *,
    seed: int = 0,
    command: str = "python -m experiments.train",
    **kinds: bool,
) -> Path:
    """The files of a run that ended well."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(accuracy, **kinds)))
    result = {"metric": "accuracy", "subset": "test", "axis": "inner steps", "step": 100, "seconds": 660.0}
    result |= {"mean": accuracy, "ci95": 0.0024, "episodes": 12345, "before": 0.2, "before_ci95": 0.01}
    result |= {"curve": [0.2, accuracy - 0.1, accuracy], "curve_ci95": [0.01, 0.003, 0.0024]}
    (folder / "results.json").write_text(json.dumps(result))
    task = {"name": "omniglot", "split": "vinyals", "ways": 20, "shots": 5}
    config = {"task": task, "seed": seed, "run_dir": str(folder)}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    part = {"command": command, "step": 0, "started": "2026-01-02", "commit": {"hash": "c0ffee" * 6, "dirty": True}}
    (folder / "run.json").write_text(json.dumps({"parts": [{**part, "machine": {"torch": "9.8.7", "gpu": None}}]}))
    (folder / "pictures" / "episode.png").write_bytes(png())
    return folder


class Page(HTMLParser):
    """Checks that elements end in the order in which they began; keeps the text, the elements and their attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.found)


def check(source: str) -> Page:
    """Balanced, and nothing in it is loaded from elsewhere or runs but the page's own script."""
    page = Page(source)
    for tag, attributes in page.found:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "a"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}={value}>"
            if name in ("src", "href", "xlink:href", "srcset", "data"):
                assert (value or "").startswith("data:image/png;base64,"), f"<{tag} {name}={value}>"
    assert not re.search(r"@import|url\(|https?:|fetch\(|XMLHttpRequest|\bimport\b", source)
    assert page.count("script") == 1
    return page


# ----------------------------------------------------------------------------------------------------------- the page
def test_one_run_has_every_panel_and_its_numbers(made: Reporter, tmp_path: Path) -> None:
    page = check(made(make_run(tmp_path / "mine")))
    for needed in ("97.31 % ± 0.24", "12,345", "20.00 % ± 1.00", "11.0", "0.60 GiB resident", "90", "mine"):
        assert needed in page.text, needed
    assert "omniglot (vinyals), 20-way 5-shot" in page.text
    assert "commit " + "c0ffee" * 6 + " with uncommitted changes" in page.text
    assert "python -m experiments.train" in page.text
    assert "torch 9.8.7" in page.text
    assert "not recorded" not in page.text
    assert page.count("svg") == 3 + 3 + 2 + 2 + 3 + 1 + 2
    assert page.count("img") == 1
    assert "mine, outer step 100: 97.31 % ± 1.00 %" in page.text  # what hovering over the curve shows


def test_several_runs_are_compared(made: Reporter, tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"run{i}", accuracy, seed=i) for i, accuracy in enumerate((0.91, 0.93, 0.95))]
    other = make_run(tmp_path / "other", 0.5)
    (other / "config.yaml").write_text("task: {name: digits, ways: 3, shots: 2}\nseed: 0\nname: [1, {a: b}]\n")
    page = check(made(*folders, other))
    for value in ("91.00 %", "93.00 %", "95.00 %", "50.00 %"):
        assert f"{value} ± 0.24" in page.text
    assert "93.00 % mean over 3 seeds of the same experiment (run0, run1, run2)" in page.text
    assert "standard deviation 2.00 %, from 91.00 % to 95.00 %" in page.text
    assert "task.ways" in page.text  # among what differs
    assert "run_dir" not in page.text.split("What differs")[1].split("Where each run comes from")[0]
    labels = [attributes["class"] for tag, attributes in page.found if "label" in (attributes.get("class") or "")]
    assert {label.split()[-1] for label in labels if label} == {"c0", "c1", "c2", "c3"}


def test_the_same_seed_twice_is_no_mean_over_seeds(made: Reporter, tmp_path: Path) -> None:
    page = check(made(make_run(tmp_path / "a"), make_run(tmp_path / "b")))
    assert "mean over" not in page.text


def test_an_evaluation_belongs_to_its_run(made: Reporter, tmp_path: Path) -> None:
    run, folder = make_run(tmp_path / "run"), tmp_path / "evaluation"
    folder.mkdir()
    record = {"checkpoint": str(run / "checkpoints/step_00000100.pt"), "step": 100, "metric": "accuracy"}
    record |= {"subset": "test", "mean": 0.9622, "ci95": 0.0007, "episodes": 50000, "curve": []}
    (folder / "evaluation_test_5w1s.json").write_text(json.dumps(record))
    (folder / "evaluation_test_5w5s.json").write_text(json.dumps(record | {"ways": 5, "shots": 5, "mean": 0.9911}))
    (folder / "evaluation_test_5w5s_2.json").write_text(
        json.dumps(record | {"ways": 5, "shots": 5, "mean": 0.5, "inner_steps": 7, "test_augment": 4, "seed": 12})
    )
    (folder / "evaluation_test_5w5s_distinct.json").write_text(
        json.dumps(record | {"ways": 5, "shots": 5, "mean": 0.9922, "distinct_characters": True})
    )
    page = check(made(folder, run))
    assert "evaluation of step 100: test, 5-way 5-shot, distinct characters99.22 % ± 0.07" in page.text
    assert (
        "evaluation of step 100: test, 5-way 5-shot, 7 inner steps, 4 copies of each task, seed 1250.00 %" in page.text
    )
    assert "96.22 % ± 0.07" in page.text
    assert "evaluation of step 100: test, 5-way 5-shot99.11 % ± 0.07" in page.text
    assert "evaluation of step 100: test" in page.text
    assert ">evaluation<" not in made(folder, run)  # no run of its own
    alone = check(made(folder))
    assert "96.22 % ± 0.07" in alone.text


def test_the_official_test_has_its_own_interval(made: Reporter, tmp_path: Path) -> None:
    run, folder = make_run(tmp_path / "run"), tmp_path / "evaluation"
    record = {"protocol": "one_shot", "error": 0.0125, "error_low": 0.0054, "error_high": 0.0288, "trials": 400}
    result = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(result | {"one_shot": record}))
    assert "1.25 % wrong (0.54 to 2.88)" in check(made(run)).text
    folder.mkdir()
    later = {**record, "error": 0.02, "checkpoint": str(run), "step": 90}
    (folder / "evaluation_one_shot.json").write_text(json.dumps(later))
    page = check(made(folder, run))
    assert "1.25 % wrong" in page.text
    assert (
        "evaluation of step 90: official within-alphabet one-shot test2.00 % wrong (0.54 to 2.88)400 answers"
        in page.text
    )


def test_errors_are_no_percentages(made: Reporter, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    record = {
        "metric": "mse",
        "mean": 0.3942,
        "ci95": 0.031,
        "episodes": 600,
        "curve": [3.0, 0.4],
        "axis": "inner steps",
    }
    (run / "results.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text('{"step": 1, "val/mse": 0.41, "val/mse_ci95": 0.02}\n')
    page = check(made(run))
    assert "0.3942 ± 0.031" in page.text
    assert "Validation mse" in page.text


# ------------------------------------------------------------------------------------------- what is missing or damaged
def test_a_run_without_validation_and_panels_has_gaps(made: Reporter, tmp_path: Path) -> None:
    run = make_run(tmp_path / "bare", panels=False, validation=False)
    for name in ("results.json", "run.json", "config.yaml", "pictures/episode.png"):
        (run / name).unlink()
    page = check(made(run))
    assert "not recorded" in page.text.split("Comparison")[1].split("Accuracy")[0]
    needs = "it needs trainer.health_every above 0 and a step that it and trainer.log_every divide, and"
    assert page.text.count(needs) == 4
    assert "trainer.pictures=true" in page.text
    assert "command and commit: not recorded" in page.text
    beside = check(made(run, make_run(tmp_path / "whole")))
    assert "not recorded for bare: it needs trainer.val_every above 0" in beside.text


def test_a_killed_run_shows_what_it_had(made: Reporter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "killed")
    (run / "results.json").unlink()
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines + '{"step": 110, "train/lo')
    page = check(made(run))
    assert "not finishedvalidation 97.31 % ± 1.00" in page.text
    assert "metrics.jsonl: its last line is cut short" in page.text
    assert "its last line is cut short" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("results.json", b"{", "results.json is damaged"),
        ("results.json", b"[]", "results.json is damaged: needed is a JSON object"),
        ("run.json", b"\xff\xfe", "run.json cannot be read (UnicodeDecodeError"),
        ("config.yaml", b"a: [", "config.yaml is damaged"),
        ("pictures/episode.png", b"GIF", "episode.png: damaged, no PNG"),
        ("metrics.jsonl", b'[1]\n{"step": 1, "train/loss": 1}\n{}\n', "2 of 3 lines are no metrics"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_shown(
    made: Reporter, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(content)
    page = check(made(run))
    assert said in page.text
    assert ("97.31 % ± 0.24" in page.text) == (name != "results.json")


def test_values_of_other_types_do_not_stop_it(made: Reporter, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    odd = {
        "metric": 3,
        "mean": "high",
        "ci95": None,
        "episodes": [],
        "curve": [None, "x", 0.5],
        "command": 7,
        "machine": 1,
    }
    (run / "results.json").write_text(json.dumps(odd))
    (run / "run.json").write_text('{"parts": [1, {"commit": "x", "machine": 3, "command": null}]}')
    (run / "config.yaml").write_text("task: 4\nseed: [1]\n")
    lines = [
        '{"step": 1, "train/loss": null, "val/accuracy": "x", "rates/a": true}',
        '{"step": 1e999}',
        '{"step": null}',
    ]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 2, "train/loss": NaN}']))
    check(made(run))


def test_names_with_special_characters_stay_text(made: Reporter, tmp_path: Path) -> None:
    run = make_run(tmp_path / NASTY, command=f"python -m experiments.train name={NASTY}")
    (run / "pictures" / '"><img src=x onerror=alert(1)>.png').write_bytes(png())
    config = {"task": {"name": NASTY, "ways": NASTY, "shots": 1}, "seed": NASTY, NASTY: NASTY}
    (run / "config.yaml").write_text(json.dumps(config))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 100, f"rates/{NASTY}": 1.0, f"attention/entropy_layer{NASTY}": 1.0}) + "\n")
    page = check(made(run, make_run(tmp_path / "other"), "--title", NASTY))
    assert page.text.count(NASTY) > 8
    assert page.count("img") == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder; needed is the directory of a run"),
        (["empty"], "empty: holds no metrics.jsonl, results.json or evaluation_*.json that can be read"),
        (["run", "--labels", "a", "b"], "--labels has 2 names for 1 run directories"),
        (["run", "--out", "run"], "run: Is a directory; needed is a file that can be written"),
    ],
)
def test_mistakes_are_explained(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"))
    Path("empty").mkdir()
    assert report.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_it_needs_python_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    command = [sys.executable, "-S", str(SCRIPTS / "report.py"), str(run), "--out", "page.html", "--labels", "mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"page\.html: 1 run, \d+ KiB\n", done.stdout)
    assert "config.yaml was not read: needed is PyYAML" in done.stderr
    assert "97.31 % ± 0.24" in check((tmp_path / "page.html").read_text()).text


@pytest.mark.parametrize("program", ["bilevel", "deq"])
def test_a_run_of_another_program_is_said_to_be_one(report, tmp_path, capsys, program):
    (tmp_path / "results.json").write_text(json.dumps({"command": f"python -m experiments.{program} experiment=x"}))
    assert report.main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    assert f"is a run of experiments.{program}, and the page shows runs" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
