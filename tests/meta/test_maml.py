"""The learner: tasks, styles, partial adaptation, learned rates, randomness, messages."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy, mse_loss

from theria.meta import ANIL, FOMAML, MAML, SGD, FirstOrder, Higher, MixedMode, Unrolled
from theria.nn import MLP, TransformerClassifier

EXACT = 1e-10  # float64, the same derivative in another order of sums
DIFFERENCE = 1e-6  # central differences, step 1e-5, of a smooth function


@pytest.fixture
def model():
    return MLP([2, 6, 3], activation=nn.Tanh).double()


@pytest.fixture
def episode():
    """T = 4 tasks, 3 classes; S = 6, Q = 5."""
    x = torch.randn(4, 11, 2, dtype=torch.float64)
    y = torch.randint(3, (4, 11))
    return x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]


def gradients(learner, *arguments, **options):
    learner.zero_grad()
    learner(*arguments, **options).backward()
    return {name: p.grad.clone() for name, p in learner.named_parameters()}


def assert_same(actual, expected, tol=EXACT):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("inner", [SGD(0.4), SGD(0.1, momentum=0.9, learn_lr=True)], ids=["sgd", "meta_sgd"])
@pytest.mark.parametrize("adjoint", [MixedMode(), Higher(), Unrolled()], ids=lambda a: type(a).__name__)
def test_tasks_chunks_and_styles_agree(model, episode, adjoint, inner):
    reference = MAML(model, cross_entropy, inner, 3)
    meta_params = dict(reference.named_parameters())

    def loop(meta_params):
        return torch.stack([reference.outer_loss(meta_params, task) for task in zip(*episode, strict=True)]).mean()

    expected = {name: g.detach() for name, g in grad(loop)(meta_params).items()}
    for chunk_size in (None, 1, 3):
        learner = MAML(model, cross_entropy, inner, 3, adjoint, chunk_size=chunk_size)
        assert_same(gradients(learner, episode), expected)
        if adjoint != Higher():
            functional = grad(learner.outer_loss)(dict(learner.named_parameters()), episode)
            assert_same({name: g.detach() for name, g in functional.items()}, expected)
    assert set(expected) >= {"model.head.weight", "model.body.0.bias"}
    assert ("rates.lr.head/weight" in expected) == inner.learn_lr


def test_transformer_meta_gradient_agrees_between_adjoints():
    model = TransformerClassifier(3, image_size=8, patch=4, d_model=8, n_heads=2, n_layers=1).double()
    x = torch.rand(2, 12, 1, 8, 8, dtype=torch.float64)
    y = torch.arange(3).repeat(2, 4)
    episode = (x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])
    expected = gradients(MAML(model, cross_entropy, SGD(0.3), 3), episode)
    assert_same(gradients(MAML(model, cross_entropy, SGD(0.3), 3, MixedMode()), episode), expected)
    first_order = gradients(FOMAML(model, cross_entropy, SGD(0.3), steps=3), episode)
    assert max((first_order[name] - g).abs().max() for name, g in expected.items()) > 1e-4


def test_meta_gradient_against_finite_differences(model, episode):
    learner = MAML(model, cross_entropy, SGD(0.4, learn_lr=True), 3, MixedMode())
    start = {name: p.detach().clone() for name, p in learner.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in start.items()}
    gradient = gradients(learner, episode)

    def along(step):
        with torch.no_grad():
            return learner.outer_loss({name: p + step * direction[name] for name, p in start.items()}, episode)

    for kind in ("model.", "rates."):
        chosen = {name: d if name.startswith(kind) else torch.zeros_like(d) for name, d in direction.items()}
        direction, kept = chosen, direction
        difference = (along(1e-5) - along(-1e-5)) / 2e-5
        product = torch.stack([(gradient[name] * d).sum() for name, d in chosen.items()]).sum()
        torch.testing.assert_close(product, difference, rtol=DIFFERENCE, atol=DIFFERENCE)
        direction = kept


def test_predict_and_adapt_are_the_same_adaptation(model, episode):
    learner = MAML(model, cross_entropy, SGD(0.4), 3, MixedMode())
    predictions = learner.predict(episode)
    assert predictions.shape == (4, 5, 3)
    for t, (sx, sy, qx, qy) in enumerate(zip(*episode, strict=True)):
        params = learner.adapt(sx, sy)
        assert params.keys() == dict(model.named_parameters()).keys()
        expected = functional_call(model, params, (qx,))
        torch.testing.assert_close(predictions[t], expected, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(learner.predict((sx, sy, qx, qy)), expected, rtol=EXACT, atol=EXACT)
    losses = torch.stack([cross_entropy(p, y) for p, y in zip(predictions, episode[3], strict=True)])
    torch.testing.assert_close(learner(episode), losses.mean(), rtol=EXACT, atol=EXACT)
    unadapted = learner.predict(episode, steps=0)
    torch.testing.assert_close(unadapted, model(episode[2]), rtol=EXACT, atol=EXACT)
    more = MAML(model, cross_entropy, SGD(0.4), 5).predict(episode)
    torch.testing.assert_close(learner.predict(episode, steps=5), more, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode(), FirstOrder(), Higher()], ids=lambda a: type(a).__name__)
def test_no_grad_and_inference_record_nothing(model, episode, adjoint):
    learner = MAML(model, cross_entropy, SGD(0.4), 2, adjoint)
    expected = learner.predict(episode).detach()
    with torch.no_grad():
        out = learner.predict(episode)
    assert not out.requires_grad
    torch.testing.assert_close(out, expected, rtol=EXACT, atol=EXACT)


def test_adapt_is_differentiable_in_the_meta_parameters(model, episode):
    sx, sy, qx, qy = (part[0] for part in episode)
    learner = MAML(model, cross_entropy, SGD(0.4), 2, MixedMode())
    expected = gradients(learner, (sx, sy, qx, qy))
    learner.zero_grad()
    cross_entropy(functional_call(model, learner.adapt(sx, sy), (qx,)), qy).backward()
    assert_same({f"model.{name}": p.grad for name, p in model.named_parameters()}, expected)


def test_the_module_is_not_changed(model, episode):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learner = MAML(model, cross_entropy, SGD(0.4, momentum=0.5), 3, MixedMode())
    learner(episode).backward()
    learner.predict(episode)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pure_function_equals_the_module(model, episode):
    params = {name: p.detach().clone() for name, p in model.named_parameters()}

    def function(params, x):
        hidden = (x @ params["body.0.weight"].T + params["body.0.bias"]).tanh()
        return hidden @ params["head.weight"].T + params["head.bias"]

    inner = SGD(0.4, learn_lr=True)
    learner = MAML(function, cross_entropy, inner, 2, MixedMode(), params=params)
    actual = gradients(learner, episode)
    expected = gradients(MAML(model, cross_entropy, inner, 2), episode)
    renamed = {
        name.replace("params.", "model.").replace("body/0/", "body.0."): g
        for name, g in actual.items()
        if name.startswith("params.")
    }
    renamed = {name.replace("head/", "head."): g for name, g in renamed.items()}
    renamed |= {name: g for name, g in actual.items() if name.startswith("rates.")}
    assert_same(renamed, expected)
    assert learner.adapt(episode[0][0], episode[1][0]).keys() == params.keys()


@pytest.mark.parametrize(
    "adapt",
    ["head", ["head"], ["head.weight", "head.bias"], lambda name: name.startswith("head")],
    ids=["module", "list", "parameters", "predicate"],
)
def test_anil_adapts_the_head_and_learns_the_body(model, episode, adapt):
    learner = MAML(model, cross_entropy, SGD(0.4, learn_lr=True), 3, MixedMode(), adapt=adapt)
    assert learner.adapted == ["head.weight", "head.bias"] == ANIL(model, cross_entropy).adapted
    assert {name for name, _ in learner.named_parameters() if name.startswith("rates")} == {
        "rates.lr.head/weight",
        "rates.lr.head/bias",
    }
    adapted = learner.adapt(episode[0][0], episode[1][0])
    assert adapted["body.0.weight"] is model.body[0].weight
    assert not torch.equal(adapted["head.weight"], model.head.weight)
    expected = gradients(MAML(model, cross_entropy, SGD(0.4, learn_lr=True), 3, adapt=adapt), episode)
    assert_same(gradients(learner, episode), expected)
    assert expected["model.body.0.weight"].abs().max() > 1e-4


def test_shared_parameters_stay_shared(episode):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh())

    model, data = Tied().double(), tuple(part % 2 if part.dtype == torch.int64 else part for part in episode)
    learner = MAML(model, cross_entropy, SGD(0.4), 2, MixedMode())
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert list(params) == ["first.weight", "first.bias", "second.bias"]

    def by_hand(params, x):
        hidden = (x @ params["first.weight"].T + params["first.bias"]).tanh()
        return hidden @ params["first.weight"].T + params["second.bias"]

    expected = MAML(by_hand, cross_entropy, SGD(0.4), 2, params=params)
    torch.testing.assert_close(learner(data), expected(data), rtol=EXACT, atol=EXACT)
    weight = gradients(expected, data)["params.first/weight"]
    torch.testing.assert_close(gradients(learner, data)["model.first.weight"], weight, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_dropout_is_replayed_on_the_way_back(episode, randomness):
    model = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3)).double()

    def seeded(adjoint):
        torch.manual_seed(7)
        learner = MAML(model, cross_entropy, SGD(0.4), 3, adjoint, randomness=randomness)
        loss = learner(episode)
        torch.rand(5)  # the generator moves on before the backward
        learner.zero_grad()
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}
        return loss.item(), gradient, torch.get_rng_state()

    # MixedMode evaluates the inner loss more often, but draws the same numbers and leaves the same generator.
    expected_loss, expected, state = seeded(Unrolled())
    loss, actual, state_after = seeded(MixedMode())
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert_same(actual, expected)
    assert torch.equal(state, state_after)


def test_dropout_without_a_choice_is_an_error(episode):
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)).double()
    with pytest.raises(RuntimeError, match="randomness"):
        MAML(model, cross_entropy, SGD(0.4))(episode)


def test_regression_episodes_with_and_without_target_dimension():
    model = MLP([1, 8, 1]).double()
    x, y = torch.randn(3, 10, 1, dtype=torch.float64), torch.randn(3, 10, 1, dtype=torch.float64)
    learner = MAML(model, mse_loss, SGD(0.1), 2)
    tasks = (x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])  # S = Q: shapes alone fit one task of (3, 5, 1) too
    one = tuple(part[1] for part in tasks)
    each = [learner(tuple(part[t] for part in tasks)) for t in range(3)]
    torch.testing.assert_close(learner(tasks), torch.stack(each).mean(), rtol=EXACT, atol=EXACT)
    assert learner.predict(one).shape == (5, 1)
    flat = MAML(lambda p, x: (x @ p["w"]).squeeze(-1), mse_loss, SGD(0.1), params={"w": x.new_ones(1, 1)})
    assert flat.predict((x[:, :5], y[:, :5, 0], x[:, 5:], y[:, 5:, 0])).shape == (3, 5)


def test_one_task_that_looks_like_several_can_be_said():
    x, y = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    learner = MAML(lambda p, x: x.sum(-1) * p["w"], mse_loss, SGD(0.1), params={"w": x.new_ones(())})
    assert learner.predict((x, y, x, y)).shape == (4, 3)
    said = learner((x, y, x, y), batched=False)
    by_hand = 1 - 0.1 * grad(lambda w: mse_loss(x.sum(-1) * w, y))(x.new_ones(()))
    torch.testing.assert_close(said, mse_loss(x.sum(-1) * by_hand, y), rtol=EXACT, atol=EXACT)


def test_training_on_sinusoids_helps():
    """Fifty outer steps on amplitudes and phases: the adapted error falls well below the unadapted one."""
    torch.manual_seed(0)
    learner = MAML(MLP([1, 40, 40, 1]), mse_loss, SGD(0.01, learn_lr=True), 3, MixedMode())
    optimiser = torch.optim.Adam(learner.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)

    def sample(tasks):
        amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
        phase = 3.1416 * torch.rand(tasks, 1, 1, generator=generator)
        x = 10 * torch.rand(tasks, 20, 1, generator=generator) - 5
        y = amplitude * (x - phase).sin()
        return x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]

    for _ in range(150):
        optimiser.zero_grad()
        learner(sample(16)).backward()
        optimiser.step()
    test = sample(100)
    with torch.no_grad():
        adapted = mse_loss(learner.predict(test), test[3])
        unadapted = mse_loss(learner.predict(test, steps=0), test[3])
    assert adapted < 0.6 * unadapted


BAD_ARGUMENTS = [
    ({"steps": 0}, ValueError, "steps=0: give at least 1"),
    ({"steps": 1.5}, TypeError, r"steps=1\.5 is a float"),
    ({"steps": True}, TypeError, "steps=True is a bool"),
    ({"adapt": "hed"}, ValueError, "adapt='hed'.*did you mean 'head'"),
    ({"adapt": ["head.weights"]}, ValueError, r"did you mean 'head\.weight'"),
    ({"adapt": []}, ValueError, "adapt is empty"),
    ({"adapt": 5}, TypeError, "adapt=5: give names of parameters or modules, a predicate"),
    ({"adapt": ["head", 5]}, TypeError, r"adapt=\['head', 5\]: give names"),
    ({"adapt": lambda name: False}, ValueError, "selects none of the parameters body"),
    ({"adjoint": MixedMode}, TypeError, r"write MixedMode\(\)"),
    ({"inner": 0.1}, TypeError, r"inner=0\.1: give an inner optimiser"),
    ({"randomness": "yes"}, ValueError, "randomness='yes'"),
    ({"chunk_size": 0}, ValueError, "chunk_size=0"),
    ({"chunk_size": 2.5}, ValueError, r"chunk_size=2\.5: give the number of tasks"),
    ({"chunk_size": True}, ValueError, "chunk_size=True"),
    ({"batch_norm": "no"}, ValueError, "batch_norm='no'"),
    ({"params": {"w": torch.ones(1)}}, ValueError, "an nn.Module brings its own"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_ARGUMENTS, ids=lambda v: str(v)[:30])
def test_bad_arguments_are_refused_at_construction(model, options, error, message):
    with pytest.raises(error, match=message):
        MAML(model, cross_entropy, **options)


def test_a_function_without_parameters_and_a_model_without_any(episode):
    with pytest.raises(ValueError, match="params="):
        MAML(lambda params, x: x, mse_loss)
    with pytest.raises(ValueError, match="no parameters"):
        MAML(nn.Tanh(), mse_loss)
    shared = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="occurs twice"):
        MAML(lambda params, x: x, mse_loss, params={"a": shared, "b": shared})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda e: e[:3], TypeError, "four tensors; given tuple"),
        (lambda e: (e[0], e[1][:, :5], *e[2:]), ValueError, r"support_x \(4, 6, 2\), support_y \(4, 5\)"),
        (lambda e: (e[0], e[1], e[2][:3], e[3][:3]), ValueError, "do not fit together"),
        (lambda e: (e[0][..., :1], *e[1:]), ValueError, "do not fit together"),
        (lambda e: (e[0][:, :0], e[1][:, :0], *e[2:]), ValueError, "S, Q >= 1"),
    ],
    ids=["three", "samples", "tasks", "features", "empty"],
)
def test_bad_episodes_are_refused(model, episode, change, error, message):
    learner = MAML(model, cross_entropy)
    for call in (learner, learner.predict):
        with pytest.raises(error, match=message):
            call(change(episode))


def test_bad_support_steps_and_losses_are_refused(model, episode):
    sx, sy, *_ = episode
    with pytest.raises(ValueError, match=r"one task has shapes \(S, ...\)"):
        MAML(model, cross_entropy).adapt(sx[0], sy[0, :2])
    with pytest.raises(ValueError, match="steps=-1: give at least 0"):
        MAML(model, cross_entropy).adapt(sx[0], sy[0], steps=-1)
    with pytest.raises(ValueError, match=r"shape \(6,\), torch.float64 for the support set"):
        MAML(model, lambda p, y: cross_entropy(p, y, reduction="none"))(episode)
    with pytest.raises(TypeError, match="returned a float for the support set"):
        MAML(model, lambda p, y: 1.0)(episode)  # type: ignore[arg-type, return-value]
