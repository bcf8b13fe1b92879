"""What the tests of the experiments share: composing a configuration, running it here, running it as a process."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from experiments import store  # noqa: E402
from experiments.config import Config  # noqa: E402
from experiments.evaluation import Evaluation  # noqa: E402
from experiments.train import train  # noqa: E402

# A regression that needs no data and takes milliseconds a step.
TINY = (
    "task=sinusoid",
    "model=mlp",
    "learner=maml",
    "inner=sgd",
    "inner.lr=0.02",
    "task.tasks=4",
    "task.shots=5",
    "trainer.steps=6",
    "trainer.max_minutes=null",
    "trainer.lr=1e-3",
    "trainer.warmup=0",
    "trainer.clip=null",
    "trainer.log_every=1",
    "trainer.health_every=3",
    "trainer.val_every=3",
    "trainer.val_episodes=8",
    "trainer.test_episodes=8",
    "trainer.eval_tasks=4",
    "trainer.checkpoint_every=2",
    "trainer.pictures=false",
    "trainer.threads=1",
    "tracking=off",
)

Composer = Callable[..., Config]
Runner = Callable[..., Evaluation]
Process = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cache of data sets of these tests' own, which their processes share."""
    base = tmp_path_factory.getbasetemp()
    path = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "theria-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THERIA_CACHE", path)
        yield path


@pytest.fixture
def omniglot_root() -> Path:
    """The folder with the real files, or a skip."""
    root = Path(os.environ.get("THERIA_OMNIGLOT", ROOT.parent / "shared" / "data" / "omniglot"))
    if not (root / "images_background.npz").exists():
        pytest.skip(f"no Omniglot in {root}; set THERIA_OMNIGLOT to its folder to run this test")
    return root


@pytest.fixture
def tiny() -> tuple[str, ...]:
    """Overrides of a run of 6 steps on sinusoids."""
    return TINY


@pytest.fixture
def compose_config() -> Iterator[Composer]:
    """Overrides -> the configuration as its dataclasses."""
    store.register()
    with initialize_config_dir(store.CONFIG_DIR, version_base="1.3"):
        yield lambda *overrides: store.to_object(compose("train", [*overrides, "run_dir=unused"]))
    GlobalHydra.instance().clear()


@pytest.fixture
def run_here(compose_config: Composer) -> Runner:
    """(run directory, overrides) -> the result of a tiny run in this process."""
    return lambda run_dir, *overrides: train(compose_config(*TINY, *overrides), run_dir, list(overrides))


@pytest.fixture
def environment(tmp_path: Path, cache: str) -> dict[str, str]:
    """Of a process: the repository on its path, one thread, no key and no settings of a tracker."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HYDRA"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "THERIA_CACHE": cache}


@pytest.fixture
def process(tmp_path: Path, environment: dict[str, str]) -> Process:
    """(module, overrides) -> the finished process, run in an empty directory as a user would run it."""

    def start(module: str, *overrides: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", module, *overrides]
        return subprocess.run(
            command, cwd=tmp_path, env={**environment, **variables}, capture_output=True, text=True, timeout=timeout
        )

    return start
