"""The commands, and what Hydra and OmegaConf say over many lines, in one."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rmt_lightning.app.processes import forget_leftovers
from rmt_lightning.app.schema import CONF, suggest
from rmt_lightning.core.errors import UserError

# What Hydra tells in words alone; tests/test_hydra_errors.py holds them against the version that is installed.
NO_DEFAULT = re.compile(r"To append to your default list use \+(\S+)")
NO_SETTING = re.compile(r"Could not override '([^']+)'")
NO_CHOICE = re.compile(r"Config group override must be a string or a list\. Got (\w+)")
PLACE = re.compile(r"^full_key: (\S+)", flags=re.MULTILINE)
# NumPy, torch and CUDA.
NO_MEMORY = re.compile(r"(MemoryError|can't allocate memory|out of memory|Storage size calculation overflowed)")
# Python's own, of a class that is not ours: ours are checked against their signatures.
ARGUMENTS = re.compile(r"missing \d+ required \S+ arguments?: (.+)|unexpected keyword argument '(\w+)'")


def front_door(main: Callable[[DictConfig], Any], config_name: str) -> Callable[[], None]:
    """Make a command of a function that takes the composed config. What the user did wrong is told in one line."""

    def job(config: DictConfig) -> Any:
        # Caught here as well: Hydra puts a line of its own before an exception that leaves the job.
        with told_in_one_line(config_name):
            return main(config)

    def run() -> None:
        # Hydra then raises its own errors instead of printing them over many lines.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        with told_in_one_line(config_name):
            forget_leftovers(sys.argv)
            if not sys.flags.safe_path and os.getcwd() not in sys.path:
                # As with `python -m`: where classes of the user's own stand.
                sys.path.insert(0, os.getcwd())
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()

    return run


@contextmanager
def told_in_one_line(config_name: str) -> Iterator[None]:
    """Print what the user did wrong, and leave with the exit code that says so."""
    try:
        yield
    except UserError as error:
        _fail(str(error), code=2)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_one_line(error, config_name), code=2)
    except ValueError as error:
        if not NO_CHOICE.search(str(error)):
            raise
        _fail(_no_choice(), code=2)
    except (MemoryError, RuntimeError) as error:
        if not NO_MEMORY.search(repr(error)):
            raise
        _fail(_no_memory(error), code=1)
    except KeyboardInterrupt:
        _fail("interrupted; a run that has begun goes on with resume=<its folder>", code=130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _fail(f"no space left while writing {error.filename or 'the run folder'}: free some and resume the run", code=1)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _one_line(error: BaseException, config_name: str) -> str:
    """What Hydra and OmegaConf tell in many lines. An error that is nobody's setting goes on as it is."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, UserError):
            return str(cause)
        if NO_MEMORY.search(repr(cause)):
            return _no_memory(cause)
    if isinstance(error, InstantiationException):
        of_the_user = isinstance(causes[1], ValueError) or type(causes[1]).__name__ == "MisconfigurationException"
        if not of_the_user and not ARGUMENTS.search(str(causes[1])):
            raise error
        place = PLACE.search(str(error))
        return f"{place[1] + ': ' if place else ''}{' '.join(str(causes[1]).split())}"
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name}: no such choice; {suggest(name, list(error.options))}" if name else _no_choice()
    if isinstance(error, OverrideParseException):
        return f"'{error.override}': settings are given as key=value; quote what is special to Hydra"
    said = next((cause for cause in causes if str(cause)), error)
    if default := NO_DEFAULT.search(str(said)):
        # A part of a part, such as model.update, comes with some choices of the whole alone.
        group = default[1].partition("=")[0]
        whole = group.rpartition(".")[0]
        if owners := [path.stem for path in sorted((CONF / whole).glob("*.yaml")) if f"/{group}@" in path.read_text()]:
            return f"{group}: no such setting; it comes with {whole}={' or '.join(owners)}"
        return f"{default[1]}: is not among the defaults; write +{default[1]}"
    if setting := NO_SETTING.search(str(said)):
        return f"{setting[1]}: no such setting; {_suggest_key(setting[1], config_name)}"
    key = getattr(said, "full_key", None)
    return f"{key + ': ' if key else ''}{(str(said).strip() or type(said).__name__).splitlines()[0]}"


def _no_memory(error: BaseException) -> str:
    told = " ".join(str(error).split())
    return f"not enough memory: make data.batch_size smaller, or what else is large ({told:.200})"


def _no_choice() -> str:
    """Which group has been given no choice but null or nothing. Hydra does not say which."""
    for word in sys.argv[1:]:
        group, _, choice = word.removeprefix("+").partition("=")
        options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        if (CONF / group).is_dir() and choice not in options and "," not in choice:
            break
    return f"{word}: no such choice; allowed: {', '.join(options)}; or leave {group}= out"


def _suggest_key(key: str, config_name: str) -> str:
    """Which keys stand where `key` was looked for."""
    # What is allowed depends on the choices that were made; those of a sweep (a,b) are left aside.
    choices = [word for word in sys.argv[1:] if (CONF / word.split("=")[0]).is_dir() and "," not in word]
    given = re.search(r"(?:--config-dir|-cd)[= \n]([^\n]+)", "\n".join(sys.argv[1:]))
    if given:
        choices.append(f"hydra.searchpath=[file://{os.path.abspath(given[1])}]")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = hydra.compose(config_name, choices)
    *parents, name = key.split(".")
    node: Any = config
    for parent in parents:
        if not isinstance(node, DictConfig) or parent not in node:
            # Presets, which have no _target_, bring no settings of their own.
            options = [path.stem for path in sorted((CONF / parent).glob("*.yaml")) if "_target_" in path.read_text()]
            return f"it comes with {parent}={' or '.join(options)}" if options else suggest(parent, _keys(node))
        node = node[parent] if not OmegaConf.is_missing(node, parent) else DictConfig({})
    return suggest(name, _keys(node)) + _owners(".".join(parents), name)


def _owners(group: str, name: str) -> str:
    """Which other choices of a group have a setting of that name."""
    has_it = re.compile(rf"^{re.escape(name)}:", re.MULTILINE)
    choices = sorted((CONF / group).glob("*.yaml")) if group else []
    owners = [path.stem for path in choices if has_it.search(path.read_text(encoding="utf-8"))]
    return f"; it comes with {group}={' or '.join(owners)}" if owners else ""


def _keys(node: Any) -> list[str]:
    return [str(key) for key in node if key != "_target_"] if isinstance(node, DictConfig) else []
