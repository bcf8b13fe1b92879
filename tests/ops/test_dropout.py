"""Stateless dropout: known answers of Philox, the law of vmap, replay in every derivative, statistics."""

from functools import partial

import pytest
import torch
from torch.func import vmap

from tests.tolerances import CUSTOM_F64
from theria.ops import sdpa, sdpa_forward, sdpa_hvp, sdpa_jvp, sdpa_vjp
from theria.ops.dropout import keep_mask, philox
from theria.ops.operands import AttentionSpec
from theria.testing import difference, make_sample

backends = pytest.mark.parametrize("backend", ["reference", "custom"])
F = 0xFFFFFFFF
# From the Random123 distribution's kat_vectors, philox4x32 with 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((F, F, F, F), (F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(counter: tuple, key: tuple, answer: tuple) -> None:
    words = philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))  # type: ignore[arg-type]
    assert tuple(w.item() for w in words) == answer


def materialised(sample, p: float, seed: int) -> torch.Tensor:
    """Attention with the mask applied by hand, element by element from single Philox calls."""
    q, k, v = sample.x
    P = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    keep = torch.empty_like(P)
    B, H, N, M = P.shape
    for b, h, n, m in torch.cartesian_prod(*(torch.arange(x) for x in (B, H, N, M))).tolist():
        counter = tuple(torch.tensor(c) for c in (m // 4, n, b * H + h, 0))
        word = philox(counter, (torch.tensor(seed & F), torch.tensor(seed >> 32)))[m % 4]  # type: ignore[arg-type]
        keep[b, h, n, m] = word.item() / 2**32 >= p
    return (P * keep / (1 - p)) @ v


@backends
@pytest.mark.parametrize("seed", [0, 2**40 + 3])
def test_the_mask_is_philox_by_position(backend: str, seed: int) -> None:
    sample = make_sample()
    out = sdpa(*sample.x, dropout_p=0.4, seed=seed, backend=backend)
    assert difference([out], [materialised(sample, 0.4, seed)]) <= CUSTOM_F64


def test_mask_does_not_depend_on_the_block_of_rows_and_is_fair() -> None:
    spec = AttentionSpec("custom", 1.0, dropout_p=0.3, heads=(2, 3))
    seed = torch.tensor(11).reshape(1, 1, 1, 1)
    whole = keep_mask(seed, spec, range(50), 401)
    assert keep_mask(seed, spec, range(17, 23), 401).equal(whole[..., 17:23, :])
    assert keep_mask(seed, spec, range(50), 9).equal(whole[..., :9])
    count = whole.numel()
    deviation = (0.3 * 0.7 / count) ** 0.5
    assert abs(whole.double().mean().item() - 0.7) <= 4 * deviation
    neighbours = (whole[..., 1:] & whole[..., :-1]).double().mean().item()
    assert abs(neighbours - 0.49) <= 6 * deviation


@backends
def test_vmap_is_the_loop(backend: str) -> None:
    """The mask depends on the logical position: a mapped call is the loop, with one seed and with one per entry."""
    q, k, v = make_sample().x
    queries, seeds = torch.stack([q, -q, 2 * q]), torch.tensor([5, 6, 5])
    attend = partial(sdpa, dropout_p=0.5, backend=backend)
    for seed, mapped in ((torch.tensor(3).expand(3), None), (seeds, 0)):
        out = vmap(lambda q, s: attend(q, k, v, seed=s), (0, mapped))(queries, seed if mapped == 0 else seed[0])
        loop = torch.stack([attend(a, k, v, seed=s) for a, s in zip(queries, seed, strict=True)])
        assert difference([out], [loop]) <= CUSTOM_F64


@backends
def test_vmap_randomness_is_torchs(backend: str) -> None:
    q, k, v = make_sample().x
    attend = partial(sdpa, dropout_p=0.5, backend=backend)
    batch = torch.stack([q, q])
    same = vmap(lambda q: attend(q, k, v), randomness="same")(batch)
    assert same[0].equal(same[1])
    different = vmap(lambda q: attend(q, k, v), randomness="different")(batch)
    assert not different[0].equal(different[1])
    with pytest.raises(RuntimeError, match="random"):
        vmap(lambda q: attend(q, k, v))(batch)


@backends
def test_without_a_seed_torchs_generator_decides_once(backend: str) -> None:
    x = make_sample().x
    torch.manual_seed(4)
    first = sdpa(*x, dropout_p=0.5, backend=backend)
    state = torch.get_rng_state()
    second = sdpa(*x, dropout_p=0.5, backend=backend)
    torch.manual_seed(4)
    assert sdpa(*x, dropout_p=0.5, backend=backend).equal(first)
    assert torch.get_rng_state().equal(state)
    assert not second.equal(first)
    leaves = [a.clone().requires_grad_() for a in x]
    out = sdpa(*leaves, dropout_p=0.5, backend=backend)
    state = torch.get_rng_state()
    grads = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    torch.autograd.grad(grads, leaves, leaves)
    assert torch.get_rng_state().equal(state)


@backends
def test_everything_or_nothing_dropped(backend: str) -> None:
    x = make_sample().x
    assert sdpa(*x, dropout_p=1.0, seed=0, backend=backend).abs().max() == 0
    assert sdpa(*x, dropout_p=0.0, seed=0, backend=backend).equal(sdpa(*x, backend=backend))


def test_backends_share_the_mask_in_every_order() -> None:
    s, options = make_sample(), {"dropout_p": 0.4, "seed": 9}
    results = []
    for backend in ("custom", "reference"):
        out, lse = sdpa_forward(*s.x, **options, backend=backend)
        first = sdpa_vjp(*s.x, s.do, **options, backend=backend)
        tangent = sdpa_jvp(*s.x, *s.t, **options, backend=backend)
        second = sdpa_hvp(*s.x, s.do, *s.t, s.do, **options, backend=backend)
        results.append((out, lse, *first, *tangent, *second))
    assert difference(*results) <= CUSTOM_F64
