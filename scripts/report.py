"""Make one self-contained HTML page of runs, from their files alone: no server, no network, no package but Python.

    python scripts/report.py RUN_DIR [RUN_DIR ...] --out report.html

A RUN_DIR is what a run or an evaluation wrote into (run_dir=...): metrics.jsonl, results.json or evaluation_*.json,
run.json, config.yaml, pictures/. What a run did not record is a gap on the page that says what records it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reporting.page import page
from reporting.runs import ReportError, read_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for what the caller can mend."""
    parser = argparse.ArgumentParser(description="One self-contained HTML page of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="the directory of a run or an evaluation")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="where the page goes")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="names of the runs; default: their directories'")
    parser.add_argument("--title", default="Runs of theria")
    options = parser.parse_args(arguments)
    try:
        runs = read_runs(options.runs, options.labels)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(runs, options.title), encoding="utf-8")
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; needed is a file that can be written", file=sys.stderr)
        return 2
    for run in runs:
        for note in run.notes:
            print(f"{run.label}: {note}", file=sys.stderr)
    size = options.out.stat().st_size / 1024
    print(f"{options.out}: {len(runs)} run{'s' * (len(runs) > 1)}, {size:,.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
