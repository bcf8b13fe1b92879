"""The outer step as one CUDA graph: thousands of kernels of a few microseconds each, started by one call.

A second derivative through an inner loop is many small kernels, and Python starts them slower than the GPU runs them.
Where the shapes stay the same from step to step, the whole step (inner loop, outer loss, its gradient) is recorded once
and then replayed, by one call, without Python in between. Compiled before that, its kernels are fewer and larger.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from theria.meta.compiled import Compiled, Run, layout, outside_autocast, surroundings

WARM_UP = 2  # steps before recording: libraries load and kernels compile in them


class CapturedStep:
    """`loss = step(episode)` is `loss = learner(episode)` and the gradient of it in every parameter's `.grad`.

        step = CapturedStep(learner)
        for episode in episodes:
            loss = step(episode)
            optimiser.step()

    The gradients replace those of the step before: there is nothing to zero, and nothing accumulates. Each set of
    shapes is recorded at its first episode; recording runs the step three times. Anywhere but on a CUDA device, nothing
    is recorded and every step runs as it is, or compiled.

    With `compile` the operations of a step, those of its gradient among them, are compiled by PyTorch's compiler, which
    fuses what lies between matrix products; the pieces that inner steps have in common are compiled once
    (`theria.meta.fused`). That takes a minute or a few, and pays over thousands of steps. The first result is
    compared with the step's own. On a GPU its batched float32 products, at "highest" precision
    (`torch.set_float32_matmul_precision`), are three products of half-precision parts each, with float32's accuracy
    (`theria.meta.products`).

    What is recorded is fixed: the shapes, the addresses of parameters and buffers (an optimiser of PyTorch updates them
    in place, and so does `load_state_dict`), and every branch that Python took: the labels of the first episode are
    checked, those of later ones are not. The memory of a step stays with its graph. Parameters that were moved, frozen
    or replaced since are noticed and recorded anew, and so are other modules, public attributes of modules that are no
    tensors (`ways`, an inner optimiser, an adjoint), and the numbers that such an object has; numbers that are deeper
    inside of it are not: make another step after changing one.

    Args:
        learner: a module whose call on an episode returns the outer loss, a scalar.
        parameters: those that get a gradient; by default all of the learner's that require one.
        record: record on a CUDA device; False for steps that are only compiled, or only in another precision.
        compile: compile the step, on a CPU too.
        autocast: run the step in this dtype where `torch.autocast` does so, the parameters staying as they are: with
            torch.bfloat16, mixed precision. None: as the caller runs it.

    Raises:
        ValueError: no parameter requires a gradient, or the loss is no scalar; a compiled step draws random numbers.
        TypeError: a leaf of the episode is neither a tensor nor a value that can be compared with the last one.
        RuntimeError: the step cannot be recorded, because it waits for the device (a solver that looks at its
            residuals, an assertion on values) or draws on the CPU (a dropout seed); for a compiled step, a branch that
            depends on values.
        ArithmeticError: the compiled step has another gradient than the step itself.
    """

    def __init__(
        self,
        learner: nn.Module,
        parameters: Sequence[nn.Parameter] | None = None,
        *,
        record: bool = True,
        compile: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.learner, self.record, self.autocast = learner, record, autocast
        self._given = None if parameters is None else list(parameters)
        self._graphs: dict[Any, _Recorded] = {}
        self._run: Run = Compiled(learner, self._loss, self._plain, autocast) if compile else self._plain

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What gets a gradient, as of now."""
        found = list(self.learner.parameters()) if self._given is None else self._given
        wanted = [p for p in found if p.requires_grad]
        if not wanted:
            raise ValueError("no parameter requires a gradient: there is no outer gradient to compute")
        return wanted

    def __call__(self, episode: Any) -> Tensor:
        """The outer loss, detached; the gradients are in `.grad`.

        Args:
            episode: a pytree whose tensors are on the device of the parameters.
        """
        parameters = self.parameters
        if parameters[0].device.type != "cuda" or not self.record:
            return self._run(episode, parameters)
        leaves, structure = pytree.tree_flatten(episode)
        key = layout(leaves), structure, *self._places(parameters)
        recorded = self._graphs.get(key)
        if recorded is None:
            # what belonged to parameters that are elsewhere now will not be replayed again
            self._graphs = {k: graph for k, graph in self._graphs.items() if k[2:] == key[2:]}
            recorded = _Recorded(self._run, leaves, structure, parameters)
            self._graphs[*key[:2], *self._places(parameters)] = recorded  # a learner may count its runs
        return recorded.replay(leaves, parameters)

    def _places(self, parameters: list[nn.Parameter]) -> tuple[Any, ...]:
        """Where the tensors are, and what else decides the step."""
        tensors = [*self.learner.parameters(), *self.learner.buffers(), *parameters]
        return tuple(x.data_ptr() for x in tensors), surroundings(self.learner)

    def _plain(self, episode: Any, parameters: list[nn.Parameter]) -> Tensor:
        wanted = set(parameters)
        others = [(p, p.grad) for p in self.learner.parameters() if p not in wanted]
        for p in [*parameters, *(p for p, _ in others)]:
            p.grad = None
        try:
            loss = self._loss(self.learner, episode)
            with outside_autocast(loss.device):
                loss.backward()  # not of `inputs` alone: a reentrant checkpoint gives them nothing, without an error
        finally:
            for p, grad in others:
                p.grad = grad
        return loss.detach()

    def _loss(self, learner: Callable[[Any], Any], episode: Any) -> Tensor:
        with ExitStack() as stack:
            if self.autocast is not None:
                kind = next(self.learner.parameters()).device.type
                # a cast that was kept from one step would be read by the graph of another
                stack.enter_context(torch.autocast(kind, self.autocast, cache_enabled=False))
            loss = learner(episode)
        if not isinstance(loss, Tensor) or loss.ndim:
            given = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the learner returned {given}; a scalar loss is needed. Reduce it, e.g. by .mean()")
        return loss


class _Recorded:
    """One graph, with the tensors it reads and writes."""

    def __init__(self, run: Any, leaves: list[Any], structure: Any, parameters: list[nn.Parameter]) -> None:
        self.inputs = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        self.graph = torch.cuda.CUDAGraph()
        episode = pytree.tree_unflatten(self.inputs, structure)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run(episode, parameters)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        try:
            # another thread, such as one that loads data, may use the device meanwhile
            with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                self.loss = run(episode, parameters)
        except RuntimeError as error:
            # PyTorch leaves the device's generator as if it were still recorded, and its next number would raise.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise RuntimeError(
                "the step cannot be recorded as a CUDA graph: something in it waits for the device or draws on the "
                "CPU. Solvers: check_every=None, throw=False. Dropout in attention: a seed tensor on the device. Or "
                "run the step without recording it: loss = learner(episode); loss.backward()"
            ) from error
        self.grads = [p.grad for p in parameters]

    def replay(self, leaves: list[Any], parameters: list[nn.Parameter]) -> Tensor:
        for mine, given in zip(self.inputs, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)
        self.graph.replay()
        for p, grad in zip(parameters, self.grads, strict=True):
            p.grad = grad  # also where the optimiser has set it to None
        return self.loss.clone()
