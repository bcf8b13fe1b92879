"""Sweeps: what is optimised, what is refused, and real ones by submitit and Optuna where they are installed."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from packaging.requirements import Requirement

from experiments import checkpoint, errors, store, tracking
from experiments.errors import Interrupted, UserError
from experiments.interrupt import SignalWatch, ending_sweep
from experiments.train import check_sweep, objective

BUSY = 180  # seconds for what takes twenty on a machine with nothing else to do
PLUGINS = {
    "hydra/launcher=submitit_local": "hydra_submitit_launcher",
    "hydra/launcher=submitit_slurm": "hydra_submitit_launcher",
    "hydra/sweeper=optuna": "hydra_optuna_sweeper",
    "sweep=rates": "hydra_optuna_sweeper",
}


def installed(plugin: str) -> bool:
    try:
        return find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # not even hydra_plugins
        return False


needs_submitit = pytest.mark.skipif(not installed("hydra_submitit_launcher"), reason="pip install -e '.[sweeps]'")
needs_optuna = pytest.mark.skipif(not installed("hydra_optuna_sweeper"), reason="pip install -e '.[sweeps]'")


@pytest.fixture
def whole_config():
    """Overrides -> the composed configuration, Hydra's own part included."""
    store.register()
    with initialize_config_dir(store.CONFIG_DIR, version_base="1.3"):
        yield lambda *overrides: compose("train", list(overrides), return_hydra_config=True)


# ------------------------------------------------------------------------------------------------ what is optimised


def test_the_objective_is_the_last_validation_and_not_the_test(tmp_path):
    rows = [
        {"step": 0, "val/accuracy": 0.2},
        {"step": 5, "val/accuracy": 0.6, "val/accuracy_ci95": 0.1},
        {"step": 9, "train/accuracy": 0.9},
        {"step": 9, "test/accuracy": 0.99},
    ]
    (tmp_path / tracking.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert objective(tmp_path) == 0.6


def test_without_a_validation_there_is_no_objective(tmp_path):
    (tmp_path / tracking.METRICS).write_text(json.dumps({"step": 3, "test/accuracy": 0.9}) + "\n")
    assert math.isnan(objective(tmp_path))


@pytest.mark.parametrize("options", [["trainer.val_every=1000"], ["trainer.val_every=4"], ["trainer.max_minutes=1e-9"]])
def test_the_last_validation_is_of_the_end_of_the_training(run_here, tmp_path, monkeypatch, options):
    """Also where the time of a trial was over before a later validation than that of step 0."""
    from experiments.trainer import Trainer

    late = Trainer._out_of_time
    monkeypatch.setattr(Trainer, "_out_of_time", lambda self: self.step > 0 and late(self))
    run_here(tmp_path, *options)
    last = checkpoint.step_of(checkpoint.saved(tmp_path)[-1])
    assert last > 0
    rows = [row for row in tracking.read(tmp_path / tracking.METRICS) if "val/mse" in row]
    assert rows[-1]["step"] == last
    assert objective(tmp_path) == rows[-1]["val/mse"] != rows[0]["val/mse"]


def test_without_validations_there_is_none_at_the_end(run_here, tmp_path):
    run_here(tmp_path, "trainer.val_every=0")
    assert not any("val/mse" in row for row in tracking.read(tmp_path / tracking.METRICS))


def test_the_entry_point_returns_it(tiny, tmp_path, monkeypatch):
    """As a launcher calls it: Hydra's own job runner, which keeps the value."""
    from experiments import train

    returned = []
    monkeypatch.setattr(sys, "argv", ["train", *tiny, f"run_dir={tmp_path}", "hydra.output_subdir=null"])
    monkeypatch.setattr(train, "objective", lambda run_dir: returned.append(objective(run_dir)))
    store.register()
    train.entry()
    rows = [row for row in tracking.read(tmp_path / tracking.METRICS) if "val/mse" in row]
    assert returned == [rows[-1]["val/mse"]]
    assert rows[-1]["step"] == 6
    assert returned[0] != json.loads((tmp_path / "results.json").read_text())["mean"]


def test_a_search_without_validation_or_the_wrong_way_is_refused(compose_config, tiny):
    up, down = (OmegaConf.create({"direction": way}) for way in ("maximize", "minimize"))
    with pytest.raises(UserError, match=r"trainer\.val_every=0.*last validation"):
        check_sweep(compose_config(*tiny, "trainer.val_every=0"), down)
    with pytest.raises(UserError, match=r"hydra\.sweeper\.direction=maximize: task=sinusoid needs minimize"):
        check_sweep(compose_config(*tiny), up)
    with pytest.raises(UserError, match="task=glyphs needs maximize"):
        check_sweep(compose_config(), down)
    check_sweep(compose_config(), up)
    check_sweep(compose_config("trainer.val_every=0"), OmegaConf.create({"max_batch_size": None}))  # Hydra's own


# ------------------------------------------------------------------------------------------------- configurations


def test_our_options_replace_those_of_the_plugins(whole_config):
    slurm = whole_config("hydra/launcher=submitit_slurm").hydra.launcher
    assert (slurm.gpus_per_node, slurm.tasks_per_node, slurm.timeout_min) == (1, 1, 240)
    assert slurm.max_num_timeout > 0  # a job that ran out of time goes on
    assert slurm.additional_parameters == {"requeue": True}
    local = whole_config("hydra/launcher=submitit_local").hydra.launcher
    assert set(local) <= set(slurm)
    repository = ConfigStore.instance().repo.get("hydra", {})
    for path in Path(store.CONFIG_DIR, "hydra").glob("*/*.yaml"):
        assert path.name not in repository.get(path.parent.name, {}), "Hydra would check the file against the plugin's"


def test_the_search_is_over_rates_that_there_are(whole_config):
    config = whole_config("sweep=rates")
    assert config.hydra.sweeper.direction == "maximize"
    assert set(config.hydra.sweeper.params) == {"trainer.lr", "inner.lr"}
    for key, given in config.hydra.sweeper.params.items():
        low, high = (float(part) for part in given.split("interval(")[1].rstrip(")").split(","))
        assert 0 < low < OmegaConf.select(config, key) <= high, key  # what one would begin with is in it


@pytest.mark.parametrize("name", ["launcher/submitit_slurm", "launcher/submitit_local", "sweeper/optuna"])
@pytest.mark.skipif(not (installed("hydra_submitit_launcher") and installed("hydra_optuna_sweeper")), reason="not here")
def test_the_options_are_those_of_the_plugin(name):
    """Every name in our file is an argument of the plugin's."""
    from hydra_plugins.hydra_optuna_sweeper import config as optuna  # pyright: ignore[reportMissingImports]
    from hydra_plugins.hydra_submitit_launcher import config as submitit  # pyright: ignore[reportMissingImports]

    schema = {
        "launcher/submitit_slurm": submitit.SlurmQueueConf,
        "launcher/submitit_local": submitit.LocalQueueConf,
        "sweeper/optuna": optuna.OptunaSweeperConf,
    }[name]
    ours = yaml.safe_load(Path(store.CONFIG_DIR, "hydra", f"{name}.yaml").read_text())
    assert set(ours) <= set(schema.__dataclass_fields__)
    assert ours["_target_"] == schema.__dataclass_fields__["_target_"].default


@needs_submitit
def test_what_slurm_is_asked_for(tmp_path, monkeypatch):
    """The batch script that submitit writes of our options, with programs of Slurm's names that do nothing."""
    import submitit  # pyright: ignore[reportMissingImports]
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf  # pyright: ignore[reportMissingImports]

    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    options = yaml.safe_load(Path(store.CONFIG_DIR, "hydra/launcher/submitit_slurm.yaml").read_text())
    options |= {"name": "theria", "partition": "gpus"}
    own = {name: options.pop(name) for name in ("_target_", "submitit_folder", "max_num_timeout")}
    executor = submitit.AutoExecutor(tmp_path, cluster="slurm", slurm_max_num_timeout=own["max_num_timeout"])
    common = BaseQueueConf.__dataclass_fields__  # as the launcher tells its arguments apart
    executor.update_parameters(**{name if name in common else f"slurm_{name}": options[name] for name in options})
    script = executor._executor._make_submission_file_text("COMMAND", "id").splitlines()
    wanted = ("gpus-per-node=1", "cpus-per-task=8", "mem=32GB", "time=240", "signal=USR2@180", "requeue")
    assert {f"#SBATCH --{line}" for line in (*wanted, "ntasks-per-node=1", "partition=gpus")} <= set(script)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("option", PLUGINS)
def test_without_the_package_the_message_says_what_to_install(process, tmp_path, option):
    plugin = PLUGINS[option]
    if installed(plugin):
        pytest.skip(f"{plugin} is installed")
    done = process("experiments.train", "--multirun", option, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {plugin.replace('_', '-')} is not installed: pip install -e '.[sweeps]'"


@pytest.mark.parametrize("option", PLUGINS)
def test_a_launcher_without_multirun_is_refused(option):
    with pytest.raises(UserError, match="give --multirun as well"):
        errors.check_arguments(["seed=1", option])
    errors.check_arguments(["--multirun", "seed=1", option])
    errors.check_arguments(["sweep=null", "hydra/launcher=basic"])


# -------------------------------------------------------------------------------------------------- the queue's signal


@pytest.fixture
def queue(monkeypatch):
    """As submitit sets a job up: its handlers; what they were called with."""
    called: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda signum, _: called.append(signum))
    yield called
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_signal_of_the_queue_waits_for_the_end_of_the_block(queue):
    def run() -> None:
        with SignalWatch() as watch:
            send(watch)

    def send(watch: SignalWatch) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # Slurm sends it along; submitit lets it pass
        assert queue == [signal.SIGTERM]
        assert watch.received is None
        os.kill(os.getpid(), signal.SIGUSR2)
        assert watch.received == signal.SIGUSR2
        assert queue == [signal.SIGTERM]  # not in the middle of a step
        raise UserError("the checkpoint is written")

    with pytest.raises(UserError, match="the checkpoint is written"):
        run()
    assert queue == [signal.SIGTERM, signal.SIGUSR2]


def test_a_run_that_ends_well_is_not_queued_again(queue):
    with SignalWatch():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert queue == []


def test_without_a_queue_terminating_is_what_it_was():
    with SignalWatch() as watch:
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.received == signal.SIGTERM


@pytest.mark.parametrize("order", [1, -1])
def test_a_signal_ends_the_sweep(environment, tiny, tmp_path, order):
    """And --multirun may stand behind the settings."""
    slow = [
        *tiny,
        "debug.step_seconds=0.05",
        "trainer.steps=100000",
        "seed=0,1",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]
    arguments = ["--multirun", *slow][::order]
    command = [sys.executable, "-m", "experiments.train", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    sweep = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    try:
        deadline = time.monotonic() + BUSY
        while not any(row["step"] >= 3 for row in tracking.read(tmp_path / "sweep/0" / tracking.METRICS)):
            assert sweep.poll() is None, sweep.communicate()
            assert time.monotonic() < deadline, "the run makes no steps"
            time.sleep(0.05)
        sweep.terminate()
        _, said = sweep.communicate(timeout=BUSY)
    finally:
        sweep.kill()
        sweep.communicate()
    assert sweep.returncode == 143, said
    assert "is written\nresume: python -m experiments.train" in said
    assert said.endswith("no later run of the sweep was begun\n")
    assert not (tmp_path / "sweep" / "1").exists()


def test_a_signal_too_late_for_its_run_ends_the_sweep(capsys):
    with pytest.raises(SystemExit, match="143"), ending_sweep(True), SignalWatch():
        os.kill(os.getpid(), signal.SIGTERM)
    assert capsys.readouterr().err == "no later run of the sweep was begun\n"
    with ending_sweep(False), SignalWatch():
        os.kill(os.getpid(), signal.SIGTERM)
    with ending_sweep(True):
        pass
    with pytest.raises(Interrupted), ending_sweep(False):
        raise Interrupted("stopped", signal.SIGTERM)


def test_an_interruption_survives_the_way_from_a_job_to_the_sweep():
    copy = pickle.loads(pickle.dumps(Interrupted("stopped at step 3", signal.SIGINT)))
    assert (str(copy), copy.exit_code) == ("stopped at step 3", 130)


def test_a_job_that_is_run_again_goes_on_without_being_told(run_here, tmp_path, monkeypatch):
    constant = "trainer.schedule=constant"
    run_here(tmp_path / "whole", constant)
    run_here(tmp_path / "parts", constant, "trainer.steps=4")
    with pytest.raises(UserError, match=r"trainer\.resume=true"):
        run_here(tmp_path / "parts", constant)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    run_here(tmp_path / "parts", constant)
    one, other = (checkpoint.load(checkpoint.saved(tmp_path / name)[-1]) for name in ("whole", "parts"))
    assert all(torch.equal(other["learner"][key], value) for key, value in one["learner"].items())


# ------------------------------------------------------------------------------------------------------ real sweeps


@needs_submitit
def test_runs_as_jobs_of_this_machine(process, tiny, tmp_path):
    arguments = ["--multirun", "hydra/launcher=submitit_local", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    done = process("experiments.train", *arguments, *tiny, timeout=BUSY)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / "sweep" / job / "results.json").read_text()) for job in "01"]
    assert results[0]["mean"] != results[1]["mean"]
    assert [result["step"] for result in results] == [6, 6]


@needs_submitit
def test_a_preempted_job_goes_back_into_the_queue_and_on_to_the_same_bits(run_here, environment, tiny, tmp_path):
    slow = [*tiny, "debug.step_seconds=0.2", "trainer.steps=30", "trainer.checkpoint_every=1000"]
    arguments = ["--multirun", "hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path / 'sweep'}", *slow]
    command = [sys.executable, "-m", "experiments.train", *arguments]
    run_dir = tmp_path / "sweep" / "0"
    sweep = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + BUSY
        while not any(row["step"] >= 7 for row in tracking.read(run_dir / tracking.METRICS)):
            assert sweep.poll() is None, sweep.communicate()[0]
            assert time.monotonic() < deadline, "the job makes no steps"
            time.sleep(0.05)
        (folder,) = (path for path in (tmp_path / "sweep/.submitit").iterdir() if path.name.isdigit())
        os.kill(worker(int(folder.name)), signal.SIGUSR2)
        output = sweep.communicate(timeout=BUSY)[0]
    finally:
        if sweep.poll() is None:
            sweep.kill()
            sweep.communicate()
    assert sweep.returncode == 0, output
    log = next(folder.glob("*_log.out")).read_text()
    reached = int(log.split("resumed from ")[1].split(" at step ")[1].splitlines()[0])
    assert 7 <= reached < 30  # the signal's own checkpoint: periodic ones were far away
    run_here(tmp_path / "whole", "trainer.steps=30")
    one, other = (checkpoint.load(checkpoint.saved(path)[-1]) for path in (tmp_path / "whole", run_dir))
    assert other["step"] == 30
    assert all(torch.equal(other["learner"][key], value) for key, value in one["learner"].items())
    steps = [row["step"] for row in tracking.read(run_dir / tracking.METRICS) if "train/loss" in row]
    assert steps == list(range(1, 31))


def worker(controller: int) -> int:
    """The process of a local job that runs the function: the last of the chain that its controller started."""
    found = controller
    while children := Path(f"/proc/{found}/task/{found}/children").read_text().split():
        names = [int(child) for child in children if b"submitit" in Path(f"/proc/{child}/cmdline").read_bytes()]
        if not names:
            break
        found = names[0]
    return found


@needs_optuna
def test_three_trials_of_the_search(process, tiny, tmp_path):
    rates = ("trainer.lr=", "inner.lr=")
    fixed = [item for item in tiny if not item.startswith(rates)]
    arguments = ["sweep=rates", "hydra.sweeper.direction=minimize", "hydra.sweeper.n_trials=3"]
    arguments += [f"hydra.sweeper.storage=sqlite:///{tmp_path}/rates.db", "hydra.sweeper.study_name=rates"]
    sweep = tmp_path / "sweep"
    command = [sys.executable, "-m", "experiments.train", "--multirun", *arguments, f"hydra.sweep.dir={sweep}"]
    # Optuna 2.10 warns of what other packages deprecated since: -W error, as elsewhere, is not for it
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *fixed], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=BUSY, check=False
    )
    assert done.returncode == 0, done.stderr
    best = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    values = [objective(sweep / job) for job in "012"]
    assert best["best_value"] == pytest.approx(min(values), rel=1e-12)
    assert set(best["best_params"]) == {"trainer.lr", "inner.lr"}
    tried = [yaml.safe_load((sweep / job / "config.yaml").read_text()) for job in "012"]
    assert len({run["inner"]["lr"] for run in tried}) == 3
    assert (tmp_path / "rates.db").stat().st_size > 0
    winner = tried[values.index(min(values))]
    assert winner["inner"]["lr"] == pytest.approx(best["best_params"]["inner.lr"])
    assert all(1e-2 <= run["inner"]["lr"] <= 1 and 3e-4 <= run["trainer"]["lr"] <= 3e-2 for run in tried)


def test_the_packages_are_pinned_within_their_bounds():
    root = Path(store.CONFIG_DIR).parent
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["sweeps"]
    lines = (line.split("#")[0].strip() for line in (root / "scripts/constraints.txt").read_text().splitlines())
    pinned = {name.lower(): version for name, version in (line.split("==") for line in lines if line)}
    for requirement in map(Requirement, extra):
        assert requirement.specifier.contains(pinned[requirement.name])
    assert pinned["optuna"].startswith("2.")  # what the sweeper works with
