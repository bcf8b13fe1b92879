"""MAML on sinusoids: an initialisation from which a few gradient steps on 10 points give a new curve.

    python examples/maml_sinusoid.py --steps 3000

The regression of Finn et al. 2017, section 5.1: amplitude and phase are drawn once a task, the network is an MLP with
two hidden layers of 40. The outer gradient passes through the inner step, so it contains Hessians of the inner loss;
`--adjoint` says how they are computed.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from theria.data import Sinusoid
from theria.meta import MAML, SGD, FirstOrder, MixedMode, Unrolled
from theria.nn import MLP

ADJOINTS = {"unrolled": Unrolled, "mixed_mode": MixedMode, "first_order": FirstOrder}
TEST_STEP = 10**6  # of the test tasks; tasks are a pure function of (seed, step), and training stays below it


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Not F.mse_loss: in torch 2.13 its backward fails under forward-mode differentiation, which MixedMode uses."""
    return (prediction - target).square().mean()


def errors(learner: MAML, tasks: Sinusoid, steps: tuple[int, ...]) -> list[float]:
    """Mean squared error on the queries of new tasks after each number of inner steps."""
    episode = tasks.sample(TEST_STEP)
    with torch.no_grad():
        return [squared_error(learner.predict(episode, steps=n), episode.query_y).item() for n in steps]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="outer steps of Adam")
    parser.add_argument("--adjoint", choices=ADJOINTS, default="unrolled", help="how the inner step is differentiated")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    train_tasks = Sinusoid(shots=10, queries=10, tasks=25, seed=options.seed)
    test_tasks = Sinusoid(shots=10, queries=100, tasks=600, seed=options.seed)
    learner = MAML(MLP([1, 40, 40, 1]), squared_error, inner=SGD(lr=0.01), steps=1, adjoint=ADJOINTS[options.adjoint]())
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    for step in range(options.steps):
        loss = learner(train_tasks.sample(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(options.steps // 10, 1) == 0:
            print(f"step {step:6d}  query loss {loss.item():.4f}")

    counts = (0, 1, 10)
    for count, error in zip(counts, errors(learner, test_tasks, counts), strict=True):
        print(f"new tasks, after {count:2d} inner steps: mean squared error {error:.3f}")


if __name__ == "__main__":
    main()
