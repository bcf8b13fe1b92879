"""Written by ``scripts/tune.py``: (kernel, width, kind, causal, architecture) -> rows, keys, warps, stages, split."""

TABLE: dict[tuple[str, int, str, bool, int], tuple[int, int, int, int, bool]] = {
    ("forward", 64, "half", False, 90): (128, 64, 8, 3, False),
    ("forward", 64, "half", True, 90): (128, 64, 8, 3, False),
    ("forward", 128, "half", False, 90): (128, 64, 8, 2, False),
    ("forward", 128, "half", True, 90): (128, 64, 8, 2, False),
    ("jvp", 64, "half", False, 90): (128, 64, 8, 2, False),
    ("jvp", 64, "half", True, 90): (128, 64, 8, 2, False),
    ("jvp", 128, "half", False, 90): (128, 64, 8, 2, False),
    ("jvp", 128, "half", True, 90): (128, 64, 8, 2, False),
}
