"""Random calls: shapes, batches, groups and masks that nobody thought of, in a random composition."""

import random
from functools import partial
from typing import Any

import pytest
import torch

from theria.ops import sdpa
from theria.testing import COMPOSITIONS, DIRECTIONAL, Sample, make_sample, naive_attention

# Absolute: tiny calls may have derivatives that are zero but for rounding. Their entries are of order one to ten.
ROUNDING = 1e-11


def random_sample(seed: int) -> tuple[str, Sample]:
    """A composition and a call, both functions of the seed."""
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    B, H, N, M, D, E = (pick.randint(1, most) for most in (3, 3, 9, 9, 7, 7))
    groups = pick.choice([0, 1, 2, 3])
    heads = H * max(groups, 1)
    options: dict[str, Any] = {"enable_gqa": True} if groups else {}
    key_batch = (B, H) if groups else pick.choice([(B, H), (1, H), (B, 1), (H,), ()])
    shape = pick.choice([(N, M), (B, 1, N, M), (1, heads, N, M), (B, heads, N, M), (B, 1, 1, M), (N, 1), (1, M), (M,)])
    kind = pick.choice(["none", "boolean", "additive"])
    if kind == "boolean":
        options["attn_mask"] = torch.rand(shape, generator=generator) < 0.6
    if kind == "additive":
        options["attn_mask"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    options["is_causal"] = pick.random() < 0.4
    options["scale"] = pick.choice([None, 0.0, 0.3, 1.5])
    sample = make_sample((B, heads), N, M, D, E, key_batch=key_batch, options=options, seed=seed)
    return pick.choice(DIRECTIONAL), sample


@pytest.mark.parametrize("backend", ["reference", "custom"])
@pytest.mark.parametrize("seed", range(60))
def test_equals_autograd_of_the_naive_formula(seed: int, backend: str) -> None:
    name, sample = random_sample(seed)
    results = COMPOSITIONS[name](partial(sdpa, backend=backend), sample)
    expected = COMPOSITIONS[name](naive_attention, sample)
    for actual, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=ROUNDING)
