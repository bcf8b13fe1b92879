"""The contract of the operator, on the fused kernels: on a GPU, or in Triton's interpreter on tiny shapes.

The interpreter takes some ten milliseconds for each tile: there every composition sees one sample and every sample one
composition of second order; on a GPU all meet all.
"""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch.func import grad, vmap

from tests.boundary import SAMPLES, WITH_TRUTH, ids
from tests.tolerances import TRITON_F32
from theria.ops import sdpa, sdpa_bwd_dk, sdpa_bwd_dq, sdpa_bwd_dv, sdpa_jvp, triton_sdpa_fused
from theria.testing import COMPOSITIONS, DIRECTIONAL, Sample, chained, compare, difference, make_sample, third_order
from theria.testing.comparison import DERIVATIVE_RATIO

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
REPEATS = 100 if ON_GPU else 3
DRAWS = 8
attend = partial(sdpa, backend="triton")
truth = partial(sdpa, backend="reference")

SECOND = ("double_backward", "forward_over_reverse")
TINY = make_sample((), 2, 2, 1, 1, name="tiny")  # for whole Jacobians
# One sample for each composition in the interpreter, in which something is broadcast, masked or dropped.
ROTATING = [
    make_sample((2,), 3, 4, 2, 3, options={"is_causal": True}, name="causal"),
    make_sample((2,), 3, 4, 2, 3, options={"dropout_p": 0.4, "seed": 7}, name="dropout"),
    make_sample((4,), 3, 4, 2, 3, key_batch=(2,), options={"enable_gqa": True}, name="gqa"),
    make_sample(
        (2,), 3, 4, 2, 3, options={"attn_mask": torch.arange(4) < torch.tensor([[[4]], [[2]]])}, name="padding"
    ),
    make_sample((2,), 3, 4, 2, 3, options={"attn_mask": torch.arange(12.0).view(3, 4).sin().double()}, name="bias"),
]
EACH = [(name, ROTATING[i % len(ROTATING)] if name in DIRECTIONAL else TINY) for i, name in enumerate(COMPOSITIONS)]
ALL = [(name, s) for name in COMPOSITIONS for s in (SAMPLES if name in DIRECTIONAL else [TINY, SAMPLES[0]])]


@pytest.fixture
def long_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a short kernel would take goes through the kernels for long sequences."""
    from theria.ops.triton import rules

    monkeypatch.setattr(rules.short, "fits", lambda *_: False)


def errors(composition: str, sample: Sample, wrap: Any = lambda attend: attend) -> tuple[float, float]:
    """Against the reference in float64 at the same rounded values: of the kernels, and of plain PyTorch in float32."""
    rounded = sample.to(torch.float32)
    compose = COMPOSITIONS[composition]
    results = compose(wrap(attend), rounded.to(device=DEVICE))
    assert all(x.device.type == DEVICE and x.dtype == torch.float32 for x in results)
    exact = compose(wrap(truth), rounded.to(torch.float64))
    plain = difference([x.double() for x in compose(wrap(truth), rounded)], exact)
    return difference([x.cpu().double() for x in results], exact), plain


def excess(composition: str, sample: Sample) -> float:
    """The error, of what it may be.

    That is TRITON_F32, or where float32 itself loses more in a composition, three times what the closed formulas in
    plain PyTorch are off (the ratio of `theria.testing.compare` for derivatives): the second derivative of a mapped
    bias over tiny tensors cancels to 2.6e-6.
    """
    ours, plain = errors(composition, sample)
    return ours / max(TRITON_F32, DERIVATIVE_RATIO * plain)


@pytest.mark.parametrize(("composition", "sample"), ALL if ON_GPU else EACH, ids=ids)
def test_composition_equals_the_reference(composition: str, sample: Sample) -> None:
    assert excess(composition, sample) <= 1


@pytest.mark.skipif(ON_GPU, reason="there every composition sees every sample")
@pytest.mark.parametrize(("sample", "composition"), list(zip(SAMPLES, itertools.cycle(SECOND))), ids=ids)
def test_every_sample_to_second_order(sample: Sample, composition: str) -> None:
    assert excess(composition, sample) <= 1


@pytest.mark.parametrize("sample", SAMPLES if ON_GPU else ROTATING, ids=ids)
def test_kernels_for_long_sequences(sample: Sample, long_kernels: None) -> None:
    compositions = DIRECTIONAL if ON_GPU else SECOND[:1]
    assert max(excess(composition, sample) for composition in compositions) <= 1


@pytest.mark.parametrize("composition", COMPOSITIONS if ON_GPU else SECOND)
def test_composition_through_two_calls(composition: str) -> None:
    """Root mean squares over draws: the second call magnifies every rounding of the first some thirty times, so that in
    one draw either of the two errors is a quarter of what it is in another.
    """
    draws = [make_sample((1,), 3, 3, 2, 2, options={"is_causal": True}, seed=seed) for seed in range(DRAWS)]
    pairs = [errors(composition, draw, chained) for draw in draws]
    ours, plain = (sum(x * x for x in column) ** 0.5 / DRAWS**0.5 for column in zip(*pairs, strict=True))
    assert ours <= max(TRITON_F32, DERIVATIVE_RATIO * plain)


@pytest.mark.skipif(not ON_GPU, reason="plain PyTorch on a GPU is the measure")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_as_accurate_as_plain_pytorch(dtype: torch.dtype, long: bool, request: pytest.FixtureRequest) -> None:
    if long:
        request.getfixturevalue("long_kernels")
    samples = [s for s in WITH_TRUTH if s.name in ("plain", "causal", "hidden_rows", "bias_with_inf", "gqa6_causal")]
    samples += [
        make_sample((2, 2), 100, 120, 64, 64, name="random"),
        make_sample((2, 2), 100, 120, 64, 64, magnitude=6.0, name="large_logits"),
        make_sample((1,), 8, 600, 32, 16, name="long"),
        make_sample((2, 2), 130, 130, 80, 48, options={"is_causal": True}, name="odd_causal"),
        make_sample((1, 2), 70, 70, 128, 128, options={"is_causal": True}, name="wide"),
    ]
    for sample in samples:
        for composition in ("forward", "backward", "func_jvp", "forward_over_forward", *SECOND):
            result = compare(attend, sample.to(device=DEVICE), composition, dtype)
            assert result.accurate, (sample.name, result)


@pytest.mark.skipif(ON_GPU, reason="the GPU test has all dtypes")
@pytest.mark.parametrize("composition", ["backward", *SECOND])
@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_half_precision_in_the_interpreter(composition: str, long: bool, request: pytest.FixtureRequest) -> None:
    if long:
        request.getfixturevalue("long_kernels")
    samples = [make_sample((1, 2), 9, 11, 8, 4)]
    if long:
        samples += [s for s in WITH_TRUTH if s.name in ("causal", "hidden_rows", "gqa6_causal")]
    for sample in samples:
        result = compare(attend, sample, composition, torch.float16)
        assert result.accurate, (sample.name, result)


def test_third_order_raises() -> None:
    with pytest.raises(NotImplementedError, match=r"third-order .*backend='reference'"):
        third_order(attend, make_sample((1,), 3, 3, 2, 2).to(torch.float32, DEVICE))


@pytest.mark.parametrize("composition", ["forward", "double_backward", "forward_over_reverse", "forward_over_forward"])
@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_results_are_bitwise_repeatable(composition: str, long: bool, request: pytest.FixtureRequest) -> None:
    if long:
        request.getfixturevalue("long_kernels")
    N = 200 if ON_GPU else 5
    sample = make_sample((1, 2), N, N, 16, 16, options={"is_causal": True}).to(torch.float32, DEVICE)
    first = COMPOSITIONS[composition](attend, sample)
    for _ in range(REPEATS - 1):
        assert all(a.equal(b) for a, b in zip(COMPOSITIONS[composition](attend, sample), first, strict=True))


def test_nothing_is_left_unwritten(poisoned: None) -> None:
    for sample in SAMPLES if ON_GPU else ROTATING[1:3]:
        for composition in ("forward", *SECOND):
            results = COMPOSITIONS[composition](attend, sample.to(torch.float32, DEVICE))
            assert all(x.isfinite().all() for x in results), (sample.name, composition)


def test_the_dropout_mask_is_that_of_custom() -> None:
    """Attention to a unit matrix shows P̃ itself; the same entries of it are dropped."""
    q, k, _ = make_sample((2, 2), 9, 11, 4).to(torch.float32, DEVICE).x
    eye = torch.eye(11, device=DEVICE).expand(2, 2, 11, 11)
    kept = [sdpa(q, k, eye, dropout_p=0.5, seed=2**40 + 5, backend=name) != 0 for name in ("custom", "triton")]
    assert torch.equal(*kept)
    assert 0.3 < kept[0].float().mean() < 0.7


def test_vmap_folds_and_does_not_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not mapped reaches the kernels in the caller's memory, with a leading dimension of one."""
    from theria.ops.triton.launch import Frame

    given: list[dict[str, torch.Tensor]] = []
    describe = Frame.describe

    def spy(self: Frame, *args: Any, **kwargs: Any) -> Any:
        given.append(dict(self.tensors))
        return describe(self, *args, **kwargs)

    monkeypatch.setattr(Frame, "describe", spy)
    q, k, v = make_sample((2,), 3, 3, 2, 2).to(torch.float16, DEVICE).x  # float32 is split into parts first
    mapped = torch.stack([q, 2 * q, 3 * q])
    vmap(grad(lambda q, k: attend(q, k, v).sum(), (0, 1)), (0, None))(mapped, k)
    assert given
    for tensors in given:
        assert tensors["q"].shape == (3, 2, 3, 2)
        assert all(tensors[name].shape == (1, 2, 3, 2) for name in "kv")
        assert (tensors["k"].data_ptr(), tensors["v"].data_ptr()) == (k.data_ptr(), v.data_ptr())


def test_seed_names_run_on_the_kernels() -> None:
    s = make_sample((1, 2), 5, 7, 4, 3).to(torch.float32)
    x, do = [a.to(DEVICE) for a in s.x], s.do.to(DEVICE)
    scale = 4**-0.5
    run: dict[str, Any] = {"backend": "triton_full_fused"}
    out, m, l = triton_sdpa_fused(*x, return_stats=True)
    assert m.shape == l.shape == (1, 2, 5)
    S = s.x[0].double() @ s.x[1].double().mT * scale
    q, k, v = x
    grads = [
        sdpa_bwd_dq(q, k, v, do, m, l, scale, **run),
        sdpa_bwd_dk(q, k, v, do, m, l, scale, **run),
        sdpa_bwd_dv(q, k, do, m, l, scale, **run),
    ]
    to, tau = sdpa_jvp(*x, *(t.to(DEVICE) for t in s.t), **run)
    exact = s.to(torch.float64)
    expected = [
        *COMPOSITIONS["forward"](truth, exact),
        S.logsumexp(-1),
        *COMPOSITIONS["backward"](truth, exact),
        *sdpa_jvp(*exact.x, *exact.t, backend="reference"),
    ]
    found = [out, m + l.log(), *grads, to, tau]
    assert difference([a.cpu().double() for a in found], expected) <= TRITON_F32
    assert sdpa(q, k, v, backend="triton_full_fused").equal(out)
