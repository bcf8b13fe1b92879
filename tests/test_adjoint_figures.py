"""The figures that docs/choosing-an-adjoint.md takes from docs/benchmarks are those of the committed data."""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "choosing-an-adjoint.md").read_text()


def rows(name: str) -> list[dict[str, Any]]:
    return json.loads((DOCS / "benchmarks" / name).read_text())["rows"]


def test_memory_over_the_steps() -> None:
    peaks = {(row["adjoint"], row["steps"]): row["peak_mib"] for row in rows("outer_gradient_steps_cpu.json")}
    table = re.findall(r"^\| (\d+) \| ([\d.]+) MiB \| ([\d.]+) MiB \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    assert {int(steps) for steps, *_ in table} == {steps for _, steps in peaks}
    for steps, *shown in table:
        unrolled, mixed = peaks["unrolled", int(steps)], peaks["mixed_mode", int(steps)]
        assert shown == [f"{unrolled:#.3g}".rstrip("."), f"{mixed:#.3g}".rstrip("."), f"{mixed / unrolled:.2f}"]


def test_times_and_the_error_of_first_order() -> None:
    by_name = {row["adjoint"]: row for row in rows("outer_gradient_cpu.json")}
    times = [f"{by_name[name]['median_s']:.2f} s" for name in ("unrolled", "mixed_mode", "first_order", "higher")]
    said = " ".join(TEXT.split())
    assert "took {} unrolled, {} mixed, {} first-order and {} by `higher`".format(*times) in said
    assert f"off by {100 * by_name['first_order']['difference']:.0f} %" in said
