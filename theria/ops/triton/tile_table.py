"""Written by ``scripts/tune.py``: (kernel, width, kind, causal, chip, keys) -> the fields of a ``Tile``."""

TABLE: dict[tuple[str, int, str, bool, int, int], tuple[int, int, int, int, bool, bool]] = {
    ("forward", 64, "half", False, 90, 0): (128, 64, 8, 3, False, False),
    ("forward", 64, "half", True, 90, 0): (128, 64, 8, 3, False, False),
    ("forward", 128, "half", False, 90, 0): (128, 64, 8, 2, False, False),
    ("forward", 128, "half", True, 90, 0): (128, 64, 8, 2, False, False),
    ("jvp", 64, "half", False, 90, 0): (128, 64, 8, 2, False, False),
    ("jvp", 64, "half", True, 90, 0): (128, 64, 8, 2, False, False),
    ("jvp", 128, "half", False, 90, 0): (128, 64, 8, 2, False, False),
    ("jvp", 128, "half", True, 90, 0): (128, 64, 8, 2, False, False),
    ("hvp_dq", 64, "half", False, 90, 0): (128, 64, 8, 2, False, False),
    ("hvp_dq", 64, "half", True, 90, 0): (128, 64, 8, 2, False, False),
    ("hvp_dkv", 64, "half", False, 90, 0): (64, 128, 8, 2, False, False),
    ("hvp_dkv", 64, "half", True, 90, 0): (32, 128, 8, 2, False, False),
}
