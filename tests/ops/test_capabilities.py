"""Each claim of the capability table, tested both ways: what is claimed works, what is not raises."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_leaves

from theria.ops import CAPABILITIES, UnsupportedError, explain, sdpa, sdpa_hvp, sdpa_jvp, sdpa_jvp_jvp, sdpa_vjp
from theria.ops import capabilities as table
from theria.ops.capabilities import ALIASES, FLOATS, PREFERENCE, interpreted
from theria.testing import make_sample, third_order

ON_GPU = torch.cuda.is_available()
DEVICES = ["cpu", *(["cuda"] if ON_GPU else [])]
DTYPES = [*FLOATS, torch.float8_e4m3fn]
WIDTHS = [0, 1, 64, 256, 257]
HERE = [name for name in CAPABILITIES if CAPABILITIES[name].missing() is None]
KERNELS_HERE = "triton" in HERE
needs_kernels = pytest.mark.skipif(not KERNELS_HERE, reason="needs Triton")
# Where the kernels run on this machine, and in what.
KERNEL_DEVICE = "cuda" if ON_GPU else "cpu"


def runs(backend: str, device: str, dtype: torch.dtype) -> bool:
    """Whether the table claims a device and a dtype on this machine."""
    can = CAPABILITIES[backend]
    if can.missing() is not None:
        return False
    simulated = can.interpreted_dtypes if interpreted() else None
    known = can.devices is None or device in can.devices or (simulated is not None and device == "cpu")
    return known and dtype in can.dtypes and (simulated is None or dtype in simulated)


def test_the_table_names_every_backend_once() -> None:
    assert set(PREFERENCE) == set(CAPABILITIES)
    assert set(ALIASES.values()) <= set(CAPABILITIES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "width"), list(itertools.product(DTYPES, WIDTHS)), ids=str)
def test_devices_dtypes_and_widths(backend: str, dtype: torch.dtype, width: int, device: str) -> None:
    can = CAPABILITIES[backend]
    x = make_sample((1, 2), 3, 3, width, width).to(dtype, device).x
    fits = can.min_head_dim <= width and (can.max_head_dim is None or width <= can.max_head_dim)
    claimed = runs(backend, device, dtype) and fits
    assert (explain(*x, backend=backend).backend == backend) == claimed
    if claimed:
        out = sdpa(*x, backend=backend)
        assert out.dtype == dtype
        assert out.isfinite().all()
    else:
        with pytest.raises(UnsupportedError, match=rf"backend '{backend}' cannot compute this call: .*; .* can\b"):
            sdpa(*x, backend=backend)


@pytest.mark.parametrize("backend", HERE)
def test_orders(backend: str) -> None:
    can = CAPABILITIES[backend]
    device = KERNEL_DEVICE if can.devices is not None else "cpu"
    sample = make_sample((1,), 3, 3, 2, 2).to(torch.float32, device)
    attend = partial(sdpa, backend=backend)
    if can.max_order is None:
        assert third_order(attend, sample)[0].isfinite().all()
    else:
        assert can.max_order == 2
        with pytest.raises(NotImplementedError, match="third-order"):
            third_order(attend, sample)


# ------------------------------------------------------------------------------------------------ derivatives of masks

X = make_sample((2,), 3, 3, 2, 2).to(torch.float32, KERNEL_DEVICE)
BIAS = torch.zeros(3, 3, device=KERNEL_DEVICE)
Attend = Callable[..., Tensor]


def requires_grad(attend: Attend) -> Any:
    bias = BIAS.clone().requires_grad_()
    return torch.autograd.grad(attend(*X.x, bias).sum(), bias)


def dual_number(attend: Attend) -> Any:
    with fwad.dual_level():
        return fwad.unpack_dual(attend(*X.x, fwad.make_dual(BIAS, BIAS + 1))).tangent


def func_grad(attend: Attend) -> Any:
    return grad(lambda bias: attend(*X.x, bias).sum())(BIAS)


def func_jvp(attend: Attend) -> Any:
    return jvp(lambda bias: attend(*X.x, bias), (BIAS,), (BIAS + 1,))


def outside_a_jvp(attend: Attend) -> Any:
    q, k, v = X.x
    return jvp(lambda bias: jvp(lambda q: attend(q, k, v, bias), (q,), (q,))[1], (BIAS,), (BIAS + 1,))


def outside_a_vmap(attend: Attend) -> Any:
    q, k, v = X.x
    return jvp(lambda bias: vmap(lambda q: attend(q, k, v, bias))(q), (BIAS,), (BIAS + 1,))


def inside_a_vmap(attend: Attend) -> Any:
    return vmap(lambda bias: jvp(lambda bias: attend(*X.x, bias), (bias,), (bias,)))(torch.stack([BIAS, BIAS]))


WAYS = [requires_grad, dual_number, func_grad, func_jvp, outside_a_jvp, outside_a_vmap, inside_a_vmap]


def explicit_calls(**options: Any) -> list[Callable[[], Any]]:
    three, four = X.t, (*X.t, BIAS)
    options = {"attn_mask": BIAS} | options
    return [
        lambda: sdpa_vjp(*X.x, X.do, mask_grad=True, **options),
        lambda: sdpa_jvp(*X.x, *three, tangent_mask=BIAS, **options),
        lambda: sdpa_hvp(*X.x, X.do, *three, tangent_mask=BIAS, **options),
        lambda: sdpa_hvp(*X.x, X.do, *three, mask_grad=True, **options),
        lambda: sdpa_jvp_jvp(*X.x, four, three, **options),
        lambda: sdpa_jvp_jvp(*X.x, three, four, **options),
        lambda: sdpa_jvp_jvp(*X.x, three, three, four, **options),
    ]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("backend", [*HERE, "auto"])
def test_derivatives_of_an_additive_mask(backend: str, way: Callable[[Attend], Any], kernel_calls: list[str]) -> None:
    if backend == "auto" or CAPABILITIES[backend].mask_gradient:
        assert all(x.isfinite().all() for x in tree_leaves(way(partial(sdpa, backend=backend))))
        assert not kernel_calls
    else:
        with pytest.raises(UnsupportedError, match=r"no derivative with respect to attn_mask.*backend='custom' can"):
            way(partial(sdpa, backend=backend))
        assert not kernel_calls, "it raises before any work"


@pytest.mark.parametrize("backend", [*HERE, "auto"])
def test_explicit_derivatives_of_an_additive_mask(backend: str, kernel_calls: list[str]) -> None:
    for call in explicit_calls(backend=backend):
        if backend == "auto" or CAPABILITIES[backend].mask_gradient:
            call()
        else:
            with pytest.raises(UnsupportedError, match=r"no derivative with respect to attn_mask, and one is asked"):
                call()
        assert not kernel_calls


@needs_kernels
def test_constant_masks_of_the_kernels() -> None:
    """A boolean or an additive mask is fine beside operands that are differentiated, at any level."""
    q, k, v = X.x
    for mask in (BIAS, BIAS == 0):
        attend = partial(sdpa, backend="triton", attn_mask=mask)
        assert jvp(lambda q, attend=attend: grad(lambda q: attend(q, k, v).sum())(q), (q,), (q,))[1].shape == q.shape
        assert vmap(lambda q, attend=attend: attend(q, k, v))(q[None]).shape == (1, *q.shape)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rules of the fused backend that are called, where it is installed."""
    called: list[str] = []
    if KERNELS_HERE:
        from theria.ops.triton import rules

        for name in ("forward", "vjp", "jvp", "hvp", "jvp_jvp", "jvp_hvp"):
            monkeypatch.setattr(rules, name, lambda *_, name=name: called.append(name))
    return called


# ------------------------------------------------------------------------------------------------ what is missing


def refusal(*x: Any, **options: Any) -> str:
    """The message with which the fused backend refuses; it is also what ``explain`` says."""
    with pytest.raises(UnsupportedError) as caught:
        sdpa(*x, backend="triton", **options)
    explanation = explain(*x, backend="triton", **options)
    assert explanation.backend is None
    assert explanation.reason.removeprefix("'triton' was asked for and cannot: ") in str(caught.value)
    assert explain(*x, **options).rejected["triton"]
    return str(caught.value)


@pytest.fixture
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


CPU = make_sample((1, 2), 3, 3, 4, 4).to(torch.float32).x


@pytest.mark.usefixtures("compiled_kernels")
def test_the_cpu_without_the_interpreter_is_refused() -> None:
    message = refusal(*CPU)
    assert "runs on cuda" in message
    assert "TRITON_INTERPRET=1" in message
    assert "inputs are on cpu" in message


@pytest.mark.skipif(ON_GPU, reason="needs a machine without a GPU")
@pytest.mark.usefixtures("compiled_kernels")
def test_a_machine_without_cuda_says_so() -> None:
    missing = CAPABILITIES["triton"].missing()
    assert missing is not None
    assert "CUDA" in missing


@pytest.mark.parametrize(("version", "words"), [(None, "not installed"), ("3.5.1", "3.5.1 is installed")])
def test_triton_that_is_absent_or_old(version: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(table, "triton_version", lambda: version)
    message = refusal(*CPU)
    assert "needs Triton 3.6 or later" in message
    assert words in message
    assert "pip install" in message


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1+gitabc", "4.0.0"])
def test_triton_that_is_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(table, "triton_version", lambda: version)
    assert CAPABILITIES["triton"].missing() is None


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.usefixtures("compiled_kernels")
def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from theria.ops import checks

    monkeypatch.setattr(checks, "compute_capability", lambda _: (7, 5))
    message = refusal(*(x.cuda() for x in CPU))
    assert "compute capability 8.0 or newer, and cuda:0 has 7.5" in message


@needs_kernels
def test_what_the_kernels_refuse_names_the_limit_and_who_can() -> None:
    def made(dtype: torch.dtype = torch.float32, D: int = 4, E: int = 4) -> Any:
        return make_sample((1, 2), 3, 3, D, E).to(dtype, KERNEL_DEVICE).x

    assert "inputs are torch.float64; backend='custom' can" in refusal(*made(torch.float64))
    assert "head dimensions 1 to 256, and the inputs have 257; backend='custom' can" in refusal(*made(E=257))
    assert "head dimensions 1 to 256, and the inputs have 0; backend='custom' can" in refusal(*made(D=0))
    if interpreted():
        assert "interpreter" in refusal(*made(torch.bfloat16))
        assert "wrongly; backend='custom' can" in refusal(*made(torch.bfloat16))


# ------------------------------------------------------------------------------------------------ explain


def test_explain_names_the_choice_and_the_reasons() -> None:
    x = make_sample().x
    auto = explain(*x)
    assert auto.backend == "custom"
    assert "order 2" in auto.reason
    assert set(auto.rejected) == {"triton", "reference"}
    named = explain(*x, backend="reference")
    assert named.backend == "reference"
    assert "every order" in named.reason
    assert "never becomes another" in named.rejected["custom"]
    assert str(auto).splitlines()[0].startswith("custom: ")


@pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")
@needs_kernels
def test_auto_never_picks_the_interpreter() -> None:
    x = make_sample().to(torch.float32).x
    auto = explain(*x)
    assert auto.backend == "custom"
    assert "ask for it by name" in auto.rejected["triton"]
    named = explain(*x, backend="triton")
    assert named.backend == "triton"
    assert "fused kernels" in named.reason


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.usefixtures("compiled_kernels")
def test_auto_picks_the_kernels_where_they_can() -> None:
    x = make_sample().to(torch.float32, "cuda").x
    assert explain(*x).backend == "triton"
    q, k, v = (a.double() for a in x)
    assert explain(q, k, v).backend == "custom"
    bias: Any = torch.zeros(5, 7, device="cuda", requires_grad=True)
    assert explain(*x, bias).backend == "custom"
    assert explain(*x, bias.detach()).backend == "triton"


def test_explain_computes_nothing() -> None:
    assert explain(*make_sample().to(device="meta").x).backend == "custom"
