"""The code cites formulas of theria/ops/README.md by number: every number cited exists."""

import re
from pathlib import Path

import theria.ops

FOLDER = Path(theria.ops.__file__).parent


def test_every_cited_number_exists() -> None:
    known = {int(n) for n in re.findall(r"^\| \((\d+)\)", (FOLDER / "README.md").read_text(), re.M)}
    assert known == set(range(1, 26))
    for name in ("autograd", "reference", "blockwise", "sweep", "explicit", "seed_names"):
        cited = re.findall(r"(?<![\w.])\((\d+)\)(?:-\((\d+)\))?", (FOLDER / f"{name}.py").read_text())
        numbers = {int(n) for pair in cited for n in pair if n}
        assert numbers
        assert numbers <= known, name
