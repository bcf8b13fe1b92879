"""Arguments that are values: what is said where a class, or something of another kind, was given."""

import inspect
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


def check_problem(params: Any, optimiser: Any) -> None:
    """What every adjoint is given: parameters by name, and an optimiser as a value."""
    if not isinstance(params, dict) or not all(isinstance(p, Tensor) for p in params.values()):
        given = f"a dict with {sorted({type(p).__name__ for p in params.values()})}" if isinstance(params, dict) else ""
        raise TypeError(
            f"params is {given or f'a {type(params).__name__}'}: give the adapted parameters as a dict of tensors by "
            f"name, such as {{'w': w}}"
        )
    check_optimiser("optimiser", optimiser)


def check_optimiser(name: str, optimiser: Any) -> None:
    """An inner optimiser is a value with an `update`."""
    if isinstance(optimiser, type) or not hasattr(optimiser, "update"):
        called = isinstance(optimiser, type) and hasattr(optimiser, "update")
        raise TypeError(_message(name, optimiser, "an inner optimiser such as theria.meta.SGD(lr=0.1)", called))
