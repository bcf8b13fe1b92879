"""An outer step as a few compiled pieces: the whole of it (inner loop, outer loss, gradient) without autograd.

    trace        the operations that the step runs, its gradients among them, as one graph of PyTorch's own operators
    functional   the same without operations in place, so that it may be cut anywhere
    by parts     float32 products, where that is faster (`theria.meta.products`)
    cut          between inner steps (`theria.meta.cuts`); pieces that are equal operation for operation are one
    compile      each different piece once, by PyTorch's compiler, which fuses what lies between matrix products

The first result is compared with that of the step itself, so that a compiler's mistake is an error.
"""

import operator
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, has_proxy_slot, make_fx
from torch.overrides import TorchFunctionMode

from theria.meta import cuts
from theria.meta.inductor import convolves, inductor
from theria.meta.products import by_parts

Tensors = list[Tensor]
Function = Callable[[Tensors], Tensors]
Compiler = Callable[[fx.GraphModule, Sequence[Tensor]], Callable[..., Sequence[Tensor]]]

VALUE = "value out of a tracing tensor"  # what PyTorch says of a tensor whose value the trace does not know
LOOKS = (
    "something in the step looks at the value of a tensor (bool(x), x.item(), x.tolist(), x[mask], a loop until x is "
    "small): what is compiled cannot depend on it. Give compile=False, or solvers check_every=None, throw=False"
)
READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}

ALIASES = {torch.ops.aten.alias.default, torch.ops.aten.detach.default, torch.ops.aten.lift_fresh.default}


@dataclass(frozen=True)
class Step:
    """One piece at its place in the program."""

    piece: int
    reads: tuple[int, ...]  # values by number
    makes: tuple[int, ...]
    last: tuple[int, ...]  # of those it reads, the ones that nothing reads afterwards


class Fused:
    """A function of tensors as compiled pieces, for inputs of the layout that it was traced with.

    Args:
        function: (list of tensors) -> list of tensors; it may differentiate inside.
        inputs: an example, with which it runs once.
        compiler: (piece, an example of its inputs) -> a function of tensors, one by one, to a sequence of tensors.

    Raises:
        ValueError: the function draws random numbers, which a compiled step would draw otherwise than the function.
        RuntimeError: a branch depends on the value of a tensor, or a tensor is read as numbers of Python or NumPy.
    """

    def __init__(self, function: Function, inputs: Tensors, compiler: Compiler = inductor) -> None:
        inputs = [x.detach() for x in inputs]  # a tensor that occurs twice would be one input to the trace
        graph, at = _traced(function, inputs)
        _refuse_random(graph)
        _refuse_shapes(graph)
        self.device = inputs[0].device.type
        with torch.autocast(self.device, enabled=False):  # the casts are in the graph
            graph, at = _functional(graph, at, inputs)
        self.constants, self.pieces, self.program, self.results = _cut(by_parts(graph), at)
        self.convolves = any(map(convolves, self.pieces))
        self.compiler = compiler
        self._compiled: dict[int, Callable[..., Sequence[Tensor]]] = {}

    @torch.no_grad()
    def __call__(self, inputs: Tensors) -> Tensors:
        """The results; a piece is compiled when it is met for the first time."""
        values: dict[int, Tensor] = dict(enumerate([*inputs, *self.constants]))
        with torch.autocast(self.device, enabled=False):
            for step in self.program:
                given = [values[i] for i in step.reads]
                for i in step.last:
                    del values[i]
                run = self._compiled.get(step.piece)
                if run is None:
                    run = self._compiled[step.piece] = self.compiler(self.pieces[step.piece], given)
                values.update(zip(step.makes, run(*given), strict=True))
        return [values[i] for i in self.results]


def _traced(function: Function, inputs: Tensors) -> tuple[fx.GraphModule, list[int]]:
    try:
        with cuts.collected() as at:
            graph = make_fx(_unread(function))(inputs)
    except RuntimeError as error:
        if VALUE not in str(error):
            raise
        raise RuntimeError(LOOKS) from error
    return graph, at


class _Unread(TorchFunctionMode):
    """Raises where a traced tensor is read past the tracer, which sees `x.item()` and would not see these."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mode = get_proxy_mode()
        if func in READS and mode is not None and has_proxy_slot(args[0], mode.tracer):
            raise RuntimeError(VALUE)
        return func(*args, **(kwargs or {}))


def _unread(function: Function) -> Function:
    def run(inputs: Tensors) -> Tensors:
        with _Unread():
            return function(inputs)

    return run


def _draws(node: fx.Node) -> bool:
    """Whether an operation draws random numbers; attention without dropout bears the tag of one that does."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return "dropout_p" not in names or bool(given.get("dropout_p", 0.0))


def _refuse_random(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if _draws(node):
            raise ValueError(
                f"the step draws random numbers ({node.target}): compiled, it would draw others, and not the same on "
                "the way back. Draw them outside and pass them in the episode, or give compile=False"
            )


def _refuse_shapes(graph: fx.GraphModule) -> None:
    """Raise where a shape depends on values: the gradient would be that of as many entries as at first."""
    for node in graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.dynamic_output_shape not in node.target.tags:
            continue
        indices = [i for i in node.args[1] if i is not None] if node.target is torch.ops.aten.index.Tensor else None
        if indices is None or any(_is_mask(i) for i in indices):
            raise RuntimeError(f"{LOOKS}. Here {node.target} makes a shape of it: use torch.where or a product")


def _is_mask(index: fx.Node) -> bool:
    if index.op == "get_attr":  # a constant, and so is what it makes
        return False
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


class _Replay(fx.Interpreter):
    """Runs a graph inside of another trace and says how far that one is at each cut."""

    def __init__(self, graph: fx.GraphModule, at: list[int]) -> None:
        super().__init__(graph)
        nodes = list(graph.graph.nodes)
        self.before = {nodes[i] for i in at if i < len(nodes)}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.before:
            cuts.cut()
        return super().run_node(n)


def _functional(graph: fx.GraphModule, at: list[int], inputs: Tensors) -> tuple[fx.GraphModule, list[int]]:
    """The same without operations in place."""

    def run(inputs: Tensors) -> Any:
        return _Replay(graph, at).run(inputs)

    with cuts.collected() as new, torch.no_grad():
        functional = make_fx(torch.func.functionalize(run), tracing_mode="fake", _allow_non_fake_inputs=True)(inputs)
    return functional, new


def _cut(module: fx.GraphModule, at: list[int]) -> tuple[Tensors, list[fx.GraphModule], list[Step], list[int]]:
    """Constants, the different pieces, the program over them, and which of the numbered values are the results."""
    graph = module.graph
    piece_of = _places(graph, at)
    _without_aliases(graph)
    graph.eliminate_dead_code()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    fixed = [node for node in graph.nodes if node.op == "get_attr"]
    number = {node: i for i, node in enumerate([*inputs, *fixed])}
    for node in fixed:
        node.meta["val"] = _constant(module, node)
    members: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            members.setdefault(piece_of[node], []).append(node)
    results: list[fx.Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    pieces: dict[Any, int] = {}
    modules: list[fx.GraphModule] = []
    program: list[Step] = []
    for place in sorted(members):
        piece = _Piece.of(members[place], set(results))
        for node in piece.made:
            number[node] = len(number)
        key = piece.key()
        if key not in pieces:
            pieces[key] = len(modules)
            modules.append(piece.module())
        reads, makes = (tuple(number[node] for node in nodes) for nodes in (piece.read, piece.made))
        program.append(Step(pieces[key], reads, makes, last=()))
    wanted = [number[node] for node in results]
    return [node.meta["val"] for node in fixed], modules, _with_ends(program, set(wanted)), wanted


def _places(graph: fx.Graph, at: list[int]) -> dict[fx.Node, int]:
    """Between which cuts a node lies; a part of a result lies where the whole does."""
    places: dict[fx.Node, int] = {}
    for i, node in enumerate(graph.nodes):
        part = node.op == "call_function" and node.target is operator.getitem
        places[node] = places[node.args[0]] if part else bisect_right(at, i)
    return places


def _without_aliases(graph: fx.Graph) -> None:
    """Nothing is written to, so that a value and another name for it are the same."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _constant(module: fx.GraphModule, node: fx.Node) -> Tensor:
    value: Any = module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _with_ends(program: list[Step], results: set[int]) -> list[Step]:
    """The program that drops each value after its last use."""
    seen, out = set(results), []
    for step in reversed(program):
        last = tuple(i for i in dict.fromkeys(step.reads) if i not in seen)
        seen.update(step.reads)
        out.append(replace(step, last=last))
    return out[::-1]


@dataclass(frozen=True)
class _Piece:
    """Operations that lie between two cuts, with the values that they read from outside and those that others read."""

    nodes: list[fx.Node]
    read: list[fx.Node]
    made: list[fx.Node]

    @classmethod
    def of(cls, nodes: list[fx.Node], results: set[fx.Node]) -> "_Piece":
        own = set(nodes)
        read = dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in own)
        made = [node for node in nodes if node in results or any(user not in own for user in node.users)]
        return cls(nodes, list(read), made)

    def key(self) -> Any:
        """Equal for pieces that do the same to inputs of the same layout."""
        local = {node: i for i, node in enumerate([*self.read, *self.nodes])}
        inputs = tuple(_layout(node.meta.get("val")) for node in self.read)
        body = tuple(
            (node.target, repr(fx.map_arg((node.args, node.kwargs), lambda n: f"value {local[n]}")))
            for node in self.nodes
        )
        return inputs, body, tuple(local[node] for node in self.made)

    def module(self) -> fx.GraphModule:
        graph, copies = fx.Graph(), {}
        for i, node in enumerate(self.read):
            copies[node] = graph.placeholder(f"x{i}")
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}  # of another trace
        graph.output(tuple(copies[node] for node in self.made))
        return fx.GraphModule(torch.nn.Module(), graph)


def _layout(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value
