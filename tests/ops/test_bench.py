"""The operator's benchmark runs, checks before it measures, and keeps where its figures come from."""

import json
import subprocess
import sys
from pathlib import Path

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
