"""Bad input gets its own message: what was given, what is needed, what to do; before any work."""

from typing import Any

import numpy as np
import pytest
import torch

from theria.ops import (
    CAPABILITIES,
    ArgumentError,
    DtypeError,
    explain,
    sdpa,
    sdpa_forward,
    sdpa_hvp,
    sdpa_jvp,
    sdpa_jvp_jvp,
    sdpa_vjp,
)
from theria.testing import make_sample


def call(**changes: Any) -> dict[str, Any]:
    q, k, v = (x.float() for x in make_sample((2, 4), 5, 7, 8, 3).x)
    return {"query": q, "key": k, "value": v} | changes


def rand(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.randn(*shape, **kwargs)


CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not_a_tensor": ({"key": [1.0]}, TypeError, r"key is a list; a torch\.Tensor is needed"),
    "integer": (
        {"query": torch.ones(2, 4, 5, 8, dtype=torch.int64)},
        TypeError,
        r"query has dtype torch\.int64.*float",
    ),
    "boolean": ({"value": torch.ones(2, 4, 7, 3, dtype=torch.bool)}, TypeError, r"value has dtype torch\.bool"),
    "complex": ({"query": rand(2, 4, 5, 8, dtype=torch.complex64)}, TypeError, r"query has dtype torch\.complex64"),
    "mixed_dtypes": ({"key": rand(2, 4, 7, 8, dtype=torch.float64)}, TypeError, r"one dtype.*key torch\.float64"),
    "mixed_devices": ({"value": rand(2, 4, 7, 3, device="meta")}, ValueError, r"one device.*value on meta"),
    "rank": ({"query": rand(8)}, ValueError, r"query has shape \(8,\); at least 2 dimensions"),
    "width": ({"key": rand(2, 4, 7, 9)}, ValueError, r"one width D.*\(2, 4, 5, 8\).*\(2, 4, 7, 9\)"),
    "length": ({"value": rand(2, 4, 6, 3)}, ValueError, r"one length M.*\(2, 4, 7, 8\).*\(2, 4, 6, 3\)"),
    "batch": ({"key": rand(3, 4, 7, 8), "value": rand(3, 4, 7, 3)}, ValueError, r"do not broadcast"),
    "heads": ({"key": rand(2, 2, 7, 8), "value": rand(2, 2, 7, 3)}, ValueError, r"enable_gqa=True"),
    "groups": (
        {"key": rand(2, 3, 7, 8), "value": rand(2, 3, 7, 3), "enable_gqa": True},
        ValueError,
        r"multiple of key's; given 4 and 3",
    ),
    "groups_without_heads": (
        {"query": rand(5, 8), "key": rand(7, 8), "value": rand(7, 3), "enable_gqa": True},
        ValueError,
        r"needs a head dimension",
    ),
    "groups_batch": (
        {"key": rand(3, 2, 7, 8), "value": rand(3, 2, 7, 3), "enable_gqa": True},
        ValueError,
        r"batch dimensions",
    ),
    "mask_shape": ({"attn_mask": rand(5, 6)}, ValueError, r"\(5, 6\) does not broadcast to .*\(2, 4, 5, 7\)"),
    "mask_larger": ({"attn_mask": rand(3, 2, 4, 5, 7)}, ValueError, r"does not broadcast"),
    "mask_dtype": ({"attn_mask": torch.ones(5, 7, dtype=torch.int64)}, TypeError, r"attn_mask has dtype torch\.int64"),
    "mask_too_precise": ({"attn_mask": rand(5, 7, dtype=torch.float64)}, TypeError, r"attn_mask has dtype"),
    "mask_device": ({"attn_mask": rand(5, 7, device="meta")}, ValueError, r"one device"),
    "dropout_negative": ({"dropout_p": -0.1}, ValueError, r"dropout_p is -0\.1; a probability"),
    "dropout_large": ({"dropout_p": 1.1}, ValueError, r"dropout_p is 1\.1"),
    "dropout_nan": ({"dropout_p": float("nan")}, ValueError, r"dropout_p is nan"),
    "seed_type": ({"dropout_p": 0.1, "seed": 1.5}, TypeError, r"seed is a float"),
    "seed_tensor": ({"dropout_p": 0.1, "seed": torch.zeros(2)}, TypeError, r"seed is a tensor of shape \(2,\)"),
    "seed_size": ({"dropout_p": 0.1, "seed": 2**64}, ValueError, r"fits 64 bits"),
    "dropout_tensor": (
        {"dropout_p": torch.tensor(0.1, requires_grad=True)},
        TypeError,
        r"dropout_p is a Tensor; a float is needed.*Nothing is differentiated",
    ),
    "dropout_none": ({"dropout_p": None}, TypeError, r"dropout_p is a NoneType; a float is needed, 0\.0 for no"),
    "dropout_string": ({"dropout_p": "0.1"}, TypeError, r"dropout_p is a str"),
    "causal_string": ({"is_causal": "x"}, TypeError, r"is_causal is a str; a bool is needed"),
    "causal_int": ({"is_causal": 1}, TypeError, r"is_causal is a int; a bool is needed"),  # as PyTorch
    "numpy_bool": ({"is_causal": np.bool_(True)}, TypeError, r"is_causal is a numpy\.bool_?; a bool is needed"),
    "gqa_none": ({"enable_gqa": None}, TypeError, r"enable_gqa is a NoneType; a bool is needed"),
    "scale_string": ({"scale": "0.5"}, TypeError, r"scale is a str; a float is needed"),
    "scale_array": ({"scale": np.array(0.5)}, TypeError, r"scale is a numpy.ndarray; a float is needed"),
    "scale_size": ({"scale": 10**400}, ValueError, r"scale is an int of 1329 bits; a number of at most 1\.8e\+308"),
    "no_query_heads": (
        {"query": rand(2, 0, 5, 8), "key": rand(2, 2, 7, 8), "value": rand(2, 2, 7, 3), "enable_gqa": True},
        ValueError,
        r"query has no heads and key 2 .*give key none either",
    ),
    "backend_type": ({"backend": ["a"]}, TypeError, r"backend is a list; a str such as 'auto' is needed"),
    "backend": ({"backend": "cutsom"}, ValueError, r"'cutsom' is not known.*Did you mean 'custom'"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_mistake_has_its_message(name: str) -> None:
    changes, kind, message = CASES[name]
    for function in (sdpa, explain):
        with pytest.raises(kind, match=message) as caught:
            function(**call(**changes))
        assert isinstance(caught.value, RuntimeError)  # what F.scaled_dot_product_attention raises


def test_messages_are_distinct() -> None:
    messages = []
    for changes, kind, _ in CASES.values():
        with pytest.raises(kind) as caught:
            sdpa(**call(**changes))
        messages.append(str(caught.value))
    assert len(set(messages)) == len(CASES)


def test_explicit_functions_check_directions_and_residuals() -> None:
    s = make_sample()
    q, k, v = s.x
    with pytest.raises(ArgumentError, match=r"grad_out has shape \(2, 2, 5, 4\); \(2, 2, 5, 3\) is needed"):
        sdpa_vjp(q, k, v, torch.ones(2, 2, 5, 4).double())
    with pytest.raises(DtypeError, match=r"grad_out has dtype torch\.float32; torch\.float64 is needed"):
        sdpa_vjp(q, k, v, s.do.float())
    with pytest.raises(ArgumentError, match=r"tangent of key has shape"):
        sdpa_jvp(q, k, v, None, s.t[0])
    with pytest.raises(ArgumentError, match="entry for attn_mask"):
        sdpa_jvp(q, k, v, tangent_mask=torch.zeros(5, 7).double())
    with pytest.raises(ArgumentError, match="first has 5 entries"):
        sdpa_jvp_jvp(q, k, v, (None,) * 5, s.t)
    with pytest.raises(ArgumentError, match=r"lse has shape \(5,\); \(2, 2, 5\) is needed"):
        sdpa_vjp(q, k, v, s.do, out=s.do, lse=torch.zeros(5).double())
    with pytest.raises(ArgumentError, match="mask_grad=True needs an additive attn_mask"):
        sdpa_hvp(q, k, v, s.do, *s.t, mask_grad=True)
    with pytest.raises(ArgumentError, match="Pass the same seed"):
        sdpa_vjp(q, k, v, s.do, dropout_p=0.5)


def test_an_unknown_argument_of_an_explicit_function_is_named() -> None:
    s = make_sample()
    with pytest.raises(TypeError, match=r"there is no argument 'causal'.*Did you mean 'is_causal'\?"):
        sdpa_forward(*s.x, causal=True)


@pytest.mark.parametrize("p", [torch.zeros(()), torch.zeros(2)], ids=str)
def test_a_tensor_of_no_dropout_is_refused_too(p: Any) -> None:
    with pytest.raises(DtypeError, match="dropout_p is a Tensor"):
        sdpa(**call(), dropout_p=p)


@pytest.mark.parametrize("backend", ["reference", "custom"])
def test_numpy_numbers_are_numbers(backend: str) -> None:
    kinds: list[Any] = [(np.float16, np.uint8), (np.float32, np.int32), (np.float64, np.int64)]
    plain = sdpa(**call(), dropout_p=0.5, scale=0.25, seed=7, backend=backend)
    for real, integer in kinds:
        options = {"dropout_p": real(0.5), "scale": real(0.25), "seed": integer(7)}
        assert sdpa(**call(), **options, backend=backend).equal(plain)
    too_large: Any = np.uint64(2**63)
    with pytest.raises(ArgumentError, match="fits 64 bits"):
        sdpa(**call(), dropout_p=0.5, seed=too_large)


@pytest.mark.parametrize("backend", [name for name, can in CAPABILITIES.items() if can.missing() is None])
def test_directions_cotangents_and_residuals_are_on_the_operands_device(backend: str) -> None:
    s = make_sample().to(torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    (q, k, v), (tq, *_), do, meta = s.x, s.t, s.do, s.do.to("meta")
    run: dict[str, Any] = {"backend": backend}
    out, lse = sdpa_forward(q, k, v, backend="custom")
    with pytest.raises(ArgumentError, match=r"grad_out is on meta and the operands are on c"):
        sdpa_vjp(q, k, v, meta, **run)
    with pytest.raises(ArgumentError, match=r"tangent of query is on meta and the operands are on c"):
        sdpa_jvp(q, k, v, tq.to("meta"), **run)
    with pytest.raises(ArgumentError, match=r"lse is on meta"):
        sdpa_vjp(q, k, v, do, out=out, lse=lse.to("meta"), **run)
    with pytest.raises(ArgumentError, match=r"out is on meta"):
        sdpa_vjp(q, k, v, do, out=out.to("meta"), lse=lse, **run)
    with pytest.raises(ArgumentError, match=r"tangent_grad_out is on meta"):
        sdpa_hvp(q, k, v, do, tangent_grad_out=meta, **run)
    with pytest.raises(ArgumentError, match=r"second of query is on meta"):
        sdpa_jvp_jvp(q, k, v, s.t, (tq.to("meta"), None, None), **run)


@pytest.mark.parametrize("wrong", [None, torch.zeros(3)], ids=["None", "tensor"])
@pytest.mark.parametrize("name", ["first", "second", "mixed"])
def test_a_direction_is_a_tuple(name: str, wrong: Any) -> None:
    s = make_sample()
    directions: dict[str, Any] = {"first": s.t, "second": s.t, name: wrong}
    with pytest.raises(DtypeError, match=rf"{name} is a \w+; a tuple .* None for each that is zero"):
        sdpa_jvp_jvp(*s.x, **directions)


@pytest.mark.parametrize("p", [None, "0.1", torch.tensor(0.1)], ids=["None", "str", "tensor"])
def test_the_explicit_functions_check_dropout(p: Any) -> None:
    s = make_sample()
    for seed in (None, 3):
        with pytest.raises(DtypeError, match="dropout_p is a"):
            sdpa_vjp(*s.x, s.do, dropout_p=p, seed=seed)
