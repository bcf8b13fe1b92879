"""One process of test_distributed.py: `python distributed_worker.py WHAT FOLDER`, as torchrun would start it."""

import importlib
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from theria.meta import MAML, SGD, FirstOrder, MixedMode, Unrolled
from theria.meta.distributed import LostProcess, Processes, processes
from theria.nn import MLP

TASKS = 5
ADJOINTS = {"unrolled": Unrolled(), "mixed_mode": MixedMode(), "first_order": FirstOrder()}


def learner_and_episode(adjoint: str, tasks: int = TASKS) -> tuple[MAML, tuple[torch.Tensor, ...]]:
    """Meta-SGD on random regressions, the same in every process, float64; one parameter that no loss depends on."""
    torch.manual_seed(0)
    model = MLP([3, 8, 2], activation=nn.Tanh).double()

    def loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target).square().mean()

    learner = MAML(model, loss, SGD(0.1, learn_lr=True), 3, ADJOINTS[adjoint])
    learner.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    shapes = [(tasks, 4, 3), (tasks, 4, 2), (tasks, 6, 3), (tasks, 6, 2)]
    return learner, tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def gradients(ranks: Processes) -> dict[str, object]:
    """Loss and gradients of 5 tasks and of 1, by every adjoint, and after three steps of Adam."""
    out: dict[str, object] = {}
    for adjoint in ADJOINTS:
        for tasks in (TASKS, 1):
            learner, episode = learner_and_episode(adjoint, tasks)
            names, parameters = zip(*learner.named_parameters(), strict=True)
            loss = ranks.backward(learner, episode, parameters)
            grads = {name: p.grad for name, p in zip(names, parameters, strict=True)}
            pure = ranks.gradient(learner, episode, parameters)
            out[f"{adjoint} {tasks}"] = {"loss": loss, "grads": grads, "pure": pure, "calls": len(ranks.share(tasks))}
    learner, episode = learner_and_episode("unrolled")
    optimiser = torch.optim.Adam(learner.parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        ranks.backward(learner, episode, list(learner.parameters()))
        optimiser.step()
    out["trained"] = learner.state_dict()
    return out


def messages(ranks: Processes) -> dict[str, object]:
    """What the control messages return."""

    def fail() -> None:
        raise ValueError("of the first")

    def fail_unportably() -> None:
        raise type("Local", (Exception,), {})("not importable")

    raised = []
    for function in (fail, fail_unportably):
        try:
            ranks.first(function)
        except Exception as error:
            raised.append((type(error).__name__, str(error)))
    value = torch.full((3,), float(ranks.rank))
    ranks.copy_first({"value": value})
    half = torch.tensor([ranks.rank + 1.0]), torch.tensor([ranks.rank + 1.0], dtype=torch.float64)
    return {
        "first": ranks.first(lambda: f"rank {ranks.rank}"),
        "raised": raised,
        "gather": ranks.gather(ranks.rank**2),
        "most": ranks.most([ranks.rank, -ranks.rank]),
        "copied": value,
        "sum": ranks.sum(half),
    }


def parallel(ranks: Processes) -> dict[str, object]:
    """PyTorch's DistributedDataParallel around a learner, with as many tasks in every process; and all in this one."""
    learner, episode = learner_and_episode("unrolled", 2 * ranks.size)
    learner.idle.requires_grad_(False)
    learner(episode).backward()
    alone = {name: p.grad for name, p in learner.named_parameters()}
    learner.zero_grad()
    wrapped = nn.parallel.DistributedDataParallel(learner)  # its hooks live as long as it does
    wrapped(ranks.part(episode)).backward()
    return {"alone": alone, "parallel": {name: p.grad for name, p in learner.named_parameters()}}


def threads() -> list[str]:
    """The names of this process's threads, which gloo gives to its own."""
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def lost(ranks: Processes, out: Path, how: str) -> dict[str, object]:
    """The last process goes while the others wait for it."""
    ranks.most([0.0])
    if ranks.rank == ranks.size - 1:
        out.touch()
        if how == "dies":
            os.kill(os.getpid(), 9)
        time.sleep(600)
    learner, episode = learner_and_episode("unrolled")
    ranks.backward(learner, episode, list(learner.parameters()))
    return {}


def main() -> None:
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2])
    out = folder / os.environ.get("RANK", "0")
    work = {"gradients": gradients, "messages": messages, "parallel": parallel}
    begun = time.monotonic()
    try:
        with processes("cpu", timeout=float(os.environ.get("TIMEOUT", "300"))) as ranks:
            importlib.import_module("torch.distributed.nn.functional")  # whose default arguments keep the group
            result = lost(ranks, out, what) if what in ("dies", "hangs") else work[what](ranks)
    except LostProcess as error:
        result = {"told": str(error), "seconds": time.monotonic() - begun}
    torch.save({**result, "threads": threads()}, out)


if __name__ == "__main__":
    main()
