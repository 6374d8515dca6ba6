"""What a saved run may name: its folder may come from anybody, and opening it must execute nothing.

What is typed now, and what conf/ holds, may name any class and look anything up. What was saved may name the public
classes of this package, what conf/ names, metrics of torchmetrics, and classes of modules that the user trusts or that
the Python program around this package has imported itself.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import ListConfig, OmegaConf

import rmt_lightning
from rmt_lightning.app.schema import CONF
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.names import public_name
from rmt_lightning.core.quoting import quoted

Trust = str | list[str] | None

# ${name:…} asks a resolver, which may read the environment; ${a.b} is another setting, and \${ no interpolation.
_LOOKUP = re.compile(r"(?<!\\)(?:\\\\)*\$\{.*:", flags=re.DOTALL)


def given_trust(words: Sequence[str]) -> Trust:
    """What the last of some words, trust=…, says; raises as `check_trust`."""
    given: Any = OverridesParser.create().parse_override(words[-1]).value() if words else None
    check_trust(given)
    return cast(Trust, given)


def check_trust(given: Any) -> None:
    """Whether a setting `trust` names modules that are there; none of them is imported.

    Raises:
        UserError: if it does not.
    """
    names = list(given) if isinstance(given, list | ListConfig) else [] if given is None else [given]
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"trust={given}: give the name of a module, or a list of some")
        if not _is_there(name):
            raise UserError(
                f"trust={given}: there is no module {name or quoted(name)}; give one as Python imports it, and start "
                "the command where it is"
            )


def _is_there(module: str) -> bool:
    """Whether a module can be found, without importing those that it is part of."""
    if module in sys.modules:
        return True
    top, *inner = module.split(".")
    try:
        found = importlib.util.find_spec(top)
        for name in inner:
            within = found.submodule_search_locations if found else None
            found = PathFinder.find_spec(name, within) if within else None
    except (ImportError, ValueError):
        return False
    return found is not None


def check_saved(content: Any, place: Path, trust: Trust) -> None:
    """Whether a config that was saved may be used.

    Args:
        content: plain values, interpolations as they stand.
        place: the file, for messages.
        trust: modules whose classes it may name.

    Raises:
        UserError: naming what it may not name, before anything is imported but modules that are trusted.
    """
    check_trust(trust)
    try:
        leaves = list(_leaves(content))
    except RecursionError:
        raise UserError(f"{place}: is damaged: it holds itself") from None
    for key, value in leaves:
        if "hydra" in re.split(r"[./@]", key):
            raise UserError(f"{place}: {key}: a saved run may not set what belongs to Hydra; remove it")
        if isinstance(value, str) and _LOOKUP.search(value):
            raise UserError(f"{place}: {key}={value}: a saved run may look nothing up; put the value itself there")
    if foreign := _foreign(leaves, trust):
        named = ", ".join(f"{key}={name}" for key, name in foreign.items())
        modules = sorted({name.rpartition(".")[0] for name in foreign.values() if _may_be_yours(name)})
        # Beside those that are trusted already.
        whole = sorted({*modules, *_listed(trust)})
        hint = f"if it is yours, add trust={whole[0] if len(whole) == 1 else '[' + ','.join(whole) + ']'}"
        raise UserError(
            f"{place}: {named}: no public class of rmt_lightning, and what was saved may execute nothing else unasked; "
            f"{hint if modules else 'use a run folder that you know'}"
        )


def check_savable(content: Any) -> None:
    """Whether what a config names can be named by a saved run too, once the modules of one's own are trusted.

    Raises:
        UserError: if not.
    """
    trust = foreign_modules(content)
    for key, name in _foreign(_leaves(content), None).items():
        with suppress(UserError):
            if _is_allowed(name, key, trust):
                continue
        raise UserError(
            f"{key}={name}: the run could not be resumed or evaluated; give a class, by the module that defines it"
        )


def check_words(words: Iterable[str], place: Path, trust: Trust) -> None:
    """Whether settings and options that were typed once may be typed again on behalf of the user.

    Raises:
        UserError: naming the word that may not.
    """
    for word in words:
        if word.startswith("-"):
            option, _, folder = word.partition("=")
            if option != "--config-dir":
                raise UserError(f"{place}: {word}: a saved run may give no option; remove it, or type it yourself")
            _check_choices(Path(folder), place, trust)
            continue
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException:
            raise UserError(f"{place}: {word}: cannot be read; remove it") from None
        names = re.split(r"[./]", f"{override.key_or_group}.{override.package}")
        # A choice is a file of conf/, and must not lead to others.
        leads_out = ".." in str(override.value()) and "." not in override.key_or_group
        if "hydra" in names or leads_out or override.is_sweep_override():
            raise UserError(f"{place}: {word}: a saved run may not set that; remove it, or type it yourself")
        if not override.is_delete():
            content = OmegaConf.create({})
            OmegaConf.update(content, override.key_or_group, override.value())
            check_saved(OmegaConf.to_container(content), place, trust)


def _check_choices(folder: Path, place: Path, trust: Trust) -> None:
    """Whether a folder of choices that a saved run names may be used."""
    again = f"if these choices are yours, type --config-dir={folder}"
    for path in sorted(folder.rglob("*.yaml")):
        try:
            text = path.read_text(encoding="utf-8")
            content = yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            raise UserError(f"{place}: {path}: cannot be read; {again}") from None
        # In a header, a key, a default or the path.
        if found := re.search(r"\b(hydra|cache_dir)\b", f"{path.relative_to(folder)}\n{text}"):
            raise UserError(f"{place}: {path}: a saved run may not set {found[1]}; {again}")
        check_saved({path.relative_to(folder).parts[0]: content}, path, trust)


def foreign_modules(content: Any) -> list[str]:
    """The modules that have to be trusted before a config is used that was saved."""
    return sorted({name.rpartition(".")[0] for name in _foreign(_leaves(content), None).values()})


def _listed(trust: Trust) -> list[str]:
    return [trust] if isinstance(trust, str) else list(trust or [])


def _foreign(leaves: Iterable[tuple[str, Any]], trust: Trust) -> dict[str, str]:
    """What a saved run may not name, by its key."""
    targets = [(key, value) for key, value in leaves if key.rpartition(".")[2] == "_target_"]
    return {key: str(value) for key, value in targets if not _is_allowed(value, key, trust)}


def _leaves(content: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """All values by their dotted keys."""
    # Whatever a _target_ is, it is looked at as a whole.
    if isinstance(content, dict | list) and above.rpartition(".")[2] != "_target_":
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _leaves(value, f"{above}.{key}".lstrip("."))
    else:
        yield above, content


def _is_allowed(target: Any, key: str, trust: Trust) -> bool:
    if not isinstance(target, str):
        return False
    module, _, name = public_name(target).rpartition(".")
    if module == rmt_lightning.__name__:
        return name in dir(rmt_lightning) and name[0].isupper() and name != UserError.__name__
    if target in _named_by_conf():
        return True
    if module.partition(".")[0] == "torchmetrics":
        from torchmetrics import Metric

        with suppress(UserError):
            return key.startswith("metrics.") and issubclass(_class(module, name, ["torchmetrics"]), Metric)
        return False
    trusted = _listed(trust)
    if _is_brought(module):
        trusted = [*trusted, module]
    return _class(module, name, trusted) is not object


def _may_be_yours(name: str) -> bool:
    """Whether it looks like a class that neither Python nor a library brings, which this must not advise to trust."""
    module, _, last = name.rpartition(".")
    top = module.partition(".")[0]
    library = top in {*sys.stdlib_module_names, *packages_distributions(), rmt_lightning.__name__}
    return bool(module) and last[:1].isupper() and not library


def _named_by_conf() -> set[str]:
    texts = (path.read_text(encoding="utf-8") for path in CONF.rglob("*.yaml"))
    return {name for text in texts for name in re.findall(r"^\s*_target_: (\S+)", text, flags=re.MULTILINE)}


def _is_brought(module: str) -> bool:
    """Whether the program has imported a module itself, which is neither Python's own nor that of a library."""
    found = sys.modules.get(module)
    libraries = {"site-packages", "dist-packages"} & set(Path(getattr(found, "__file__", None) or "").parts)
    return found is not None and module.partition(".")[0] not in sys.stdlib_module_names and not libraries


def _class(module: str, name: str, trusted: Sequence[str]) -> type:
    """A class that is defined in a trusted module; `object` if it is none, or the module is not trusted."""

    def is_trusted(place: str) -> bool:
        return any(place == one or place.startswith(f"{one}.") for one in trusted)

    if not is_trusted(module):
        return object
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"{module}: cannot be imported ({error}); start the command where it is") from None
    except (Exception, SystemExit) as error:  # whatever may go wrong in it
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(f"{module}: cannot be imported ({reason:.200}); mend it") from None
    # What a trusted module has imported from elsewhere is not meant.
    return found if isinstance(found, type) and is_trusted(found.__module__) else object
