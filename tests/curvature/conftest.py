"""One small network of every kind of product, and its matrices written out."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from theria.curvature import module_function
from theria.nn import TransformerClassifier

CLASSES = 3


def flat(tree: dict[str, Tensor], leading: int = 0) -> Tensor:
    """(..., N) with the entries of all leaves in order."""
    return torch.cat([x.flatten(leading) for x in tree.values()], -1)


@dataclass(frozen=True)
class Network:
    """A transformer of theria.nn with its data, and the dense truth by `reference` and torch.func."""

    model_fn: Any  # params -> logits (n, CLASSES), through the backend under test
    params: dict[str, Tensor]
    y: Tensor
    jacobian: Tensor  # (n, CLASSES, N)
    logits: Tensor
    hessian: Tensor  # (N, N), of the mean cross entropy

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.model_fn(params), self.y)

    def tree(self, x: Tensor) -> dict[str, Tensor]:
        pieces = x.split([p.numel() for p in self.params.values()], -1)
        return {k: a.reshape(*x.shape[:-1], *p.shape) for (k, p), a in zip(self.params.items(), pieces, strict=True)}


def make_network(backend: str) -> Network:
    torch.manual_seed(0)
    build = partial(TransformerClassifier, CLASSES, image_size=4, patch=2, d_model=4, n_heads=2, n_layers=1, d_ff=4)
    truth = build(backend="reference", head_std=1.0).double()
    model = build(backend=backend).double()
    model.load_state_dict(truth.state_dict())
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 1, 0])
    model_fn, params = module_function(model, x)
    reference = module_function(truth, x)[0]
    jacobian = flat(torch.func.jacrev(reference)(params), 2)
    n = jacobian.shape[-1]
    blocks = torch.func.hessian(lambda p: F.cross_entropy(reference(p), y))(params)
    rows = [torch.cat([b.reshape(params[i].numel(), -1) for b in row.values()], 1) for i, row in blocks.items()]
    hessian = torch.cat(rows)
    assert hessian.shape == (n, n)
    return Network(model_fn, params, y, jacobian, reference(params), hessian)


@pytest.fixture(scope="session", params=["auto", "custom"])
def network(request: pytest.FixtureRequest) -> Network:
    return make_network(request.param)
