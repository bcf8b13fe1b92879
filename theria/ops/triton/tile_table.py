"""Written by ``scripts/tune.py``: (kernel, width, kind, causal, chip, keys) -> (rows, keys, warps, stages, split)."""

TABLE: dict[tuple[str, int, str, bool, int, int], tuple[int, int, int, int, bool]] = {
    ("forward", 64, "half", False, 90, 0): (128, 64, 8, 3, False),
    ("forward", 64, "half", True, 90, 0): (128, 64, 8, 3, False),
    ("forward", 128, "half", False, 90, 0): (128, 64, 8, 2, False),
    ("forward", 128, "half", True, 90, 0): (128, 64, 8, 2, False),
    ("jvp", 64, "half", False, 90, 0): (128, 64, 8, 2, False),
    ("jvp", 64, "half", True, 90, 0): (128, 64, 8, 2, False),
    ("jvp", 128, "half", False, 90, 0): (128, 64, 8, 2, False),
    ("jvp", 128, "half", True, 90, 0): (128, 64, 8, 2, False),
    ("hvp_dq", 64, "half", False, 90, 0): (128, 64, 8, 2, False),
    ("hvp_dq", 64, "half", True, 90, 0): (128, 64, 8, 2, False),
    ("hvp_dkv", 64, "half", False, 90, 0): (64, 128, 8, 2, False),
    ("hvp_dkv", 64, "half", True, 90, 0): (32, 128, 8, 2, False),
}
