"""Every command and every block of Python in the documentation runs, and every link leads somewhere.

`HOW` says for each command how it is run here. A command that is not in it fails the test, so a new one in the
documentation needs a line there.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments import build, store
from tests.printed import run, same_output
from theria import cli
from theria.testing import standard_samples

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/*.md"),
        *ROOT.glob("theria/**/*.md"),
    )
)
# Their ```python blocks are signatures that the parts agree on, not programs.
SIGNATURES = ("docs/design/architecture.md",)
# Their ```python blocks are one program, from the first to the last.
TUTORIALS = ("docs/tutorial.md",)

Check = Callable[[Path], None]


# ------------------------------------------------------------------------------------------- how a command is checked


def as_it_stands(command: str) -> Check:
    return runs(*shlex.split(command)[1:])


def runs(path: str, *arguments: str) -> Check:
    """A Python program with these arguments (possibly fewer steps than in the documentation) ends well."""

    def check(_: Path) -> None:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(sys, "argv", [path, *arguments])
            status = None
            try:
                runpy.run_path(str(ROOT / path), run_name="__main__")
            except SystemExit as end:
                status = end.code
        assert not status, out.getvalue()

    return check


def theria_command(name: str) -> Check:
    """`theria NAME`; what `theria check` checks is cut to two calls, since tests/ does the whole."""

    def check(_: Path) -> None:
        samples = list(standard_samples())[:2]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(cli, "standard_samples", lambda: samples)
            assert cli.main([name]) == 0, out.getvalue()

    return check


def composes(*overrides: str) -> Check:
    """`scripts/train.sh` with these overrides is a run that can start (tests/test_scripts.py: it passes them on)."""

    def check(folder: Path) -> None:
        from hydra import compose, initialize_config_dir

        store.register()
        with initialize_config_dir(store.CONFIG_DIR, version_base="1.3"):
            config = compose("train", [*overrides, f"run_dir={folder}"])
        build.check(store.to_object(config))

    return check


def runs_test_command(*arguments: str) -> Check:
    """`scripts/test.sh` with these arguments: pytest accepts them and finds tests."""

    def check(_: Path) -> None:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr

    return check


def installs(*extras: str) -> Check:
    """The extras exist; tests/test_packaging.py checks what they hold. Nothing is downloaded here."""

    def check(_: Path) -> None:
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(extras) <= set(known)

    return check


def on_a_gpu(path: str, *arguments: str) -> Check:
    """A Python program that needs a GPU: it ends well on one; elsewhere it says so and ends with an error."""

    def check(_: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, path, *arguments]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if torch.cuda.is_available():
            assert result.returncode == 0, result.stderr
        else:
            assert result.returncode == 1
            assert "CUDA device" in result.stderr.splitlines()[-1]
            assert "Traceback" not in result.stderr

    return check


def measures_on_a_gpu(path: str, *arguments: str) -> Check:
    """The same for what takes minutes on a GPU: there its file exists."""
    return names(path) if torch.cuda.is_available() else on_a_gpu(path, *arguments)


def reports(*folders: str) -> Check:
    """`scripts/report.py` makes a page of committed results."""

    def check(folder: Path) -> None:
        command = [sys.executable, "scripts/report.py", *folders, "--out", str(folder / "report.html")]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert (folder / "report.html").stat().st_size > 10_000

    return check


def names(path: str) -> Check:
    def check(_: Path) -> None:
        assert (ROOT / path).is_file()

    return check


DECODER = "examples/minimal_decoder_transformer.py"
HOW: dict[str, Check] = {
    "bash scripts/train.sh": composes(),
    "bash scripts/train.sh task.ways=10 inner.steps=3 tracking=off": composes(
        "task.ways=10", "inner.steps=3", "tracking=off"
    ),
    "bash scripts/train.sh adjoint=mixed_mode ops=reference": composes("adjoint=mixed_mode", "ops=reference"),
    "bash scripts/train.sh experiment=sinusoid_maml": composes("experiment=sinusoid_maml"),
    # docs/scaling.md, whose runs are in tests/experiments: several processes in test_distributed.py, launchers and the
    # search in test_sweeps.py (where their packages are installed), the comparison in test_compare.py
    "torchrun --nproc-per-node=4 -m experiments.train": composes(),
    "python -m experiments.train --multirun seed=0,1,2": composes("seed=2"),
    "python -m experiments.train --multirun hydra/launcher=submitit_local seed=0,1": composes(
        "hydra/launcher=submitit_local", "seed=1"
    ),
    "python -m experiments.train --multirun sweep=rates hydra.sweeper.n_trials=20": composes(
        "sweep=rates", "hydra.sweeper.n_trials=20"
    ),
    'pip install -e ".[sweeps]" -c scripts/constraints.txt': installs("sweeps"),
    **{
        f"python -m experiments.compare{arguments}": names("docs/benchmarks/compare_cpu.json")
        for arguments in (
            "",
            " --environments DIR --install --repeats 15 --out docs/benchmarks/compare_cpu.json",
        )
    },
    "bash scripts/train.sh run_dir=outputs/mine": composes("run_dir=outputs/mine"),
    "bash scripts/train.sh run_dir=outputs/mine trainer.resume=true": composes(
        "run_dir=outputs/mine", "trainer.resume=true"
    ),
    # tests/experiments/test_processes.py evaluates a real run
    ".venv/bin/python -m experiments.evaluate checkpoint=outputs/mine": names("experiments/evaluate.py"),
    ".venv/bin/python -m experiments.evaluate checkpoint=outputs/mine ways=5 shots=5 episodes=10000 tasks=250 "
    "run_dir=outputs/mine": names("experiments/evaluate.py"),  # tests/experiments/test_protocols.py, in small
    "bash scripts/train.sh experiment=omniglot_maml task.root=OMNIGLOT_FOLDER": composes(
        "experiment=omniglot_maml", "task.root=OMNIGLOT_FOLDER"
    ),
    "bash scripts/train.sh trainer.health_every=50 trainer.log_every=10": composes(
        "trainer.health_every=50", "trainer.log_every=10"
    ),
    **{
        f"python scripts/report.py {' '.join(folders)} --out report.html": reports(*folders)
        for folders in [("docs/benchmarks/omniglot_maml_cpu", "docs/benchmarks/imaml_omniglot")]
    },
    "python scripts/report.py outputs/mine --out report.html": names("scripts/report.py"),  # tests/test_report.py
    # the figures of docs/benchmarks; each script has a test that runs it in small
    "python scripts/bench.py --repeats 5 --out docs/benchmarks/operator_cpu.json": names("scripts/bench.py"),
    "python scripts/bench_meta.py --threads 2 --out docs/benchmarks/outer_gradient_cpu.json": names(
        "scripts/bench_meta.py"
    ),
    "python scripts/bench_meta.py --steps 5 10 20 50 --rate 0.01 --tasks 1 --repeats 0 "
    "--out docs/benchmarks/outer_gradient_steps_cpu.json": names("scripts/bench_meta.py"),
    **{
        f"bash scripts/train.sh experiment=omniglot_{name} task.root=OMNIGLOT_FOLDER": composes(
            f"experiment=omniglot_{name}", "task.root=OMNIGLOT_FOLDER"
        )
        for name in (
            "20w1s_prototransformer",
            "20w1s_unicorn",
            "background_prototransformer",
            "background_unicorn",
            "small1_prototransformer",
        )
    },
    ".venv/bin/python -m experiments.evaluate checkpoint=outputs/mine protocol=one_shot test_augment=16": names(
        "experiments/evaluate.py"  # tests/experiments/test_protocols.py
    ),
    "bash scripts/train.sh experiment=imaml_omniglot task.root=OMNIGLOT_FOLDER": composes(
        "experiment=imaml_omniglot", "task.root=OMNIGLOT_FOLDER"
    ),
    "python -m experiments.deq experiment=deq": names("configs/experiment/deq.yaml"),  # tests/experiments/test_deq.py
    # tests/experiments/test_bilevel.py runs both in small
    **{
        f"python -m experiments.bilevel experiment={name}": names(f"configs/experiment/{name}.yaml")
        for name in ("hyper_cleaning", "ridge_hyperparameter")
    },
    # the GPU: scripts/gpu_check.sh has its tests in tests/test_scripts.py
    "bash scripts/gpu_check.sh outputs/gpu": names("scripts/gpu_check.sh"),
    **{
        f"python {path} {rest}": measures_on_a_gpu(path, *rest.split())
        for path, rest in (
            ("scripts/bench.py", "--gpu --out outputs/gpu"),
            ("scripts/bench_outer.py", "--out outputs/gpu"),
            ("scripts/bench.py", "--gpu --out outputs/gpu --sections short --candidates theria"),
            ("scripts/tune.py", "--out outputs/gpu --minutes 8 --write"),
            ("scripts/tune.py", "--out outputs/gpu --kernels hvp_dkv --widths 128 --kinds half"),
        )
    },
    # tests/ops/triton/test_compile.py runs it on every kernel
    "python -m theria.testing.compile 90 jvp hvp_dkv": names("theria/testing/compile.py"),
    "bash scripts/test.sh tests/ops/triton": runs_test_command("tests/ops/triton"),
    f"python {DECODER}": on_a_gpu(DECODER),
    **{
        f"python {DECODER} --backend {backend} --steps 10 --seed 42": on_a_gpu(
            DECODER, "--backend", backend, "--steps", "10", "--seed", "42"
        )
        for backend in ("triton_full_fused", "reference")
    },
    "bash scripts/test.sh": names("scripts/test.sh"),  # this test is a part of it; its steps: tests/test_scripts.py
    "bash scripts/test.sh tests/ops -k causal": runs_test_command("tests/ops", "-k", "causal"),
    "pip install -e .": installs(),
    'pip install -e ".[experiments,dev]"': installs("experiments", "dev"),
    "pip install --no-deps torchvision==0.28.0": installs("vision"),
    "conda env create -f environment.yml": names("environment.yml"),
    "python scripts/smoke_sdpa.py": runs("scripts/smoke_sdpa.py"),
    "theria check": theria_command("check"),
    "theria info": theria_command("info"),
    "python scripts/api_pages.py": runs("scripts/api_pages.py", "--check"),
    **{
        command: as_it_stands(command)
        for command in (
            f"python {DECODER} --backend reference --device cpu --steps 5",
            f"python {DECODER} --backend custom --device cpu --steps 5",
            f"python {DECODER} --backend reference --device cpu --steps 1 --verbose",
            "python examples/second_order_attention.py",
        )
    },
    f"python {DECODER} --backend custom --device cpu --steps 300 --lr 3e-3 --use-synthetic-task": runs(
        DECODER, "--backend", "custom", "--device", "cpu", "--steps", "3", "--lr", "3e-3", "--use-synthetic-task"
    ),
    "python examples/deep_equilibrium.py": runs("examples/deep_equilibrium.py", "--steps", "3"),
    "python examples/maml_sinusoid.py --steps 3000": runs("examples/maml_sinusoid.py", "--steps", "3"),
    "python examples/maml_sinusoid.py --steps 3000 --adjoint mixed_mode": runs(
        "examples/maml_sinusoid.py", "--steps", "3", "--adjoint", "mixed_mode"
    ),
}


# -------------------------------------------------------------------------------------------------------- the blocks


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[str]:
    """One a line, comments dropped and continued lines joined."""
    text = "\n".join(blocks(document, "bash")).replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*$", "", line).strip() for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line and not line.startswith("#")]


def programs(document: str) -> list[tuple[str, str | None]]:
    """Each block of Python, and what it prints: the ```text block right after it, if there is one."""
    pattern = r"^```python\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?"
    found = re.finditer(pattern, (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    return [(match[1], match[2]) for match in found]


COMMANDS = sorted({command for document in DOCUMENTS for command in commands(document)})
PROGRAMS = [
    (document, number)
    for document in DOCUMENTS
    if document not in (*SIGNATURES, *TUTORIALS)
    for number in range(len(blocks(document, "python")))
]


def test_the_documents_are_found() -> None:
    assert {"README.md", "docs/STATUS.md", "examples/README.md", "docs/theory/hvp.md"} <= set(DOCUMENTS)
    assert len(COMMANDS) > 10
    assert len(PROGRAMS) > 6


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path) -> None:
    assert command in HOW, f"say in HOW how {command!r} is run by this test"
    HOW[command](tmp_path)


def test_no_line_of_the_table_is_left_over() -> None:
    assert set(HOW) == set(COMMANDS)


@pytest.mark.parametrize(("document", "number"), PROGRAMS)
def test_program(document: str, number: int) -> None:
    source, expected = programs(document)[number]
    printed = run(source, f"{document}, block {number}", {"__name__": "__main__"})
    assert expected is None or same_output(printed, expected), printed


@pytest.mark.parametrize("document", TUTORIALS)
def test_tutorial(document: str) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    dtype = torch.get_default_dtype()
    try:
        for number, (source, expected) in enumerate(programs(document)):
            printed = run(source, f"{document}, block {number}", namespace)
            assert same_output(printed, expected or ""), f"block {number} prints\n{printed}"
    finally:
        torch.set_default_dtype(dtype)


def test_every_fence_names_a_language_that_is_checked_or_none() -> None:
    known = {"", "bash", "python", "yaml", "text"}
    for document in DOCUMENTS:
        fences = re.findall(r"^```(.*)$", (ROOT / document).read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0, f"{document}: a fence is not closed"
        assert set(fences[::2]) <= known, f"{document}: {set(fences[::2]) - known}"


# --------------------------------------------------------------------------------------------------------- the links


def headings(document: Path) -> set[str]:
    """GitHub's anchors of a document."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_somewhere(document: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document}: {target} does not exist"
        assert ROOT in file.resolve().parents, f"{document}: {target} leaves the repository"
        if anchor:
            assert anchor in headings(file), f"{document}: {target} has no such heading"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_code_exist(document: str) -> None:
    """`theria/...py` and the like, named in the text, are files of this repository."""
    text = (ROOT / document).read_text()
    for path in re.findall(r"`((?:theria|scripts|examples|experiments|configs|tests|docs)/[\w./-]+)`", text):
        assert os.path.exists(ROOT / path), f"{document}: {path} does not exist"


def test_figures_of_peers_name_their_machine() -> None:
    text = (ROOT / "docs/comparison.md").read_text()
    for needed in ("one\nNVIDIA H200", "PyTorch 2.11", "Triton 3.6", "JAX 0.11"):
        assert needed in text
