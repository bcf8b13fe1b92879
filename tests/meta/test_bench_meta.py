"""The benchmark runs, gates on equal gradients, and writes what it shows."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_meta.py"


def test_quick_run_writes_its_rows(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--backend", "reference", "--out", str(out)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(out.read_text())
    rows = {row["adjoint"]: row for row in result["rows"]}
    assert {"unrolled", "mixed_mode", "first_order"} <= set(rows)
    assert all(name in shown for name in rows)
    assert rows["mixed_mode"]["difference"] < 1e-4 < rows["first_order"]["difference"]
    assert rows["mixed_mode"]["peak_mib"] < rows["unrolled"]["peak_mib"]
    assert result["machine"]["torch"]
