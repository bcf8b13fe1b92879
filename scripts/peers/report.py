"""The results as tables."""

from collections.abc import Sequence
from typing import Any

LIST = Sequence[dict[str, Any]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def problems(rows: LIST) -> str:
    """A line for each way of each library, a column for each problem: relative error, milliseconds of CPU time."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    ways = list(dict.fromkeys((row["peer"], row["method"]) for row in rows))
    found = {(row["peer"], row["method"], row["problem"]): row for row in rows}
    lines = [[f"{peer}: {way}", *(_cell(found.get((peer, way, name))) for name in names)] for peer, way in ways]
    return table(["error (ms)", *names], lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "failed" in row:
        return "raises"
    return f"{row['error']:.0e} ({1e3 * row['cpu_s']:.3g})"


def speed(rows: LIST) -> str:
    """Outer steps a second; the ratio is to the same figure of the fastest peer."""
    peers = [row["steps_per_second"] for row in rows if not row["method"].startswith("theria") and "failed" not in row]
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["method"], "raises", "", "", "", ""])
            continue
        rate = row["steps_per_second"]
        ratio = f"{rate / max(peers):.2f}" if peers else ""
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        figures = [f"{rate:.3f}", ratio, f"{row['median_s']:.2f}", memory, f"{row['difference']:.0e}"]
        lines.append([row["method"], *figures])
    head = ["", "outer steps a CPU second", "of the fastest peer's", "wall s a step", "peak MiB", "gradients differ by"]
    return table(head, lines)


def failures(rows: LIST, most: int = 160) -> str:
    """A line for each way that failed: where, and the beginning of its first message."""
    told: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "failed" in row:
            told.setdefault(f"{row['peer']}: {row['method']}", []).append(row)
    return "\n".join(
        f"{way} ({', '.join(row['problem'] for row in failed)}): {failed[0]['failed'][:most]}"
        for way, failed in told.items()
    )
