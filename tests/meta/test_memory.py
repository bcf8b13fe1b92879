"""Peak memory: the meter itself, MixedMode's independence of the activations, no growth over meta-steps."""

import gc

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from theria.meta import MAML, SGD, FirstOrder, MixedMode, Unrolled
from theria.meta.truncated import Truncated
from theria.nn import MLP, TransformerClassifier
from theria.testing.memory import PeakMemory

KB = 1000 * 4  # a thousand float32


def test_the_meter_counts_storages_once_and_forgets_freed_ones():
    x = torch.randn(1000)
    with PeakMemory() as memory:
        y = 2 * x
        assert memory.live == KB
        view = y[10:]
        y.add_(1)
        assert memory.live == KB
        z = [y + i for i in range(3)]
        assert memory.live == 4 * KB
        del z
        assert (memory.live, memory.peak) == (KB, 4 * KB)
        del y
        assert memory.live == KB  # the view holds the storage
        del view
        assert (memory.live, memory.peak) == (0, 4 * KB)


def test_the_meter_sees_what_autograd_and_torch_func_keep():
    w = torch.randn(1000, requires_grad=True)
    with PeakMemory() as memory:
        loss = w.sin().cos().sum()
        assert memory.live == KB + 4  # sin(w) is saved for cos; cos(w) is not; the sum is one number
        loss.backward()
        assert memory.live == KB + 4  # the gradient and the sum
    with PeakMemory() as memory:
        torch.func.vmap(torch.func.grad(lambda a: (a * a).sin().sum()))(torch.randn(4, 1000))
    assert memory.peak >= 3 * 4 * KB  # the input, a * a, and a gradient


def peak(adjoint, samples, steps, width=32):
    torch.manual_seed(0)
    model = MLP([4, width, width, 2])
    learner = MAML(model, mse_loss, SGD(0.01), steps, adjoint)
    x, y = torch.randn(samples, 4), torch.randn(samples, 2)
    learner.zero_grad()
    with PeakMemory() as memory:
        learner((x, y, x[:5], y[:5])).backward()
    return memory.peak, 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("samples", [500, 4000])
def test_each_step_of_mixed_mode_costs_its_parameters_only(samples):
    few, parameters = peak(MixedMode(), samples, 3)
    many, _ = peak(MixedMode(), samples, 11)
    activations = 4 * samples * 2 * 32  # the two hidden layers of one forward
    assert many - few <= 8 * parameters + 1000  # 8 more points of the trajectory, and a few scalars
    few, _ = peak(Unrolled(), samples, 3)
    many, _ = peak(Unrolled(), samples, 11)
    assert many - few >= 8 * activations


def test_mixed_mode_needs_at_most_half_of_unrolled_at_five_steps():
    assert peak(MixedMode(), 1000, 5)[0] <= 0.5 * peak(Unrolled(), 1000, 5)[0]


def test_first_order_does_not_grow_with_the_steps_either():
    few, parameters = peak(FirstOrder(), 1000, 3)
    many, _ = peak(FirstOrder(), 1000, 11)
    assert many - few <= parameters


def test_checkpoints_near_the_root_of_the_steps_need_least():
    """A state as heavy as the activations of a step: T / k of the one and k of the other."""
    at = {k: peak(Unrolled(checkpoint_every=k), 16, 16, width=128)[0] for k in (1, 4, 16)}
    assert at[4] < 0.6 * min(at[1], at[16], peak(Unrolled(), 16, 16, width=128)[0])


def test_checkpoints_keep_the_activations_of_one_segment():
    assert peak(Unrolled(checkpoint_every=4), 1000, 16)[0] <= 0.35 * peak(Unrolled(), 1000, 16)[0]


def test_checkpoints_of_mixed_mode_store_fewer_points():
    every, parameters = peak(MixedMode(), 50, 25, width=64)
    some, _ = peak(MixedMode(checkpoint_every=5), 50, 25, width=64)
    assert every - some >= (24 - 4 - 5) * parameters  # 24 points, against 4 stored and at most 5 between two of them


def test_truncated_keeps_its_last_steps_only():
    few, parameters = peak(Truncated(3), 1000, 4)
    many, _ = peak(Truncated(3), 1000, 12)
    assert many - few <= parameters
    assert peak(Truncated(12), 1000, 12)[0] >= 2.5 * many


def test_mixed_mode_on_a_transformer_needs_at_most_0_15_of_unrolled_at_twenty_steps():
    """The bar for fifty steps, which `scripts/bench_meta.py` measures on four layers, holds here at twenty."""

    def peak_of(adjoint):
        torch.manual_seed(0)
        model = TransformerClassifier(5, image_size=14, d_model=16, n_heads=2, n_layers=1)
        learner = MAML(model, cross_entropy, SGD(0.01), 20, adjoint)
        x, y = torch.rand(2, 25, 1, 14, 14), torch.arange(5).repeat(2, 5)
        with PeakMemory() as memory:
            learner((x[0], y[0], x[1], y[1])).backward()
        return memory.peak

    assert peak_of(MixedMode()) <= 0.15 * peak_of(Unrolled())


@pytest.mark.parametrize(
    "adjoint",
    [Unrolled(), Unrolled(checkpoint_every=1), MixedMode(), FirstOrder(), Truncated(1)],
    ids=str,
)
def test_memory_and_objects_are_constant_over_200_meta_steps(adjoint):
    inner = SGD(0.1, momentum=0.9, learn_lr=True)
    learner = MAML(lambda p, x: x @ p["w"], mse_loss, inner, 2, adjoint, params={"w": torch.randn(2)})
    optimiser = torch.optim.SGD(learner.parameters(), 0.01)
    x, y = torch.randn(10, 2), torch.randn(10)
    episode = (x[:5], y[:5], x[5:], y[5:])

    def meta_step():
        optimiser.zero_grad()
        learner(episode).backward()
        optimiser.step()

    live, objects = [], []
    with PeakMemory() as memory:
        for step in range(200):
            meta_step()
            if step % 50 == 49:
                gc.collect()
                live.append(memory.live)
                objects.append(len(gc.get_objects()))
    assert len(set(live)) == 1, live
    assert len(set(objects)) == 1, objects
    assert live[0] <= 4 * sum(p.numel() for p in learner.parameters())  # their gradients
