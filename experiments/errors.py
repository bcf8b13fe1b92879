"""Errors that a user can mend: what was given, what is needed, what to do. Anything else keeps its traceback."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from experiments import launch
from theria.meta.distributed import FROM_FIRST, LostProcess
from theria.meta.solvers import SolverError
from theria.ops import UnsupportedError

# A folder that cannot be made or written; every other OSError keeps its traceback.
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ENOSPC}
UNWRITABLE |= {errno.ENAMETOOLONG, errno.ELOOP}
# The settings that name such a folder.
FOLDERS = ("run_dir", "hydra.run.dir", "hydra.sweep.dir")

# What makes several runs, or runs them elsewhere.
SWEEPS = ("hydra/launcher", "hydra/sweeper", "sweep")
UNKNOWN_PLUGIN = "Unknown plugin class : 'hydra_plugins."  # Hydra's words for one that is not installed


class UserError(Exception):
    """Ends the program with its message and `exit_code`, without a traceback.

    `common` says that every process of a run raises it at the same time, so that the first one speaks for all.
    """

    exit_code = 2
    common = False


class NonFiniteError(UserError):
    """The loss or the meta-gradient is not finite."""

    exit_code = 3
    common = True


class LostProcessError(UserError, LostProcess):
    """Another process of the run is gone or hangs."""

    exit_code = 4


class Interrupted(UserError):
    """A signal stopped the run after its checkpoint was written."""

    common = True

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum  # the shell's convention: 130 for SIGINT, 143 for SIGTERM

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.exit_code - 128)  # a launcher sends it from a job to the sweep


def nearest(name: str, valid: Iterable[str]) -> str:
    """'did you mean ...?' with the nearest valid name, or the list of them when none is near."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(valid)}"


def unknown_setting(key: str, valid: Iterable[str]) -> str:
    return f"{key}: there is no such setting; {nearest(key, valid)}"


def value_needed(key: str) -> str:
    return f"{key}: a value is needed: give {key}=..."


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would take for something else, before it makes a folder.

    Raises:
        UserError: an empty path, which would be the current directory; a sweep with a run_dir, which it would ignore;
            a launcher or sweeper for one run, which would ignore it.
    """
    given = _given(arguments)
    for key in ("run_dir", "checkpoint"):
        if not given.get(key, key).strip("'\" "):
            raise UserError(value_needed(key))
    if "run_dir" in given and {"--multirun", "-m"} & {*arguments}:
        raise UserError(
            f"run_dir={given['run_dir']}: the runs of --multirun have a directory each: give "
            f"hydra.sweep.dir={given['run_dir']}, in which they are 0, 1, ..."
        )
    for key in SWEEPS:
        if given.get(key, "null") not in ("null", "basic") and not {"--multirun", "-m"} & {*arguments}:
            raise UserError(f"{key}={given[key]}: without --multirun Hydra runs once, here: give --multirun as well")
    if launch.size() > 1 and {"--multirun", "-m"} & {*arguments}:
        raise UserError("--multirun: several processes train one run at a time: start each of them with torchrun")


def _given(arguments: Sequence[str]) -> dict[str, str]:
    """The settings on a command line as they are written there."""
    return {key.lstrip("+"): value for key, sign, value in (item.partition("=") for item in arguments) if sign}


def _no_folder(error: OSError) -> bool:
    """Whether a run's folder cannot be made or written; a virtual file system, as /proc, says that there is none."""
    if error.errno != errno.ENOENT:
        return error.errno in UNWRITABLE
    given = _given(sys.argv[1:])
    folders = [Path(given[key].strip("'\"")) for key in FOLDERS if key in given]
    return any(Path(error.filename) in (folder, *folder.parents) for folder in folders)


def run(entry: Callable[[], None], program: str | None = None) -> None:
    """Call a `hydra.main` function; turn errors that a user can mend into one message on stderr and an exit code.

    Args:
        program: its module, where it runs experiments of `configs/experiment`.
    """
    verbose = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing a message of its own
    try:
        check_arguments(sys.argv[1:])
        if program is not None:
            check_experiment(sys.argv[1:], program)
        sys.argv[1:] = launch.arranged(sys.argv[1:])
        entry()
    except UserError as error:
        if launch.is_other() and (error.common or FROM_FIRST in getattr(error, "__notes__", ())):
            sys.exit(error.exit_code)  # the first process says it
        message, code = str(error), error.exit_code
    except LostProcess as error:
        message, code = str(error), LostProcessError.exit_code
    except (HydraException, OmegaConfBaseException) as error:
        if verbose:
            raise
        message, code = explain(error, program), UserError.exit_code
    except SolverError as error:
        if verbose:
            raise
        message, code = unsolved(error.reason), UserError.exit_code
    except UnsupportedError as error:
        if verbose:
            raise
        message, code = f"{error} The setting is ops=...", UserError.exit_code
    except RuntimeError as error:
        if verbose or UNKNOWN_PLUGIN not in str(error):
            raise
        package = str(error).split(UNKNOWN_PLUGIN)[1].split(".")[0].replace("_", "-")
        message, code = f"{package} is not installed: pip install -e '.[sweeps]'", UserError.exit_code
    except OSError as error:
        if verbose or error.filename is None or not _no_folder(error):
            raise
        message = f"{error.filename}: {error.strerror}; needed is a folder that can be written: give another run_dir"
        code = UserError.exit_code
    except KeyboardInterrupt:
        message, code = "interrupted; if training had begun, trainer.resume=true with the same run_dir goes on", 130
    else:
        return
    print(f"error: {message}" if code < 128 else message, file=sys.stderr)
    sys.exit(code)


def unsolved(reason: str) -> str:
    """Why an implicit gradient could not be solved for, with the settings that decide it."""
    settings = "adjoint.solver, adjoint.iterations, inner.lr, inner.steps, learner=imaml, learner.strength, learner.tol"
    return f"{reason}. The settings of adjoint=implicit: {settings}"


def program_of(experiment: str) -> str | None:
    """The module that an experiment is run with, by the command at its top; None where there is no such experiment."""
    from experiments.store import CONFIG_DIR

    path = Path(CONFIG_DIR, "experiment", f"{experiment}.yaml")
    found = re.search(r"^# python -m (\S+)", path.read_text(), re.MULTILINE) if path.is_file() else None
    return found and found[1]


def check_experiment(arguments: Sequence[str], program: str) -> None:
    """Refuse an experiment of another program.

    Raises:
        UserError: with the command that runs it.
    """
    given = _given(arguments).get("experiment", "").strip("'\"")
    owner = program_of(given)
    if owner not in (None, program):
        raise UserError(f"experiment={given}: it is of another program: python -m {owner} experiment={given}")


def explain(error: Exception, program: str | None = None) -> str:
    """One message for an error of Hydra or OmegaConf, with the nearest valid name where a name is wrong; of experiments
    those of the program, where one is given."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group == "experiment":
            return f"{group}={name}: there is no such {group}; {nearest(name, _experiments(program, error.options))}"
        return f"{group}={name}: there is no such {group}; {nearest(name, error.options)}"
    if isinstance(cause, OmegaConfBaseException):
        return _explain_value(cause)
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown:
        known = _groups_and_keys()
        if unknown[1] in known:
            return f"{unknown[1]}: {program or 'this program'} has no such setting; --help lists those that it has"
        return f"{unknown[1]}: there is no such name; {nearest(unknown[1], known)}"
    return " ".join(str(error).split("\n"))


def _explain_value(error: OmegaConfBaseException) -> str:
    key = error.full_key or str(error.key)
    if isinstance(error, MissingMandatoryValue):
        return value_needed(key)
    if isinstance(error.parent_node, DictConfig) and str(error.key) not in error.parent_node.keys():  # noqa: SIM118
        prefix = key[: len(key) - len(str(error.key))]  # (`in` without keys() misses what has no value yet)
        return unknown_setting(key, [f"{prefix}{name}" for name in error.parent_node])
    return f"{key}: {(error.msg or str(error)).splitlines()[0]}"


def _experiments(program: str | None, options: Iterable[str]) -> list[str]:
    return [option for option in options if program is None or program_of(option) == program]


def _groups_and_keys() -> list[str]:
    from experiments.config import Config
    from experiments.store import CONFIG_DIR

    groups = [entry.name for entry in os.scandir(CONFIG_DIR) if entry.is_dir()]
    schema = OmegaConf.structured(Config)
    keys = [
        f"{group}.{key}"
        for group in schema
        if not OmegaConf.is_missing(schema, group) and isinstance(schema[group], DictConfig)
        for key in schema[group]
    ]
    return [*groups, *keys, "name", "seed", "run_dir"]
