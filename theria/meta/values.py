"""Arguments that are values: what is said where a class, or something of another kind, was given."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def check_value(name: str, value: Any, kind: type, needed: str) -> None:
    """`value` is an instance of `kind`.

    Args:
        needed: what is needed, with an example.
    """
    if not isinstance(value, kind):
        raise TypeError(_message(name, value, needed, isinstance(value, type) and issubclass(value, kind)))


def _message(name: str, value: Any, needed: str, called: bool) -> str:
    """What was given, what is needed; for a class that only has to be `called`, how."""
    if not called:
        return f"{name}={value!r}: give {needed}"
    required = [
        p
        for p in inspect.signature(value).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    call = f"{value.__name__}({'...' if required else ''})"
    return f"{name}={value.__name__} is a class, and a value is needed: write {call}"


def check_problem(
    inner_loss: Callable[[Any, Any], Tensor], params: Any, optimiser: Any, steps: Any
) -> Callable[[Any, Any], Tensor]:
    """What every adjoint is given: parameters by name, an optimiser as a value, a number of steps.

    Returns:
        The inner loss, which raises where its value is not one floating-point number.
    """
    if not isinstance(params, dict) or not all(isinstance(p, Tensor) for p in params.values()):
        given = f"a dict with {sorted({type(p).__name__ for p in params.values()})}" if isinstance(params, dict) else ""
        raise TypeError(
            f"params is {given or f'a {type(params).__name__}'}: give the adapted parameters as a dict of tensors by "
            f"name, such as {{'w': w}}"
        )
    check_optimiser("optimiser", optimiser)
    check_steps(steps, least=0)

    def scalar(params: Any, context: Any) -> Tensor:
        return check_scalar(inner_loss(params, context), "inner_loss")

    return scalar


def check_steps(steps: Any, least: int) -> int:
    """`steps`, when it is an integer of at least `least`."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps={steps!r} is a {type(steps).__name__}: give the number of inner steps as an int")
    if steps < least:
        raise ValueError(f"steps={steps}: give at least {least} inner step{'s' if least != 1 else ''}")
    return steps


def check_scalar(loss: Any, name: str, where: str = "") -> Tensor:
    """`loss`, what the function `name` returned, when it is a floating-point scalar tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} returned a {type(loss).__name__}{where}: return a scalar tensor")
    if loss.ndim or not loss.is_floating_point():
        raise ValueError(
            f"{name} returned shape {tuple(loss.shape)}, {loss.dtype}{where}: it has to return one "
            f"floating-point number, such as the mean over the samples"
        )
    return loss


def check_optimiser(name: str, optimiser: Any) -> None:
    """An inner optimiser is a value with an `update`."""
    if isinstance(optimiser, type) or not hasattr(optimiser, "update"):
        called = isinstance(optimiser, type) and hasattr(optimiser, "update")
        raise TypeError(_message(name, optimiser, "an inner optimiser such as theria.meta.SGD(lr=0.1)", called))


def check_undecayed(theorem: Any, optimiser: Any, hyper: Mapping[str, Any] | None = None) -> None:
    """What an implicit derivative is of, the minimum of the loss, is where the optimiser goes.

    Args:
        theorem: who differentiates the minimum, for the message.
        hyper: what the optimiser is given beside its own numbers.

    Raises:
        ValueError: for weight decay, with which the steps end at the minimum of another function.
    """
    if getattr(optimiser, "weight_decay", 0) or "weight_decay" in (hyper or {}):
        given = f"{optimiser!r} has" if getattr(optimiser, "weight_decay", 0) else "hyper gives"
        raise ValueError(
            f"{given} a weight decay, so that the steps do not end at the minimum of the inner loss, which is what "
            f"{theorem!r} differentiates: take weight_decay=0 and add the decay to the loss, "
            f"loss + 0.5 * weight_decay * |theta|^2, or differentiate the steps, such as by Unrolled()"
        )
