"""The comparison of what a program prints with what a document says."""

import pytest

from tests.printed import run, same_output


@pytest.mark.parametrize(
    ("printed", "same"),
    [
        ("loss 0.124 after 5 steps\n", True),
        ("loss  0.122 after 5\n steps", True),  # in the last place, and where lines are broken
        ("loss 0.125 after 5 steps", False),
        ("loss 0.123 after 6 steps", False),
        ("loss -0.123 after 5 steps", False),
        ("losses 0.123 after 5 steps", False),
        ("loss nan after 5 steps", False),
    ],
)
def test_outputs_are_compared_to_the_digits_shown(printed: str, same: bool) -> None:
    assert same_output(printed, "loss 0.123 after 5 steps\n") is same


def test_outputs_with_exponents_are_compared_to_the_digits_shown() -> None:
    assert same_output("1.3e-07", "1.2e-07")
    assert not same_output("1.4e-07", "1.2e-07")
    assert not same_output("1.2e-06", "1.2e-07")


def test_what_is_printed_is_returned_and_names_stay() -> None:
    namespace: dict[str, object] = {}
    assert run("x = 2\nprint(x)", "first block", namespace) == "2\n"
    assert run("print(x + 1)", "second block", namespace) == "3\n"
