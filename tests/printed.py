"""What a program prints, and whether that is what a document says."""

import contextlib
import io
import re


def run(source: str, name: str, namespace: dict[str, object]) -> str:
    """What the program prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, name, "exec"), namespace)
    return out.getvalue()


NUMBER = re.compile(r"-?\d+(?:\.(\d+))?(?:e([-+]\d+))?")


def same_output(printed: str, expected: str) -> bool:
    """The same text, with decimal numbers within one unit of their last place: rounding differs between machines."""
    if "".join(NUMBER.sub("#", printed).split()) != "".join(NUMBER.sub("#", expected).split()):
        return False
    return all(
        abs(float(a[0]) - float(b[0])) <= 1.01 * _last_place(b)
        for a, b in zip(NUMBER.finditer(printed), NUMBER.finditer(expected), strict=True)
    )


def _last_place(number: re.Match[str]) -> float:
    """One unit of the last place of a decimal number; 0 for an integer, which has to be exact."""
    return 0.0 if number[1] is None and number[2] is None else 10.0 ** (int(number[2] or 0) - len(number[1] or ""))
