"""Tasks over several processes: the loss and gradient of one process, to rounding.

The outer loss of T tasks is their mean. A process that has n_r of them computes its own mean loss L_r, and

    L = sum_r (n_r / T) L_r,        dL/dp = sum_r (n_r / T) dL_r/dp,

which is exact for any shares, none included: each process scales its loss by n_r / T, and one sum over the processes of
one flat bucket does the rest. Every process then holds the same bits and takes the same step.

    with processes() as ranks:                        # under torchrun; alone elsewhere
        for step in range(steps):
            optimiser.zero_grad()
            loss = ranks.backward(learner, source.sample(step), parameters)     # all T tasks; each takes its share
            optimiser.step()

NOTE [control runs on the CPU]. What the processes tell each other beside gradients goes through gloo on CPU tensors, on
GPUs too: it waits for no kernel. A message of it precedes each sum of gradients, because gloo notices a process that is
gone at once, and one that hangs within the timeout, by an error that can be caught; NCCL would wait with it and end the
program from another thread.

NOTE [threads end before Python does]. A thread of gloo gives back the tensors of an operation after it has told the
waiting thread that it is done, and takes Python's lock for that. If Python is ending by then, the thread is made to
exit from a place that does not allow it and the program aborts ("terminate called without an active exception"), after
all its work was done. Destroying a group joins its threads, but only once nothing refers to it any more. Two things do:
functions of torch.distributed.nn.functional, whose default arguments are the group of the moment of their import, which
PyTorch does late; and the frames of an error that it raised.
"""

import importlib
import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")
FROM_FIRST = "(raised in the first process)"


class LostProcess(RuntimeError):
    """Another process is gone or did not answer in time; this one cannot go on."""


def share(tasks: int, rank: int, size: int) -> range:
    """The tasks of process `rank` of `size`: consecutive, the shares differ by one at most, the first ones are larger.

    Raises:
        ValueError: a negative number of tasks, or a rank outside [0, size).
    """
    if tasks < 0 or not 0 <= rank < size:
        raise ValueError(f"tasks={tasks}, rank={rank}, size={size}: needed is tasks >= 0 and 0 <= rank < size")
    each, rest = divmod(tasks, size)
    start = rank * each + min(rank, rest)
    return range(start, start + each + (rank < rest))


@dataclass(frozen=True)
class Processes:
    """The processes that share the tasks, seen from one of them. Every method but `share` and `part` is collective:
    all processes call it, in the same order.

    Attributes:
        rank, size: this process and their number; alone, 0 of 1, nothing is communicated and nothing is rounded.
        group: of torch.distributed; None is the default group.

    Raises:
        LostProcess: by each collective, when a process is gone or silent for longer than the group's timeout.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, tasks: int) -> range:
        """Which of `tasks` tasks are this process's, possibly none."""
        return share(tasks, self.rank, self.size)

    def part(self, episode: T) -> T:
        """The tasks of an episode that are this process's: every leaf (T, ...) -> (n, ...), as views."""
        mine = self.share(count_tasks(episode))
        return pytree.tree_map(lambda leaf: leaf[mine.start : mine.stop], episode)

    # ------------------------------------------------------------------------------------------------------- gradients
    def backward(self, loss_fn: Callable[[Any], Tensor], episode: Any, parameters: Sequence[Tensor]) -> Tensor:
        """The mean loss over all tasks of an episode; its gradient is added to the `.grad` of each parameter.

        Args:
            loss_fn: episode of n >= 1 tasks -> their mean loss, a scalar; such as a learner, or a lambda around its
                `outer_loss`. It is not called where this process has no task.
            episode: a pytree of (T, ...) tensors, the same in every process.
            parameters: leaves that require grad, the same list in every process. One that no process's loss depends
                on keeps its `.grad`, as in one process.

        Returns:
            The detached mean loss, the same bits in every process.
        """
        if self.size == 1:
            loss = loss_fn(episode)
            loss.backward()
            return loss.detach()
        loss, grads = self.gradient(loss_fn, episode, parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        return loss

    def gradient(
        self, loss_fn: Callable[[Any], Tensor], episode: Any, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """`backward` without a side effect: the mean loss and its gradients, None for what it does not depend on."""
        mine = self.part(episode)
        loss, grads = None, [None] * len(parameters)
        if self.share(count_tasks(episode)):
            loss = loss_fn(mine)
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        return self.combine(loss, grads, parameters, count_tasks(episode))

    def combine(
        self, loss: Tensor | None, grads: Sequence[Tensor | None], parameters: Sequence[Tensor], tasks: int
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The mean loss over `tasks` tasks and its gradients from those of this process's share, however computed.

        Args:
            loss: the mean over this process's tasks; None where it has none.
            grads: its gradients, None for what it does not depend on.
        """
        if self.size == 1:
            assert loss is not None
            return loss.detach(), list(grads)
        weight = len(self.share(tasks)) / tasks
        used = self.most([float(grad is not None) for grad in grads])  # see NOTE [control runs on the CPU]
        first = parameters[0]
        zero = first.new_zeros((), dtype=torch.promote_types(first.dtype, torch.float32))
        values = [zero if loss is None else loss.detach().to(zero) * weight]
        values += [
            torch.zeros_like(p) if g is None else g * weight
            for p, g, u in zip(parameters, grads, used, strict=True)
            if u
        ]
        total, *summed = self.sum(values)
        found = iter(summed)
        return total, [next(found) if u else None for u in used]

    def sum(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The sum over the processes of each tensor, one message for each dtype."""
        if self.size == 1:
            return list(values)
        out: list[Tensor] = list(values)
        for dtype in dict.fromkeys(value.dtype for value in values):
            where = [i for i, value in enumerate(values) if value.dtype == dtype]
            bucket = torch.cat([values[i].detach().reshape(-1) for i in where])
            with self._guard("summing gradients"):
                dist.all_reduce(bucket, group=self.group)
            for i, piece in zip(where, bucket.split([values[i].numel() for i in where]), strict=True):
                out[i] = piece.view(values[i].shape)
        return out

    # --------------------------------------------------------------------------------------------------------- control
    def most(self, values: Sequence[float]) -> list[float]:
        """The largest over the processes of each number: how they agree to stop."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        with self._guard("waiting for the others"):
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.group)
        return numbers.tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; anything that can be pickled, tensors on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._guard("gathering"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, function: Callable[[], T]) -> T:
        """What `function` returns in the first process, where alone it is called; in the others a pickled copy.

        Raises:
            Exception: the one that `function` raised, in every process, so that no process waits for another; the
                copies bear the note FROM_FIRST.
        """
        if self.size == 1:
            return function()
        value, error = None, None
        if self.is_first:
            try:
                value = function()
            except Exception as caught:
                error = caught
        sent = [value, _portable(error)]
        with self._guard("waiting for the first process"):
            dist.broadcast_object_list(sent, group=self.group, group_src=0)
        if error is not None:
            raise error
        copy: Any
        copy, error = sent
        if error is not None:
            error.add_note(FROM_FIRST)
            raise error
        return copy if value is None else value

    def copy_first(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the tensors of every process, in place, by those of the first; names and shapes are the same."""
        if self.size == 1:
            return
        with torch.no_grad(), self._guard("copying the first process's parameters"):
            for tensor in tensors.values():
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, group=self.group, group_src=0)
                tensor.copy_(whole)

    @contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what torch.distributed raises for a closed connection and for a timeout
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            traceback.clear_frames(error.__traceback__)  # see NOTE [threads end before Python does]
            raise LostProcess(
                f"process {self.rank} of {self.size}, {doing}: another process is gone or did not answer ({reason})"
            ) from error


ALONE = Processes()


def current(group: Any = None) -> Processes:
    """The processes of an initialised torch.distributed, or ALONE where there is none.

    Raises:
        ValueError: the group cannot send CPU tensors, see NOTE [control runs on the CPU].
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    backends = str(dist.get_backend_config(group))
    if "cpu:" not in backends:
        raise ValueError(
            f"the process group has the backends {backends!r} and none for CPU tensors: initialise it with "
            'backend="cpu:gloo,cuda:nccl" (or "gloo" on CPUs)'
        )
    return Processes(dist.get_rank(group), dist.get_world_size(group), group)


@contextmanager
def processes(device: str = "auto", timeout: float = 600.0) -> Iterator[Processes]:
    """The processes that torchrun started, joined for the time of a block; ALONE without torchrun or with one process.

    Args:
        device: "cpu" for gloo alone; "cuda" for NCCL between the GPUs, of which process LOCAL_RANK gets its own as
            the current device; "auto" for cuda where there is one.
        timeout: seconds that a process waits for another in one operation before it raises LostProcess.

    Raises:
        LostProcess: the processes did not find each other in time.
        ValueError: a timeout that is not positive, or more processes on this machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if not timeout > 0:
        raise ValueError(f"timeout={timeout}: needed is a positive number of seconds")
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    importlib.import_module("torch.distributed.nn.functional")  # see NOTE [threads end before Python does]
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise LostProcess(f"process {rank} of {size} did not find the others within {timeout:g} s ({error})") from error
    try:
        yield current()
    except LostProcess:
        if not cuda:  # gloo's operations have failed by now; NCCL's might wait for the process that is gone
            dist.destroy_process_group()
        raise
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def count_tasks(episode: Any) -> int:
    """T, the leading dimension of every leaf.

    Raises:
        ValueError: leaves that do not agree on it, or no task.
    """
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(episode)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0] or shapes[0][0] == 0:
        raise ValueError(
            f"an episode with leaves {shapes}: to be shared by processes, every leaf needs the same leading dimension "
            "of at least one task (a single task: give it a leading 1)"
        )
    return shapes[0][0]


def _take_gpu(local_rank: int) -> None:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"process {local_rank} of this machine wants a GPU of its own and there are {count}: give "
            f"--nproc-per-node={count}, or the device cpu"
        )
    torch.cuda.set_device(local_rank)


def _portable(error: Exception | None) -> Exception | None:
    """The error as something that survives pickling; its text where the error itself does not."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
