"""The commands, and what Hydra and OmegaConf say over many lines, in one."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from rmt_lightning.app.console import keep, steady_screen, trouble
from rmt_lightning.app.own_parts import mistake
from rmt_lightning.app.processes import forget_leftovers, share_cores
from rmt_lightning.app.schema import CONF, may_be_added, suggest
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import check_readable
from rmt_lightning.core.quoting import for_shell, literal, one_line, quoted, setting

# What Hydra tells in words alone; tests/test_hydra_errors.py holds them against the version that is installed.
NO_DEFAULT = re.compile(r"To append to your default list use \+(\S+)")
NO_VALUE = re.compile(r"Error merging override (.+)")
NO_SETTING = re.compile(r"Could not override '([^']+)'")
NOT_THERE = re.compile(r"Could not delete from config\. '(.+)' does not exist")
NO_CHOICE = re.compile(r"Config group override must be a string or a list\. Got (\w+)")
SEVERAL = re.compile(r"Ambiguous value for argument '(.*)'$", flags=re.MULTILINE)
FUNCTION = re.compile(r"Sweep parameters '(.*)' requires --multirun$")
THERE = re.compile(r"Could not append to config\. An item is already at '(.*)'")
SWEPT = re.compile(r"Sweeping over Hydra's configuration is not supported : '(.*)'$")
TWICE = re.compile(
    r"Multiple values for ([^. ]+)\.|force-add of config groups is not supported: '\+\+([^=]+)="
    r"|^(\S+) appears more than once in the final defaults list"
)
PLACE = re.compile(r"^full_key: (\S+)", flags=re.MULTILINE)
# Groups of Hydra whose choices its plugins bring.
_OF_SWEEPS = ("hydra/launcher", "hydra/sweeper")
# Options of Hydra that have no place in these commands, and what to give instead.
_NOT_HERE = {
    "config_name": "each command has a config of its own; give choices of your own with --config-dir",
    "config_path": "each command has a config of its own; give choices of your own with --config-dir",
    "experimental_rerun": "go on with a run by resume=<its folder>",
}
_READ_AGAIN = ConfigLoaderImpl.get_group_options
# What goes on with what has been interrupted.
_AGAIN = {
    "train": "a run that has begun goes on with resume=<its folder>",
    "evaluate": "the same command goes on where it stopped",
}
# NumPy, torch and CUDA.
NO_MEMORY = re.compile(r"(MemoryError|can't allocate memory|out of memory|Storage size calculation overflowed)")
# Python's own, of a class that is not ours: ours are checked against their signatures.
ARGUMENTS = re.compile(r"missing \d+ required \S+ arguments?: (.+)|unexpected keyword argument '(\w+)'")


def front_door(
    main: Callable[[DictConfig], Any], config_name: str, words: Callable[[list[str]], list[str]] = list
) -> Callable[[], None]:
    """Make a command of a function that takes the composed config. What the user did wrong is told in one line.

    Args:
        main: what the command does.
        config_name: its settings in conf/, which is its name too.
        words: what becomes of the command line before Hydra reads it.
    """
    begun = []

    def job(config: DictConfig) -> Any:
        begun.append(config_name)
        # Caught here as well: Hydra puts a line of its own before an exception that leaves the job.
        with told_in_one_line(config_name):
            _keep_places()
            _expand(config)
            return main(config)

    def run() -> None:
        begun.clear()
        # Hydra then raises its own errors instead of printing them over many lines.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        # A run has succeeded whoever watches it; of what only tells something, that is all.
        with steady_screen(lambda: config_name != "train" or not begun), told_in_one_line(config_name):
            forget_leftovers(sys.argv)
            share_cores()
            if not os.environ.get("RMT_LIGHTNING_CACHE"):
                # Empty is as good as not set.
                os.environ.pop("RMT_LIGHTNING_CACHE", None)
            if not sys.flags.safe_path and os.getcwd() not in sys.path:
                # As with `python -m`: where classes of the user's own stand.
                sys.path.insert(0, os.getcwd())
            sys.argv[1:] = _options_first(sys.argv[1:])
            for word in sys.argv[1:]:
                _check_encoding(word)
            sys.argv[1:] = words([_as_meant(word) for word in sys.argv[1:]])
            for word in sys.argv[1:] if config_name != "train" else ():
                _check_door(word, config_name)
            # Hydra finds nothing in it, and says nothing.
            for place in map(Path, _own_choices()):
                check_readable(place)
                _check_names(place)
            # What is wrong there is told in a line of its own.
            warnings.filterwarnings("ignore", "provider=.* is not available")
            ConfigLoaderImpl.get_group_options = _choices  # type: ignore[method-assign]
            try:
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
            except OSError as error:
                if begun or not error.filename:
                    raise
                key = "hydra.sweep.dir" if {"-m", "--multirun"} & {*sys.argv} else "hydra.run.dir"
                raise UserError(f"{key}={error.filename}: {error.strerror}; choose another folder") from None
            except ValueError as error:
                if begun or isinstance(error, OmegaConfBaseException) or NO_CHOICE.search(str(error)):
                    raise
                # Text of a yaml that cannot be read, or options that do not go together.
                raise UserError(_unreadable_choice() or " ".join(str(error).split())) from None
            except yaml.YAMLError as error:
                raise UserError(_unreadable_choice() or " ".join(str(error).split())) from None
            except Exception as error:  # Hydra asserts what it has been told, and divides by it
                told = [word for word in sys.argv[1:] if re.match(r"[+~]*hydra[./]", word)]
                if begun or not told or isinstance(error, HydraException | OmegaConfBaseException | RuntimeError):
                    raise
                reason = " ".join(f"{type(error).__name__} {error}".split())
                raise UserError(f"{' '.join(told)}: Hydra cannot obey that ({reason:.200}); leave it out") from None

    return run


def _choices(
    self: ConfigLoaderImpl, group_name: str, results_filter: ObjectType | None = ObjectType.CONFIG,
    config_name: str | None = None, overrides: list[str] | None = None,
) -> list[str]:  # fmt: skip
    """What there is in a group, as Hydra tells it, without that it reads its own config again each time.

    For --help it did so 146 times, which took a second.
    """
    if config_name is None and not overrides:
        return self.repository.get_group_options(group_name, results_filter)
    # They may name other places to search.
    return _READ_AGAIN(self, group_name, results_filter, config_name, overrides)


def _options_first(words: list[str]) -> list[str]:
    """A command line as Hydra reads it, which wants settings in a row.

    Raises:
        UserError: if there is an option that Hydra does not know, which it would tell over many lines.
    """
    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        raise UserError(f"{message}; see --hydra-help")

    parser.error = error  # type: ignore[method-assign]
    given = parser.parse_intermixed_args(words)
    for option, hint in _NOT_HERE.items():
        if getattr(given, option):
            raise UserError(f"--{option.replace('_', '-')}: {hint}, or leave it out")
    if given.package and not given.cfg:
        raise UserError(f"--package={given.package}: is the part that --cfg job shows; add that, or leave it out")
    settings = given.overrides
    options = list(words)
    for word in settings:
        options.remove(word)
    return [*options, *settings]


def _check_encoding(name: str) -> None:
    """Raise UserError if a name is no UTF-8, which the libraries that write models and tokenizers insist on."""
    if not name.isascii() and name.encode(errors="ignore").decode() != name:
        encoding = sys.getfilesystemencoding()
        raise UserError(
            f"{name}: is no {encoding}; choose another name{', or set PYTHONUTF8=1' * (encoding != 'utf-8')}"
        )


def _check_door(word: str, config_name: str) -> None:
    """Raise UserError if a word sets what a command has not: with a + before it, Hydra would add it for nothing.

    A run may have parts that its user has made, which only the composed config can tell.
    """
    key, equals, choice = word.lstrip("+~").partition("=")
    name = re.split(r"[.@/:]", key)[0]
    if word.startswith("-") or not equals or not name or name == "hydra":
        return
    settings = yaml.safe_load((CONF / f"{config_name}.yaml").read_text(encoding="utf-8"))
    groups = [group for default in settings.pop("defaults") if isinstance(default, dict) for group in default]
    if name not in settings and name not in groups:
        allowed = [setting for setting in settings if setting != "hydra"]
        raise UserError(f"{key}: no such setting; {suggest(name, allowed + groups)}")
    path = CONF / key / f"{choice}.yaml"
    # What is no choice may be longer than any name of a file.
    if path in (CONF / key).glob("*.yaml") and "@package _global_" in path.read_text(encoding="utf-8"):
        raise UserError(f"{word}: is a kind of run of its own, which another cannot be asked; leave it out")


def _as_meant(word: str) -> str:
    """A word of the command line with home folders expanded, and a name that is there taken as it stands."""
    key, _, text = word.partition("=")
    if ("${" in text or "\\" in text or text != text.strip()) and os.path.lexists(text):
        return setting(key, text)
    if word.startswith("-"):
        return f"{key}={os.path.expanduser(text)}" if text else word
    # Unquoted, Hydra would not read it.
    return re.sub(r"(?<=[\"'])~\w*(?=[/\"'])", lambda home: quoted(os.path.expanduser(home[0]))[1:-1], word)


def _expand(config: DictConfig) -> None:
    """Expand home folders in what a yaml says."""
    for key, node in config.items_ex(resolve=False):
        if isinstance(node, DictConfig):
            _expand(node)
        elif isinstance(node, str) and re.match(r"~\w*(/|$)", node):
            config[key] = literal(os.path.expanduser(node))


def check_places(settings: Any) -> None:
    """Raise UserError if Hydra's own settings, those of this command, name no folder or have no effect."""
    swept, door = settings.mode == RunMode.MULTIRUN, settings.job.config_name
    if settings.job.chdir:
        raise UserError("hydra.job.chdir=true: all paths are seen from where the command is started; leave it out")
    typed: Any = OmegaConf.to_container(settings.overrides, resolve=False)
    for word in typed["task"]:
        group, _, choice = word.lstrip("+").partition("=")
        if re.fullmatch(r"\{\s*\}", choice):
            raise UserError(f"{word}: sets nothing; name what is to be set, or leave it out")
        files = (CONF / group).glob("*.yaml") if choice.startswith("[") else ()
        if any(re.search("^_target_:", path.read_text(encoding="utf-8"), flags=re.MULTILINE) for path in files):
            raise UserError(f"{word}: a run has one {group}; give one choice, without brackets")
    for word in typed["hydra"]:
        key = word.partition("=")[0].lstrip("+~")
        if key == "hydra.run.dir" and swept:
            raise UserError(f"{word}: is where a single run goes; of a sweep, give hydra.sweep.dir=…")
        if key == "hydra.run.dir" and door != "train":
            raise UserError(f"{word}: nothing is written there; --help shows what says where results go")
        if re.match(r"hydra[./](sweep|sweeper|launcher)\b", key) and not swept:
            raise UserError(f"{word}: is for sweeps alone; add --multirun, or leave it out")
    places = [word for word in sys.argv[1:] if word.startswith("folder=")]
    if swept and door == "flops" and not any(re.search(r"[,$(]", word) for word in places):
        hint = for_shell("folder=outputs/flops/${hydra:job.num}")
        raise UserError(f"--multirun: the jobs would write over each other; give each a folder, such as {hint}")
    for source in settings.runtime.config_sources:
        if source.provider == "hydra.searchpath in command-line" and not (
            source.schema != "file" or Path(source.path).is_dir()
        ):
            raise UserError(f"hydra.searchpath: {source.path} is no folder; name one that holds choices of your own")
    if "sweep" in settings.callbacks and not settings.callbacks.sweep:
        raise UserError("hydra.callbacks.sweep: is what carries out a sweep; leave it out")
    for name, number in settings.sweeper.items() if swept else ():
        if type(number) is int and number < 1:
            raise UserError(f"hydra.sweeper.{name}={number}: must be 1 or more")
    for key in ("sweep.dir", "sweep.subdir") if swept else ("run.dir",):
        group, _, name = key.partition(".")
        if not OmegaConf.is_interpolation(settings[group], name) and not settings[group][name]:
            raise UserError(f"hydra.{key}=: is empty; name a folder, or leave it out")


def _keep_places() -> None:
    """Set the paths that Hydra has put into its own config as they are, so that no ${…} in them is looked up."""
    settings: Any = HydraConfig.get()
    try:
        check_places(settings)
    except UserError:
        if settings.runtime.output_dir != settings.runtime.cwd:
            with suppress(OSError):
                # Made by Hydra, unless something is in it.
                os.rmdir(settings.runtime.output_dir)
        raise
    folder = settings.run.dir
    if settings.mode == RunMode.MULTIRUN:
        folder = os.path.join(settings.sweep.dir, settings.sweep.subdir)
    _check_encoding(os.path.abspath(folder))
    with read_write(settings):
        settings.runtime.cwd = literal(os.getcwd())
        settings.runtime.output_dir = literal(os.path.abspath(folder))
        # Lightning sets it in double quotes for the processes that it starts.
        settings.run.dir = literal(quoted(folder)[1:-1])


@contextmanager
def told_in_one_line(config_name: str) -> Iterator[None]:
    """Print what the user did wrong, and leave with the exit code that says so."""
    try:
        yield
    except UserError as error:
        _fail(str(error), code=2)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_one_line(error, config_name), code=2)
    except KeyboardInterrupt:
        _fail(f"interrupted; {_AGAIN.get(config_name, 'repeat the command')}", code=130)
    except OSError as error:
        _fail(trouble(error), code=1)
    except Exception as error:
        if isinstance(error, ValueError) and NO_CHOICE.search(str(error)):
            _fail(_no_choice(), code=2)
        if isinstance(error, MemoryError | RuntimeError) and NO_MEMORY.search(repr(error)):
            _fail(_no_memory(error), code=1)
        if own := mistake(error):
            _fail(own, code=2, error=error)
        raise


def _fail(message: str, code: int, error: BaseException | None = None) -> None:
    """Leave with an error, which the log file of a run keeps as well; one in somebody's own code with its traceback."""
    told = f"error: {one_line(message)}"
    print(told, file=sys.stderr)
    keep(told, logging.ERROR, error)
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
            return _no_memory(cause, PLACE.search(str(error)))
        if isinstance(cause, OSError) and not isinstance(cause, HydraException):
            return trouble(cause)
    if isinstance(error, InstantiationException):
        of_the_user = isinstance(causes[1], ValueError) or type(causes[1]).__name__ == "MisconfigurationException"
        told = str(causes[1]) if of_the_user or ARGUMENTS.search(str(causes[1])) else mistake(causes[1])
        if told is None:
            raise error
        place = PLACE.search(str(error))
        if place and (lacks := ARGUMENTS.search(told)):
            needed = {f"~{place[1]}.{name}" for name in re.findall(r"'(\w+)'", lacks[1] or "")}
            if taken := [word for word in sys.argv[1:] if word.partition("=")[0] in needed]:
                return f"{taken[0]}: the run needs it; leave it out"
        return f"{place[1] + ': ' if place else ''}{' '.join(told.split())}"
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        hint = "; others come with pip install 'rmt-lightning[sweeps]'" if group in _OF_SWEEPS else ""
        return f"{group}={name}: no such choice; {suggest(name, list(error.options))}{hint}" if name else _no_choice()
    if isinstance(error, OverrideParseException):
        return _unread(str(error.override))
    said = next((cause for cause in causes if str(cause)), error)
    if several := SEVERAL.search(str(said)):
        key, _, text = several[1].partition("=")
        return (
            f"{several[1]}: a comma separates the values of a sweep (--multirun) or of a list ({key}=[{text}]); "
            f"for one text, type {for_shell(setting(key, text))}"
        )
    if there := THERE.search(str(said)):
        return f"{there[1]}: is a setting already; write {there[1]}=… without +"
    if function := FUNCTION.search(str(said)):
        hint = for_shell(setting(*function[1].split("=", 1)))
        return f"{function[1]}: gives the values of a sweep (--multirun); for one text, type {hint}"
    if swept := SWEPT.search(str(said)):
        hint = for_shell(setting(*swept[1].split("=", 1)))
        return f"{swept[1]}: is one for all jobs; for one text with commas, type {hint}"
    if twice := TWICE.search(str(said)):
        group = next(filter(None, twice.groups()))
        if not any(word.startswith(f"+{group}") or word.startswith(f"++{group}") for word in sys.argv[1:]):
            return f"{group}: is among the defaults already; in those of a yaml, write 'override /{group}: …'"
        return f"{group}: is among the defaults; write {group}=… without +"
    if default := NO_DEFAULT.search(str(said)):
        # A part of a part, such as model.update, comes with some choices of the whole alone.
        group = default[1].partition("=")[0]
        if not group:
            return _unread(default[1])
        whole = group.rpartition(".")[0]
        choices = sorted((CONF / whole).glob("*.yaml"))
        if owners := [path.stem for path in choices if f"/{group}@" in path.read_text(encoding="utf-8")]:
            return f"{group}: no such setting; it comes with {whole}={' or '.join(owners)}"
        return f"{default[1]}: is not among the defaults; write +{default[1]}"
    if absent := NOT_THERE.search(str(said)):
        return f"~{absent[1]}: there is no such setting, or it is null already; leave it out"
    unknown, key = NO_SETTING.search(str(said)), getattr(said, "full_key", None)
    group = (unknown[1] if unknown else key or "").partition(".")[0]
    if group and any(word.partition("=")[0] == f"~{group}" for word in sys.argv[1:]):
        return f"~{group}: the run needs it; leave it out"
    if unknown and "@" in unknown[1] and not any(unknown[1] in word for word in sys.argv[1:]):
        return _in_a_yaml(unknown[1])
    if unknown:
        return f"{unknown[1]}: no such setting; {_suggest_key(unknown[1], config_name)}"
    for word in sys.argv[1:]:
        if word[0] == "~" and f"Interpolation key '{word[1:].partition('=')[0]}." in str(said):
            return f"{word}: the run needs it; leave it out"
    if (merged := NO_VALUE.search(str(said))) and len(causes) > 1:
        told = str(causes[1]).splitlines()[0]
        if "to string" in told:
            return f"{merged[1]}: {told}; for a text, type {for_shell(setting(*merged[1].split('=', 1)))}"
        return f"{merged[1]}: {told}; give another value, or leave it out"
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    told = f"{key + ': ' if key else ''}{lines[0] if lines else type(said).__name__}"
    if looked_up := [word for word in sys.argv[1:] if "${" in word and word.lstrip("+").startswith(key or "")]:
        return f"{told}; for a text as it stands, type {for_shell(setting(*looked_up[0].split('=', 1)))}"
    return told


def _in_a_yaml(key: str) -> str:
    """What is wrong with an override among the defaults of somebody's yaml."""
    group = key.partition("@")[0]
    if "/" in group:
        name = group.partition("/")[2]
        return f"{name}: is looked for beside the yaml that overrides it; write 'override /{name}: …'"
    return f"{group}: is overridden by a yaml that stands for one part; begin it with the line '# @package _global_'"


def _check_names(folder: Path) -> None:
    """Raise UserError if a choice of the user's own is hidden by one of ours that has its name."""
    for path in sorted(folder.rglob("*.yaml")):
        ours = CONF / path.relative_to(folder)
        if ours.is_file() and path.read_bytes() != ours.read_bytes():
            raise UserError(f"{path}: is not read, for there is one of that name already; give it another name")


def _unread(word: str) -> str:
    """What to type instead of a word that Hydra cannot read."""
    key, equals, text = word.partition("=")
    if not equals or not re.fullmatch(r"[+~]*[\w@:$-]+([./][\w@:$-]+)*", key, flags=re.ASCII):
        return f"'{word}': settings are given as key=value, such as seed=2"
    if choices := sorted(path.stem for path in (CONF / key.lstrip("+~")).glob("*.yaml")):
        return f"{word}: no such choice; {suggest(text, choices)}"
    if (quoted_text := setting(key, text)) == word:
        return f"{word}: cannot be read; a key is made of names with points between them, such as noise.documents"
    other = f", and a list looks like {key}=[1,2]" if text.startswith("[") else ""
    return f"{word}: cannot be read; a text with such characters needs quotes{other}: type {for_shell(quoted_text)}"


def _no_memory(error: BaseException, place: re.Match[str] | None = None) -> str:
    told = " ".join(str(error).split())
    part = f"{place[1]}: is too large" if place else "make data.batch_size smaller, or what else is large"
    return f"not enough memory: {part} ({told:.200})"


def _no_choice() -> str:
    """Which group has been given no choice but null or nothing. Hydra does not say which."""
    for word in sys.argv[1:]:
        group, _, choice = word.removeprefix("+").partition("=")
        if not group:
            return _unread(word)
        options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        if (CONF / group).is_dir() and choice not in options and "," not in choice:
            return f"{word}: no such choice; allowed: {', '.join(options)}; or leave {group}= out"
    return "a group has been given no choice; leave it out"


def _own_choices() -> list[str]:
    """The folders of the user's own choices that are given."""
    words = sys.argv[1:]
    return [
        option.partition("=")[2] or value
        for option, value in zip(words, [*words, ""][1:], strict=True)
        if option.partition("=")[0] in ("--config-dir", "-cd")
    ]


def _unreadable_choice() -> str | None:
    """What is wrong with the first of the user's own choices that cannot be read."""
    for path in sorted(path for folder in _own_choices() for path in Path(folder).rglob("*.yaml")):
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            return f"{path}: is not UTF-8; save it as UTF-8"
        except yaml.YAMLError as error:
            return f"{path}: is no yaml: {' '.join(str(error).split())}"
    return None


def _suggest_key(key: str, config_name: str) -> str:
    """Which keys stand where `key` was looked for."""
    if key.startswith("hydra."):
        return "--cfg hydra shows those that there are"
    given = _own_choices()
    groups = [CONF, *map(Path, given)]
    # What is allowed depends on the choices that were made; those of a sweep (a,b) are left aside.
    choices = [
        word
        for word in sys.argv[1:]
        if "," not in word and any((place / word.lstrip("+").partition("=")[0]).is_dir() for place in groups)
    ]
    searched = quoted([f"file://{os.path.abspath(folder)}" for folder in given])
    GlobalHydra.instance().clear()
    # If a choice itself is wrong, without any.
    for tried in (choices, []):
        with (
            suppress(HydraException, OmegaConfBaseException, ValueError),
            hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)),
        ):
            config = hydra.compose(config_name, [*tried, f"hydra.searchpath={searched}"])
            break
    *parents, name = key.split(".")
    node: Any = config
    for parent in parents:
        if not isinstance(node, DictConfig) or parent not in node:
            if owners := _owners(parent, name):
                return owners.removeprefix("; ")
            # Some choices stand under a name of their own.
            named = re.compile(rf"# @package {re.escape(parent)}\n")
            if there := [path for path in CONF.glob("*/*.yaml") if named.match(path.read_text(encoding="utf-8"))]:
                return f"it comes with {there[0].parent.name}={there[0].stem}"
            # Presets, which have no _target_, bring no settings of their own.
            choices_there = sorted((CONF / parent).glob("*.yaml"))
            options = [path.stem for path in choices_there if "_target_" in path.read_text(encoding="utf-8")]
            return f"it comes with {parent}={' or '.join(options)}" if options else suggest(parent, _keys(node))
        node = node[parent] if not OmegaConf.is_missing(node, parent) else DictConfig({})
    if isinstance(node, DictConfig) and "_target_" in node and may_be_added(node._target_, name):
        return f"its yaml leaves it to the class; write +{key}=…"
    return suggest(name, _keys(node)) + _owners(".".join(parents), name)


def _owners(group: str, name: str) -> str:
    """Which other choices of a group have a setting of that name."""
    has_it = re.compile(rf"^{re.escape(name)}:", re.MULTILINE)
    choices = sorted((CONF / group).glob("*.yaml")) if group else []
    owners = [path.stem for path in choices if has_it.search(path.read_text(encoding="utf-8"))]
    return f"; it comes with {group}={' or '.join(owners)}" if owners else ""


def _keys(node: Any) -> list[str]:
    return [str(key) for key in node if key != "_target_"] if isinstance(node, DictConfig) else []
