"""Tasks shared by processes: one process is the truth, closed forms the shares, real deaths the errors."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ports import free_port
from theria.meta.distributed import ALONE, Processes, count_tasks, current, processes, share

WORKER = Path(__file__).with_name("distributed_worker.py")
# Sums of float64 in another order: a handful of roundings of 1.1e-16.
ROUNDING = 1e-12
# The same after three steps of Adam, which divides by the square root of a second moment.
STEPS = 1e-10
# Seconds for what takes ten on a machine with nothing else to do.
BUSY = 300

Launch = Callable[..., list[Any]]


def environments(size: int, **variables: str) -> Iterator[dict[str, str]]:
    """What torchrun tells each of `size` processes of one machine."""
    port = str(free_port())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    root = str(WORKER.parents[2])
    for rank in map(str, range(size)):
        yield {**os.environ, **common, "PYTHONPATH": root, "RANK": rank, "LOCAL_RANK": rank, **variables}


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """(what, size) -> the results of the processes that have one, by rank."""
    running: list[subprocess.Popen[str]] = []

    def start(what: str, size: int, survivors: int | None = None, **variables: str) -> list[Any]:
        folder = tmp_path / f"{what}{size}"
        folder.mkdir()
        command = [sys.executable, str(WORKER), what, str(folder)]
        running[:] = [
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for env in environments(size, **variables)
        ]
        for process in running[:survivors]:
            output = process.communicate(timeout=BUSY)[0]
            assert process.returncode == 0, output
        results = [
            torch.load(folder / str(rank), weights_only=False)
            for rank in range(size if survivors is None else survivors)
        ]
        for result in results:  # one that lives on may abort the program when Python ends
            assert not [name for name in result.pop("threads") if "gloo" in name]
        return results

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("tasks", "size"), list(product([0, 1, 2, 5, 16], [1, 2, 3, 7])))
def test_the_shares_are_every_task_once_and_differ_by_one_at_most(tasks, size):
    shares = [share(tasks, rank, size) for rank in range(size)]
    assert [task for part in shares for task in part] == list(range(tasks))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_share_outside_the_processes_is_refused():
    for tasks, rank, size in ((-1, 0, 1), (3, 2, 2), (3, -1, 2)):
        with pytest.raises(ValueError, match="0 <= rank < size"):
            share(tasks, rank, size)


def test_a_part_is_rows_of_every_leaf():
    episode = {"x": torch.arange(10).view(5, 2), "y": (torch.arange(5),)}
    parts = [Processes(rank, 3).part(episode) for rank in range(3)]
    assert torch.equal(torch.cat([part["x"] for part in parts]), episode["x"])
    assert [len(part["y"][0]) for part in parts] == [2, 2, 1]
    assert parts[1]["x"].untyped_storage().data_ptr() == episode["x"].untyped_storage().data_ptr()


@pytest.mark.parametrize("episode", [(torch.ones(2, 3), torch.ones(3)), (torch.ones(()),), (torch.ones(0, 2),)])
def test_an_episode_without_tasks_to_share_is_refused(episode):
    with pytest.raises(ValueError, match="leading dimension"):
        count_tasks(episode)


def test_alone_nothing_is_communicated_and_nothing_rounded():
    with processes() as ranks:
        assert ranks is ALONE
    assert current() is ALONE
    weight = torch.tensor([3.0], requires_grad=True)
    loss = ALONE.backward(lambda x: (weight * x).mean(), torch.tensor([0.1, 0.2, 0.4]), [weight])
    expected = (weight * torch.tensor([0.1, 0.2, 0.4])).mean()
    (grad,) = torch.autograd.grad(expected, weight)
    assert torch.equal(loss, expected)
    assert weight.grad is not None
    assert torch.equal(weight.grad, grad)
    assert not loss.requires_grad


@pytest.mark.parametrize("size", [2, 3])
def test_processes_have_the_loss_and_gradients_of_one(launch: Launch, size: int):
    """5 tasks: shares of 3 and 2, or 2, 2 and 1; 1 task: processes with none."""
    (alone,) = launch("gradients", 1)
    several = launch("gradients", size)
    trained = alone.pop("trained")
    for rank, result in enumerate(several):
        first, mine = several[0].get("trained"), result.pop("trained") if rank else result["trained"]
        assert all(torch.equal(mine[name], first[name]) for name in first)  # processes never drift apart
        assert max(relative(mine[name], trained[name]) for name in trained) < STEPS
    for key, expected in alone.items():
        assert sum(result[key]["calls"] for result in several) == expected["calls"]
        for result in several:
            assert relative(result[key]["loss"], expected["loss"]) < ROUNDING
            assert result[key]["grads"]["idle"] is expected["grads"]["idle"] is None
            for name, grad in expected["grads"].items():
                if grad is not None:
                    assert relative(result[key]["grads"][name], grad) < ROUNDING, (key, name)
                    assert torch.equal(result[key]["grads"][name], several[0][key]["grads"][name])
            loss, grads = result[key]["pure"]
            assert torch.equal(loss, result[key]["loss"])
            pairs = zip(grads, result[key]["grads"].values(), strict=True)
            assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_control_messages(launch: Launch):
    for rank, result in enumerate(launch("messages", 3)):
        assert result["first"] == "rank 0"
        assert result["raised"][0] == ("ValueError", "of the first")
        assert "not importable" in result["raised"][1][1]
        assert result["raised"][1][0] == ("Local" if rank == 0 else "RuntimeError")
        assert result["gather"] == [0, 1, 4]
        assert result["most"] == [2.0, 0.0]
        assert torch.equal(result["copied"], torch.zeros(3))
        assert [(value.item(), value.dtype) for value in result["sum"]] == [(6.0, torch.float32), (6.0, torch.float64)]


def test_a_learner_works_inside_distributed_data_parallel(launch: Launch):
    for result in launch("parallel", 2):
        for name, grad in result["alone"].items():
            found = result["parallel"][name]
            assert found is grad is None or relative(found, grad) < ROUNDING


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_process_is_an_error_within_the_timeout(launch: Launch, how: str):
    results = launch(how, 3, survivors=2, TIMEOUT="5")
    for rank, result in enumerate(results):
        assert f"process {rank} of 3, waiting for the others: another process is gone" in result["told"]
        assert result["seconds"] < 120  # 5 and what a busy machine adds; the one that hangs does so for 600
