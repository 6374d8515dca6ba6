"""Whether a composed config can be built, and where conf/ is.

A component's constructor is its schema: names, types and limits of the settings are read off its signature, so a new
task, noise, backbone or model needs a class and a yaml, nothing else.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import hydra.utils
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, ValidationError, create_model

import rmt_lightning
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.names import BY_THE_RUN
from rmt_lightning.core.quoting import for_shell, literals, setting

# It prints what it cannot import, which is told in a line here.
logging.getLogger(hydra.utils.__name__).setLevel(logging.CRITICAL)

# The largest seed. Nothing that is counted comes near it, and what is begun with more never ends.
_LARGEST = 2**32 - 1

# What a class must be able to do to be chosen for a group; what is more, signatures tell.
_ABILITIES = {
    "task": ("draw", "sentences"),
    "noise": ("documents", "fingerprint"),
    "backbone": ("config", "tokenizer"),
    "model": ("initial_state", "read_segment"),
    "model.update": ("forward",),
    "answer": ("judge",),
    "data": ("train_dataloader",),
    "curriculum": ("training_keys",),
    "hold": ("training_keys",),
    "metrics": ("update", "compute"),
    "optim": ("build",),
    "trainer": ("fit",),
    "logger": ("log_metrics",),
    "callbacks": ("on_train_batch_end",),
}

# Groups of which there may be several at once, each under a name of its own. One logger needs none.
_NAMED = ("metrics", "callbacks", "logger")

# Groups whose choices set what belongs to others.
_PRESETS = ("experiment", "sweep")

# In a wheel conf/ is inside the package, in a checkout beside it.
_PACKAGE = Path(__file__).parents[1]
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


def instantiate(config: DictConfig, **options: Any) -> Any:
    """Build what a config names, as Hydra does, but with texts as they are.

    Hydra writes resolved texts into the config, and reads them once more from there.
    """
    plain = literals(literals(OmegaConf.to_container(config, resolve=True)))
    key = config._get_full_key(None)
    # Where it stands, which Hydra tells if it cannot be built.
    place = OmegaConf.create({})
    OmegaConf.update(place, key, plain) if key else place.update(plain)
    return hydra.utils.instantiate(OmegaConf.select(place, key) if key else place, **options)


def check(config: DictConfig, root: type) -> None:
    """Compare a composed config with the signatures of what its `_target_`s name.

    Args:
        config: what Hydra has composed.
        root: a dataclass of the settings that belong to no group.

    Raises:
        UserError: naming the key, the value and what is allowed.
    """
    _check_missing(config, "")
    given = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    # What is of several settings is a group, but where one belongs.
    single = inspect.signature(root).parameters
    own = {name: value for name, value in given.items() if name in single or not isinstance(value, dict)}
    _check_keys(name for name in own if name not in single)
    for name in own:
        if name not in single and own[name] is None:
            raise UserError(f"{name}=null: is a part of the run, whose settings are given one by one; leave it out")
    _check_settings(root, own, "")
    # Mistakes are where something was typed, and need not wait for what the classes of other parts import.
    parts = [str(name) for name in config if isinstance(config[name], DictConfig)]
    for name in sorted(parts, key=lambda part: not is_typed(part)):
        alone = [str(key) for key, value in config[name].items() if not isinstance(value, DictConfig)]
        if "_target_" not in config[name] and name in _ABILITIES and name not in _NAMED:
            raise UserError(f"{name}: names no class; choose one with {name}=…, or give its yaml a _target_")
        if "_target_" in config[name] and name in _NAMED and name != "logger":
            raise UserError(f"{name}._target_: there may be several; give it a name, as in {name}.mine._target_=…")
        if name in _PRESETS:
            _check_keys([name])
        if alone and "_target_" not in config[name] and (CONF / name).is_dir():
            # There is no class whose setting it could be.
            raise UserError(f"{name}.{alone[0]}: no such setting; {suggest(alone[0], [])}")
        _check_nodes(config[name], f"{name}.")


def _check_keys(names: Iterable[str]) -> None:
    """Raise UserError for what only the yaml of somebody's own choices can have put there."""
    for name in names:
        if name in _PRESETS:
            # What a preset sets stands where it belongs, unless it lacks that line.
            raise UserError(f"{name}: its yaml would change nothing; begin it with the line '# @package _global_'")
        if (CONF / name).is_dir():
            raise UserError(f"{name}: is chosen among the defaults of a yaml; write 'override /{name}: …' there")
        if "." in name:
            part, _, setting = name.partition(".")
            raise UserError(f"{name}: no such setting; in a yaml, write {part}: and below it, indented, {setting}:")


def is_typed(name: str) -> bool:
    """Whether a setting, or one of a group, stands on the command line."""
    return any(re.split(r"[.@=/]", word.lstrip("+~"))[0] == name for word in sys.argv[1:])


def check_parts(config: DictConfig, names: Iterable[str]) -> None:
    """Compare some parts of a config that was saved with the signatures of what they name; raises as `check`."""
    for name in names:
        _check_missing(config[name], f"{name}.")
        _check_nodes(config[name], f"{name}.")


def _check_missing(config: DictConfig, path: str) -> None:
    for name in list[Any](config):
        if OmegaConf.is_missing(config, name):
            raise UserError(f"{path}{name}: is missing; give {path}{name}=…")
        if isinstance(config[name], DictConfig):
            _check_missing(config[name], f"{path}{name}.")


def _check_nodes(config: DictConfig, path: str) -> None:
    for name in list[Any](config):
        if isinstance(config[name], DictConfig):
            _check_nodes(config[name], f"{path}{name}.")
    if "_target_" in config:
        given = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
        name = given.pop("_target_")
        target = _named(name, path)
        _check_kind(target, name, path)
        _check_settings(target, given, path)


def _named(name: Any, path: str) -> Callable[..., Any]:
    """What a `_target_` names.

    Raises:
        UserError: if there is no such thing, or it cannot be imported.
    """
    try:
        target = get_object(name)
    except (Exception, SystemExit) as error:  # whatever may go wrong in a module of one's own when it is imported
        cause = error.__cause__ or error
        reason = " ".join((str(cause) or type(cause).__name__).split())
        module, _, last = str(name).rpartition(".")
        if place := getattr(sys.modules.get(module), "__file__", None):
            # Perhaps another one of that name than was meant.
            reason = f"{place} has no {last}"
        raise UserError(f"{path}_target_={name}: cannot be imported ({reason:.200}); give <module>.<class>") from None
    if not callable(target):
        raise UserError(f"{path}_target_={name}: is no class; give one")
    return cast(Callable[..., Any], target)


def _check_kind(target: Callable[..., Any], name: str, path: str) -> None:
    """Raise UserError if a class is of another kind than its group."""
    # Each metric and each callback has a name of its own, and so may loggers.
    group, _, rest = path[:-1].partition(".")
    group = group if group in _NAMED and "." not in rest else path[:-1]
    missing = [ability for ability in _ABILITIES.get(group, ()) if not hasattr(target, ability)]
    # What a base class has left open.
    missing += sorted(getattr(target, "__abstractmethods__", ()))
    # Of this task there is one, which draws nothing; of what a function makes, nothing is known.
    if missing and inspect.isclass(target) and not (group == "task" and target is rmt_lightning.LanguageModeling):
        hint = f"choose one with {group}=…" if (CONF / group).is_dir() else "choose another"
        raise UserError(f"{path}_target_={name}: is nothing for {group}, for it has no {missing[0]}(); {hint}")


def _check_settings(target: Callable[..., Any], given: dict[str, Any], path: str) -> None:
    parameters = inspect.signature(target).parameters
    hints = type_hints(target.__init__ if inspect.isclass(target) else target)
    # What has to be given and is not in the config, the run gives itself.
    allowed = [
        name
        for name, parameter in parameters.items()
        if name in given or (parameter.default is not parameter.empty and _can_be_typed(hints.get(name, Any)))
    ]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # A logger hands what it does not know on to what it is made of, when the run has begun.
    is_logger = path.startswith("logger.")
    takes_any = takes_any and not is_logger
    for name in given:
        if name not in parameters and not takes_any:
            raise UserError(f"{path}{name}: no such setting; {suggest(name, allowed)}")
    # A part of a part has a signature of its own.
    plain = [name for name, value in given.items() if not (path and isinstance(value, dict) and "_target_" in value)]
    for name in plain:
        if given[name] is not None and not _can_be_typed(hints.get(name, Any)):
            raise UserError(f"{path}{name}: is set by the run itself; leave it out")
        # Loggers read it as nothing given.
        if given[name] == "" and not is_logger:
            raise UserError(f"{path}{name}=: is empty; give a value, or leave it out")
    fields: Any = {name: (hints.get(name, Any), ...) for name in plain}
    # No setting means anything when it is infinite or no number.
    rules = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    schema = create_model("Settings", __config__=rules, **fields)
    try:
        schema(**given)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        # A setting that may be of several kinds fails in several ways.
        ways = [_say(way) for way in error.errors() if way["loc"][0] == key]
        # In a list, a text is typed as it is.
        needs_text = any(
            way["type"] == "string_type" and not any(isinstance(place, int) for place in way["loc"])
            for way in error.errors()
        )
        hint = _as_text(f"{path}{key}") if needs_text else ""
        raise UserError(f"{path}{key}={given[key]}: {' or '.join(dict.fromkeys(ways))}{hint}") from None
    for name in plain:
        _check_size(f"{path}{name}", given[name])


def _check_size(key: str, value: Any) -> None:
    """Raise UserError if a whole number, or one in a list, is larger than any library counts."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and abs(number) > _LARGEST:
            raise UserError(f"{key}={value}: must be less than or equal to {_LARGEST}")


def type_hints(constructor: Callable[..., Any]) -> dict[str, Any]:
    """The types of what a constructor takes, as far as they can be found out."""
    try:
        return get_type_hints(constructor, include_extras=True)
    except (NameError, TypeError):
        # Another library's constructor, annotated with names that it imports for type checkers only; or no function.
        return {}


def may_be_added(target: str, name: str) -> bool:
    """Whether a class has a setting of that name, so that it can be typed though no yaml gives it a value."""
    constructor = get_object(target)
    parameter = inspect.signature(constructor).parameters.get(name)
    hints = type_hints(constructor.__init__ if inspect.isclass(constructor) else constructor)
    return parameter is not None and parameter.default is not parameter.empty and _can_be_typed(hints.get(name, Any))


def _can_be_typed(hint: Any) -> bool:
    """Whether a yaml can hold a value of such a type: a number, a text, or lists and mappings of them."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return BY_THE_RUN not in parts[1:] and _can_be_typed(parts[0])
    if kind is Union or kind is UnionType:
        return any(_can_be_typed(part) for part in parts if part is not NoneType)
    if kind is Literal or not inspect.isclass(kind or hint):
        return True
    plain = (kind or hint).__module__ in ("builtins", "collections.abc", "typing") and kind is not Callable
    return plain and all(_can_be_typed(part) for part in parts if part is not Ellipsis)


def _say(error: Any) -> str:
    message = str(error["msg"]).replace("Input should be", "must be")
    return message[0].lower() + message[1:]


def _as_text(key: str) -> str:
    """How to type what Hydra has read as a number, a list or nothing, so that it stays a text."""
    typed = [text for word, _, text in (word.lstrip("+").partition("=") for word in sys.argv[1:]) if word == key]
    return f"; for a text, type {for_shell(setting(key, typed[-1]))}" if typed else ""


def suggest(name: str, allowed: list[str]) -> str:
    """What is allowed, and which of it may have been meant."""
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}allowed: {', '.join(allowed)}" if allowed else "there is none here"
