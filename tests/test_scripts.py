"""The two commands: their logic, with stubs in place of interpreters, pip and nvidia-smi. Nothing is installed."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHELL_SCRIPTS = (
    "scripts/train.sh",
    "scripts/test.sh",
    "scripts/gpu_check.sh",
    "scripts/lib/environment.sh",
    ".ci/run",
)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the commands are bash scripts")


def write_program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the commands read, without an environment."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH that holds what bash needs and no Python."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("bash", "sh", "dirname", "cat"):
        (folder / name).symlink_to(shutil.which(name) or f"/bin/{name}")
    return folder


# ---------------------------------------------------------------------------------------------- the shell scripts


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_shell_syntax(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_continuous_integration_calls_the_test_command_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "exec bash scripts/test.sh"]
    assert os.access(ROOT / ".ci/run", os.X_OK)


def gpu_check(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts/gpu_check.sh"), *arguments]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_gpu_check_wants_a_folder() -> None:
    result = gpu_check()
    assert result.returncode == 2
    assert "gpu_check.sh OUTDIR" in result.stderr


def test_gpu_check_says_what_is_missing_before_it_starts(tmp_path: Path) -> None:
    absent = gpu_check(str(tmp_path / "out"), THERIA_PYTHON="/nowhere/python")
    assert absent.returncode == 1
    assert "/nowhere/python is missing" in absent.stderr
    bare = write_program(tmp_path / "python", f'exec "{sys.executable}" -S -E "$@"')  # no site-packages
    result = gpu_check(str(tmp_path / "out"), THERIA_PYTHON=str(bare), PYTHONPATH="")
    assert result.returncode == 1
    assert "lacks torch, triton, pytest, hypothesis" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_gpu_check_wants_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    result = gpu_check(str(tmp_path / "out"), THERIA_PYTHON=sys.executable)
    assert result.returncode == 1
    assert "sees no CUDA device" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def find_python(checkout: Path, tools: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = '. scripts/lib/environment.sh; find_python; echo "status $?"'
    environment = {"PATH": str(tools), **variables}
    return subprocess.run(
        [str(tools / "bash"), "-c", command], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )


# The contract of probe_python: 0 good, 3 too old, 4 newer than tested, 5 without venv.
@pytest.mark.parametrize(
    ("interpreters", "chosen"),
    [
        ({"python3": 0, "python3.12": 0}, "python3"),
        ({"python3": 3, "python3.11": 0}, "python3.11"),
        ({"python3": 4, "python3.12": 0}, "python3.12"),
        ({"python3": 5, "python3.12": 0}, "python3.12"),
        ({"python3": 127, "python": 0}, "python"),  # a shim of a version manager that runs nothing
        ({"python3": 4}, "python3"),
    ],
)
def test_finds_the_best_python(checkout: Path, tools: Path, interpreters: dict[str, int], chosen: str) -> None:
    for name, status in interpreters.items():
        write_program(tools / name, f"exit {status}")
    assert find_python(checkout, tools).stdout.split() == [chosen, "status", "0"]


@pytest.mark.parametrize(
    ("interpreters", "message"),
    [
        ({}, "Python 3.11 or 3.12 is needed. Looked for python3, python3.11"),
        ({"python3": 3}, "Python 3.11 or 3.12 is needed; python3 is older."),
        ({"python3": 5}, "python3 is here, but without its venv module."),
    ],
)
def test_says_which_python_is_missing(checkout: Path, tools: Path, interpreters: dict[str, int], message: str) -> None:
    for name, status in interpreters.items():
        write_program(tools / name, f"exit {status}")
    result = find_python(checkout, tools)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stdout == ""


def test_a_named_python_is_used_or_refused_never_replaced(checkout: Path, tools: Path, tmp_path: Path) -> None:
    write_program(tools / "python3", "exit 0")
    named = write_program(tmp_path / "elsewhere" / "python", "exit 4")
    assert find_python(checkout, tools, THERIA_PYTHON=str(named)).stdout.split()[0] == str(named)
    missing = find_python(checkout, tools, THERIA_PYTHON="/nowhere/python")
    assert missing.returncode == 1
    assert "THERIA_PYTHON=/nowhere/python does not run" in missing.stderr


def test_the_probe_agrees_with_this_interpreter(checkout: Path, tools: Path) -> None:
    supported = sys.version_info < (3, 13)
    command = f'. scripts/lib/environment.sh; status=0; probe_python "{sys.executable}" || status=$?; echo $status'
    result = subprocess.run(["bash", "-c", command], cwd=checkout, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ("0" if supported else "4")


@pytest.fixture
def prepared(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkout with a stub environment that writes its arguments to the returned log; `ruff check` fails in it."""
    log = tmp_path / "log"
    base = write_program(tmp_path / "base" / "python", "exit 0")  # passes the probe, and bootstrap.py does nothing
    write_program(checkout / ".venv/bin/python", f'echo "$*" >> {log}\ncase "$*" in *"ruff check"*) exit 7 ;; esac')
    monkeypatch.setenv("THERIA_PYTHON", str(base))
    monkeypatch.delenv("THERIA_VENV", raising=False)
    return log


def test_train_passes_its_overrides_on(prepared: Path, checkout: Path, tmp_path: Path) -> None:
    command = ["bash", str(checkout / "scripts/train.sh"), "debug=fast", "task.ways=3"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert prepared.read_text().splitlines() == ["-m experiments.train debug=fast task.ways=3"]


def test_test_with_arguments_is_pytest_alone(prepared: Path, checkout: Path) -> None:
    subprocess.run(["bash", "scripts/test.sh", "-k", "a b"], cwd=checkout, check=True)
    assert prepared.read_text().splitlines() == ["-m pytest -k a b"]


def test_test_without_arguments_runs_every_check_and_fails_if_one_does(prepared: Path, checkout: Path) -> None:
    result = subprocess.run(["bash", "scripts/test.sh"], cwd=checkout, capture_output=True, text=True, check=False)
    steps = [" ".join(line.split()[1:3]) for line in prepared.read_text().splitlines()]
    assert steps == ["ruff check", "ruff format", "pyright --pythonpath", "pytest -n"]
    assert result.returncode == 1
    assert result.stderr.strip() == "theria: failed: ruff-check"


# ---------------------------------------------------------------------------------------------------- bootstrap.py


class Machine:
    """A checkout whose environments are stubs: `pip` decides what the stub's pip does, `calls` are its arguments."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.venv, self.log = root, root / ".venv", root / "calls"
        self.pip, self.torch = "exit 0", "2.13.0+cpu cpu"
        self.created = 0
        monkeypatch.syspath_prepend(root / "scripts/lib")  # where Python finds the modules beside a script
        monkeypatch.delitem(sys.modules, "pip_runner", raising=False)
        specification = importlib.util.spec_from_file_location("bootstrap", root / "scripts/lib/bootstrap.py")
        assert specification is not None
        assert specification.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, "bootstrap", self.module)  # dataclass looks its module up
        specification.loader.exec_module(self.module)
        monkeypatch.setattr(self.module.venv, "create", self._create)
        monkeypatch.setattr(self.module, "NEEDED_GB", {"cpu": 0.0, "cuda": 0.0})

    def _create(self, path: Path, **_: bool) -> None:
        self.created += 1
        self.stub()

    def stub(self) -> None:
        body = f"""
case "$*" in
  "-m pip install"*) shift 3; echo "$*" >> {self.log}; {self.pip} ;;
  -c*) echo {self.torch} ;;
esac"""
        write_program(self.venv / "bin/python", body)

    def prepare(self, *extras: str) -> None:
        if self.venv.exists():
            self.stub()
        self.log.write_text("")
        self.module.prepare(self.venv, frozenset(extras or ("dev",)))

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    @property
    def phase(self) -> str:
        return json.loads((self.venv / "theria-state.json").read_text())["phase"]


@pytest.fixture
def machine(checkout: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("PATH", str(tools))  # no nvidia-smi
    for name in ("THERIA_TORCH", "THERIA_PYTHON", "THERIA_VENV"):
        monkeypatch.delenv(name, raising=False)
    return Machine(checkout, monkeypatch)


CPU_TORCH = "torch==2.13.0+cpu" if sys.platform == "linux" else "torch==2.13.0"
CPU_CALLS = [f"--no-deps {CPU_TORCH}", f"-c scripts/constraints-cpu.txt {CPU_TORCH} -e .[dev]"]


def test_a_fresh_checkout_gets_the_cpu_build_and_a_second_run_does_nothing(machine: Machine) -> None:
    machine.prepare()
    assert machine.calls == CPU_CALLS
    assert machine.phase == "ready"
    machine.prepare()
    assert machine.calls == []
    assert machine.created == 1


def test_extras_accumulate(machine: Machine) -> None:
    machine.prepare("experiments")
    machine.prepare("experiments", "dev")
    assert machine.calls[-1].endswith("-e .[dev,experiments]")
    machine.prepare("experiments")
    assert machine.calls == []
    assert machine.created == 1


def test_a_gpu_gets_the_plain_build(machine: Machine, tools: Path) -> None:
    write_program(tools / "nvidia-smi", 'echo "GPU 0: some device"')
    machine.torch = "2.13.0 13.0"
    machine.prepare()
    assert machine.calls == ["-c scripts/constraints.txt torch==2.13.0 -e .[dev]"]


@pytest.mark.parametrize("answer", ["exit 9", 'echo "No devices found"'])
def test_an_nvidia_smi_without_a_gpu_is_no_gpu(machine: Machine, tools: Path, answer: str) -> None:
    write_program(tools / "nvidia-smi", answer)
    machine.prepare()
    assert machine.calls == CPU_CALLS


def test_the_choice_of_torch_can_be_forced_and_a_change_rebuilds(
    machine: Machine, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(tools / "nvidia-smi", 'echo "GPU 0: some device"')
    monkeypatch.setenv("THERIA_TORCH", "cpu")
    machine.prepare()
    assert machine.calls == CPU_CALLS
    monkeypatch.setenv("THERIA_TORCH", "cuda")
    machine.torch = "2.13.0 13.0"
    machine.prepare()
    assert machine.created == 2
    monkeypatch.setenv("THERIA_TORCH", "gpu")
    with pytest.raises(machine.module.Problem, match="THERIA_TORCH=cpu or THERIA_TORCH=cuda"):
        machine.prepare()


def test_a_cpu_environment_is_kept_when_a_gpu_appears(
    machine: Machine, tools: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    machine.prepare()
    write_program(tools / "nvidia-smi", 'echo "GPU 0: some device"')
    machine.prepare()
    assert machine.calls == []
    assert "THERIA_TORCH=cuda replaces it" in capfd.readouterr().err


def test_a_cpu_build_on_a_gpu_machine_is_reported(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERIA_TORCH", "cuda")
    with pytest.raises(machine.module.Problem, match="a build without CUDA"):
        machine.prepare()
    assert machine.phase == "stopped"


NO_SUCH_TORCH = (
    'case "$*" in *constraints*) exit 0 ;; *) echo "ERROR: No matching distribution found" >&2; exit 1 ;; esac'
)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the plain build is the CPU build")
def test_torch_falls_back_to_the_index_of_cpu_builds(machine: Machine) -> None:
    machine.pip = NO_SUCH_TORCH.replace("*constraints*)", "*constraints*|*index-url*)")
    machine.prepare()
    assert machine.calls[1] == f"--no-deps --index-url https://download.pytorch.org/whl/cpu {CPU_TORCH}"
    assert machine.phase == "ready"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the plain build is the CPU build")
def test_no_cpu_build_anywhere_is_an_error_and_never_a_cuda_build(machine: Machine) -> None:
    machine.pip = NO_SUCH_TORCH
    with pytest.raises(machine.module.Problem, match="neither in the configured index nor within reach"):
        machine.prepare()
    assert [call for call in machine.calls if CPU_TORCH not in call] == []


def test_without_any_network_the_message_is_about_the_network(machine: Machine) -> None:
    machine.pip = 'echo "NewConnectionError; ERROR: No matching distribution found" >&2; exit 1'
    with pytest.raises(machine.module.Problem, match="no network: pip could not reach a package index"):
        machine.prepare()
    assert machine.phase == "stopped"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the plain build is the CPU build")
def test_one_index_out_of_reach_does_not_hide_the_index_of_cpu_builds(machine: Machine) -> None:
    found = 'case "$*" in *constraints*|*index-url*) exit 0 ;; esac; '
    machine.pip = found + 'echo "NewConnectionError; ERROR: No matching distribution found" >&2; exit 1'
    machine.prepare()
    assert machine.phase == "ready"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("WARNING: Retrying: NewConnectionError: Connection refused\nERROR: No matching distribution", "no network"),
        ("ERROR: Could not install packages due to an OSError: No space left on device", "the disk is full"),
        ("ERROR: No matching distribution found for rich", "has not all of"),
        ("error: subprocess-exited-with-error", "pip could not install"),
    ],
)
def test_a_failure_of_pip_is_explained_and_the_next_run_goes_on(machine: Machine, written: str, message: str) -> None:
    machine.pip = f'case "$*" in *constraints*) echo "{written}" >&2; exit 1 ;; esac'
    with pytest.raises(machine.module.Problem, match=message):
        machine.prepare()
    assert machine.phase == "stopped"
    machine.pip = "exit 0"
    machine.prepare()
    assert machine.phase == "ready"
    assert machine.created == 1


def test_a_killed_install_is_built_anew(machine: Machine) -> None:
    machine.pip = "kill -9 $$"
    with pytest.raises(machine.module.Problem):
        machine.prepare()
    assert machine.phase == "installing"
    (machine.venv / "half-written").touch()
    machine.pip = "exit 0"
    machine.prepare()
    assert machine.phase == "ready"
    assert machine.created == 2
    assert not (machine.venv / "half-written").exists()


def test_an_environment_made_by_hand_is_completed_not_deleted(machine: Machine) -> None:
    machine.stub()
    (machine.venv / "by-hand").touch()
    machine.prepare()
    assert machine.calls == CPU_CALLS
    assert machine.created == 0
    assert (machine.venv / "by-hand").exists()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("pyproject.toml", '"torch>=2.11"', '"torch>=2.12"'),
        ("scripts/constraints.txt", "numpy==2.3.5", "numpy==2.3.4"),
        ("scripts/constraints-cpu.txt", "triton==3.6.0", "triton==3.7.0"),
    ],
)
def test_changed_requirements_are_installed_in_place(machine: Machine, name: str, old: str, new: str) -> None:
    machine.prepare()
    text = (machine.root / name).read_text()
    assert old in text
    (machine.root / name).write_text(text.replace(old, new))
    machine.prepare()
    assert machine.calls == CPU_CALLS
    assert machine.created == 1


def test_changed_settings_of_tools_install_nothing(machine: Machine) -> None:
    machine.prepare()
    text = (machine.root / "pyproject.toml").read_text()
    (machine.root / "pyproject.toml").write_text(text.replace("line-length = 120", "line-length = 100"))
    machine.prepare()
    assert machine.calls == []


def test_a_named_python_of_another_version_rebuilds(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.prepare()
    (machine.venv / "pyvenv.cfg").write_text("version = 3.9.1\n")
    machine.prepare()
    assert machine.created == 1
    monkeypatch.setenv("THERIA_PYTHON", sys.executable)
    machine.prepare()
    assert machine.created == 2


def test_a_moved_checkout_or_a_lost_interpreter_is_repaired(machine: Machine) -> None:
    machine.prepare()
    (machine.venv / "bin/python").unlink()
    machine.module.prepare(machine.venv, frozenset({"dev"}))
    assert machine.created == 2
    state = machine.venv / "theria-state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"root": "/elsewhere"}))
    machine.prepare()
    assert machine.calls == CPU_CALLS


def test_too_little_disk_is_said_before_anything_is_downloaded(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.module, "NEEDED_GB", {"cpu": 1e9})
    with pytest.raises(machine.module.Problem, match=r"GB are free at .* THERIA_VENV"):
        machine.prepare()
    assert machine.calls == []


def test_packages_that_do_not_import_are_an_error(machine: Machine) -> None:
    machine.torch = "x; echo broken >&2; exit 1"
    with pytest.raises(machine.module.Problem, match=r"do not import:\nbroken"):
        machine.prepare()
    assert machine.phase == "stopped"


def test_a_second_run_waits_for_the_first_and_uses_what_it_made(
    machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    machine.venv.mkdir()
    second = threading.Thread(target=machine.prepare)
    with open(machine.venv / "theria.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second.start()
        assert "another run is preparing" in wait_for(lambda: capfd.readouterr().err)
        second.join(0.5)
        assert second.is_alive()
        machine.stub()  # what the first run made
        machine.module.Environment(machine.venv, frozenset({"dev"}), "cpu").write_state("ready")
    second.join(30)
    assert not second.is_alive()
    assert machine.calls == []
    assert machine.created == 0


def wait_for(read: Callable[[], str], seconds: float = 30.0) -> str:
    """What `read` gives first that is not empty, or "" after `seconds`."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if text := read():
            return text
        pause.wait(0.02)
    return ""


def test_the_command_line_reports_a_problem_without_a_traceback(checkout: Path) -> None:
    command = [sys.executable, "scripts/lib/bootstrap.py", "--venv", ".venv", "--extras", "dev"]
    environment = {**os.environ, "THERIA_TORCH": "tpu"}
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert (
        result.stderr
        == "theria: THERIA_TORCH=tpu is not a build of torch. Use THERIA_TORCH=cpu or THERIA_TORCH=cuda.\n"
    )
