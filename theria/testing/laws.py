"""Laws of attention's derivatives that need no reference.

Each law takes ``(attend, sample)`` and returns by how much it is violated, relative to the size of what it compares:
about 1e-15 in float64. They hold for every mask and for dropout with a seed, except where said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from theria.testing.compositions import ARGS, forward_over_reverse, reverse_over_forward, reverse_over_reverse
from theria.testing.samples import Attend, Sample

Law = Callable[[Attend, Sample], float]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """⟨a, b⟩ over tuples of tensors."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def norm(a: Sequence[Tensor]) -> Tensor:
    return dot(a, a).sqrt()


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """‖a − b‖ / ‖b‖ over tuples of tensors, computed in float64."""
    a, b = [x.detach().double() for x in a], [x.detach().double() for x in b]
    return _relative(norm([x - y for x, y in zip(a, b, strict=True)]), norm(b))


def _relative(gap: Tensor, size: Tensor) -> float:
    """|gap| in units of size, or as it is where the two sides of a law are zero."""
    return (gap.abs() / size if size > 0 else gap.abs()).item()


def _call(attend: Attend, s: Sample) -> Callable[..., Tensor]:
    return lambda *x: attend(*x, **s.options)


def _hvp(attend: Attend, s: Sample, direction: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The Hessian of ⟨do, O⟩ along a direction."""
    return jvp(grad(lambda *x: (_call(attend, s)(*x) * s.do).sum(), ARGS), s.x, direction)[1]


def adjoint(attend: Attend, s: Sample) -> float:
    """⟨u, J t⟩ = ⟨Jᵀu, t⟩."""
    f = _call(attend, s)
    pushed = jvp(f, s.x, s.t)[1]
    pulled = vjp(f, *s.x)[1](s.do)
    size = norm([s.do]) * norm([pushed]) + norm(pulled) * norm(s.t)
    return _relative(dot([s.do], [pushed]) - dot(pulled, s.t), size)


def symmetry(attend: Attend, s: Sample) -> float:
    """⟨u, H t⟩ = ⟨t, H u⟩."""
    ht, hu = _hvp(attend, s, s.t), _hvp(attend, s, s.u)
    size = norm(s.u) * norm(ht) + norm(s.t) * norm(hu)
    return _relative(dot(s.u, ht) - dot(s.t, hu), size)


def linearity(attend: Attend, s: Sample) -> float:
    """H(2t − 3u) = 2Ht − 3Hu, and the same for J."""

    def combine(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(2 * x - 3 * y for x, y in zip(a, b, strict=True))

    f, mixed = _call(attend, s), combine(s.t, s.u)
    hessian = difference(_hvp(attend, s, mixed), combine(_hvp(attend, s, s.t), _hvp(attend, s, s.u)))
    pushed = combine([jvp(f, s.x, s.t)[1]], [jvp(f, s.x, s.u)[1]])
    return max(hessian, difference([jvp(f, s.x, mixed)[1]], pushed))


def key_shift(attend: Attend, s: Sample) -> float:
    """One vector added to every key leaves O unchanged; so the cotangents of the keys sum to zero, in every order."""
    q, k, v = s.x
    shift = s.u[1][..., :1, :]
    moved = difference([attend(q, k + shift, v, **s.options)], [attend(q, k, v, **s.options)])
    dk = vjp(_call(attend, s), *s.x)[1](s.do)[1]
    tdk = _hvp(attend, s, s.t)[1]
    sums = [_relative(x.sum(-2).norm(), x.norm()) for x in (dk, tdk)]
    return max(moved, *sums)


def probabilities(attend: Attend, s: Sample) -> float:
    """Rows of P sum to 1: attention to ones is one (zero in a row that sees no key). Not with dropout."""
    q, k, v = s.x
    out = attend(q, k, torch.ones_like(v), **s.options)
    seen = attend(torch.zeros_like(q), torch.zeros_like(k), torch.ones_like(v), **s.options).round()
    return (out - seen).abs().max().item()


def prescaled(attend: Attend, s: Sample) -> float:
    """scale=1 with pre-scaled queries equals the default scale."""
    q, k, v = s.x
    options = {name: value for name, value in s.options.items() if name != "scale"}
    scale = s.options.get("scale", q.shape[-1] ** -0.5)
    return difference([attend(q * scale, k, v, scale=1.0, **options)], [attend(q, k, v, **s.options)])


def modes_agree(attend: Attend, s: Sample) -> float:
    """Forward over reverse, reverse over reverse and reverse over forward give one Hessian-vector product."""
    products = forward_over_reverse(attend, s)[3:]
    return max(difference(other(attend, s), products) for other in (reverse_over_reverse, reverse_over_forward))


LAWS: dict[str, Law] = {
    f.__name__: f for f in (adjoint, symmetry, linearity, key_shift, probabilities, prescaled, modes_agree)
}


def applies(law: str, s: Sample) -> bool:
    """Whether a law speaks about a sample."""
    return law != "probabilities" or "dropout_p" not in s.options
