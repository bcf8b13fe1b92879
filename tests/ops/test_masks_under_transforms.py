"""An additive mask as an operand of every transform, and mapped masks of both kinds."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap
from torch.utils._pytree import tree_leaves

from tests.tolerances import CUSTOM_F64
from theria.ops import sdpa
from theria.testing import difference, make_sample, naive_attention

Q, K, V = make_sample((2, 3), 4, 5, 4, 2).x
Z = torch.randn(3, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Attend = Callable[..., Tensor]


def loss(attend: Attend, q: Tensor, z: Tensor) -> Tensor:
    return attend(q, K, V, attn_mask=z).sin().sum()


def along(attend: Attend, direction: Tensor) -> Callable[[Tensor], Tensor]:
    """The tangent of attention along a direction of the mask, as a function of the mask."""
    return lambda z: jvp(lambda y: attend(Q, K, V, attn_mask=y), (z,), (direction,))[1]


TRANSFORMS: dict[str, Callable[[Attend], object]] = {
    "vmap_grad": lambda f: vmap(grad(partial(loss, f), (0, 1)), (None, 0))(Q, Z),
    "hessian": lambda f: hessian(partial(loss, f), 1)(Q, Z[0]),
    "jvp": lambda f: along(f, Z[1])(Z[0]),
    "vmap_jvp": lambda f: vmap(lambda t: along(f, t)(Z[0]))(Z),
    "grad_of_jvp": lambda f: grad(lambda z: jvp(lambda q: loss(f, q, z), (Q,), (Q.cos(),))[1])(Z[0]),
    "jvp_of_grad": lambda f: jvp(grad(partial(loss, f), (0, 1)), (Q, Z[0]), (Q.cos(), Z[1])),
    "jvp_of_jvp": lambda f: jvp(along(f, Z[1]), (Z[0],), (Z[2],))[1],
    "mapped_boolean": lambda f: vmap(lambda z: grad(lambda q: loss(f, q, z))(Q))(Z > 0),
}


@pytest.mark.parametrize("backend", ["reference", "custom"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_equals_the_naive_formula(name: str, backend: str) -> None:
    results = [tree_leaves(TRANSFORMS[name](f)) for f in (partial(sdpa, backend=backend), naive_attention)]
    assert difference(*results) <= CUSTOM_F64
