"""Every lookup gives a tile that a kernel can be launched with, no larger than the call."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from theria.ops.triton import tiles
from theria.ops.triton.tile_table import TABLE
from theria.ops.triton.tiles import DTYPES, WIDTHS, Key, Tile, choose, lookup, override, select
from theria.testing.kernels import RULES, short_sides

CHIPS = (0, 80, 86, 89, 90, 100, 120)  # 0: the interpreter
SIDES = (16, 32, 64, 128, 256)
LONG = [kernel for kernel in RULES if not tiles.is_short(kernel)]
SHORT = [kernel for kernel in RULES if tiles.is_short(kernel)]


def is_legal(tile: Tile) -> bool:
    sides = all(side in SIDES for side in (tile.rows, tile.keys))
    return sides and tile.warps in (1, 2, 4, 8) and 1 <= tile.stages <= 5


def frame(
    N: int, M: int, D: int, E: int, dtype: torch.dtype, causal: bool = False, **tensors: object
) -> SimpleNamespace:
    spec = SimpleNamespace(is_causal=causal)
    return SimpleNamespace(N=N, M=M, D=D, E=E, dtype=dtype, device=torch.device("cpu"), spec=spec, tensors=tensors)


@pytest.mark.parametrize("kernel", LONG)
def test_every_lookup_is_legal_and_fits_the_call(kernel: str) -> None:
    grid = product(WIDTHS, DTYPES, (False, True), CHIPS, SIDES, SIDES)
    for width, kind, causal, arch, rows, keys in grid:
        key = Key(kernel, width, kind, causal, arch)
        tile = choose(key, rows, keys)
        assert is_legal(tile), (key, tile)
        assert tile.rows <= rows, (key, tile)
        assert tile.keys <= keys, (key, tile)
        assert not tile.split or "dkv" in kernel


@pytest.mark.parametrize("kernel", SHORT)
def test_a_short_tile_holds_all_keys(kernel: str) -> None:
    for width, kind, arch in product(WIDTHS, DTYPES, CHIPS):
        for keys in short_sides(width, kind):
            tile = choose(Key(kernel, width, kind, False, arch, keys), 16, keys)
            assert is_legal(tile)
            assert tile.keys == keys


def test_every_entry_of_the_table_is_legal_and_reachable() -> None:
    for entry in TABLE:
        key = Key(*entry)
        assert key.kernel in RULES
        assert key.width in WIDTHS
        assert key.kind in DTYPES
        assert lookup(key) == Tile(*TABLE[entry])
        assert is_legal(lookup(key))
        assert bool(key.keys) == tiles.is_short(key.kernel)
        if tiles.is_short(key.kernel) or key.kernel in tiles.ROWS_ONLY:
            assert not key.causal  # what such kernels are looked up by


def test_a_large_call_gets_the_entry_itself() -> None:
    for key in (Key(*entry) for entry in TABLE if not Key(*entry).keys):
        assert choose(key, 256, 256) == lookup(key)


@pytest.mark.parametrize(
    ("width", "held"), [((1, 1), 16), ((16, 3), 16), ((17, 16), 32), ((3, 65), 128), ((256, 256), 256)]
)
def test_the_wider_head_dimension_counts(width: tuple[int, int], held: int) -> None:
    assert tiles.key_of("jvp", frame(100, 100, *width, torch.float16)).width == held


def test_what_a_call_is_looked_up_by() -> None:
    call = frame(70, 40, 8, 8, torch.bfloat16, causal=True)
    assert tiles.key_of("jvp", call) == Key("jvp", 16, "half", True, 0)
    assert tiles.key_of("row_stats", call) == Key("row_stats", 16, "half", False, 0)
    assert tiles.key_of("second_short", call) == Key("second_short", 16, "half", False, 0, 64)
    everything = frame(70, 40, 8, 8, torch.float32, causal=True, tdo=object())
    assert tiles.key_of("hvp_dq", everything) == Key("hvp_dq_all", 16, "float", True, 0)


def test_a_variant_without_an_entry_has_that_of_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key("hvp_dq", 64, "half", False, 90)
    monkeypatch.delitem(TABLE, ("hvp_dq_all", 64, "half", False, 90, 0), raising=False)  # put back as it is written
    monkeypatch.setitem(TABLE, key, tuple(Tile(128, 32, 8, 3)))
    assert lookup(key._replace(kernel="hvp_dq_all")) == Tile(128, 32, 8, 3)
    monkeypatch.setitem(TABLE, key._replace(kernel="hvp_dq_all"), tuple(Tile(64, 32, 4, 2)))
    assert lookup(key._replace(kernel="hvp_dq_all")) == Tile(64, 32, 4, 2)


def test_an_unknown_chip_gets_the_default_of_every_chip() -> None:
    for kernel, width, kind in product(LONG, WIDTHS, DTYPES):
        assert lookup(Key(kernel, width, kind, False, 120)) == lookup(Key(kernel, width, kind, False, 86))


def test_a_mask_lifts_the_limit_of_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes registers of its own, which a limit chosen without it would spill."""
    tile = Tile(16, 32, 4, 2, most=168)
    monkeypatch.setattr(tiles, "choose", lambda *_: tile)
    sizes = 64, 64, 64, 64, torch.bfloat16
    assert select("jvp", frame(*sizes)) == tile
    assert select("jvp", frame(*sizes, mask=None)) == tile._replace(most=0)
    assert select("jvp", frame(*sizes, seed=None)) == tile._replace(most=0)


def test_an_override_holds_inside_and_ends_with_it() -> None:
    call, forced = frame(70, 70, 16, 16, torch.float32), Tile(16, 32, 2, 1)
    before = select("jvp", call)
    with override("jvp", forced):
        assert select("jvp", call) == forced
        with override("jvp", Tile(32, 16, 1, 1)):
            assert select("jvp", call) == Tile(32, 16, 1, 1)
        assert select("jvp", call) == forced
        assert select("forward", call) != forced
    assert select("jvp", call) == before
    with pytest.raises(ZeroDivisionError), override("jvp", forced):
        _ = 1 // 0
    assert select("jvp", call) == before
