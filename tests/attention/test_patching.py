"""Existing models, unchanged, inside ``higher_order``."""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.tolerances import CUSTOM_F64
from theria.attention import higher_order, sdpa_custom
from theria.attention.patching import _hf_attention
from theria.ops import UnsupportedError, sdpa
from theria.testing import difference, make_sample


def second_gradients(loss: torch.Tensor, params: list[nn.Parameter]) -> tuple[torch.Tensor, ...]:
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    return torch.autograd.grad(sum((g**2).sum() for g in grads), params, materialize_grads=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_transformer_layer_differentiates_twice(is_causal: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x, params = torch.randn(2, 5, 8).double(), list(layer.parameters())
    mask = nn.Transformer.generate_square_subsequent_mask(5).double() if is_causal else None
    with sdpa_kernel(SDPBackend.MATH):
        expected = second_gradients(layer(x, mask, is_causal=is_causal).pow(2).sum(), params)
    with higher_order(backend="custom"):
        loss = layer(x, mask, is_causal=is_causal).pow(2).sum()
    assert "Forward" in graph_names(loss)
    assert difference(second_gradients(loss, params), expected) <= CUSTOM_F64


def graph_names(x: torch.Tensor) -> str:
    seen, queue = set(), [x.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [n for n, _ in node.next_functions]
    return " ".join(type(n).__name__ for n in seen)


def test_without_it_pytorch_raises() -> None:
    x = make_sample(E=4).to(torch.float32).leaves()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        grads = torch.autograd.grad(F.scaled_dot_product_attention(*x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(grads, x, x)


def test_it_ends_with_the_context_and_passes_the_backend() -> None:
    x = make_sample().x
    with higher_order(backend="reference"):
        inside = F.scaled_dot_product_attention(*x, is_causal=True)
    assert inside.equal(sdpa(*x, is_causal=True, backend="reference"))
    with higher_order(backend="triton"), pytest.raises(UnsupportedError):
        F.scaled_dot_product_attention(*x)
    assert F.scaled_dot_product_attention(*x).shape == inside.shape


def test_nested_and_concurrent_contexts_leave_no_trace() -> None:
    original, x = F.scaled_dot_product_attention, make_sample().x
    reference = sdpa(*x, backend="reference")
    outside: list[torch.Tensor] = []
    with higher_order(backend="custom"):
        with higher_order(backend="reference"):
            assert F.scaled_dot_product_attention(*x).equal(reference)
            other = threading.Thread(target=lambda: outside.append(F.scaled_dot_product_attention(*x)))
            other.start()
            other.join()
        assert F.scaled_dot_product_attention(*x).equal(sdpa(*x, backend="custom"))
    assert F.scaled_dot_product_attention is original
    assert outside[0].equal(original(*x))  # another thread is not inside


def test_under_func_transforms() -> None:
    s = make_sample()

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with higher_order():
            return F.scaled_dot_product_attention(q, k, v).pow(2).sum()

    expected = torch.func.jvp(torch.func.grad(lambda *x: sdpa(*x).pow(2).sum(), (0, 1, 2)), s.x, s.t)
    actual = torch.func.jvp(torch.func.grad(loss, (0, 1, 2)), s.x, s.t)
    assert all(a.equal(b) for a, b in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True))


def test_sdpa_custom_defaults_to_the_reference() -> None:
    x = make_sample().x
    assert sdpa_custom(*x).equal(sdpa(*x, backend="reference"))
    assert sdpa_custom(*x, is_causal=True, backend="custom").equal(sdpa(*x, is_causal=True, backend="custom"))


def test_hugging_faces_position_bias_is_added_and_what_changes_the_function_is_refused() -> None:
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    bias, seen = torch.randn(1, 3, 5, 5, dtype=torch.float64), torch.ones(2, 1, 5, 5, dtype=torch.bool)
    seen[1, ..., 3:] = False
    module = torch.nn.Identity()
    out, _ = _hf_attention(
        module, q, k, v, seen, scaling=1.0, position_bias=bias, softcap=None, output_attentions=False
    )
    scores = (q @ k.mT + bias).masked_fill(~seen, -torch.inf)
    assert difference((out.transpose(1, 2),), (scores.softmax(-1) @ v,)) < 1e-12
    refused: list[dict[str, Any]] = [{"softcap": 50.0}, {"s_aux": torch.zeros(3)}, {"output_attentions": True}]
    for changed in refused:
        with pytest.raises(NotImplementedError, match=next(iter(changed))):
            _hf_attention(module, q, k, v, None, **changed)
