"""Arguments that are values: a class, another kind of value, or params that are no dict are named as what they are."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import theria.meta
import theria.nn
from theria.meta import (
    AID,
    ANIL,
    IMAML,
    ITD,
    MAML,
    SGD,
    FirstOrder,
    Higher,
    Identity,
    Implicit,
    MAMLPlusPlus,
    MixedMode,
    Reptile,
    Truncated,
    Unrolled,
    argmin,
    certify,
    custom_root,
    fixed_point,
    linear_solve,
    root,
)
from theria.meta.adjoint import Adjoint
from theria.meta.certificate import Fault, spot_check
from theria.meta.implicit import LBFGS, Anderson, GradientDescent, Inexact, Newton, NewtonCG, Picard
from theria.meta.solvers import CG, GMRES, SolverError
from theria.nn import MLP

C = torch.ones(2, dtype=torch.float64)
MODEL = MLP((1, 4, 1))
bad: Any = lambda x: x  # noqa: E731  (what follows is wrong for the type checker, as it is meant to be)


def loss(z: Tensor, c: Tensor) -> Tensor:
    return (z - c).square().sum() / 2


CLASSES: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: Implicit(bad(CG)), "solver=CG", "CG()"),
    (lambda: Inexact(bad(GMRES)), "solver=GMRES", "GMRES()"),
    (lambda: argmin(loss, C, C, solver=bad(LBFGS)), "solver=LBFGS", "LBFGS()"),
    (lambda: argmin(loss, C, C, solver=bad(GradientDescent)), "solver=GradientDescent", "GradientDescent(...)"),
    (lambda: argmin(loss, C, C, linear_solver=bad(CG)), "linear_solver=CG", "CG()"),
    (lambda: fixed_point(lambda x, c: x / 2 + c, C, C, solver=bad(Anderson)), "solver=Anderson", "Anderson()"),
    (lambda: root(lambda x, c: x - c, C, C, solver=bad(Newton)), "solver=Newton", "Newton()"),
    (lambda: custom_root(lambda x, c: x - c, linear_solver=bad(CG))(lambda x, c: c)(C, C), "linear_solver=CG", "CG()"),
    (lambda: linear_solve(lambda v: v, C, solver=bad(CG)), "solver=CG", "CG()"),
    (lambda: Newton(bad(GMRES)), "linear_solver=GMRES", "GMRES()"),
    (lambda: NewtonCG(bad(CG)), "linear_solver=CG", "CG()"),
    (lambda: certify(loss, loss, C, C, solver=bad(CG)), "solver=CG", "CG()"),
    (lambda: ITD(SGD(0.1), 1, bad(Unrolled)), "adjoint=Unrolled", "Unrolled()"),
    (lambda: ITD(bad(SGD), 1), "optimiser=SGD", "SGD(...)"),
    (lambda: AID(bad(SGD), 1), "optimiser=SGD", "SGD(...)"),
    (lambda: AID(SGD(0.1), 1, bad(CG)), "solver=CG", "CG()"),
    *[
        (lambda kind=kind: kind(MODEL, mse_loss, adjoint=bad(MixedMode)), "adjoint=MixedMode", "MixedMode()")
        for kind in (MAML, ANIL, IMAML, MAMLPlusPlus)
    ],
    *[
        (lambda kind=kind: kind(MODEL, mse_loss, bad(SGD)), "inner=SGD", "SGD(...)")
        for kind in (MAML, ANIL, IMAML, MAMLPlusPlus, Reptile)
    ],
    (lambda: Unrolled().solve(lambda p, c: loss(p["z"], c), {"z": C}, C, bad(SGD), {}, 1), "optimiser=SGD", "SGD(...)"),
]


@pytest.mark.parametrize(("call", "given", "write"), CLASSES, ids=range(len(CLASSES)))
def test_a_class_in_place_of_a_value(call: Callable[[], Any], given: str, write: str):
    with pytest.raises(TypeError) as error:
        call()
    assert str(error.value) == f"{given} is a class, and a value is needed: write {write}"


OTHERS: list[tuple[Callable[[], Any], str]] = [
    (lambda: Implicit(bad(1e-6)), r"solver=1e-06: give a linear solver such as CG\(\)"),
    (lambda: Implicit(bad(SGD)), r"solver=<class .*SGD'>: give a linear solver such as CG\(\)"),
    (lambda: argmin(loss, C, C, solver=bad(CG())), r"solver=CG\(.*\): give a way to iterate such as LBFGS\(\)"),
    (lambda: argmin(loss, C, C, solver=Picard()), r"solver=Picard\(.*\) is one of fixed_point: for argmin give LBFGS"),
    (lambda: fixed_point(lambda x, c: c, C, C, solver=LBFGS()), r"is one of argmin: for fixed_point give Picard\(\)"),
    (lambda: root(lambda x, c: x - c, C, C, solver=Anderson()), r"is one of fixed_point: for root give Newton\(\)"),
    (lambda: MAML(MODEL, mse_loss, adjoint=bad("mixed")), r"adjoint='mixed': give an adjoint such as MixedMode\(\)"),
]


@pytest.mark.parametrize(("call", "message"), OTHERS, ids=range(len(OTHERS)))
def test_a_value_of_another_kind(call: Callable[[], Any], message: str):
    with pytest.raises(TypeError, match=message):
        call()


ADJOINTS = [Unrolled(), Unrolled(1), MixedMode(), FirstOrder(), Truncated(1), Implicit(), Identity(), Higher()]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_params_that_are_no_dict_of_tensors(adjoint: Adjoint):
    for params, given in ((C, "a Tensor"), ([C], "a list"), ({"z": [1.0]}, r"a dict with \['list'\]")):
        with pytest.raises(TypeError, match=f"params is {given}: give .* a dict of tensors by name"):
            adjoint.solve(lambda p, c: loss(p["z"], c), bad(params), C, SGD(0.5), {}, 2)


# --- what failures and the package say ----------------------------------------------------------------------------


def test_a_failure_says_what_was_solved_and_of_how_many_tasks():
    with pytest.raises(SolverError, match=r"^linear solve did not converge \(max_iterations, residual \d.*after 1 it"):
        CG(max_iterations=1).solve(lambda v: v * torch.tensor([1.0, 2.0], dtype=torch.float64), C)
    starts = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, 3.0]], dtype=torch.float64)
    with pytest.raises(SolverError, match=r"^fixed_point did not converge \(2 of 3 tasks, the first of them task 0: "):
        torch.func.vmap(lambda x: fixed_point(lambda x, c: x / 2 + c / 2, x, C, max_iter=1).value)(starts)


def test_a_failed_solve_under_imaml_names_the_strength():
    """A support loss that is concave near its start, more than the proximal term holds against."""
    learner = IMAML(
        lambda p, x: (p["w"] * 3).cos() + 0 * x, lambda p, y: p.mean(), SGD(1e-3), 1, tol=None,
        params={"w": torch.zeros((), dtype=torch.float64) + 0.1}, strength=0.5,
    )  # fmt: skip
    x = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(SolverError, match=r"indefinite.*add damping \(for IMAML: raise strength\)"):
        learner((x, x[:, 0], x, x[:, 0]), batched=False).backward()


def test_sizes_of_findings_where_a_hypergradient_of_zero_was_given():
    def outer_loss(z: Tensor, c: Tensor) -> Tensor:
        return z.sum()

    certificate = certify(loss, outer_loss, C, C, hypergradient=torch.zeros_like(C), directions=2)
    assert Fault.wrong_formula in certificate.faults
    assert all(finding.size <= 2 for finding in certificate.findings), certificate
    nothing = certify(loss, lambda z, c: 0 * z.sum(), C, C, hypergradient=torch.zeros_like(C))
    assert nothing.ok, nothing


def test_exports():
    assert theria.meta.spot_check is spot_check
    assert {"DeepEquilibrium", "EquilibriumBlock"} <= set(theria.nn.__all__)
    assert isinstance(theria.nn.DeepEquilibrium(theria.nn.EquilibriumBlock(4, 1)), torch.nn.Module)


@pytest.mark.parametrize("module", ["theria.nn", "theria.meta", "theria.nn.equilibrium", "theria.curvature"])
def test_no_module_has_to_be_imported_before_another(module: str):
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
