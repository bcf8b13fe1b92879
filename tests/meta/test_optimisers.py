"""Inner optimisers: what they accept, what they learn, and that they are pure functions of tensors."""

import pytest
import torch
from torch.func import jvp, vmap
from torch.utils import _pytree as pytree

from theria.meta.optimisers import SGD, Adam, AdamW, Cosine, Exponential, Lion, RMSprop

EXACT = 1e-12  # float64, the same arithmetic

ALL = [
    SGD(0.1),
    SGD([0.3, 0.2, 0.1], momentum=0.9, dampening=0.5, weight_decay=0.01),
    SGD(Exponential(0.1, 0.5), momentum=0.9, nesterov=True),
    Adam(0.1, amsgrad=True, weight_decay=0.1),
    AdamW([0.3, 0.2]),
    RMSprop(Cosine(0.1, 5), momentum=0.5, centered=True),
    Lion(0.1, weight_decay=0.1),
]


@pytest.fixture(params=ALL, ids=lambda o: type(o).__name__)
def optimiser(request):
    return request.param


def loss(params):
    w, b = params["w"], params["b"]
    return (w.sin() @ b).square().sum() + (w * w).mean() + b.cos().sum()


def start(dtype=torch.float64):
    return {"w": torch.randn(3, 4, dtype=dtype), "b": torch.randn(4, 2, dtype=dtype)}


def run(optimiser, params, hyper, steps):
    state = optimiser.init(params)
    for _ in range(steps):
        params, state = optimiser.update(torch.func.grad(loss)(params), state, params, hyper)
    return params, state


def same(actual, expected, tol=EXACT):
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("make", [SGD, Adam, AdamW, RMSprop, Lion])
def test_learned_rates_start_at_lr_in_the_documented_shapes(make):
    params = start()

    def shapes(**options):
        rates = make(**options).hyper(params)["lr"]
        start_at = options["lr"] if isinstance(options["lr"], list) else [options["lr"]]
        assert sum(r.sum() for r in rates.values()) == pytest.approx(
            sum(r.numel() / len(start_at) * sum(start_at) for r in rates.values())
        )
        return {name: tuple(r.shape) for name, r in rates.items()}

    assert make(lr=0.3).hyper(params) == make(lr=[0.3, 0.1]).hyper(params) == {}
    assert shapes(lr=0.3, learn_lr=True) == {"w": (3, 4), "b": (4, 2)}
    assert shapes(lr=0.3, learn_lr="tensor") == {"w": (), "b": ()}
    assert shapes(lr=[0.3, 0.1], learn_lr="tensor") == {"w": (2,), "b": (2,)}
    assert shapes(lr=[0.3, 0.1], learn_lr=True) == {"w": (2, 3, 4), "b": (2, 4, 2)}


@pytest.mark.parametrize("learn_lr", [False, True, "tensor"])
@pytest.mark.parametrize("make", [SGD, Adam, AdamW, RMSprop, Lion])
def test_each_step_uses_its_rate_and_later_ones_the_last(make, learn_lr):
    params, rates = start(), [0.3, 0.02, 0.1]
    optimiser = make(lr=rates, learn_lr=learn_lr)
    hyper = optimiser.hyper(params)
    expected, state, plain = params, make(lr=1.0).init(params), make(lr=1.0)
    for rate in [0.3, 0.02, 0.1, 0.1, 0.1]:
        grads, scalar = torch.func.grad(loss)(expected), torch.tensor(rate, dtype=torch.float64)
        expected, state = plain.update(grads, state, expected, {"lr": scalar})
    same(run(optimiser, params, hyper, 5)[0], expected)


def test_schedules_equal_those_of_torch():
    for schedule, name, options in [
        (Exponential(0.3, 0.7), "ExponentialLR", {"gamma": 0.7}),
        (Cosine(0.3, 6, last=0.01), "CosineAnnealingLR", {"T_max": 6, "eta_min": 0.01}),
    ]:
        theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
        scheduler = getattr(torch.optim.lr_scheduler, name)(theirs, **options)
        for t in range(7):
            torch.testing.assert_close(
                schedule(torch.tensor(float(t), dtype=torch.float64)).item(),
                theirs.param_groups[0]["lr"],
                rtol=1e-12,
                atol=0,
            )
            theirs.step()
            scheduler.step()
    assert Cosine(0.3, 6, last=0.01)(torch.tensor(9.0)) == pytest.approx(0.01)


def test_a_scheduled_step_uses_the_count_of_steps_done():
    params, schedule = start(), Exponential(0.2, 0.5)
    same(run(SGD(schedule), params, {}, 3)[0], run(SGD([0.2, 0.1, 0.05]), params, {}, 3)[0])


@pytest.mark.parametrize("shape", ["shared", "each", "entry"])
def test_a_hyperparameter_may_be_one_tensor_one_for_each_parameter_or_for_each_entry(shape):
    params, value = start(), torch.tensor(0.2, dtype=torch.float64)
    given = {
        "shared": value,
        "each": dict.fromkeys(params, value),
        "entry": {name: torch.full_like(p, 0.2) for name, p in params.items()},
    }[shape]
    expected = run(AdamW(0.2, weight_decay=0.3), params, {}, 3)[0]
    same(run(AdamW(1.0, weight_decay=0.3), params, {"lr": given}, 3)[0], expected)
    expected = run(AdamW(0.1, weight_decay=0.2), params, {}, 3)[0]
    same(run(AdamW(0.1, weight_decay=0.7), params, {"weight_decay": given}, 3)[0], expected)


def test_vmap_maps_the_whole_state_and_equals_the_loop(optimiser):
    starts = {name: torch.stack([p, 2 * p, -p]) for name, p in start().items()}
    state = vmap(optimiser.init)(starts)
    steps = vmap(lambda p, s: optimiser.update(torch.func.grad(loss)(p), s, p, {}))
    params = starts
    for _ in range(4):
        params, state = steps(params, state)  # the state leaves the transform and comes back
    for i in range(3):
        expected = run(optimiser, {name: p[i] for name, p in starts.items()}, {}, 4)
        same(({name: p[i] for name, p in params.items()}, pytree.tree_map(lambda x, i=i: x[i], state)), expected)


def test_states_and_steps_pass_forward_mode(optimiser):
    params = start()
    primal, tangent = jvp(lambda p: run(optimiser, p, {}, 3), (params,), (params,))[:2]
    same(primal, run(optimiser, params, {}, 3))
    assert all(torch.isfinite(leaf).all() for leaf in pytree.tree_leaves(tangent))


def test_inputs_are_not_mutated_and_outputs_are_new(optimiser):
    params, state = start(), optimiser.init(start())
    before = pytree.tree_map(torch.clone, (params, state))
    after = optimiser.update(params, state, params, {})
    same((params, state), before, tol=0)
    inputs = {leaf.data_ptr() for leaf in pytree.tree_leaves((params, state))}
    assert inputs.isdisjoint(leaf.data_ptr() for leaf in pytree.tree_leaves(after))
    assert all(leaf.is_floating_point() for leaf in pytree.tree_leaves(state))


@pytest.mark.parametrize("optimiser", [SGD([0.3, 0.2], learn_lr="tensor"), Adam(0.1, weight_decay=0.1)], ids=str)
def test_derivatives_of_steps_compile_to_one_graph(optimiser):
    params, hyper = start(), optimiser.hyper(start())

    def gradient(params, hyper):
        return torch.func.grad(lambda p, h: loss(run(optimiser, p, h, 2)[0]), (0, 1))(params, hyper)

    compiled = torch.compile(gradient, fullgraph=True, backend="eager")
    same(compiled(params, hyper), gradient(params, hyper))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_keep_their_dtype_scalars_included(optimiser, dtype):
    params = {"w": torch.ones(2, dtype=dtype), "s": torch.ones((), dtype=dtype)}
    hyper = {} if isinstance(optimiser.lr, tuple) else {"lr": torch.tensor(0.1, dtype=torch.float64)}
    state = optimiser.init(params)
    for _ in range(2):
        params, state = optimiser.update(params, state, params, hyper)
    assert {p.dtype for p in params.values()} == {dtype}
    assert {x.dtype for kind, x in state.items() if kind == "count"} <= {torch.float64}
    assert {x.dtype for kind, xs in state.items() if kind != "count" for x in xs.values()} <= {dtype}


def test_no_parameters_is_no_work(optimiser):
    assert optimiser.update({}, optimiser.init({}), {}, {})[0] == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(0.0), "lr=0.0.*positive"),
        (lambda: SGD(-1.0), "lr=-1.0.*positive"),
        (lambda: SGD(float("nan")), "lr=nan.*finite"),
        (lambda: Adam(float("inf")), "lr=inf.*finite"),
        (lambda: Lion([0.1, 0.0]), "positive"),
        (lambda: RMSprop([]), "positive"),
        (lambda: SGD(0.1, momentum=1.0), r"momentum=1.0 is outside \[0, 1\)"),
        (lambda: SGD(0.1, nesterov=True), "momentum > 0"),
        (lambda: SGD(0.1, momentum=0.9, nesterov=True, dampening=0.1), "no dampening"),
        (lambda: SGD(0.1, dampening=0.1), "momentum > 0"),
        (lambda: SGD(0.1, learn_lr="row"), "learn_lr='row' is not known"),
        (lambda: SGD(Cosine(0.1, 5), learn_lr=True), "no rates to learn"),
        (lambda: AdamW(betas=(0.9, 1.0)), r"beta2=1.0 is outside"),
        (lambda: Lion(betas=(-0.1, 0.9)), r"beta1=-0.1 is outside"),
        (lambda: Adam(eps=0.0), "eps=0.0.*NaN"),
        (lambda: RMSprop(eps=-1.0), "eps=-1.0"),
        (lambda: RMSprop(alpha=1.5), "alpha=1.5 is outside"),
        (lambda: Adam(weight_decay=-0.1), "weight_decay=-0.1"),
        (lambda: Cosine(0.1, 0), "steps=0"),
        (lambda: Cosine(0.1, 3, last=-1.0), "last=-1.0"),
        (lambda: Exponential(0.1, 0.0), "gamma=0.0"),
    ],
)
def test_impossible_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("lr", [torch.tensor(0.1), "0.1", None])
def test_what_is_no_rate_is_named(lr):
    with pytest.raises(TypeError, match="lr"):
        SGD(lr)


@pytest.mark.parametrize(
    ("optimiser", "hyper", "message"),
    [
        (SGD(0.1), {"learning_rate": 0.1}, r"\['learning_rate'\].*does not read.*\['lr', 'weight_decay'\]"),
        (SGD(0.1), {"momentum": 0.1}, "momentum.*construction"),
        (RMSprop(0.1), {"momentum": 0.1}, "momentum.*construction"),
        (Lion(0.1), {"eps": 0.1}, "eps"),
        (
            SGD([0.1, 0.2]),
            {"lr": {"w": torch.ones(3, 4), "b": torch.ones(2)}},
            r"'w' has shape \(3, 4\).*dimension of 2",
        ),
    ],
)
def test_hyperparameters_that_would_be_ignored_raise(optimiser, hyper, message):
    params = start()
    with pytest.raises(ValueError, match=message):
        optimiser.update(params, optimiser.init(params), params, hyper)
