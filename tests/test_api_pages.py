"""The pages of the public API are up to date with the docstrings, complete, and lose nothing of a docstring."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import theria.curvature
import theria.meta
import theria.meta.bilevel
import theria.meta.certificate
import theria.meta.implicit
import theria.meta.optimisers
import theria.meta.solvers
import theria.testing.problems

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = (
    theria.curvature,
    theria.meta,
    theria.meta.bilevel,
    theria.meta.certificate,
    theria.meta.implicit,
    theria.meta.optimisers,
    theria.meta.solvers,
    theria.testing.problems,
)


@pytest.fixture(scope="module")
def api_pages() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        return importlib.import_module("api_pages")


def test_every_page_is_up_to_date(api_pages: ModuleType) -> None:
    stale = [name for name in api_pages.PAGES if (api_pages.FOLDER / f"{name}.md").read_text() != api_pages.made(name)]
    assert not stale, f"run: python scripts/api_pages.py (it writes {stale})"


def test_every_file_is_a_page_and_listed(api_pages: ModuleType) -> None:
    files = {path.stem for path in api_pages.FOLDER.glob("*.md")} - {"README"}
    assert files == set(api_pages.PAGES)
    listed = set(re.findall(r"\((\w+)\.md\)", (api_pages.FOLDER / "README.md").read_text()))
    assert files <= listed


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_every_public_class_and_function_is_on_a_page(module: ModuleType, api_pages: ModuleType) -> None:
    shown = {id(value) for page in api_pages.PAGES.values() for value in page.objects.values()}
    public = {name: getattr(module, name) for name in module.__all__}
    missing = [
        name
        for name, value in public.items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and id(value) not in shown
    ]
    assert not missing, "name it in PAGES of scripts/api_pages.py"


def test_every_public_name_has_a_docstring(api_pages: ModuleType) -> None:
    for page in api_pages.PAGES.values():
        for name, value in page.objects.items():
            assert (vars(value) if inspect.isclass(value) else {"__doc__": value.__doc__}).get("__doc__"), name


def words(text: str) -> list[str]:
    """Without those that the markup adds, removes or renames."""
    return [w for w in re.findall(r"\w+", text) if w not in ("Args", "Arguments", "func", "mod", "class", "text")]


def test_no_word_of_a_docstring_is_lost(api_pages: ModuleType) -> None:
    for page in api_pages.PAGES.values():
        for name, value in page.objects.items():
            doc = inspect.cleandoc(value.__doc__)
            assert words("\n".join(api_pages.markdown(doc))) == words(doc), name


DOC = """One line of *stars, a_b, _c and <d>.

    indented = 1

| a | b |
|---|---|
| 1 | 2 |

Args:
    one, two: the first
        goes on.
    **options: others.
The others: see `Base_`.

Returns:
    What it
    returns.

Raises:
    ValueError: `a*b` is wrong.
"""
MARKDOWN = r"""One line of \*stars, a_b, \_c and \<d>.

```text
indented = 1
```

| a | b |
|---|---|
| 1 | 2 |

**Arguments**

- `one`, `two`: the first
  goes on.
- `**options`: others.

The others: see `Base_`.

**Returns** What it returns.

**Raises**

- `ValueError`: `a*b` is wrong.
"""


def test_a_docstring_becomes_markdown(api_pages: ModuleType) -> None:
    assert re.sub(r"\n{2,}", "\n\n", "\n".join(api_pages.markdown(DOC))).strip() == MARKDOWN.strip()


def test_signatures_are_as_written(api_pages: ModuleType) -> None:
    assert api_pages.arguments(theria.meta.Unrolled) == ["checkpoint_every: int | None = None"]
    taken = api_pages.arguments(theria.meta.solvers.Neumann)
    assert (taken[0], taken[-1]) == ("rtol: float = 1e-06", "scale: float = 1.0")  # those of the base come first
    assert api_pages.arguments(theria.meta.solvers.Solution) is None  # nobody makes one
    newton = api_pages.arguments(theria.meta.implicit.NewtonCG)
    assert newton[0] == "linear_solver: LinearSolver = CG(rtol=1e-4, check_every=1)"  # behind a private name


def example(x: int, *args: Any, y: str = "a, b", z: "str | None" = None, **rest: Any) -> "list[str]":
    raise NotImplementedError


def test_a_long_signature_has_a_line_for_each_argument(api_pages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["x: int", "*args: Any", "y: str = 'a, b'", "z: str | None = None", "**rest: Any"]
    assert api_pages.taken(example) == parts
    assert list(api_pages.function_entry("f", example, "##"))[3:5] == ["```text", f"f({', '.join(parts)}) -> list[str]"]
    monkeypatch.setattr(api_pages, "WIDTH", 20)
    lines = list(api_pages.function_entry("f", example, "##"))
    assert lines[3:-2] == ["```text", "f(", *(f"    {part}," for part in parts), ") -> list[str]"]


def test_check_says_what_is_stale(
    api_pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    page = tmp_path / "certify.md"
    page.write_text(f"# Certificates\n\n{api_pages.MARK}\n\nold\n")
    monkeypatch.setattr(api_pages, "FOLDER", tmp_path)
    monkeypatch.setattr(api_pages, "PAGES", {"certify": api_pages.PAGES["certify"]})
    monkeypatch.setattr(sys, "argv", ["api_pages.py", "--check"])
    with pytest.raises(SystemExit, match="run: python"):
        api_pages.main()
    assert "not up to date" in capsys.readouterr().out
    assert page.read_text().endswith("old\n")
    monkeypatch.setattr(sys, "argv", ["api_pages.py"])
    api_pages.main()
    assert page.read_text().startswith(f"# Certificates\n\n{api_pages.MARK}\n\n## theria.meta.certificate")
    page.write_text("# Certificates\n")
    with pytest.raises(SystemExit, match="has no line"):
        api_pages.made("certify")
