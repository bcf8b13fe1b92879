"""What happens to BatchNorm and other buffers: copies are read, nothing is written."""

import pytest
import torch
from torch import nn
from torch.func import grad
from torch.nn.functional import cross_entropy

from theria.meta import MAML, SGD, FirstOrder, Higher, MixedMode, Unrolled
from theria.nn import ConvNet4

EXACT = 1e-10  # float64, the same derivative in another order of sums
ADJOINTS = [Unrolled(), MixedMode(), FirstOrder(), Higher()]


def network(track=True):
    norm = nn.BatchNorm1d(5, track_running_stats=track)
    return nn.Sequential(nn.Linear(2, 5), norm, nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def episode():
    x, y = torch.randn(3, 11, 2, dtype=torch.float64), torch.randint(3, (3, 11))
    return x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]


def by_hand(model, mean_and_variance, episode, lr, steps):
    """MAML on `network` written out, with the batch's statistics or given ones; per-task losses averaged."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def forward(p, x):
        h = x @ p["0.weight"].T + p["0.bias"]
        mean, variance = mean_and_variance or (h.mean(0), h.var(0, correction=0))
        h = (h - mean) / (variance + 1e-5).sqrt() * p["1.weight"] + p["1.bias"]
        return h.tanh() @ p["3.weight"].T + p["3.bias"]

    def outer(params):
        losses = []
        for sx, sy, qx, qy in zip(*episode, strict=True):
            p = params
            for _ in range(steps):
                g = grad(lambda p, x, y: cross_entropy(forward(p, x), y))(p, sx, sy)
                p = {name: p[name] - lr * g[name] for name in p}
            losses.append(cross_entropy(forward(p, qx), qy))
        return torch.stack(losses).mean()

    return outer(params), grad(outer)(params)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_batch_statistics_in_training_and_evaluation(episode, adjoint, training):
    model = network()
    learner = MAML(model, cross_entropy, SGD(0.3), 2, adjoint).train(training)
    loss, gradient = by_hand(model, None, episode, 0.3, 2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    actual = learner(episode)
    actual.backward()
    torch.testing.assert_close(actual, loss, rtol=EXACT, atol=EXACT)
    if adjoint != FirstOrder():
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, gradient[name], rtol=EXACT, atol=EXACT)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model[1].training == training
    assert model[1].track_running_stats


@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode()], ids=lambda a: type(a).__name__)
def test_running_statistics_as_constants(episode, adjoint):
    model = network()
    mean, variance = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
    model.load_state_dict({**model.state_dict(), "1.running_mean": mean, "1.running_var": variance})
    learner = MAML(model, cross_entropy, SGD(0.3), 2, adjoint, batch_norm="running").train()
    loss, gradient = by_hand(model, (mean, variance), episode, 0.3, 2)
    actual = learner(episode)
    actual.backward()
    torch.testing.assert_close(actual, loss, rtol=EXACT, atol=EXACT)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradient[name], rtol=EXACT, atol=EXACT)
    assert torch.equal(model.state_dict()["1.running_mean"], mean)
    assert model[1].training


def test_running_statistics_have_to_exist():
    with pytest.raises(ValueError, match="layer '1' keeps no running statistics"):
        MAML(network(track=False), cross_entropy, batch_norm="running")


def test_the_papers_network_runs():
    model = ConvNet4(3, image_size=8, width=4).double()
    x, y = torch.rand(2, 12, 1, 8, 8, dtype=torch.float64), torch.arange(3).repeat(2, 4)
    episode = (x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])
    losses = []
    for adjoint in (Unrolled(), MixedMode()):
        learner = MAML(model, cross_entropy, SGD(0.4), 2, adjoint)
        model.zero_grad()
        learner(episode).backward()
        losses.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


class Counting(nn.Module):
    """Writes a buffer in its forward: with a number, or with something of the batch."""

    def __init__(self, what):
        super().__init__()
        self.what, self.linear = what, nn.Linear(2, 3)
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.seen.add_(1 if self.what == "number" else x.sum().detach())
        return self.linear(x)


@pytest.mark.parametrize("what", ["number", "batch"])
@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode(), Higher()], ids=lambda a: type(a).__name__)
def test_a_forward_that_writes_another_buffer_raises(episode, adjoint, what):
    model = Counting(what).double()
    learner = MAML(model, cross_entropy, SGD(0.3), 2, adjoint)
    with pytest.raises(RuntimeError, match=r"writes to a buffer \(of: seen"):
        learner(episode)
    assert model.seen == 0


def test_buffers_that_are_only_read_are_constants(episode):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 3)
            self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))

        def forward(self, x):
            return self.linear(x * self.scale)

    model = Scaled().double()
    plain = MAML(model.linear, cross_entropy, SGD(0.3), 2)
    scaled = tuple(2 * part if part.is_floating_point() else part for part in episode)
    torch.testing.assert_close(MAML(model, cross_entropy, SGD(0.3), 2, MixedMode())(episode), plain(scaled))
