"""Write the figures of docs/benchmarks/{host,operator}_h200.json into the tables of its README.md.

    python scripts/gpu_tables.py [--check]

A row is found by its first cells (shape, causal or dtype); its other cells are replaced. With --check nothing is
written, and the exit status says whether something would be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
Row = dict[str, Any]
HOST = {  # how a row of the host's table is called, and how its figures begin in the data
    "theria": "",
    "`F.scaled_dot_product_attention`": "pytorch_",
    "a `Function` that does nothing": "nothing_",
}


class Figures:
    """The rows of the benchmark, and cells made of them."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def find(self, section: str, **wanted: Any) -> Row:
        """The row with these values; an empty one where there is none."""
        found = (r for r in self.rows if r["section"] == section and all(r.get(k) == v for k, v in wanted.items()))
        return next(found, {})

    def of(self, section: str, candidate: str, shape: list[int], causal: bool = False, dtype: str = "bfloat16") -> Row:
        return self.find(section, candidate=candidate, shape=shape, causal=causal, dtype=dtype)

    def double_backward(self, shape: list[int], causal: bool) -> list[str]:
        own = self.of("double backward", "theria", shape, causal)
        others = (self.of("double backward", name, shape, causal) for name in ("compiled", "closed form", "math"))
        memory = f"{own['extra_bytes'] / 2**20:.0f} MiB"
        return [f"{own['floor_ms']:.2f}", rated(own), errors(own), memory, *map(rated, others)]

    def short(self, shape: list[int], dtype: str) -> list[str]:
        dtype = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
        own = self.of("short", "theria", shape, dtype=dtype)
        others = (self.of("short", name, shape, dtype=dtype) for name in ("compiled", "closed form", "math"))
        return [f"{own['floor_ms']:.3f}", time(own, "graph_ms"), time(own), *(time(x, "graph_ms") for x in others)]

    def forward_over_reverse(self, shape: list[int], causal: bool) -> list[str]:
        own = self.of("forward over reverse", "theria", shape, causal)
        jvp, flash = (self.of("jvp", name, shape, causal) for name in ("theria", "jvp_flash_attention"))
        return [rated(own), f"{own['of_double_backward']:.2f}", rated(jvp), rated(flash), ratio(flash, jvp, 1)]

    def first_order(self, shape: list[int], causal: bool) -> list[str]:
        names = ("theria", "flash", "cudnn")
        return [rated(self.of(section, name, shape, causal)) for section in ("forward", "vjp") for name in names]


def time(row: Row, key: str = "ms") -> str:
    """Milliseconds, or why there are none."""
    if "failure" in row:
        return row["failure"] if len(row["failure"]) < 16 else "failed"
    if key not in row:
        return ""
    ms = row[key]
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def rated(row: Row) -> str:
    return f"{time(row)} ({row['tflops']:.0f})" if "tflops" in row else time(row)


def ratio(a: Row, b: Row, digits: int) -> str:
    return f"{a['ms'] / b['ms']:.{digits}f}" if "ms" in a and "ms" in b else ""


def errors(row: Row) -> str:
    """theria's and the math path's."""
    return "; ".join(f"{row[key]:.1e}" for key in ("error", "math_error") if row.get(key) is not None)


def cells_of(heading: str, cells: list[str], figures: Figures) -> list[str] | None:
    """The cells of a row of the table under a heading; None for a row that is not made of the data."""
    by_shape: dict[str, Callable[..., list[str]]] = {
        "The whole double backward": figures.double_backward,
        "Short sequences": figures.short,
        "Forward over reverse, and output with tangent": figures.forward_over_reverse,
        "First order, beside PyTorch's kernels": figures.first_order,
    }
    if not cells[0][:1].isdigit() and cells[0] not in ("math", *HOST):
        return None
    if make := by_shape.get(heading):
        shape = [int(x) for x in cells[0].split(",")]
        return [*cells[:2], *make(shape, cells[1] if heading == "Short sequences" else cells[1] == "yes")]
    if heading == "float32":
        row = figures.of("float32", cells[0], [4, 16, 4096, 64], dtype="float32")
        return [cells[0], rated(row), f"{row['error']:.1e}"]
    if heading == "Memory":
        row = figures.find("memory", rows=int(cells[0].replace(",", "")))
        return [cells[0], f"{row['of_outputs']:.2f}", f"{row['whole_bytes'] / 1e9:.2f} GB"]
    if heading == "Repeatability and the host":
        row, whose = figures.find("host"), HOST[cells[0]]
        ways = ("forward", "backward", "chained_forward", "chained_backward")
        return [cells[0], *(f"{row[f'{whose}{way}_us']:.0f}" for way in ways)]
    return None


def written(text: str, figures: Figures) -> str:
    """The page with the figures; only the section "On a GPU" is touched."""
    lines, heading, inside = [], "", False
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
            inside = heading == "On a GPU" if line.startswith("## ") else inside
        elif inside and line.startswith("| "):
            cells = cells_of(heading, [cell.strip() for cell in line.strip("|").split("|")], figures)
            line = line if cells is None else f"| {' | '.join(cells)} |".replace("|  |", "| |")
        lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> None:
    page = BENCHMARKS / "README.md"
    old = page.read_text()
    # A row of the host is taken from its own file: it is measured where nothing else runs.
    rows = [
        row
        for name in ("host", "operator")
        for row in json.loads((BENCHMARKS / f"{name}_h200.json").read_text())["rows"]
        if row.get("failure") != "out of time"
    ]
    new = written(old, Figures(rows))
    if "--check" in sys.argv[1:]:
        sys.exit(new != old)
    page.write_text(new)


if __name__ == "__main__":
    main()
