"""Curvature of functions on pytrees and modules, by products alone.

| name | what |
|---|---|
| `hvp` | Hessian times vector, three modes |
| `gauss_newton_product`, `fisher_product`, `empirical_fisher_product` | the positive semidefinite relatives |
| `extreme_eigenvalues`, `spectral_density` | the ends of a spectrum, its density, traces of functions (Lanczos) |
| `trace`, `trace_deflated`, `diagonal` | estimates with standard errors (Hutchinson, Hutch++) |
| `module_function`, `module_loss` | a module as a pure function of its parameters |
| `second_order` | mends PyTorch functions whose second derivative is wrong |

The estimators take an operator v -> A v, such as `functools.partial(hvp, loss_fn, params)`, and return constants.
"""

from theria.curvature.hvp import hvp
from theria.curvature.lanczos import Extremes, extreme_eigenvalues
from theria.curvature.modules import module_function, module_loss
from theria.curvature.products import (
    Categorical,
    Gaussian,
    empirical_fisher_product,
    fisher_product,
    gauss_newton_product,
)
from theria.curvature.second_order import second_order
from theria.curvature.spectrum import SpectralDensity, spectral_density
from theria.curvature.trace import Estimate, diagonal, trace, trace_deflated

__all__ = [
    "Categorical",
    "Estimate",
    "Extremes",
    "Gaussian",
    "SpectralDensity",
    "diagonal",
    "empirical_fisher_product",
    "extreme_eigenvalues",
    "fisher_product",
    "gauss_newton_product",
    "hvp",
    "module_function",
    "module_loss",
    "second_order",
    "spectral_density",
    "trace",
    "trace_deflated",
]
