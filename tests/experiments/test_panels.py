"""Panels against independent truths: dense Hessians, gradients and loops by hand; and that they disturb nothing."""

import math
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.func import functional_call

from experiments import checkpoint, health, panels, tracking
from tests.experiments.small import EXACT, F64, classification, mlp, regression, square
from theria import meta
from theria.data import Episode
from theria.meta.cavia import CAVIA, ExtraInputs
from theria.meta.distributed import Processes
from theria.meta.imaml import IMAML
from theria.meta.maml_plus_plus import MAMLPlusPlus
from theria.meta.proto_maml import ProtoMAML
from theria.meta.protonet import ProtoNet
from theria.meta.reptile import Reptile


# ----------------------------------------------------------------------------------------------------------- curvature
def dense(model, names, x, y):
    """Gradient (n,) and Hessian (n, n) of the mean squared error in the named parameters."""
    whole = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [whole[name].numel() for name in names]

    def loss(flat):
        pieces = {name: piece.view_as(whole[name]) for name, piece in zip(names, flat.split(sizes), strict=True)}
        return square(functional_call(model, {**whole, **pieces}, (x,)), y)

    at = torch.cat([whole[name].flatten() for name in names])
    return torch.func.grad(loss)(at), torch.func.hessian(loss)(at)


@pytest.mark.parametrize("adapt", [None, "2"])
def test_curvature_is_that_of_the_dense_hessian(adapt):
    model, episode = mlp(), regression()
    learner = meta.MAML(model, square, adapt=adapt)
    g, H = dense(model, learner.adapted, episode.support_x[0], episode.support_y[0])
    u, ends = g / g.norm(), torch.linalg.eigvalsh(H)
    found = panels.curvature(learner, episode, products=len(g))
    expected = {
        "inner_gradient": g.norm(),
        "hvp_norm": (H @ u).norm(),
        "along_gradient": u @ H @ u,
        "largest_eigenvalue": ends[-1],
        "smallest_eigenvalue": ends[0],
    }
    for name, value in expected.items():
        assert found[f"curvature/{name}"] == pytest.approx(float(value), rel=EXACT, abs=EXACT), name


def test_a_few_products_stay_inside_the_spectrum_and_within_the_stated_error():
    model, episode = mlp(), regression()
    learner = meta.MAML(model, square)
    _, H = dense(model, learner.adapted, episode.support_x[0], episode.support_y[0])
    values = torch.linalg.eigvalsh(H)
    found = panels.curvature(learner, episode, products=4)
    error = found["curvature/eigenvalue_error"]
    assert error > 0
    for name, end in (("largest", values[-1]), ("smallest", values[0])):
        ritz = found[f"curvature/{name}_eigenvalue"]
        assert values[0] - EXACT <= ritz <= values[-1] + EXACT
        assert float((values - ritz).abs().min()) <= error + EXACT
        assert abs(ritz - float(end)) < 0.5 * float(values[-1] - values[0])


def test_curvature_of_cavia_is_that_in_its_context():
    model, episode = ExtraInputs(mlp(3)), regression()
    learner = CAVIA(model, square, 1)
    x, y = episode.support_x[0], episode.support_y[0]
    H = torch.func.hessian(lambda c: square(model(x, c), y))(torch.zeros(1, dtype=F64)).detach()
    found = panels.curvature(learner, episode)
    assert found["curvature/largest_eigenvalue"] == pytest.approx(float(H), rel=EXACT)
    assert found["curvature/along_gradient"] == pytest.approx(float(H), rel=EXACT)


def test_curvature_of_imaml_is_that_of_its_inner_loss():
    """H + strength I at the start, where the proximal term has no gradient."""
    model, episode, strength = mlp(), regression(), 0.7
    learner = IMAML(model, square, strength=strength)
    g, H = dense(model, learner.adapted, episode.support_x[0], episode.support_y[0])
    found = panels.curvature(learner, episode, products=len(g))
    largest = float(torch.linalg.eigvalsh(H)[-1])
    assert found["curvature/largest_eigenvalue"] == pytest.approx(largest + strength, rel=EXACT)
    assert found["curvature/inner_gradient"] == pytest.approx(float(g.norm()), rel=EXACT)


def test_curvature_of_proto_maml_is_that_in_a_classifier_of_prototypes():
    torch.manual_seed(0)
    embedding = nn.Sequential(nn.Flatten(-3), nn.Linear(28 * 28, 2)).double()
    episode = classification(shots=2)
    x, y = episode.support_x[0], episode.support_y[0]
    z = embedding(x).detach()
    c = torch.stack([z[y == k].mean(0) for k in range(3)])
    start = torch.cat([2 * c, -c.square().sum(1, keepdim=True)], 1)  # (3, 2) weights and a column of biases
    inputs = torch.cat([z, torch.ones(6, 1, dtype=F64)], 1)
    H = torch.func.hessian(lambda W: nn.functional.cross_entropy(inputs @ W.T, y))(start).reshape(9, 9)
    found = panels.curvature(ProtoMAML(embedding, ways=3), episode, products=9)
    assert found["curvature/largest_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=EXACT)


def test_curvature_does_not_depend_on_what_is_differentiated():
    episode = regression()
    plain = panels.curvature(meta.MAML(mlp(), square), episode)
    for learner in (meta.FOMAML(mlp(), square), MAMLPlusPlus(mlp(), square, first_order_epochs=5)):
        own = learner.adjoint
        assert panels.curvature(learner, episode) == pytest.approx(plain, rel=EXACT)
        assert learner.adjoint is own


def test_learners_without_inner_steps_have_none_of_it():
    learner = ProtoNet(mlp(), ways=3)
    assert panels.curvature(learner, regression()) == {}
    assert panels.inner_curves(learner, regression(), 2) == {}
    assert panels.gradient(learner, regression()) == {}
    assert panels.rates(learner) == {}


# ------------------------------------------------------------------------------------------------------------ gradient
def test_share_and_cosine_are_those_of_two_quadratics():
    """One inner step of rate a on ½ w'diag(h)w: g = (1 - ah)² h w and g1 = (1 - ah) h w, entry by entry."""
    h, a, w = torch.tensor([0.5, 3.0], dtype=F64), 0.4, torch.tensor([1.0, -2.0], dtype=F64)
    learner = meta.MAML(
        lambda p, x: p["w"], lambda p, _: 0.5 * (h * p * p).sum(), meta.SGD(lr=a), params={"w": w}, steps=1
    )
    dummy = torch.zeros(1, 1, 1, dtype=F64)
    full, first = (1 - a * h) ** 2 * h * w, (1 - a * h) * h * w
    found = panels.gradient(learner, Episode(dummy, dummy, dummy, dummy))
    assert found["gradient/second_order"] == pytest.approx(math.dist(full, first) / float(full.norm()), rel=EXACT)
    cosine = sum(x * y for x, y in zip(full.tolist(), first.tolist(), strict=True))
    cosine /= math.hypot(*full.tolist()) * math.hypot(*first.tolist())
    assert found["gradient/cosine"] == pytest.approx(cosine, rel=EXACT)
    assert cosine < 0.99  # 1 - 3a is negative: the two disagree in the second entry


def test_first_order_epochs_are_compared_with_the_second_order_that_follows_them():
    exact: dict[str, Any] = {"multi_step_epochs": 0, "steps": 2}
    early, late = (MAMLPlusPlus(mlp(), square, first_order_epochs=epochs, **exact) for epochs in (5, 0))
    found = panels.gradient(early, regression())
    assert found == pytest.approx(panels.gradient(late, regression()), rel=EXACT)
    assert found["gradient/second_order"] > 0.01
    assert early.first_order_epochs == 5


def test_reptile_has_no_second_order_to_compare_with():
    assert panels.gradient(Reptile(mlp(), square), regression()) == {}


def test_maml_plus_plus_that_never_gets_to_its_second_order_is_told(run_here, tmp_path, capsys):
    options = ["learner=maml_plus_plus", "learner.epoch_steps=3", "learner.first_order_epochs=2", "inner.steps=1"]
    run_here(tmp_path / "never", *options)
    line = (
        "first order throughout: the second order of learner=maml_plus_plus begins after step 6 (learner.epoch_steps=3"
    )
    assert line in capsys.readouterr().out
    run_here(tmp_path / "late", *options, "trainer.steps=7")
    assert "first order throughout" not in capsys.readouterr().out


def test_a_failure_in_another_process_is_everyones(monkeypatch):
    monkeypatch.setattr(Processes, "most", lambda self, values: [1.0])
    with pytest.raises(RuntimeError, match="another one"):
        health.meta_gradients(meta.MAML(mlp(), square), regression(4), Processes(0, 2))


# ---------------------------------------------------------------------------------------------------------- inner loop
def test_inner_curves_are_those_of_a_loop_by_hand():
    torch.manual_seed(0)
    model, rate, steps = nn.Linear(28 * 28, 3).double(), 0.05, 3
    flat = nn.Sequential(nn.Flatten(-3), model)
    episode, loss_fn = classification(), nn.functional.cross_entropy
    found = panels.inner_curves(meta.MAML(flat, loss_fn, meta.SGD(lr=rate), steps=steps), episode, steps)
    sums: dict[str, float] = {}
    for task in range(2):
        sx, sy, qx, qy = (field[task] for field in episode)
        W, b = model.weight.detach().clone(), model.bias.detach().clone()
        for step in range(steps + 1):
            for name, x, y in (("support", sx, sy), ("query", qx, qy)):
                logits = x.flatten(1) @ W.T + b
                values = {"loss": loss_fn(logits, y), "accuracy": (logits.argmax(1) == y).double().mean()}
                for figure, value in values.items():
                    key = f"steps/{name}_{figure}_{step}"
                    sums[key] = sums.get(key, 0.0) + float(value) / 2
            slope = (sx.flatten(1) @ W.T + b).softmax(1) - nn.functional.one_hot(sy, 3)
            W, b = W - rate * slope.T @ sx.flatten(1) / len(sx), b - rate * slope.mean(0)
    assert found.keys() == sums.keys()
    assert found == pytest.approx(sums, rel=EXACT)
    assert tracking.step_curves(found)["loss"]["query"] == [found[f"steps/query_loss_{i}"] for i in range(4)]


def test_wandb_draws_one_chart_for_each_figure():
    class Run:
        def log(self, row):
            logged.update(row)

    class Module:
        class plot:
            @staticmethod
            def line_series(xs, ys, keys, title, xname):
                return xs, ys, keys, title, xname

    logged = {}
    wandb = tracking.Wandb.__new__(tracking.Wandb)
    wandb.run, wandb.wandb, wandb.say = Run(), cast(Any, Module), pytest.fail
    row = {f"steps/{name}_loss_{i}": value + i for name, value in (("support", 1.0), ("query", 5.0)) for i in (0, 1)}
    wandb.scalars(row)
    series = ([[0, 1]] * 2, [[1.0, 2.0], [5.0, 6.0]], ["support", "query"], "loss after each inner step", "inner step")
    assert logged == {**row, "curves/loss": series}


def test_learned_rates_are_means_over_each_layer():
    learner = meta.MAML(mlp(), square, meta.SGD(lr=0.1, learn_lr=True))
    with torch.no_grad():
        learner.get_parameter("rates.lr.0/weight").fill_(0.5)  # 6 entries, beside 3 biases of 0.1
    found = panels.rates(learner)
    assert found["rates/0"] == pytest.approx((6 * 0.5 + 3 * 0.1) / 9)
    assert found["rates/2"] == pytest.approx(0.1)
    assert found["inner/lr_min"] == pytest.approx(0.1)
    assert panels.rates(MAMLPlusPlus(mlp(), square, steps=2)).keys() >= {"rates/0", "rates/2"}  # one for each step


# ------------------------------------------------------------------------------------------------ what they must not do
def test_panels_change_no_bit_of_the_run(run_here, tmp_path):
    ends = []
    for name, options in {"with": ["trainer.health_every=1"], "without": ["trainer.health_every=0"]}.items():
        run_here(tmp_path / name, *options, "inner.learn_lr=true", "trainer.steps=3", "trainer.val_every=0")
        ends.append(checkpoint.load(checkpoint.saved(tmp_path / name)[-1]))
    rows = tracking.read(tmp_path / "with/metrics.jsonl")
    assert {"gradient/cosine", "curvature/hvp_norm", "steps/query_loss_1", "rates/head"} <= rows[0].keys()
    with_panels, without = (torch.cat([p.flatten() for p in end["learner"].values()]) for end in ends)
    assert torch.equal(with_panels, without)
    assert torch.equal(ends[0]["rng"]["torch"], ends[1]["rng"]["torch"])


def test_a_panel_that_fails_says_so_once_and_stops_nothing(run_here, tmp_path, monkeypatch, capsys):
    def broken(*_):
        torch.rand(3)  # nor does what it drew
        raise ValueError("no spectrum\nat all")

    monkeypatch.setattr(panels, "curvature", broken)
    run_here(tmp_path, "trainer.health_every=1")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("panel")]
    assert said == ["panel curvature failed (ValueError: no spectrum): it is left out from here on"]
    rows = [row for row in tracking.read(tmp_path / "metrics.jsonl") if "gradient/cosine" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert not any(name.startswith("curvature/") for row in rows for name in row)
    assert all("steps/query_loss_1" in row for row in rows)


def test_panels_beyond_their_share_of_the_time_are_skipped(run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(panels, "ALLOWANCE", 0.0)
    run_here(tmp_path / "none", "trainer.health_every=1", "trainer.health_share=0")
    run_here(tmp_path / "all", "trainer.health_every=1", "trainer.health_share=1")
    steps = {
        name: [row["step"] for row in tracking.read(tmp_path / name / "metrics.jsonl") if "gradient/cosine" in row]
        for name in ("none", "all")
    }
    assert steps == {"none": [1], "all": [1, 2, 3, 4, 5, 6]}


def test_the_roundings_of_mixed_precision_are_those_of_products_of_8_bits():
    """y = x W with x and W rounded to bfloat16, and their product again; means and distances in float32."""
    torch.manual_seed(0)
    learner = ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(784, 4, bias=False)), ways=2)
    episode = Episode(*(field.float() if field.is_floating_point() else field for field in classification(2, 2)))
    assert panels.precision(learner, episode, None) == {}
    (weight,) = learner.parameters()
    gradients = []
    for mixed in (False, True):
        rounded = (lambda t: t.bfloat16()) if mixed else (lambda t: t)
        losses = []
        for sx, sy, qx, qy in zip(*episode, strict=True):
            support, query = ((rounded(x.flatten(1)) @ rounded(weight).T).float() for x in (sx, qx))
            means = torch.stack([support[sy == k].mean(0) for k in range(2)])
            distances = (query[:, None] - means).square().sum(-1)
            losses.append(nn.functional.cross_entropy(-distances, qy))
        gradients.append(torch.autograd.grad(torch.stack(losses).mean(), weight)[0])
    by_hand = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    found = panels.precision(learner, episode, torch.bfloat16)["gradient/rounding"]
    assert 1e-4 < found < 0.05
    assert found == pytest.approx(by_hand, rel=1e-3)
