"""The wiring under torch.autograd: gradcheck, partial gradients, masks, checkpointing, hooks."""

import itertools
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from tests.tolerances import CUSTOM_F64
from theria.ops import DtypeError, UnsupportedError, explain, sdpa, sdpa_hvp, sdpa_vjp
from theria.testing import difference, make_sample, masks, naive_attention

BACKENDS = ["reference", "custom"]
backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@pytest.mark.parametrize("mask", ["plain", "causal", "hidden_rows", "bias_per_head", "dropout_causal"])
def test_gradcheck_in_both_modes(backend: str, mask: str) -> None:
    options = masks(3, 4)[mask] if mask != "bias_per_head" else {"attn_mask": torch.randn(1, 2, 3, 4).double()}
    attend = partial(sdpa, backend=backend, **options)
    x = make_sample(batch=(1, 2), N=3, M=4, D=2, E=3).leaves()
    assert gradcheck(attend, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(attend, x, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@backends
@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (3, 4), (1, 2, 1, 4), (2, 1, 3, 1), (4,), ()], ids=str)
def test_additive_mask_has_exact_gradients_to_second_order(backend: str, shape: tuple[int, ...]) -> None:
    x = make_sample(batch=(2, 2), N=3, M=4, D=2, E=3).leaves()
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return sdpa(q, k, v, bias, backend=backend)

    assert gradcheck(attend, (*x, bias), check_forward_ad=True)
    assert gradgradcheck(attend, (*x, bias), check_fwd_over_rev=True, check_rev_over_rev=True)


@backends
def test_grouped_queries_with_a_learned_bias(backend: str) -> None:
    sample = make_sample((2, 4), 3, 4, 2, 3, key_batch=(2, 2))
    bias = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    x = sample.leaves()

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return sdpa(q, k, v, bias, enable_gqa=True, backend=backend)

    assert gradgradcheck(attend, (*x, bias), check_fwd_over_rev=True)
    expected = naive_attention(*x, attn_mask=bias, enable_gqa=True)
    assert difference([attend(*x, bias)], [expected]) <= CUSTOM_F64


@backends
def test_every_subset_of_gradients_equals_the_full_one(backend: str) -> None:
    """Cotangents that autograd does not ask for are not computed; the others must not notice."""
    sample = make_sample()
    full = second_gradients(sample, backend, (True, True, True))
    for bits in range(1, 7):
        wanted = tuple(bool(bits >> i & 1) for i in range(3))
        some = second_gradients(sample, backend, wanted)
        reference = second_gradients(sample, "reference", wanted)
        assert difference(some, reference) <= CUSTOM_F64
    assert len(full) == 4


def second_gradients(sample: Any, backend: str, wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
    x = [a.clone().requires_grad_(need) for a, need in zip(sample.x, wanted, strict=True)]
    do = sample.do.clone().requires_grad_()
    asked = [a for a in x if a.requires_grad]
    grads = torch.autograd.grad(sdpa(*x, backend=backend), asked, do, create_graph=True)
    directions = [t for t, need in zip(sample.t, wanted, strict=True) if need]
    return torch.autograd.grad(grads, (*asked, do), directions, materialize_grads=True)


@backends
def test_under_checkpoint(backend: str) -> None:
    sample = make_sample()
    x = sample.leaves()

    def loss(use: bool) -> Tensor:
        attend = partial(sdpa, backend=backend)
        out = checkpoint(attend, *x, use_reentrant=False) if use else attend(*x)
        assert isinstance(out, Tensor)
        return (out * sample.do).sin().sum()

    def second(use: bool) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(loss(use), x, create_graph=True)
        return torch.autograd.grad(grads, x, sample.t)

    assert all(a.equal(b) for a, b in zip(second(True), second(False), strict=True))


def test_checkpoint_frees_what_the_operator_saved() -> None:
    """Nothing but the saved-tensor slots may hold the operands: a hook that drops them frees them."""
    import weakref

    x = make_sample().leaves()
    kept: list[weakref.ref] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = sdpa(q * 1, k * 1, v * 1, backend="custom")
        kept.append(weakref.ref(out.untyped_storage()))
        return out * 2

    out = checkpoint(run, *x, use_reentrant=False)
    assert isinstance(out, Tensor)
    assert kept[0]() is None
    out.sum().backward()


def test_saved_tensors_go_through_hooks_and_are_linear_in_length() -> None:
    """Saved for backward: q, k, v, o, lse; nothing of size N·M."""
    N, M, D = 40, 50, 4
    x = make_sample(batch=(1, 1), N=N, M=M, D=D, E=D).leaves()
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = sdpa(*x, backend="custom")
        grads = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert saved
    assert max(t.numel() for t in saved) <= D * max(N, M)
    second = torch.autograd.grad(grads, x, x)
    plain = torch.autograd.grad(torch.autograd.grad(sdpa(*x).sum(), x, create_graph=True), x, x)
    assert all(a.equal(b) for a, b in zip(second, plain, strict=True))


@backends
def test_strided_inputs_and_cotangents(backend: str) -> None:
    """A transposed projection and a transposed cotangent give what their contiguous copies give."""
    sample = make_sample((2, 6), 3, 3, 4, 4)
    strided = [x.detach().transpose(1, 2).requires_grad_() for x in sample.x]  # (2, 3, 6, 4)
    do = torch.randn(2, 3, 4, 6, dtype=torch.float64).mT
    copies = [x.detach().contiguous().requires_grad_() for x in strided]
    results = []
    for (q, k, v), cotangent in ((strided, do), (copies, do.contiguous())):
        grads = torch.autograd.grad(sdpa(q, k, v, backend=backend), (q, k, v), cotangent, create_graph=True)
        results.append(torch.autograd.grad(grads, (q, k, v), copies))
    assert difference(*results) <= CUSTOM_F64


@backends
def test_autocast_casts_the_inputs_and_nothing_inside(backend: str) -> None:
    """As F.scaled_dot_product_attention: the result has autocast's dtype, with the accuracy of that dtype."""
    q, k, v = (torch.randn(2, 3, 8, 4) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sdpa(q, k, v, backend=backend)
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype
    outside = sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=backend)
    assert out.equal(outside) or backend == "reference"


@backends
@pytest.mark.parametrize("dtypes", list(itertools.permutations([torch.bfloat16, torch.float16])), ids=str)
def test_autocast_takes_a_mask_of_the_other_half_dtype(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """As F.scaled_dot_product_attention; with its derivative, and without rounding it."""
    inside, other = dtypes
    q, k, v = (torch.randn(2, 3, 8, 4) for _ in range(3))
    mask = torch.randn(8, 8).to(other).requires_grad_()
    with torch.autocast("cpu", dtype=inside):
        out = sdpa(q, k, v, mask, backend=backend)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v, mask).dtype == inside
        assert explain(q, k, v, mask).backend == "custom"
    (found,) = torch.autograd.grad(out, mask, torch.ones_like(out))
    rounded = [x.to(inside).double() for x in (q, k, v)]
    leaf = mask.detach().double().requires_grad_()
    exact = naive_attention(*rounded, attn_mask=leaf)
    (expected,) = torch.autograd.grad(exact, leaf, torch.ones_like(exact))
    assert difference([out], [exact]) <= 4 * torch.finfo(inside).eps
    assert difference([found], [expected]) <= 16 * max(torch.finfo(x).eps for x in dtypes)


def test_explain_says_what_a_call_under_autocast_does() -> None:
    q, k, v = (torch.randn(2, 3, 8, 4) for _ in range(3))
    mask = torch.zeros(8, 8, dtype=torch.bfloat16)
    with pytest.raises(DtypeError, match="attn_mask has dtype"):
        explain(q, k, v, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explain(q, k.bfloat16(), v, mask).backend == "custom"
        assert sdpa(q, k.bfloat16(), v, mask).dtype == torch.bfloat16
        said = explain(q, k, v, backend="triton")
        assert said.backend is None
        with pytest.raises(UnsupportedError, match=re.escape(said.rejected["triton"])):
            sdpa(q, k, v, backend="triton")


def test_explicit_results_are_differentiable_or_raise() -> None:
    """Nothing is detached silently: one more derivative of an explicit vjp is exact, of an explicit hvp raises."""
    sample = make_sample()
    x = sample.leaves()
    grads = sdpa_vjp(*x, sample.do, backend="custom")
    twice = torch.autograd.grad(grads, x, sample.t)
    assert difference(twice, sdpa_hvp(*sample.x, sample.do, *sample.t, backend="reference")) <= CUSTOM_F64
    third = sdpa_hvp(*x, sample.do, *sample.t, backend="custom")
    with pytest.raises(NotImplementedError, match="third-order"):
        torch.autograd.grad(third, x, sample.t)


def test_inputs_are_never_written() -> None:
    sample = make_sample(options={"attn_mask": torch.randn(5, 7, dtype=torch.float64)})
    before = [a.clone() for a in (*sample.x, sample.do, *sample.t, sample.options["attn_mask"])]
    sdpa_hvp(*sample.x, sample.do, *sample.t, **sample.options, backend="custom")
    after = (*sample.x, sample.do, *sample.t, sample.options["attn_mask"])
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))


def test_the_gradient_of_a_tangent_is_taken_after_its_level() -> None:
    """Inside the level PyTorch asks for the tangent of that gradient as well; the truth is double backward."""
    sample = make_sample()
    q, k, v, t = *sample.leaves(), sample.t[0]
    with fwad.dual_level():
        tangent: Any = fwad.unpack_dual(sdpa(fwad.make_dual(q.detach(), t), k, v, backend="custom")).tangent
        with pytest.raises(NotImplementedError, match=r"third-order.*take the gradient of a tangent after the level"):
            torch.autograd.grad(tangent, k, sample.do, retain_graph=True)
    found = torch.autograd.grad(tangent, k, sample.do)
    (dq,) = torch.autograd.grad(naive_attention(q, k, v), q, sample.do, create_graph=True)
    assert difference(found, torch.autograd.grad(dq, k, t)) <= CUSTOM_F64
