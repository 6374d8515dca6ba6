"""Going on with an earlier run: its config is composed again, from what was typed then and what is typed now.

So interpolations stay alive, what is typed is checked as it is for a new run, and all of it takes effect. What weights
and samples depend on may not change.
"""

from __future__ import annotations

import filecmp
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rmt_lightning.app.schema import CONF, check_parts
from rmt_lightning.app.trust import Trust, check_saved, check_words, given_trust
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import check_readable, write_atomically
from rmt_lightning.core.names import public_name
from rmt_lightning.core.quoting import for_shell, literal, literals, quoted, setting, shown, to_type
from rmt_lightning.core.run_folder import CHECKPOINTS, CONFIG, LAST, TEXT, TYPED, in_the_way, locate

log = logging.getLogger(__name__)

# Settings of a model that neither its weights nor its state depend on.
_FREE = {"bptt_depth", "gradient_checkpointing", "memory_attention", "dropout", "schedule"}
# Files may have moved; what is asked in them is compared.
_FILES = re.compile(r"task\.(path|validation_path|test_path|folder)")
_PARTS = ("task", "noise", "backbone", "model")
_CHOSEN = ("task", "backbone", "model", "finetune", "experiment")
# Where a row of running text stands is counted in num_segments, and where an epoch stands in steps_per_epoch.
_KEPT = re.compile(
    r"(task|backbone|model|lora|frozen)\..*|data\.(segment_length|num_segments|steps_per_epoch|_target_)|(answer|curriculum|optim)\._target_"
)

# What is said if what a run began with, by its name in text.json, is not there any more.
_CHANGED = {
    "sha256": ("the text is not the one that the run began with: its files or the settings of its noise have changed"),
    "questions": "the questions are not those that the run began with: the files of its task have changed",
}


class DamagedConfig(UserError):
    """The config of a run cannot be read."""


def saved_config(run: Path, trust: Trust) -> DictConfig:
    """The resolved config of a run, whatever its classes were called, and wherever they stood, when it was written.

    Args:
        run: its folder.
        trust: modules whose classes it may name.

    Raises:
        DamagedConfig: if it cannot be read.
        UserError: if it names what it may not (see trust.py).
    """
    place = Path(os.path.relpath(run)) / CONFIG
    # What cannot be read is not written anew.
    check_readable(run / CONFIG)
    try:
        config = OmegaConf.load(run / CONFIG)
        content = OmegaConf.to_container(config)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError):
        content = None
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("seed"), int)
        or not all(isinstance(content.get(part), dict) for part in (*_PARTS, "answer"))
    ):
        hint = (
            f"train {to_type('resume', os.path.relpath(run))} writes it anew"
            if (run / TYPED).exists()
            else "start a new run"
        )
        raise DamagedConfig(f"{place}: is damaged, or not that of a run; {hint}")
    check_saved(content, place, trust)
    assert isinstance(config, DictConfig)
    for part in config.values():
        if isinstance(part, DictConfig) and "_target_" in part:
            part._target_ = public_name(part._target_)
    return config


def trained_config(run: Path, asked: DictConfig) -> DictConfig:
    """The config of a run, with the task and the noise that `asked` names instead of its own."""
    config = saved_config(run, asked.trust)
    for group in ("task", "noise"):
        if group in asked:
            config[group] = asked[group]
    check_parts(config, (*_PARTS, "answer"))
    config.cache_dir = literal(asked.cache_dir)
    return config


def provenance(config: DictConfig, checkpoint: Path, sha256: str) -> dict[str, Any]:
    """What results depend on besides the settings of a front door: the checkpoint's content, the task and the noise."""
    return {
        "checkpoint": checkpoint.name,
        "sha256": sha256,
        "task": OmegaConf.to_container(config.task, resolve=True),
        "noise": OmegaConf.to_container(config.noise, resolve=True),
    }


def save_config(folder: Path, config: DictConfig, typed: Sequence[str], presets: str | None) -> None:
    """Leave in a run folder the resolved config, and what was typed to compose it and belongs to the run.

    Args:
        typed: overrides.
        presets: a folder of the user's own choices (--config-dir).
    """
    words = ([f"--config-dir={os.path.abspath(presets)}"] if presets else []) + _kept(typed)
    resolved = OmegaConf.create(literals(OmegaConf.to_container(config, resolve=True)))
    resolved.resume = resolved.trust = None
    content = {CONFIG: OmegaConf.to_yaml(resolved), TYPED: yaml.safe_dump(words, allow_unicode=True, width=10_000)}
    # A kill between them leaves a run that can be resumed: a new one without what was typed, or what is typed now.
    for name in (TYPED, CONFIG) if (folder / CONFIG).exists() else (CONFIG, TYPED):
        write_atomically(folder / name, content[name].encode())


def overrides(settings: HydraConf) -> list[str]:
    """What was typed, in the very words; `settings` are those of Hydra, which would interpolate them."""
    words: Any = OmegaConf.to_container(OmegaConf.create({"words": settings.overrides.task}), resolve=False)
    return words["words"]


def save_text(folder: Path, names: Mapping[str, str]) -> None:
    """Leave in a run folder what names the text that the run began with."""
    write_atomically(folder / TEXT, json.dumps(names).encode())


def begun_with(run: Path, names: dict[str, str]) -> dict[str, str]:
    """What names the text that a run began with. If it is not the present one, that is said."""
    begun = _saved_names(run)
    if not begun:
        log.info("%s does not tell its text; documents that repeat others are left out now", os.path.relpath(run))
    for name in _others(begun, names):
        log.info("%s: %s; going on with what is there now", os.path.relpath(run), _CHANGED[name])
    return names | begun


def other_text(run: Path, names: dict[str, str], asked: DictConfig) -> dict[str, str]:
    """What results depend on besides `provenance`: the text and the questions that the run did not begin with.

    Args:
        run: the folder of the run.
        names: what names the present ones.
        asked: the settings of a front door, which may name another noise and another task; if they do not, it is said.
    """
    begun = _saved_names(run)
    own = [name for name, group in (("sha256", "noise"), ("questions", "task")) if group not in asked]
    found: dict[str, str] = {}
    for name in _others(begun, names):
        found |= {"text" if name == "sha256" else name: names[name]}
        if name in own:
            log.info("%s: %s; what is held out now may have been trained on", os.path.relpath(run), _CHANGED[name])
    if "sha256" not in begun and "sha256" not in own:
        found["text"] = names["sha256"]
    return found


def _others(begun: Mapping[str, str], names: Mapping[str, str]) -> list[str]:
    return [name for name in names if begun.get(name, names[name]) != names[name]]


def _saved_names(run: Path) -> dict[str, str]:
    check_readable(run / TEXT)
    try:
        names = json.loads((run / TEXT).read_text(encoding="utf-8"))
        return {name: str(names[name]) for name in _CHANGED if name in names}
    except (OSError, ValueError, TypeError):
        return {}  # An earlier version did not write it.


def presets(settings: HydraConf) -> str | None:
    """The folder of the user's own choices, if --config-dir names one; `settings` are those of Hydra."""
    sources = settings.runtime.config_sources
    return next((str(source.path) for source in sources if source.provider == "command-line"), None)


def composed_again(words: Sequence[str]) -> list[str]:
    """The command line that composes an earlier run as it was typed, and changes of it what is typed now.

    Args:
        words: the command line; unless it names a run to go on with, it is left as it is.

    Raises:
        UserError: if there is no such run, or it names what it may not (see trust.py).
    """
    resume = _text([word for word in words if key_of(word) == "resume"])
    if not resume:
        return list(words)
    run, _ = locate(resume, "resume")
    trust = given_trust([word for word in words if key_of(word) == "trust"])
    config = None
    with suppress(DamagedConfig):
        config = saved_config(run, trust)
    then = {key_of(word): word for word in _kept(_typed(run, trust))}
    now = {"--config-dir" if word.startswith("-cd") else key_of(word) for word in words}
    check_words(
        [word for key, word in then.items() if key not in now or (CONF / key).is_dir()],
        Path(os.path.relpath(run)) / TYPED, trust,
    )  # fmt: skip
    if config is not None:
        then = {key_of(word): word for word in _since_changed(config, [*then.values()])} | then
    for word in words:
        if key_of(word) in _CHOSEN and word != then.get(key_of(word)):
            raise UserError(f"{word}: a resumed run keeps its {key_of(word)}; leave it out, or start a new run")
    others = {key_of(word) for word in words if word != then.get(key_of(word)) and _is_another_kind(word, then)}
    # What had to be added then has to be added now.
    added = {key for key, word in then.items() if word.startswith("+")}
    typed = [f"+{word}" if key_of(word) in added and word[0] not in "+~" else word for word in words]
    # The settings of what is not there any more are left out.
    earlier = [word for key, word in then.items() if key not in now and key.partition(".")[0] not in others]
    options = [word for word in earlier if word.startswith("-")]
    # Hydra wants settings in a row.
    first = next(place for place, word in enumerate(typed) if "=" in word and not word.startswith("-"))
    return [*options, *typed[:first], *(word for word in earlier if word not in options), *typed[first:]]


def _is_another_kind(word: str, then: Mapping[str, str]) -> bool:
    """Whether a word of the command line chooses for a group something of another class than what was chosen then."""
    group = key_of(word)
    if word.startswith("~") or not (CONF / group).is_dir():
        return word.startswith("~")
    config_dir = then.get("--config-dir", "").partition("=")[2]
    search = [f"hydra.searchpath=[{quoted(f'file://{config_dir}')}]"] if config_dir else []
    earlier = [other for key, other in then.items() if key.partition(".")[0] != group and not other.startswith("-")]
    earlier = [other for other in earlier if "." not in key_of(other)]
    kinds = []
    for choice in ([then[group]] if group in then else [], [word]):
        kinds.append(_kind(_composed([*search, *earlier, *choice]), group))
    return kinds[0] != kinds[1]


def _kept(typed: Iterable[str]) -> list[str]:
    """What belongs to a run, wherever and by whomever it goes on; not where a cache is on this machine."""
    return [word for word in typed if key_of(word) not in ("resume", "sweep", "trust", "cache_dir")]


def _text(words: Sequence[str]) -> str | None:
    """The text, or nothing, that the last of some words sets.

    Raises:
        UserError: if it is neither.
    """
    if not words:
        return None
    (override,) = OverridesParser.create().parse_overrides([words[-1]])
    value = OmegaConf.create({"value": override.value()})["value"] if not override.is_sweep_override() else ()
    if not isinstance(value, str | None):
        hint = for_shell(setting(*words[-1].split("=", 1)))
        raise UserError(f"{words[-1]}: must be a valid string; for a text, type {hint}")
    return value


def key_of(word: str) -> str:
    """What a word of the command line sets: a key, a group or an option."""
    return word.partition("=")[0].lstrip("+~").partition("@")[0]


def _typed(run: Path, trust: Trust) -> list[str]:
    check_readable(run / TYPED)
    try:
        words = yaml.safe_load((run / TYPED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        try:
            return _derived(saved_config(run, trust))
        except DamagedConfig:
            # It is told once the rest of what was typed has been found right.
            return []
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{run / TYPED}: is damaged; remove it, and the run goes on from its {CONFIG}")
    return words


def _derived(config: DictConfig) -> list[str]:
    """What could have been typed to compose a config, for a run of a version that did not write it down."""
    parts = [(str(group), part) for group, part in config.items() if isinstance(part, DictConfig)]
    choices = [f"{group}={_nearest(group, part)}" for group, part in parts]
    # The choice of a task may bring others with it, and must not undo those that were made.
    choices.sort(key=lambda choice: not choice.startswith("task="))
    choices = [choice for choice in choices if not choice.endswith("=None")]
    words = choices
    # What was interpolated follows the rest, and need not be typed.
    for interpolated in (False, True):
        words = words + list(_differences(config, _composed(words), interpolated))
    return words


def _since_changed(config: DictConfig, typed: Sequence[str]) -> list[str]:
    """The words that give a run what was a default when it began, and is none in this version."""
    folders = [word.partition("=")[2] for word in typed if key_of(word) == "--config-dir"]
    words = [f"hydra.searchpath=[{quoted(f'file://{folder}')}]" for folder in folders]
    words += [word for word in typed if not word.startswith("-")]
    try:
        composed = _composed(words)
        choices = [
            f"{group}={nearest}"
            for group, part in ((str(name), part) for name, part in config.items())
            if isinstance(part, DictConfig) and _kind(composed, group) != part.get("_target_")
            if (nearest := _nearest(group, part))
        ]
        composed = _composed([*words, *choices]) if choices else composed
    except (HydraException, OmegaConfBaseException, ValueError):
        # What is wrong is told when what is typed now is composed with it.
        return []
    return choices + [word for word in _differences(config, composed, False) if not word.startswith("+")]


def _composed(words: Sequence[str]) -> DictConfig:
    """The config that some words compose."""
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return hydra.compose("train", list(words))
    finally:
        GlobalHydra.instance().clear()


def _kind(config: DictConfig, group: str) -> str | None:
    kind: str | None = OmegaConf.select(config, f"{group}._target_")
    return kind and public_name(kind)


def _differences(config: DictConfig, composed: DictConfig, interpolated: bool) -> Iterator[str]:
    """The settings that differ, as they could be typed; those that are interpolated, or all others."""
    there = dict(flat(composed))
    for key, value in flat(config):
        # Where this run goes, and where tokenized noise is kept, is for the present command to say.
        if key in ("resume", "cache_dir", "trust") or (key in there and there[key] == value):
            continue
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(composed, parent) if parent else composed
        known = isinstance(node, DictConfig) and name in map(str, node)
        if interpolated == (known and OmegaConf.is_interpolation(node, name)):
            yield f"{'' if known else '+'}{key}={quoted(value)}"


def _nearest(group: str, part: DictConfig) -> str | None:
    """The choice of a group that has most in common with a part of a config."""
    own = dict(flat(part))

    def common(path: Path) -> int:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        content = content.get(group, content)
        if public_name(content.get("_target_", "")) != own.get("_target_", ""):
            return -1
        return sum(own.get(key) == value for key, value in content.items())

    best = max(sorted((CONF / group).glob("*.yaml")), key=common, default=None)
    return best.stem if best and common(best) >= 0 else None


def flat(config: DictConfig, above: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a config by their dotted keys, interpolations resolved."""
    for name in list[Any](config):
        key = f"{above}{name}"
        try:
            value = config[name]
        except OmegaConfBaseException:
            # Missing, or known only while a job runs.
            continue
        if isinstance(value, DictConfig):
            yield from flat(value, f"{key}.")
        else:
            yield key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def check_place(folder: Path, source: Path | None) -> None:
    """Whether nothing would be lost or mixed in a folder, in which a run goes on if there is one.

    Raises:
        UserError: naming what is in the way.
    """
    if source != folder.resolve() and not (folder / CONFIG).exists() and (found := in_the_way(folder)):
        raise UserError(
            f"hydra.run.dir={shown(folder)}: holds {found}, which is none of this run's; choose a folder of its own"
        )


def check_folder(
    config: DictConfig, folder: Path, source: Path | None, checkpoint: Path | None, typed: Iterable[str]
) -> None:
    """Whether a run can begin in a folder, or go on from a checkpoint of the run in `source`, if there is one.

    Raises:
        UserError: if the folder holds another run, or naming a setting that may not change.
    """
    goes_on = source == folder.resolve() and (checkpoint is None or checkpoint.name == LAST)
    if not goes_on and (folder / CONFIG).exists():
        again = to_type("resume", os.path.relpath(folder))
        raise UserError(
            f"hydra.run.dir={shown(folder)}: already holds a run; choose another folder, or go on with {again}"
        )
    there = list((folder / CHECKPOINTS).glob("*.ckpt"))
    # Killed before it had its config, a run that goes on from an earlier one leaves a copy of where it begins.
    begun = checkpoint and [path.name for path in there] == [LAST] and filecmp.cmp(there[0], checkpoint, shallow=False)
    if not goes_on and there and not begun:
        raise UserError(
            f"hydra.run.dir={shown(folder)}: holds checkpoints of a run whose {CONFIG} is missing; choose another one"
        )
    if source:
        _check_settings(config, source, typed)


def _check_settings(config: DictConfig, run: Path, typed: Iterable[str]) -> None:
    try:
        saved = saved_config(run, config.trust)
    except DamagedConfig:
        if not (run / TYPED).exists():
            raise
        # What was typed then is the same as before; the weights are compared with the model that it makes.
        return
    typed = list(typed)
    changed = [key for key in (*changes(config, saved), *_left_out(config, saved, typed)) if _is_kept(key)]
    if not changed:
        return
    word, key = as_typed(changed, config, typed)
    group = key.partition(".")[0]
    what = key if group in ("data", "optim") else group
    there = dict(flat(saved))[key]
    raise UserError(f"{word}: a resumed run keeps its {what} ({key}={there}); start a new run to change it")


def changes(config: DictConfig, saved: DictConfig) -> list[str]:
    """The settings that differ from those of an earlier start. Another version may have had other settings."""
    there = dict(flat(saved))
    return [key for key, value in flat(config) if key in there and value != there[key]]


def _left_out(config: DictConfig, saved: DictConfig, typed: Iterable[str]) -> list[str]:
    """The settings of an earlier start that something typed (~key) takes out."""
    now, out = dict(flat(config)), tuple(f"{key_of(word)}." for word in typed if word.startswith("~"))
    return [key for key, _ in flat(saved) if key not in now and f"{key}.".startswith(out)]


def as_typed(changed: Sequence[str], config: DictConfig, typed: Iterable[str]) -> tuple[str, str]:
    """How one of some settings was typed, if any was, and which it is."""
    words = {key_of(word): word for word in typed}
    key = next((key for key in changed if key in words), changed[0])
    above = (key.rsplit(".", depth)[0] for depth in range(key.count(".") + 1))
    return next((words[part] for part in above if part in words), f"{key}={dict(flat(config)).get(key)}"), key


def _is_kept(key: str) -> bool:
    free = _FILES.fullmatch(key) or (key.startswith("model.") and key.rpartition(".")[2] in _FREE)
    return _KEPT.fullmatch(key) is not None and not free


def run_folder(resume: str | None, fresh: str) -> str:
    """Where a run goes: a resumed run stays where it is; one that goes on from an earlier stage gets a new folder.

    A new folder is made at once, for others may begin in the same second; `fresh` is its name if that is still free.
    """
    if resume is None:
        return _made(fresh)
    run, checkpoint = locate(str(resume), "resume")
    if checkpoint is None or checkpoint.name == LAST:
        return os.path.relpath(run)
    return _made(f"{fresh}-{checkpoint.stem}-of-{run.name}")


def _made(name: str) -> str:
    folder, number = name, 1
    try:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        if any(os.environ.get(several, "1") not in ("", "1") for several in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")):
            # Processes that belong together must come to the same folder.
            return name
        while True:
            try:
                os.mkdir(folder)
                return folder
            except FileExistsError:
                number += 1
                folder = f"{name}-{number}"
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; choose another folder with hydra.run.dir=…") from None
