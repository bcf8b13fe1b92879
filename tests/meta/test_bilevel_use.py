"""ITD and AID on pytrees, with torch's optimisers, under transforms; and everything that they have to refuse."""

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.meta.bilevel_methods import CLOSED, TIGHT, aid, bilevel, close, itd
from theria.meta import SGD, FirstOrder, MixedMode, Unrolled
from theria.meta.bilevel import AID, ITD, BilevelProblem
from theria.meta.solvers import CG, Result, SolverError
from theria.testing.problems import PROBLEMS, quadratic

LOOP = 1e-12  # vmap against a loop: the same sums in another order


# ------------------------------------------------------------------------------------- pytrees, torch.optim, transforms
def tree_ridge():
    """`ridge_per_feature` with the weights in a nested pytree, and the penalties too."""
    problem = PROBLEMS["ridge_per_feature"]()

    def join(inner, outer):
        return torch.cat([inner["a"][0], inner["b"].reshape(-1)]), torch.cat([outer[0], outer[1]["rest"]])

    def split(vector, outer=False):
        return (vector[:2], {"rest": vector[2:]}) if outer else {"a": [vector[:2]], "b": vector[2:].reshape(2, 2)}

    losses = [
        lambda inner, outer, loss=loss: loss(*join(inner, outer)) for loss in (problem.inner_loss, problem.outer_loss)
    ]
    return problem, BilevelProblem(*losses), split


@pytest.mark.parametrize("kind", [itd, aid])
def test_pytrees(kind):
    problem, nested, split = tree_ridge()
    found = nested.hypergradient(split(problem.outer0, True), split(problem.inner0), kind(problem))
    expected = split(problem.hypergradient(problem.outer0), True)
    assert pytree.tree_structure(found.gradient) == pytree.tree_structure(expected)
    pytree.tree_map(close, found.gradient, expected)
    assert pytree.tree_structure(found.inner) == pytree.tree_structure(split(problem.inner0))


@pytest.mark.parametrize("kind", [itd, aid])
def test_backward_and_a_torch_optimiser(kind):
    """h's gradient through a function of the outer variable; LBFGS finds the optimum of h."""
    problem = quadratic(7, inner_dim=6, outer_dim=3, condition=4.0)
    assert problem.outer_solution is not None
    raw = torch.nn.Parameter((problem.outer0 / 2).clone())
    (2 * bilevel(problem).evaluate(2 * raw, problem.inner0, kind(problem)).value).backward()
    close(raw.grad, 4 * problem.hypergradient(problem.outer0))

    optimiser = torch.optim.LBFGS(
        [raw], max_iter=30, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = bilevel(problem).evaluate(2 * raw, problem.inner0, kind(problem)).value
        loss.backward()
        return loss

    optimiser.step(closure)
    close(2 * raw.detach(), problem.outer_solution, 1e-6)


@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode(), None], ids=["unrolled", "mixed_mode", "aid"])
def test_vmap_over_problems_is_the_loop(adjoint):
    """Outer variables, starts and data differ; each linear solve stops on its own."""
    n, p, tasks = 12, 4, 5
    X, y = torch.randn(2, tasks, n, p, dtype=torch.float64), torch.randn(2, tasks, n, dtype=torch.float64)
    outers, inners = torch.rand(tasks, p, dtype=torch.float64) + 0.5, torch.randn(tasks, p, dtype=torch.float64)
    X[0, 0], outers[0] = 0.0, 0.7  # H = 0.7 I: one iteration of CG

    def inner_loss(w, l, batch):
        return (batch["X"] @ w - batch["y"]).square().mean() / 2 + (l * w.square()).sum() / 2

    problem = BilevelProblem(inner_loss, lambda w, l, batch: (batch["X"] @ w - batch["y"]).square().mean())
    method = AID(SGD(0.1), 100, TIGHT) if adjoint is None else ITD(SGD(0.1), 20, adjoint)

    def solve(x, z, X, y):
        on = problem.on({"X": X[0], "y": y[0], "kind": None}, {"X": X[1], "y": y[1]})
        return on.hypergradient(x, z, method)

    together = torch.func.vmap(solve, in_dims=(0, 0, 1, 1))(outers, inners, X, y)
    for t in range(tasks):
        alone = solve(outers[t], inners[t], X[:, t], y[:, t])
        pytree.tree_map(lambda a, b, t=t: close(a[t], b, LOOP), tuple(together), tuple(alone))
    if adjoint is None:
        assert len(set(together.linear.iterations.tolist())) > 1


def test_vmapped_values_have_gradients():
    problem = PROBLEMS["least_squares_cleaning"]()
    outers = torch.stack([problem.outer0, problem.outer0.flip(0)]).requires_grad_()
    torch.func.vmap(lambda x: bilevel(problem).evaluate(x, problem.inner0, aid(problem)).value)(outers).sum().backward()
    close(outers.grad, torch.stack([problem.hypergradient(x) for x in outers.detach()]))


def test_rates_can_be_a_part_of_the_outer_variable():
    """d/dr of f after T steps of rate r on a quadratic, by central differences."""
    problem = quadratic(8)

    def value(rate):
        method = ITD(SGD(0.1, learn_lr=True), 4, hyper=lambda outer: {"lr": {"0": outer["rate"]}})
        nested = BilevelProblem(lambda z, x: problem.inner_loss(z, x["x"]), lambda z, x: problem.outer_loss(z, x["x"]))
        return nested.evaluate({"x": problem.outer0, "rate": rate}, problem.inner0, method).value

    rate = torch.tensor(0.2, dtype=torch.float64)
    close(torch.func.grad(value)(rate), (value(rate + 1e-5) - value(rate - 1e-5)) / 2e-5, 1e-8)


def test_second_order_by_unrolling():
    """The Hessian of h of a quadratic problem: hypergradient(x + e) - hypergradient(x), exactly."""
    problem = quadratic(9, inner_dim=4, outer_dim=2, condition=3.0)
    x = problem.outer0

    def value(x):
        return bilevel(problem).evaluate(x, problem.inner0, itd(problem)).value

    columns = [problem.hypergradient(x + e) - problem.hypergradient(x) for e in torch.eye(2).double()]
    close(torch.func.hessian(value)(x), torch.stack(columns), CLOSED)
    tangent = torch.randn_like(x)
    close(torch.func.jvp(value, (x,), (tangent,))[1], problem.hypergradient(x) @ tangent)


def test_first_order_drops_the_inner_problem():
    problem = quadratic()
    gradient = bilevel(problem).hypergradient(problem.outer0, problem.inner0, itd(problem, FirstOrder())).gradient
    direct = torch.func.grad(problem.outer_loss, 1)(problem.inner_solution(problem.outer0), problem.outer0)
    close(gradient, direct)


# ---------------------------------------------------------------------------------------------------------- refusals
def test_aid_refuses_a_second_derivative_and_a_tangent():
    problem = quadratic(0, inner_dim=3, outer_dim=2)

    def value(x):
        return bilevel(problem).evaluate(x, problem.inner0, aid(problem)).value

    x = problem.outer0
    for second in (
        lambda: torch.func.jacrev(torch.func.grad(value))(x),
        lambda: torch.func.hessian(value)(x),
        lambda: torch.func.jvp(value, (x,), (x,)),
        lambda: torch.func.jvp(torch.func.grad(value), (x,), (x,)),
    ):
        with pytest.raises(NotImplementedError, match="ITD"):
            second()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    close(gradient.detach(), problem.hypergradient(x))
    with pytest.raises(NotImplementedError, match="ITD"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", [itd, aid])
def test_a_derivative_that_would_be_lost_is_refused(kind):
    problem = quadratic(0, inner_dim=3, outer_dim=2)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    for inner_scale, outer_scale, name in ((scale, 1, "inner_loss"), (1, scale, "outer_loss")):
        closed_over = BilevelProblem(
            lambda z, x, s=inner_scale: s * problem.inner_loss(z, x),
            lambda z, x, s=outer_scale: s * problem.outer_loss(z, x),
        )
        with pytest.raises(ValueError, match=f"{name} depends on a tensor"):
            closed_over.evaluate(problem.outer0, problem.inner0, kind(problem))
    in_batch = BilevelProblem(lambda z, x, s: s * problem.inner_loss(z, x), problem.outer_loss)
    with pytest.raises(ValueError, match="part of a batch"):
        in_batch.on(scale).evaluate(problem.outer0, problem.inner0, kind(problem))


@pytest.mark.parametrize("kind", [itd, aid])
def test_hypergradients_are_constants_and_say_so(kind):
    problem = quadratic(0, inner_dim=3, outer_dim=2)
    solve = bilevel(problem).hypergradient
    leaf = problem.outer0.clone().requires_grad_()
    found = solve(leaf, problem.inner0.clone().requires_grad_(), kind(problem))
    assert not any(t.requires_grad for t in pytree.tree_leaves(tuple(found)))
    close(found.gradient, problem.hypergradient(problem.outer0))
    for transform in (
        lambda f: torch.func.grad(f)(problem.outer0),
        lambda f: torch.func.jvp(f, (problem.outer0,), (problem.outer0,)),
        lambda f: torch.func.vmap(torch.func.grad(f))(problem.outer0[None]),
    ):
        with pytest.raises(ValueError, match="returns constants"):
            transform(lambda x: solve(x, problem.inner0, kind(problem)).gradient.sum())


def test_a_failed_linear_solve_is_an_error_or_says_so():
    problem = quadratic(0)
    start = (problem.outer0, problem.inner0)
    few = CG(rtol=1e-12, max_iterations=2)
    with pytest.raises(SolverError, match="max_iterations"):
        bilevel(problem).hypergradient(*start, aid(problem, few))
    found = bilevel(problem).hypergradient(*start, aid(problem, few, throw=False))
    assert found.linear.result == Result.max_iterations
    assert found.linear.residual > 1e-6


def test_an_inner_problem_without_a_minimum_is_reported():
    saddle = BilevelProblem(
        lambda z, x: (z * z * torch.tensor([1.0, -1.0])).sum() + (x * z).sum(), lambda z, x: z.sum()
    )
    with pytest.raises(SolverError, match="indefinite"):
        saddle.hypergradient(torch.ones(2), torch.zeros(2), AID(SGD(0.1), 1))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda b, x, z: b.evaluate(x, z, Unrolled()), TypeError, r"ITD\(SGD"),
        (lambda b, x, z: b.evaluate(x, z, ITD(SGD(0.1), 2), z), ValueError, "v0"),
        (lambda b, x, z: b.evaluate({}, z, ITD(SGD(0.1), 2)), TypeError, "outer holds no leaves"),
        (lambda b, x, z: b.evaluate(x, torch.arange(3), ITD(SGD(0.1), 2)), TypeError, "inner0 holds torch.int64"),
        (lambda b, x, z: b.evaluate([x, 1.0], z, ITD(SGD(0.1), 2)), TypeError, "outer holds float"),
        (lambda b, x, z: ITD(SGD(0.1), -1), ValueError, "at least 0"),
        (lambda b, x, z: ITD(SGD(0.1), 1, SGD(0.1)), TypeError, "adjoint"),  # pyright: ignore
        (lambda b, x, z: AID(SGD(0.1), 1, Unrolled()), TypeError, "solver"),  # pyright: ignore
        (lambda b, x, z: AID(SGD(0.1), 1.5), TypeError, "steps"),  # pyright: ignore
        (
            lambda b, x, z: BilevelProblem(lambda z, x: z * x, b.outer_loss).evaluate(x, x, ITD(SGD(0.1), 1)),
            ValueError,
            r"inner_loss returned shape \(2,\)",
        ),
        (
            lambda b, x, z: BilevelProblem(b.inner_loss, lambda z, x: 1.0).evaluate(x, z, ITD(SGD(0.1), 1)),  # pyright: ignore
            ValueError,
            "outer_loss returned float",
        ),
    ],
)
def test_arguments_that_do_not_fit(call, error, words):
    problem = quadratic(0, inner_dim=3, outer_dim=2)
    with pytest.raises(error, match=words):
        call(bilevel(problem), problem.outer0, problem.inner0)
