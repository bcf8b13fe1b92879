"""The reference part of docs/api/*.md, from the docstrings: they are its one source.

    python scripts/api_pages.py            writes the pages
    python scripts/api_pages.py --check    says which are not up to date, and ends with an error if one is not

A page is written by hand above the line MARK: an example, and what to choose. Below it stands, module by module, what
the docstrings say. `PAGES` decides what is on which page; tests/test_api_pages.py holds it to the public names.
"""

import argparse
import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "api"
MARK = "<!-- From here on: the docstrings, by scripts/api_pages.py. Edit those. -->"
WIDTH = 110  # of a signature, beyond which each argument gets a line


@dataclass(frozen=True)
class Page:
    """What a page refers to: names of modules; `notes` are modules of which only the docstring is shown.

    A last `...` among the names stands for all others that the module exports.
    """

    names: dict[str, tuple[Any, ...]]
    notes: tuple[str, ...] = ()

    @property
    def objects(self) -> dict[str, Any]:
        """The classes and functions, by name."""
        found = {}
        for module, names in self.names.items():
            home = importlib.import_module(module)
            given = [*names[:-1], *sorted(set(home.__all__) - set(names))] if names[-1] is ... else names
            for name in given:
                value = getattr(home, name)
                if inspect.isclass(value) or inspect.isfunction(value):
                    found[name] = value
        return found


ADJOINTS = ("Adjoint", "Unrolled", "MixedMode", "FirstOrder", "Truncated", "Implicit", "Identity", "Higher")
LEARNERS = ("Learner", "GradientLearner", "MAML", "FOMAML", "ANIL", "MetaSGD", "MAMLPlusPlus", "IMAML")
LEARNERS += ("Reptile", "CAVIA", "ExtraInputs", "FiLM", "ProtoNet", "R2D2")
LEARNERS += ("TaskHeadLearner", "ProtoMAML", "UnicornMAML")
DISTRIBUTED = ("processes", "current", "Processes", "share", "count_tasks", "LostProcess")
EVOLUTION = ("PES", "TruncatedES", "EvolutionState", "EvolutionInfo")
EQUILIBRIUM = ("DeepEquilibrium", "EquilibriumBlock")
PAGES = {
    "adjoints": Page({"theria.meta": ADJOINTS}),
    "learners": Page({"theria.meta": LEARNERS}, notes=("theria.meta.functional",)),
    "optimisers": Page({"theria.meta.optimisers": ("InnerOptimiser", "SGD", ...)}),
    "solvers": Page({"theria.meta.solvers": ("LinearSolver", "IterativeSolver", "Solution", "Result", ...)}),
    "implicit": Page(
        {"theria.meta.implicit": ("root", "fixed_point", "argmin", ...), "theria.nn.equilibrium": EQUILIBRIUM},
        notes=("theria.meta.implicit.rules",),
    ),
    "bilevel": Page(
        {"theria.meta.bilevel": ("BilevelProblem", "ITD", "AID", ...), "theria.meta.evolution": EVOLUTION},
    ),
    "certify": Page({"theria.meta.certificate": ("certify", "Certificate", "Terms", "spot_check", ...)}),
    "running": Page({"theria.meta.distributed": DISTRIBUTED, "theria.meta": ("CapturedStep",)}),
    "curvature": Page({"theria.curvature": ("hvp", ...)}),
    "problems": Page({"theria.testing.problems": ("Problem", ...)}),
}


# ------------------------------------------------------------------------------------------------------------- markdown
def escaped(text: str) -> str:
    """Prose of a docstring as Markdown shows it: what is not code keeps its stars, brackets and underscores."""
    text = re.sub(r":(?:func|mod|class):(?=`)", "", text)
    parts = re.split(r"(``.*?``|`.*?`)", text, flags=re.DOTALL)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(\*|<(?=[\w/!?])|(?<!\w)_|(?<=\])\(|(?<=\S)~|~(?=\S))", r"\\\1", parts[i])
    return "".join(parts)


def prose(lines: list[str]) -> Iterator[str]:
    """Paragraphs and tables as they are; what is indented becomes a block of text."""
    block: list[str] = []
    for line in [*lines, "."]:  # the full stop ends a last block
        if line.startswith("    ") or (block and not line):
            block.append(line)
            continue
        if block:
            body = textwrap.dedent("\n".join(block)).strip("\n")
            yield from ("", "```text", *body.splitlines(), "```", "")
            block = []
        yield line if line.startswith("|") else escaped(line)


def listed(lines: list[str]) -> Iterator[str]:
    """`name: what it is` at one indentation, wrapped lines at a deeper one."""
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        entry = re.match(r"(\*{0,2}[A-Za-z]\w*(?:, \*{0,2}\w+)*):\s(.*)", line)
        if entry:
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            yield f"- {names}: {escaped(entry[2])}"
        elif line.strip():
            yield f"  {escaped(line.strip())}"


SECTIONS = {"Args": "Arguments", "Attributes": "Attributes", "Raises": "Raises", "Returns": "Returns"}


def markdown(doc: str) -> list[str]:
    """A docstring: its prose, and its sections as lists."""
    lines, out = inspect.cleandoc(doc).splitlines(), []
    while lines:
        section = SECTIONS.get(lines[0].removesuffix(":")) if lines[0].endswith(":") else None
        stop = next((i for i, line in enumerate(lines) if i and _ends(line, section)), len(lines))
        here, lines = lines[:stop], lines[stop:]
        if section == "Returns":
            out += ["", f"**{section}** {escaped(' '.join(line.strip() for line in here[1:] if line.strip()))}", ""]
        elif section:
            out += ["", f"**{section}**", "", *listed(here[1:]), ""]
        else:
            out += list(prose(here))[:-1]
    return out


def _ends(line: str, section: str | None) -> bool:
    """Whether a line begins something else: a section, or prose after one."""
    begins = line.endswith(":") and line[:-1] in SECTIONS
    return begins or (section is not None and bool(line) and not line.startswith(" "))


# ----------------------------------------------------------------------------------------------------------- signatures
def node_of(value: Any) -> Any:
    """The syntax of a class or function: its annotations and defaults as they were written."""
    return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]


def own(cls: type) -> list[type]:
    """The class and its bases that are theria's, the most basic first."""
    return [base for base in reversed(cls.__mro__) if base.__module__.startswith("theria")]


def arguments(cls: type) -> list[str] | None:
    """What the constructor takes; None where a class is not made by its user."""
    if issubclass(cls, Enum | Exception | tuple) or getattr(cls, "_is_protocol", False):
        return None
    if is_dataclass(cls):
        fields: dict[str, str] = {}
        for base in own(cls):
            for item in node_of(base).body:
                if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation):
                    fields[ast.unparse(item.target)] = part(item.target, item.annotation, item.value, base)
        return list(fields.values())
    inits = [base for base in own(cls) if "__init__" in vars(base)]
    return taken(vars(inits[-1])["__init__"]) if inits else None


def taken(function: Any) -> list[str]:
    """The arguments without `self`, each with its annotation and default."""
    args = node_of(function).args
    plain = [*zip(reversed(args.args), [*reversed(args.defaults), *[None] * len(args.args)], strict=False)][::-1]
    out = [
        part(ast.Name(a.arg), a.annotation, default, function) for a, default in plain if a.arg not in ("self", "cls")
    ]
    if args.vararg or args.kwonlyargs:
        out.append(f"*{ast.unparse(args.vararg) if args.vararg else ''}")
    keywords = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    out += [part(ast.Name(a.arg), a.annotation, default, function) for a, default in keywords]
    return out + ([f"**{ast.unparse(args.kwarg)}"] if args.kwarg else [])


def part(name: ast.expr, annotation: Any, default: Any, owner: Any) -> str:
    """`name: annotation = default`; a private constant is shown as what it stands for."""
    text = ast.unparse(name) + (f": {unquoted(annotation)}" if annotation else "")
    if default is None:
        return text
    value = ast.unparse(default)
    if value.startswith("_") and (found := re.search(rf"^{value} = (.*)$", source_of(owner), re.MULTILINE)):
        value = found[1]
    return f"{text} = {value}"


def source_of(owner: Any) -> str:
    """Of the module that an object comes from."""
    return inspect.getsource(inspect.getmodule(owner) or owner)


def unquoted(annotation: ast.expr) -> str:
    """An annotation without the quotes that a forward reference has."""
    return annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)  # type: ignore[return-value]


def signature(name: str, inside: list[str], returns: str = "") -> list[str]:
    """A block of text, one line if it fits."""
    one = f"{name}({', '.join(inside)}){returns}"
    if len(one) > WIDTH:
        one = f"{name}(\n" + "".join(f"    {part},\n" for part in inside) + f"){returns}"
    return ["", "```text", *one.splitlines(), "```", ""]


# ------------------------------------------------------------------------------------------------------------ the pages
def function_entry(name: str, function: Any, level: str) -> Iterator[str]:
    annotation = node_of(function).returns
    yield from ("", f"{level} `{name}`")
    yield from signature(name, taken(function), f" -> {unquoted(annotation)}" if annotation else "")
    yield from markdown(function.__doc__ or "")


def class_entry(name: str, cls: type, shown: set[str]) -> Iterator[str]:
    yield from ("", f"### `{name}`")
    inside, doc = arguments(cls), cls.__dict__.get("__doc__") or ""
    if inside is not None and "Attributes:" not in doc:
        yield from signature(name, inside)
    yield from ("", *markdown(doc))
    if issubclass(cls, Enum):
        yield from ("", "| member | meaning |", "|---|---|")
        yield from (f"| `{m.name}` | {escaped(str(getattr(m, 'advice', m.value)))} |" for m in cls)
    hidden = [base for base in own(cls)[:-1] if base.__name__.startswith("_")]
    for base in hidden:
        yield from ("", *markdown(base.__doc__ or ""))
    for home in (*hidden, cls):
        for key, value in vars(home).items():
            yield from method_entry(f"{name}.{key}", key, value, shown)


def method_entry(name: str, key: str, value: Any, shown: set[str]) -> Iterator[str]:
    """A public method or property that says something which the page has not said yet."""
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    doc = getattr(function, "__doc__", None)
    if not inspect.isfunction(function) or (key.startswith("_") and key != "__call__") or not doc or doc in shown:
        return
    shown.add(doc)
    if isinstance(value, property):
        yield from ("", f"#### `{name}`", "", *markdown(doc))
    else:
        yield from function_entry(name, function, "####")


def reference(page: Page) -> str:
    """The part of a page below the mark."""
    by_module: dict[str, list[tuple[str, Any]]] = {name: [] for name in page.notes}
    for name, value in page.objects.items():
        by_module.setdefault(value.__module__, []).append((name, value))
    lines, shown = [], set()
    for module, entries in by_module.items():
        home = importlib.import_module(module)
        path = Path(inspect.getsourcefile(home) or "").resolve().relative_to(ROOT).as_posix()
        lines += ["", f"## {module}", "", f"Source: [`{path}`](../../{path}).", "", *markdown(home.__doc__ or "")]
        for name, value in entries:
            entry = class_entry(name, value, shown) if inspect.isclass(value) else function_entry(name, value, "###")
            lines += entry
    text = "\n".join(line.rstrip() for line in lines)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def made(name: str) -> str:
    """The whole page: its head as it is, its reference anew."""
    head, mark, _ = (FOLDER / f"{name}.md").read_text().partition(MARK)
    if not mark:
        raise SystemExit(f"docs/api/{name}.md has no line {MARK!r}: what is below it is made by this script")
    return f"{head}{MARK}\n\n{reference(PAGES[name])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = [name for name in PAGES if (FOLDER / f"{name}.md").read_text() != made(name)]
    for name in stale:
        if not options.check:
            (FOLDER / f"{name}.md").write_text(made(name))
        print(f"docs/api/{name}.md {'is not up to date' if options.check else 'written'}")
    if stale and options.check:
        sys.exit("run: python scripts/api_pages.py")


if __name__ == "__main__":
    main()
