"""Replays of a rule: the same values for other tensors of a layout, and nothing is replayed that did more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from theria.ops import sdpa
from theria.ops.triton import plans
from theria.ops.triton.tiles import Tile, override
from theria.testing import COMPOSITIONS, difference, make_sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32 = 2e-6  # what float32 "highest" may be off float64
fused: Callable[..., Tensor] = partial(sdpa, backend="triton")
truth: Callable[..., Tensor] = partial(sdpa, backend="reference")


@pytest.fixture(autouse=True)
def no_plans(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """Plans of this test alone."""
    own: dict[Any, Any] = {}
    monkeypatch.setattr(plans, "_plans", own)
    return own


def check(composition: str, draw: int, sizes: tuple[int, int] = (5, 7), **options: Any) -> None:
    sample = make_sample((2, 3), *sizes, 4, 6, seed=draw, options=options)
    results = COMPOSITIONS[composition](fused, sample.to(torch.float32, DEVICE))
    exact = COMPOSITIONS[composition](truth, sample)
    assert difference([x.cpu() for x in results], exact) <= FLOAT32


@pytest.mark.parametrize("sizes", [(5, 7), (5, 140)], ids=["short", "long"])
@pytest.mark.parametrize("composition", ["forward", "backward", "double_backward", "func_jvp", "forward_over_reverse"])
def test_a_replay_computes_with_the_tensors_it_is_given(
    composition: str, sizes: tuple[int, int], no_plans: dict[Any, Any]
) -> None:
    made: dict[Any, Any] = {}
    for seed in range(3):
        check(composition, seed, sizes)
        if seed == 0:
            made = dict(no_plans)
            assert any(plan is not None for plan in made.values())
    assert no_plans == made  # the second and third calls made no new ones


def test_results_of_two_calls_do_not_share_memory() -> None:
    x = make_sample((1, 2), 5, 7, 4, 4).to(torch.float32, DEVICE).x
    first, second, third = fused(*x), fused(*x), fused(*x)
    assert len({first.data_ptr(), second.data_ptr(), third.data_ptr()}) == 3
    assert first.equal(second)
    assert second.equal(third)


def test_one_tensor_in_two_places_is_not_mistaken_for_two(no_plans: dict[Any, Any]) -> None:
    q, k, v = make_sample((1, 2), 6, 6, 4, 4).to(torch.float32, DEVICE).x
    same = fused(q, q, q)
    assert not no_plans
    assert difference((fused(q, k, v).cpu(),), (truth(q.double(), k.double(), v.double()).cpu(),)) <= FLOAT32
    assert difference((same.cpu(),), (truth(*[q.double()] * 3).cpu(),)) <= FLOAT32


def test_what_copies_or_sums_is_run_again(no_plans: dict[Any, Any]) -> None:
    for seed in range(2):
        sample = make_sample((2, 3), 5, 7, 4, 4, seed=seed).to(torch.float32, DEVICE)
        q, k, v = sample.x
        wide = torch.empty(2, 3, 5, 8, device=DEVICE)[..., ::2].copy_(q)  # a last stride that no kernel reads
        assert fused(wide, k, v).equal(fused(q, k, v))
        shared = [x.detach().requires_grad_() for x in (q, k[:1], v)]  # its gradient is a sum over the batch
        grads = torch.autograd.grad(fused(*shared).sum(), shared)
        exact = [x.detach().double().requires_grad_() for x in shared]
        expected = torch.autograd.grad(truth(*exact).sum(), exact)
        assert difference([x.cpu() for x in grads], [x.cpu() for x in expected]) <= 1e-5
    assert any(plan is None for plan in no_plans.values())


def test_options_and_layouts_have_plans_of_their_own() -> None:
    each: list[dict[str, Any]] = [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"dropout_p": 0.3, "seed": 1},
        {"dropout_p": 0.3, "seed": 2},
    ]
    for _ in range(2):
        for options in each:
            check("backward", 0, **options)
        q, k, v = make_sample((2, 3), 5, 7, 4, 4).to(torch.float32, DEVICE).x
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        assert fused(*turned).equal(fused(q, k, v))
        assert fused(*turned).stride() != fused(q, k, v).stride()


def test_chosen_tiles_are_not_replayed_past(no_plans: dict[Any, Any]) -> None:
    x = make_sample((1, 1), 5, 7, 4, 4).to(torch.float32, DEVICE).x
    with override("forward", Tile(16, 16, 1, 1)):
        fused(*x)
    assert not no_plans


def test_a_failing_rule_leaves_no_recording(monkeypatch: pytest.MonkeyPatch, no_plans: dict[Any, Any]) -> None:
    from theria.ops.triton import forward

    x = make_sample((1, 1), 5, 7, 4, 4).to(torch.float32, DEVICE).x

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(forward, "launch", fail)
        with pytest.raises(RuntimeError, match="planted"):
            fused(*x)
    assert plans.recording() is None
    assert not no_plans
    assert fused(*x).isfinite().all()
