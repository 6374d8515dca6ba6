"""Between Hydra and the front doors: where conf/ is, whether a composed config can be built, and errors in one line.

A component's constructor is its schema: names, types and limits of the settings are read off its signature, so a new
task, noise, backbone or model needs a class and a yaml, nothing else.
"""

from __future__ import annotations

import difflib
import errno
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_type_hints

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, ValidationError, create_model

from rmt_lightning.errors import UserError

# In a wheel conf/ is inside the package, in a checkout beside it.
_PACKAGE = Path(__file__).parent
CONF = next(
    folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir() or folder.parent != _PACKAGE
)


def check(config: DictConfig, path: str = "") -> None:
    """Compare every node that has a `_target_` with the signature of what it names.

    Raises:
        UserError: naming the key, the value and what is allowed.
    """
    for name in map(str, config):
        if not OmegaConf.is_missing(config, name) and isinstance(config[name], DictConfig):
            check(config[name], f"{path}{name}.")
    if "_target_" not in config:
        return
    target = get_object(config._target_)
    constructor = target.__init__ if inspect.isclass(target) else target
    hints = get_type_hints(constructor, include_extras=True)
    if not inspect.signature(constructor).parameters.keys() - {"self"} <= hints.keys():
        hints = get_type_hints(target, include_extras=True)
    given = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    del given["_target_"]
    allowed = list(inspect.signature(target).parameters)
    for name in given:
        if name not in allowed:
            raise UserError(f"{path}{name}: no such setting of {config._target_}; {_suggest(name, allowed)}")
    fields: Any = {name: (hints.get(name, Any), ...) for name in given}
    schema = create_model("Settings", __config__=ConfigDict(strict=True, arbitrary_types_allowed=True), **fields)
    try:
        schema(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = f"{path}{first['loc'][0]}"
        raise UserError(f"{key}={given[str(first['loc'][0])]}: {_say(first)}") from None


def _say(error: Any) -> str:
    message = str(error["msg"]).replace("Input should be", "must be")
    return message[0].lower() + message[1:]


def _suggest(name: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}allowed: {', '.join(allowed)}"


def front_door(main: Callable[[DictConfig], None], config_name: str) -> Callable[[], None]:
    """Make a command of a function that takes the composed config. What the user did wrong is told in one line."""

    def job(config: DictConfig) -> None:
        # Hydra would put a line of its own before an exception that leaves the job.
        try:
            main(config)
        except UserError as error:
            _fail(str(error), code=2)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            _fail(
                f"no space left while writing {error.filename or 'the run folder'}: free some and resume the run",
                code=1,
            )

    def run() -> None:
        # Hydra then raises its own errors instead of printing them over many lines.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
        except (HydraException, OmegaConfBaseException) as error:
            _fail(_one_line(error, config_name), code=2)

    return run


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _one_line(error: BaseException, config_name: str) -> str:
    """What Hydra and OmegaConf tell in many lines."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, UserError):
            return str(cause)
    text = next((str(cause) for cause in causes if str(cause)), type(error).__name__)
    if missing := re.search(r"Could not find '(.+?)/([^/']+)'", text):
        options = re.findall(r"^\t(.+)$", text, flags=re.MULTILINE)
        return f"{missing[1]}={missing[2]}: no such choice; {_suggest(missing[2], options)}"
    if unknown := re.search(r"Could not override '([^']+)'", text):
        return f"{unknown[1]}: no such setting; {_suggest_key(unknown[1], config_name)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    return f"{key + ': ' if key else ''}{lines[0]}"


def _suggest_key(key: str, config_name: str) -> str:
    """Which keys stand where `key` was looked for."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = hydra.compose(config_name)
    *parents, name = key.split(".")
    node: Any = config
    for parent in parents:
        if not isinstance(node, DictConfig) or parent not in node:
            return _suggest(parent, _keys(node))
        node = node[parent] if not OmegaConf.is_missing(node, parent) else DictConfig({})
    return _suggest(name, _keys(node))


def _keys(node: Any) -> list[str]:
    return [str(key) for key in node if key != "_target_"] if isinstance(node, DictConfig) else []
