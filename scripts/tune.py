"""Measure the tiles of the fused kernels on this machine's GPU and write the table of the best.

    python scripts/tune.py --out results --minutes 8                       # every kernel, the most used widths first
    python scripts/tune.py --out results --kernels jvp hvp_dq --widths 64 128 --kinds half --write
    python scripts/tune.py --out results --merge results_a results_b --write   # no GPU: join what was measured

Candidates are compiled ahead in worker processes, which fill Triton's cache and say what spills or does not fit; the
rest is timed. The fastest that spills nothing and agrees with float64 becomes the entry. Every timing goes to
``tune.json`` in the folder as it is made (what is there already is not measured again), the table to ``tile_table.py``
beside it; ``--write`` puts it into the package.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from theria.ops.triton import tile_table
from theria.ops.triton.launch import launch
from theria.ops.triton.tiles import DTYPES, ROWS_ONLY, VARIANT, Key, Tile, covers, is_short, override
from theria.testing import difference
from theria.testing.kernels import RULES, Problem, call, launches, make_problem, short_sides, truth
from theria.testing.machine import machine

TABLE_FILE = Path(tile_table.__file__)
WIDTHS = (64, 128, 32, 16, 256)
# Sides of the outer block, which a program keeps, and of the inner one, which it walks over; warps
# and stages. What never came near the best on an H200 is not here.
BLOCKS = {
    ("half", 64): [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (64, 32, 4, 3),
        (128, 32, 8, 3),
    ],
    ("half", 128): [(128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (128, 32, 8, 4), (128, 128, 8, 2)],
    ("half", 256): [(64, 32, 4, 1), (64, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 1), (64, 16, 4, 2), (128, 16, 8, 2)],
    ("float", 64): [(64, 64, 4, 1), (64, 32, 4, 2), (64, 16, 4, 2), (128, 32, 8, 2), (32, 32, 4, 2), (64, 64, 8, 1)],
    ("float", 128): [(64, 32, 4, 1), (64, 16, 4, 2), (128, 16, 8, 2), (128, 32, 8, 1), (32, 32, 4, 1), (64, 32, 8, 1)],
    ("float", 256): [(64, 16, 8, 1), (64, 16, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1), (32, 32, 8, 1), (32, 16, 8, 2)],
}
HELD = 128  # largest width at which left operands fit into registers
THREE = 168  # registers a thread with which three programs of four warps fit a multiprocessor of 65,536
SPLIT = 128  # least width at which two launches for the cotangents of keys and values may pay
# Rows of all heads of a program, by its keys.
SHORT_ROWS = {16: (16, 32, 64, 128), 32: (32, 64, 128), 64: (16, 32, 64), 128: (16, 32, 64, 128)}
ROW_SUM_BLOCKS = [(16, 16, 4), (32, 16, 4), (64, 16, 4), (128, 16, 4), (128, 16, 8), (32, 16, 2), (16, 16, 1)]
# What a right result may differ from float64 by, in errors of the formulas in the same dtype (tests/tolerances.py).
ACCURACY = 3.0
FLOOR = 8.0  # roundings, where these happen to be almost exact
HEAVY_SPILL = 256  # bytes of stack per thread with which a candidate is not even timed
HOPELESS = 1.5  # times the best so far at which a candidate is timed once and not again


def candidates(key: Key) -> list[Tile]:
    """Tiles to try, likely ones first."""
    if key.kernel in ROWS_ONLY:
        return [Tile(rows, keys, warps, 1) for rows, keys, warps in ROW_SUM_BLOCKS]
    if is_short(key.kernel):
        side = [Tile(rows, key.keys, warps, 1) for rows, warps in product(SHORT_ROWS[key.keys], (1, 2, 4, 8))]
        if key.keys > 64:  # blocks of rows, which load ahead
            side = [tile._replace(stages=2) for tile in side]
            side += [tile._replace(split=True) for tile in side]
        least = 64 if key.kind == "float" or key.width >= 128 else 256
        return [tile for tile in side if least <= tile.rows * tile.keys // tile.warps <= 2048]
    tiles = [Tile(*block) for block in BLOCKS[key.kind, max(key.width, 64)]]
    if "dkv" in key.kernel:
        tiles = [tile._replace(rows=tile.keys, keys=tile.rows) for tile in tiles]
        if key.width >= SPLIT:
            tiles += [tile._replace(split=True) for tile in tiles]
    # of a forward kernel that holds its queries the assembler makes a wrong program (theria/testing/sass.py)
    if key.kind == "half" and key.width <= HELD and key.kernel not in ("forward", "jvp_jvp"):
        tiles += [tile._replace(held=True) for tile in tiles]
    if key.kind == "half" and key.width <= 64:
        tiles += [tile._replace(most=THREE) for tile in tiles if tile.warps == 4]
    if key.causal and "dkv" in key.kernel:
        tiles += [tile._replace(anchored=True) for tile in tiles]
    return tiles


def shape_for(key: Key) -> tuple[int, int, int, int, int, int]:
    """(B, H, N, M, D, E) that a key is measured at: enough programs for every multiprocessor, several times over."""
    if key.keys:  # the same number of rows as (2048, 4, 64)
        return 2**17 // key.keys, 4, key.keys, key.keys, key.width, key.width
    batch, heads = (4, 16) if key.kind == "half" and key.width <= 128 else (2, 8)
    return batch, heads, 4096, 4096, key.width, key.width


def compiled(key: Key, tile: Tile) -> list[dict[str, Any]]:
    """What the compiler says; runs in a worker, whose cache is this process's too."""
    from theria.testing.compile import compile_kernel, ought_to_use_wgmma

    dtype = DTYPES[key.kind]
    made = compile_kernel(key.kernel, tile, key.arch, shape_for(key), dtype, key.causal)
    expected = ought_to_use_wgmma(key.kernel, tile, dtype, key.arch)
    return [asdict(one) | {"faults": one.faults(wgmma=expected)} for one in made]


def timed(run: Callable[[], Any], best: float) -> float:
    """Milliseconds of ``run``: the median of graph replays, or one rough figure where it is far from ``best``."""
    run()
    torch.cuda.synchronize()
    rough = elapsed(run)
    if rough > HOPELESS * best + 0.1:  # 0.1 ms: what the host may add
        return rough
    graph, repeats = torch.cuda.CUDAGraph(), max(1, math.ceil(1.0 / max(rough, 0.02)))
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    return statistics.median(elapsed(graph.replay) for _ in range(7)) / repeats


def elapsed(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def edged(shape: tuple[int, int, int, int, int, int]) -> tuple[int, int, int, int, int, int]:
    """A shape that no tile divides. ptxas 12.8 makes a wrong program of a right kernel for some tiles, which shows only
    where a mask is applied inside the loop."""
    batch, heads, N, M, D, E = shape
    return min(batch, 300), heads, min(N, 512) - 1, min(M, 512) - 3, D, E


@lru_cache(maxsize=2)
def problem_for(shape: tuple[int, int, int, int, int, int], kind: str, causal: bool) -> Problem:
    return make_problem(shape, DTYPES[kind], causal, "cuda")


def inaccuracy(key: Key, tile: Tile) -> float:
    """The worst error on whole tiles and at edges, in units of what it may be; above 1 is wrong."""
    shape = shape_for(key)
    return max(inaccuracy_at(key, tile, each) for each in (shape, edged(shape)))


def inaccuracy_at(key: Key, tile: Tile, shape: tuple[int, int, int, int, int, int]) -> float:
    """The same on the first and the last head of one shape."""
    problem = problem_for(shape, key.kind, key.causal)
    with override(key.kernel.removesuffix(VARIANT), tile):
        results = call(key.kernel, problem)
    worst = 0.0
    for b, h in ((0, 0), (-1, -1)):
        b, h = b % problem.o.shape[0], h % problem.o.shape[1]
        one, eps = problem.head(b, h), torch.finfo(DTYPES[key.kind]).eps
        exact, plain = truth(key.kernel, one.map(torch.Tensor.double)), truth(key.kernel, one)
        for x, y, z in zip(results, plain, exact, strict=True):
            error = difference((x[b : b + 1, h : h + 1],), (z,))
            allowed = ACCURACY * difference((y,), (z,)) + FLOOR * eps
            worst = max(worst, error / allowed if math.isfinite(error) else math.inf)
    return worst


def measure(key: Key, work: list[tuple[Tile, Future[Any]]], seconds: float) -> dict[str, Any]:
    """One row of the results: every candidate, and the best of them."""
    rows: list[dict[str, Any]] = []
    stop = time.monotonic() + seconds
    for tile, future in work:
        row: dict[str, Any] = {"tile": list(tile)}
        rows.append(row)
        if time.monotonic() > stop:
            future.cancel()
            row["error"] = "out of time"
            continue
        try:
            row["compiled"] = future.result(timeout=max(stop - time.monotonic(), 1.0))
            row["faults"] = [fault for one in row["compiled"] for fault in one["faults"]]
            if any("shared" in fault for fault in row["faults"]) or row["compiled"][0]["stack"] > HEAVY_SPILL:
                continue
            with override(key.kernel.removesuffix(VARIANT), tile):
                own = launches(key.kernel, problem_for(shape_for(key), key.kind, key.causal))
            best = min((r["ms"] for r in rows if "ms" in r), default=math.inf)
            row["ms"] = timed(lambda own=own: [launch(*one) for one in own], best)
        except Exception as error:  # a candidate that does not compile or run is a result, too
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            torch.cuda.synchronize()  # raises after a fault of the GPU, which no later figure would survive
    ranked = sorted((row for row in rows if "ms" in row), key=lambda row: row["ms"])
    for row in ranked:
        if not row["faults"]:
            row["inaccuracy"] = inaccuracy(key, Tile(*row["tile"]))
            if row["inaccuracy"] <= 1.0:
                break
    good = [row for row in ranked if row.get("inaccuracy", math.inf) <= 1.0]
    return {"key": list(key), "shape": shape_for(key), "best": good[0] if good else None, "candidates": rows}


def tune(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measure what is wanted and not yet in the results, within the time."""
    stop = time.monotonic() + 60 * args.minutes
    major, minor = torch.cuda.get_device_capability()
    keys = [key for key in wanted(args, 10 * major + minor) if list(key) not in [row["key"] for row in results["rows"]]]
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        work = {key: [(tile, pool.submit(compiled, key, tile)) for tile in candidates(key)] for key in keys}
        for key in keys:
            left = stop - time.monotonic()
            if left <= 0:
                print(f"out of time: {key} and what follows were not measured", flush=True)
                break
            row = measure(key, work[key], min(args.seconds, left))
            results["rows"].append(row)
            save(args.out, results)
            print(line(row), flush=True)
        pool.shutdown(wait=False, cancel_futures=True)


def wanted(args: argparse.Namespace, arch: int) -> Iterator[Key]:
    for kind, width, causal, kernel in product(args.kinds, args.widths, args.causal, args.kernels):
        if not covers(kernel, width, kind):
            continue
        if not is_short(kernel):
            if kernel not in ROWS_ONLY or not causal:
                yield Key(kernel, width, kind, causal, arch)
        elif not causal:
            sides = [keys for keys in short_sides(width, kind) if keys in args.lengths]
            yield from (Key(kernel, width, kind, causal, arch, keys) for keys in sides)


def line(row: dict[str, Any]) -> str:
    kernel, width, kind, causal, arch, keys = row["key"]
    name = f"{kernel:<16} {keys or '':>3} {width:>3} {kind:<5} {'causal' if causal else '':<6} sm_{arch}"
    best, timings = row["best"], [c for c in row["candidates"] if "ms" in c]
    if not best:
        errors = {c.get("error", "; ".join(c.get("faults", []))) for c in row["candidates"]}
        return f"{name}  none of {len(row['candidates'])}: {sorted(errors)[0][:120]}"
    fastest = min(timings, key=lambda c: c["ms"])
    note = "" if fastest is best else f"  (faster but {'; '.join(fastest['faults'])[:60]}: {fastest['ms']:.3f})"
    return f"{name}  {Tile(*best['tile'])!s:<62} {best['ms']:8.3f} ms of {len(timings)}{note}"


def table(rows: list[dict[str, Any]]) -> str:
    """The source of ``tile_table.py``: the package's entries, replaced where there are new ones."""
    entries = dict(tile_table.TABLE) | {tuple(row["key"]): tuple(row["best"]["tile"]) for row in rows if row["best"]}
    names = list(RULES)
    order = sorted(entries, key=lambda key: (key[4], names.index(key[0]), key[2] != "half", key[1], key[5], key[3]))
    head, _, _ = TABLE_FILE.read_text().partition("    (")
    body = "".join(f"    {key!r}: {entries[key]!r},\n" for key in order).replace("'", '"')
    return f"{head}{body}}}\n"


def save(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tune.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "tile_table.py").write_text(table(results["rows"]))


def load(folders: list[Path]) -> dict[str, Any]:
    """The results in these folders, the later ones first in case both have a key."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    machines = []
    for folder in folders:
        if (folder / "tune.json").exists():
            found = json.loads((folder / "tune.json").read_text())
            machines += [m for m in found["machines"] if m not in machines]
            rows |= {tuple(row["key"]): row for row in found["rows"]}
    return {"machines": machines, "rows": list(rows.values())}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--kernels", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--kinds", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=list(SHORT_ROWS), choices=SHORT_ROWS, help="short ones"
    )
    parser.add_argument("--causal", nargs="+", type=lambda x: x == "yes", default=[False, True], metavar="yes|no")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="for one key (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 1, 1))
    parser.add_argument("--merge", nargs="+", type=Path, help="join the results of these folders; measures nothing")
    parser.add_argument("--write", action="store_true", help="put the table into the package")
    return parser.parse_args()


def main() -> None:
    args = parse()
    results = load(args.merge or [args.out])
    if not args.merge:
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device: tiles are measured on the GPU they are for (--merge needs none)")
        results["machines"] += [machine()] if machine() not in results["machines"] else []
        tune(args, results)
    save(args.out, results)
    if args.write:
        TABLE_FILE.write_text(table(results["rows"]))
    print("\n".join(line(row) for row in results["rows"]))


if __name__ == "__main__":
    main()
