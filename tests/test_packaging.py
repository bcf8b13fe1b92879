"""The metadata, the pins, and that the library alone needs torch alone."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from torch import Tensor

import theria
from theria import cli
from theria.testing import standard_samples

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = ("triton", "numpy", "hydra", "omegaconf", "wandb", "torchvision", "matplotlib", "sklearn", "rich", "higher")


def pins(name: str) -> dict[str, Version]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "scripts" / name).read_text().splitlines()]
    exact = [line.split("==") for line in lines if line and not line.startswith("-c")]
    return {normal(package): Version(version) for package, version in exact}


def normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


# ------------------------------------------------------------------------------------------------ torch is enough

# As if they were not installed: every finder of modules is asked through one that does not see them.
HIDE = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {hidden} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

assert not {hidden} & set(sys.modules)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


def run_without_optional_packages(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter in which no optional package can be imported."""
    program = HIDE.format(hidden=set(OPTIONAL)) + textwrap.dedent(code)
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["triton", "numpy", "wandb"])
def test_the_optional_packages_are_hidden(package: str) -> None:
    result = run_without_optional_packages(f"import {package}")
    assert f"No module named '{package}'" in result.stderr


def test_every_module_imports_with_torch_alone() -> None:
    result = run_without_optional_packages(
        """
        import importlib, pkgutil, theria
        modules = [m.name for m in pkgutil.walk_packages(theria.__path__, "theria.")]
        needs_triton = ("theria.ops.triton.", "theria.testing.kernels", "theria.testing.compile")
        for name in modules:
            if not name.startswith(needs_triton):
                importlib.import_module(name)
        assert "theria.ops.sdpa" in modules
        """
    )
    assert result.returncode == 0, result.stderr


def test_attention_and_its_derivatives_work_with_torch_alone() -> None:
    result = run_without_optional_packages(
        """
        import torch, theria
        q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
        for backend in ("auto", "custom", "reference"):
            out = theria.sdpa(q, k, v, is_causal=True, dropout_p=0.1, seed=3, backend=backend)
            first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))
            tangent = torch.func.jvp(lambda q: theria.sdpa(q, k, v, backend=backend), (q.detach(),), (q.detach(),))[1]
            assert all(g.isfinite().all() for g in (*first, *second, tangent))
        """
    )
    assert result.returncode == 0, result.stderr


def test_the_transformer_example_runs_with_torch_alone() -> None:
    arguments = ("--backend", "reference", "--device", "cpu", "--steps", "2")
    result = run_without_optional_packages(
        """
        import runpy
        sys.argv[0] = "examples/minimal_decoder_transformer.py"
        runpy.run_path(sys.argv[0], run_name="__main__")
        """,
        *arguments,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("loss") == 2


# ------------------------------------------------------------------------------------------------------- metadata


def test_the_library_requires_torch_and_triton_without_an_upper_bound() -> None:
    requirements = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
    assert set(requirements) == {"torch", "triton"}
    assert all(
        Version(v) in requirements["torch"].specifier for v in ("2.11.0", "2.13.0", "2.13.0+cpu", "2.15.0", "3.0")
    )
    assert all(Version(v) in requirements["triton"].specifier for v in ("3.6.0", "3.7.1", "3.9.0"))
    marker = requirements["triton"].marker
    assert marker is not None
    assert marker.evaluate({"platform_system": "Linux", "platform_machine": "x86_64"})
    assert not marker.evaluate({"platform_system": "Darwin", "platform_machine": "arm64"})
    assert not marker.evaluate({"platform_system": "Windows", "platform_machine": "AMD64"})


def test_no_upper_bounds_in_the_extras_and_no_torchvision_beside_them() -> None:
    extras = PROJECT["optional-dependencies"]
    for requirement in map(Requirement, extras["experiments"] + extras["dev"]):
        assert {s.operator for s in requirement.specifier} == {">="}, requirement
        assert requirement.name not in ("torch", "torchvision"), "these two decide which build of torch is installed"


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    pinned = pins("constraints.txt")
    for requirement in map(Requirement, [r for group in ("experiments", "dev") for r in extra(group)]):
        assert pinned[normal(requirement.name)] in requirement.specifier, requirement
    assert pinned["torch"] == Version("2.13.0")
    assert pinned["numpy"] < Version("2.4"), "numpy 2.4 breaks the CPU interpreter of Triton 3.6"
    assert "triton" not in pinned, "the CUDA build of torch requires its own triton"
    assert pins("constraints-cpu.txt") == {"triton": Version("3.6.0")}


def extra(name: str) -> list[str]:
    return PROJECT["optional-dependencies"][name]


def test_the_pins_cover_everything_that_the_extras_pull_in() -> None:
    pinned, seen = pins("constraints.txt") | pins("constraints-cpu.txt"), set()
    todo = [Requirement(r) for r in PROJECT["dependencies"] + extra("experiments") + extra("dev")]
    while todo:
        requirement = todo.pop()
        name = normal(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        assert name in pinned, f"scripts/constraints.txt does not pin {name}"
        try:
            metadata = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform, or not in this environment
            continue
        for child in map(Requirement, metadata):
            extras = ("", *requirement.extras)
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                todo.append(child)
    assert len(seen) > 40


def test_the_conda_environment_installs_what_the_scripts_install() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "theria"
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.11", "pip"]
    assert pip["pip"] == [
        "--extra-index-url https://download.pytorch.org/whl/cpu",
        "-c scripts/constraints-cpu.txt",
        f"torch=={pins('constraints.txt')['torch']}+cpu",
        "-e .[experiments,dev]",
    ]


def test_the_wheel_holds_every_package_the_license_and_the_type_marker(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "theria", source / "theria", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = tmp_path.glob("theria-*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {f"theria/{p.relative_to(ROOT / 'theria')}" for p in (ROOT / "theria").rglob("*.py")} <= files
    assert "theria/py.typed" in files
    assert any(name.endswith("LICENSE") for name in files)
    assert not any(name.startswith(("tests", "experiments", "examples")) for name in files)


def test_the_license_is_mit() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "MIT"
    assert text.startswith("MIT License\n\nCopyright (c) 2026 the theria authors\n")


# ---------------------------------------------------------------------------------------------------- the command


def test_info_names_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["torch"] == importlib.metadata.version("torch")
    assert rows["theria"] == PROJECT["version"] == theria.__version__


def test_info_says_what_is_not_installed() -> None:
    assert cli.version("a-package-that-nobody-has") == "not installed"
    result = run_without_optional_packages("from theria import cli; print(cli.info())")
    assert "device" in result.stdout, result.stderr


@pytest.fixture
def two_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [s for s in standard_samples() if s.name in ("causal", "dropout")]
    monkeypatch.setattr(cli, "standard_samples", lambda: samples)


@pytest.mark.usefixtures("two_samples")
def test_check_passes_on_every_backend_that_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0
    rows = capsys.readouterr().out.splitlines()
    for backend in ("reference", "custom"):
        assert [row.split()[2:5:2] for row in rows if row.startswith(backend)][:2] == [["truth", "ok"], ["laws", "ok"]]


@pytest.mark.usefixtures("two_samples")
def test_check_fails_when_a_derivative_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    def doubled(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        out = theria.sdpa(query, key, value, **options)
        return 2 * out - out.detach()  # the right value and twice the derivative

    def shifted(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return theria.sdpa(query, key, value, **options) + key.sum()  # breaks the law of the key shift

    for wrong in (doubled, shifted):
        assert cli.check(wrong) >= 2
        assert "FAILED: above" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fly"])
    assert "info" in capsys.readouterr().err
