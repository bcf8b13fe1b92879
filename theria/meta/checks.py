"""Every message of the meta-learners: what was given, what is needed, what to do."""

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from theria.meta.adjoint import Adjoint
from theria.meta.implicit.frozen import differentiating
from theria.meta.implicit_adjoint import Identity, Implicit
from theria.meta.levels import carries_derivative
from theria.meta.solvers import Result, SolverError
from theria.meta.solvers.loop import readable
from theria.meta.values import check_optimiser, check_undecayed, check_value

Adapt = Callable[[str], bool] | str | Sequence[str] | None


def check_loss_fn(loss_fn: Any) -> None:
    """A loss is a function: parameters of its own would not be learned."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn={loss_fn!r}: give a function (prediction, target) -> scalar")
    if isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters()):
        raise TypeError(
            "loss_fn is a module with parameters, which would not be meta-parameters: give a function, and put "
            "what is learned into the model"
        )


def check_tasks(chunk_size: Any, randomness: Any) -> None:
    """How tasks run under `vmap`."""
    if randomness not in ("error", "different", "same"):
        raise ValueError(f"randomness={randomness!r} is not known: give 'error', 'different' or 'same'")
    if chunk_size is not None and not _is_count(chunk_size):
        raise ValueError(f"chunk_size={chunk_size!r}: give the number of tasks, at least 1, or None for all at once")


def check_inner(inner: Any, adjoint: Any, name: str = "inner") -> None:
    """Both are values, not classes or numbers, and go together; `name` is that of the optimiser's argument."""
    check_value("adjoint", adjoint, Adjoint, "an adjoint such as MixedMode() or Unrolled()")
    check_optimiser(name, inner)
    if isinstance(adjoint, Implicit | Identity):
        check_undecayed(adjoint, inner)


def check_start(adjoint: Adjoint, learned: bool) -> None:
    """An implicit adjoint has no derivative in the start of the inner steps: something else has to be `learned`."""
    if isinstance(adjoint, Implicit | Identity) and not learned:
        raise ValueError(
            f"adjoint={adjoint!r}: a minimum does not depend on where the steps began, so the initialisation, which is "
            f"all there is to learn here, would have no gradient. Use IMAML, whose proximal term remembers it, or "
            f"adapt a part of the model only, such as adapt='head'"
        )


def check_rates(adjoint: Adjoint, inner: Any) -> None:
    """Learned rates need a derivative, which an implicit adjoint does not have."""
    if isinstance(adjoint, Implicit | Identity):
        raise ValueError(
            f"inner={inner!r} learns rates and adjoint={adjoint!r} gives them no gradient, as a minimum does not "
            f"depend on the steps: use learn_lr=False, or another adjoint"
        )


def check_path(adjoint: Adjoint, start: Any, hyper: Any) -> None:
    """An implicit adjoint has no derivative in how the steps came to the minimum: none is asked for."""
    if not isinstance(adjoint, Implicit | Identity) or not differentiating():
        return
    for name, tree in (("the start of the inner steps", start), ("what hyper gives the optimiser", hyper)):
        if any(isinstance(x, Tensor) and carries_derivative(x) for x in pytree.tree_leaves(tree)):
            raise ValueError(
                f"{name} is being differentiated and adjoint={adjoint!r} gives it no gradient, as a minimum does not "
                f"depend on the steps: detach it, or use another adjoint, such as Unrolled()"
            )


def check_positive(name: str, value: Any, hint: str) -> float:
    """`value`, when it is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r}: {hint} has to be a positive finite number")
    return float(value)


def check_count(name: str, value: Any) -> int:
    """`value`, when it is an integer of at least 1."""
    if not _is_count(value):
        raise ValueError(f"{name}={value!r}: give an integer of at least 1")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class Count:
    """An attribute that is an integer of at least 1 whenever it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, of: Any, owner: type) -> Any:
        return self if of is None else vars(of)[self.name]

    def __set__(self, of: Any, value: Any) -> None:
        vars(of)[self.name] = check_count(self.name, value)


class CountOrNone(Count):
    """The same, or None."""

    def __set__(self, of: Any, value: Any) -> None:
        vars(of)[self.name] = value if value is None else check_count(self.name, value)


class StationarityError(SolverError):
    """The inner steps of iMAML did not reach the minimum; `residual` is the gradient there as a share of the first."""

    def __init__(self, ratio: float, tol: float, steps: int) -> None:
        super().__init__(Result.max_iterations, ratio, steps)
        self.reason = (
            f"after {steps} inner steps the gradient of the inner problem is {ratio:.2g} of what it was at the start "
            f"(worst task), and tol={tol:g}: the implicit derivative belongs to the minimum, not to this point. Take "
            f"more steps, another inner rate or optimiser, or a larger strength; a larger tol, or None, accepts it"
        )
        self.args = (self.reason,)


def check_stationary(ratio: Tensor, tol: float, steps: int) -> None:
    """The inner problem is solved to `tol`. Synchronises with the device once; under torch.compile nothing looks.

    Raises:
        StationarityError: it is not; NaN is not, either.
    """
    if torch.compiler.is_compiling():
        return
    worst = readable(ratio).max().item()
    if not worst <= tol:
        raise StationarityError(worst, tol, steps)


def check_epochs(**epochs: int) -> None:
    """Each a number of epochs, 0 for none."""
    for name, value in epochs.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}={value!r}: give a number of epochs, or 0 for none")


def check_weights(weights: Sequence[float], steps: int) -> list[float]:
    """One weight of at least 0 for each inner step, not all of them 0."""
    values = [float(v) for v in weights]
    if len(values) != steps or not all(math.isfinite(v) and v >= 0 for v in values) or not any(values):
        raise ValueError(
            f"weights={values}: give {steps} finite numbers of at least 0, one for each inner step, not all 0"
        )
    return values


def recording() -> bool:
    """Whether a CUDA graph is recorded, during which nothing may wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def hidden() -> bool:
    """Whether labels are not looked at: while a step is compiled, traced or recorded, which it was not the first time
    that it ran."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None or recording()


def check_classes(member: Tensor, y: Tensor) -> None:
    """Every label is in [0, ways); `member` (S, ways) is `one_hot(y, ways)`. Synchronises with the device once."""
    if hidden() or bool(readable(member.any(-1)).all()):
        return
    labels, ways = readable(y), member.shape[-1]
    raise ValueError(
        f"support_y has labels {int(labels.min())} to {int(labels.max())}: with ways={ways} they are "
        f"integers from 0 to {ways - 1}"
    )


def check_every_class(member: Tensor, y: Tensor) -> None:
    """Every label is in [0, ways), and every class is in the support set. Synchronises with the device."""
    check_classes(member, y)
    if hidden() or bool(readable(member.any(0)).all()):
        return
    ways = member.shape[-1]
    raise ValueError(
        f"a class has no example in a support set: with ways={ways} every label from 0 to {ways - 1} has to occur"
    )


def check_embedding(h: Any, x: Tensor) -> Tensor:
    """`h`, when it is one vector of features for each of the inputs `x`."""
    if not isinstance(h, Tensor):
        raise TypeError(f"the model returned a {type(h).__name__}: an embedding is a tensor (B, d) for B inputs")
    if h.ndim != 2 or h.shape[0] != x.shape[0] or not h.is_floating_point():
        raise ValueError(
            f"the model returned shape {tuple(h.shape)}, {h.dtype}, for inputs {tuple(x.shape)}: an embedding is "
            f"(B, d), floats, for B inputs; end the model with nn.Flatten(), or with unsqueeze(-1) for one feature"
        )
    return h


def check_no_steps(steps: int | None, learner: str) -> int:
    """0, when a learner without inner steps is asked for none."""
    if steps is not None:
        raise ValueError(f"steps={steps}: {learner} adapts in closed form and takes no inner steps; leave steps out")
    return 0


def select(names: Mapping[str, str], adapt: Adapt, default: Container[str]) -> list[str]:
    """The parameters that are adapted, in the order of `names`.

    Args:
        names: of every name of a parameter the one that it is given by: itself, or the first one of a shared parameter.
        adapt: a predicate on names; a name or names, each of a parameter or of a module whose parameters are meant
            ("head" selects "head.weight" and "head.bias"); None for those in `default`.
    """
    given = list(dict.fromkeys(names.values()))
    if not given:
        raise ValueError("the model has no parameters: there is nothing to adapt")
    if adapt is None or callable(adapt):
        answers = {name: first in default if adapt is None else bool(adapt(name)) for name, first in names.items()}
        chosen = {names[name] for name, answer in answers.items() if answer}
        if not chosen:
            raise ValueError(f"adapt selects none of the parameters {_listed(given)}: make it true for at least one")
        split = next((name for name, answer in answers.items() if not answer and names[name] in chosen), None)
        if split is not None:
            raise ValueError(
                f"adapt is false for {split!r} and true for another name of the same parameter, which modules share "
                f"(the first is {names[split]!r}): make it answer alike for all names of one parameter"
            )
        return [name for name in given if name in chosen]
    wanted = names_of(adapt)
    if not wanted:
        raise ValueError(f"adapt is empty: give names among {_listed(given)}, or None for all")
    for prefix in wanted:
        if not any(within(name, prefix) for name in names):
            near = get_close_matches(prefix, [*names, *(name.rpartition(".")[0] for name in names)], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            parts = dict.fromkeys(name.partition(".")[0] for name in names)
            raise ValueError(f"adapt={prefix!r} is no parameter or module; there are {_listed(parts)}{hint}")
    chosen = {first for name, first in names.items() if any(within(name, prefix) for prefix in wanted)}
    return [name for name in given if name in chosen]


def names_of(adapt: Any) -> list[str]:
    """The names that `adapt` is or has."""
    names = [adapt] if isinstance(adapt, str) else list(adapt) if isinstance(adapt, Iterable) else [adapt]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapt={adapt!r}: give names of parameters or modules, a predicate on names, or None for all")
    return names


def within(name: str, prefix: str) -> bool:
    """Whether the parameter is the one of this name, or in the module of this name."""
    return name == prefix or name.startswith(prefix + ".")


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_support(x: Tensor, y: Tensor) -> None:
    """One task's data: as many inputs as targets, at least one."""
    if x.ndim == 0 or y.ndim == 0 or x.shape[0] != y.shape[0] or x.shape[0] == 0:
        raise ValueError(
            f"support_x {tuple(x.shape)} and support_y {tuple(y.shape)}: one task has shapes (S, ...) and (S, ...) "
            f"with the same S of at least 1; several tasks are for learner(episode) and learner.predict(episode)"
        )


def is_batched(episode: Any, batched: bool | None) -> bool:
    """Whether the tensors of an episode have a leading dimension of tasks.

    Inferred from the shapes when `batched` is None: targets of one dimension are one task; otherwise several tasks
    wherever the shapes allow it. Where they allow both, which takes as many queries as supports, labels (T, S) and
    vectors (T, S, k) are of several tasks: give `batched=False` for one task with (S, C, ...) inputs and (S, C) or
    (S, C, k) targets; targets of more dimensions (images) raise. Tasks of scalar inputs, (T, S), read as one: give
    `batched=True`.

    Raises:
        TypeError: for what is no episode.
        ValueError: for shapes that do not fit together, and for targets of four dimensions or more that fit both
            readings.
    """
    try:
        sx, sy, qx, qy = (tuple(part.shape) for part in episode)
    except (TypeError, ValueError, AttributeError):
        raise TypeError(
            f"an episode is (support_x, support_y, query_x, query_y), four tensors; given {type(episode).__name__}"
        ) from None
    one = _consistent(sx, sy, qx, qy, 0)
    many = len(sy) > 1 and sx[:1] == sy[:1] == qx[:1] == qy[:1] and _consistent(sx, sy, qx, qy, 1)
    if batched is None:
        if one and many and len(sx) > 2 and len(sy) > 3:
            raise ValueError(
                f"episode shapes support_x {sx}, support_y {sy}, query_x {qx}, query_y {qy} are those of {sx[0]} tasks "
                f"with {sx[1]} samples each, and of one task with {sx[0]} samples: give batched=True for several "
                f"tasks, batched=False for one"
            )
        batched = len(sx) > 2 and many
    if not (many if batched else one):
        raise ValueError(
            f"episode shapes support_x {sx}, support_y {sy}, query_x {qx}, query_y {qy} do not fit together: one task "
            f"has (S, *x), (S, *y), (Q, *x), (Q, *y) with S, Q >= 1; T tasks have the same after a leading T"
        )
    return batched


def _consistent(sx: tuple[int, ...], sy: tuple[int, ...], qx: tuple[int, ...], qy: tuple[int, ...], d: int) -> bool:
    """Whether dimension `d` counts the samples and what follows it agrees between support and query."""
    if min(map(len, (sx, sy, qx, qy))) <= d or 0 in (*sx[: d + 1], *qx[: d + 1]):
        return False
    return sx[d] == sy[d] and qx[d] == qy[d] and sx[d + 1 :] == qx[d + 1 :] and sy[d + 1 :] == qy[d + 1 :]
