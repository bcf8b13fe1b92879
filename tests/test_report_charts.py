"""The charts of scripts/report.py: round ticks, points where their values are, labels apart."""

from __future__ import annotations

import importlib
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def charts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("reporting.charts")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.913, 0.987, [0.9, 0.92, 0.94, 0.96, 0.98, 1.0]),
        (-3, 7, [-4, -2, 0, 2, 4, 6, 8]),
        (0, 2.4, [0, 0.5, 1, 1.5, 2, 2.5]),
        (5, 5, [4.4, 4.6, 4.8, 5, 5.2, 5.4, 5.6]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round_and_hold_the_data(charts: ModuleType, low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 10, 16, 60000])
def test_an_axis_that_counts_has_whole_ticks(charts: ModuleType, most: int) -> None:
    found = charts.ticks(0, most, 4, whole=True)
    assert all(tick == round(tick) for tick in found)
    assert found[-1] >= most
    assert 2 <= len(found) <= 6


def test_ticks_are_written_as_short_as_they_can_be(charts: ModuleType) -> None:
    texts = [charts.tick_text(value, 0.25) for value in (0, 0.25, 1000.5)]
    assert texts == ["0.00", "0.25", "1,000.50"]
    assert charts.tick_text(3000, 1000) == "3,000"
    assert charts.tick_text(0.975, 0.025, percent=True) == "97.5 %"
    assert charts.tick_text(2e-5, 1e-5) == "2e-05"
    assert charts.log_ticks(0.02, 30) == pytest.approx([0.01, 0.1, 1, 10, 100])


def test_a_point_is_where_its_value_is(charts: ModuleType) -> None:
    svg = charts.line_chart([charts.Line([(0, 0), (50, 1), (100, 5)], "a", 0)], x_label="step")
    width, height = charts.WIDTH - 14 - charts.LEFT, charts.HEIGHT - charts.BOTTOM - charts.TOP
    x = [float(value) for value in re.findall(r'class="hit" cx="([\d.]+)"', svg)]
    y = [float(value) for value in re.findall(r'class="hit" cx="[\d.]+" cy="([\d.]+)"', svg)]
    assert x == pytest.approx([charts.LEFT + share * width for share in (0, 0.5, 1)], abs=0.06)
    assert y == pytest.approx([charts.TOP + (1 - share) * height for share in (0, 0.2, 1)], abs=0.06)


def test_long_lines_are_averaged_not_cut(charts: ModuleType) -> None:
    points = [(float(i), float(i % 2)) for i in range(1000)]
    thin = charts.thinned(charts.Line(points, "a", 0, [0.5] * 1000))
    assert len(thin.points) == len(thin.half) == 200
    assert sum(y for _, y in thin.points) / 200 == pytest.approx(0.5)
    assert charts.line_chart([charts.Line([], "a", 0)], x_label="step") == ""


def test_labels_do_not_overlap(charts: ModuleType) -> None:
    lines = [charts.Line([(0, 1), (1, 1 + i / 1000)], f"run {i}", i) for i in range(8)]
    svg = charts.line_chart([*lines, charts.Line([(0, 0), (1, 5)], "far", 8)], x_label="step")
    heights = sorted(float(y) for y in re.findall(r'class="label c\d" x="[\d.]+" y="([\d.]+)"', svg))
    assert len(heights) == 9
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 11.9
    assert heights[-1] <= charts.HEIGHT
