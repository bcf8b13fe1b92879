"""Traces and diagonals of operators from products with random vectors, with their standard errors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from theria.curvature.vectors import (
    Layout,
    LinearMap,
    Tree,
    VectorMap,
    check_count,
    chunks,
    generator_of,
    many,
    rademacher,
)


class Estimate(NamedTuple):
    """A mean over random probes.

    Attributes:
        value: the estimate, unbiased.
        standard_error: of `value`, from the spread of the probes; like `value`.
    """

    value: Any
    standard_error: Any


def mean_of(samples: Tensor) -> Estimate:
    """The mean over the first dimension (at least 2 entries) and its standard error."""
    return Estimate(samples.mean(0), samples.std(0) / len(samples) ** 0.5)


def trace(
    matvec: LinearMap,
    like: Tree,
    *,
    probes: int = 32,
    seed: int | torch.Generator = 0,
    chunk_size: int | None = None,
) -> Estimate:
    """tr A as the mean of z'Az over vectors z of ±1 (Hutchinson, Comm. Stat. Sim. Comp. 19 (1990) 433).

    The variance of one probe is that of the part off the diagonal: 2 sum_{i != j} A_ij^2 for a symmetric A; a diagonal
    A is exact at once.

    Args:
        matvec: v -> A v on pytrees like `like`. Runs under `torch.func.vmap`, unless `chunk_size` is 1.
        like: a pytree of tensors of one dtype on one device; its values are not used.
        probes: products with A; at least 2, for a standard error.
        seed: a number, or a generator, which is advanced.
        chunk_size: how many probes run at once (bounds memory); all by default. The result does not depend on it.
    """
    check_count("probes", probes, 2)
    layout, generator = Layout.of(like, "like"), generator_of(seed)
    apply = layout.on_vectors(matvec)
    with torch.no_grad():
        return mean_of(_quadratic_forms(apply, layout, probes, generator, chunk_size))


def trace_deflated(
    matvec: LinearMap,
    like: Tree,
    *,
    probes: int = 33,
    seed: int | torch.Generator = 0,
    chunk_size: int | None = None,
) -> Estimate:
    """tr A by Hutch++ (Meyer, Musco, Musco and Woodruff 2021, arXiv 2010.09649, algorithm 1), for a symmetric A.

    A third of the products sketches the range of A, a third gives the trace on an orthonormal basis Q of it exactly,
    the rest estimates tr (I - QQ') A (I - QQ') as `trace` does. With a spectrum that decays the error falls with the
    number of probes instead of its root. `probes` is the number of all products, at least 6; see `trace`.
    """
    check_count("probes", probes, 6)
    layout, generator = Layout.of(like, "like"), generator_of(seed)
    apply = layout.on_vectors(matvec)
    third = min(probes // 3, layout.size)
    with torch.no_grad():
        sketch = many(apply, rademacher(layout, third, generator), chunk_size)
        Q = torch.linalg.qr(sketch.mT)[0].mT  # (third, N), orthonormal rows
        on_basis = (Q * many(apply, Q, chunk_size)).sum()

        def outside(x: Tensor) -> Tensor:
            return x - (Q @ x) @ Q

        rest = mean_of(
            _quadratic_forms(lambda z: apply(outside(z)), layout, probes - 2 * third, generator, chunk_size, outside)
        )
    return Estimate(on_basis + rest.value, rest.standard_error)


def _quadratic_forms(
    apply: VectorMap,
    layout: Layout,
    probes: int,
    generator: torch.Generator,
    chunk_size: int | None,
    left: VectorMap = lambda z: z,
) -> Tensor:
    """(probes,) of left(z)' apply(z)."""
    sizes = chunks(probes, chunk_size)
    forms = [many(lambda z: left(z) @ apply(z), rademacher(layout, count, generator), chunk_size) for count in sizes]
    return torch.cat(forms)


def diagonal(
    matvec: LinearMap,
    like: Tree,
    *,
    probes: int = 32,
    seed: int | torch.Generator = 0,
    chunk_size: int | None = None,
) -> Estimate:
    """diag A as the mean of z∘Az over vectors z of ±1 (Bekas, Kokiopoulou and Saad, Appl. Num. Math. 57 (2007) 1214).

    The variance of one probe at entry i is sum_{j != i} A_ij^2. The arguments are those of `trace`; the value and the
    standard error are pytrees like `like`.
    """
    check_count("probes", probes, 2)
    layout, generator = Layout.of(like, "like"), generator_of(seed)
    apply = layout.on_vectors(matvec)
    mean = spread = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
    done = 0
    with torch.no_grad():
        for count in chunks(probes, chunk_size):
            samples = many(lambda z: z * apply(z), rademacher(layout, count, generator), chunk_size)
            # Chan, Golub and LeVeque's update of a mean and a sum of squares by a batch: (probes, N) is never kept.
            step = samples.mean(0) - mean
            spread = (
                spread + (samples - samples.mean(0)).square().sum(0) + step.square() * (done * count) / (done + count)
            )
            mean = mean + step * (count / (done + count))
            done += count
    error = (spread / (probes - 1) / probes).sqrt()
    return Estimate(layout.unravel(mean), layout.unravel(error))
