"""Tests of runs in, curves of figures out: runs that differ in nothing but their seed together, with 95% intervals."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from statistics import fmean
from typing import Any

from rmt_lightning.core.statistics import mean, wilson
from rmt_lightning.reporting.runs import ACCURACY, Row, Tested, differences, kind, memory
from rmt_lightning.reporting.style import Curve, Look, Place, looks, plain
from rmt_lightning.reporting.sweeps import CAPACITY, PAIRS_TOLD, SEED, held

# Points of a test, by what they are to be compared by.
PlacesOf = Callable[[Tested], Mapping[Hashable, Place]]
# Settings that change nothing of what weights can do.
_NO_MATTER = (SEED, "cache_dir", "logger", "test", "resume", "trust")
# Longer names of curves are of no use.
_LONG = 48


@dataclass(frozen=True)
class Group:
    """Tests that make a curve together.

    Attributes:
        label: what tells it from the others.
        look: of its curve.
        members: runs that differ in nothing but their seed.
    """

    label: str
    look: Look
    members: list[Tested]

    def curve(self, places_of: PlacesOf) -> Curve:
        """What members have in common: a mean over seeds with its interval, of a single one what it has found."""
        found: dict[Hashable, list[Place]] = {}
        for member in self.members:
            for key, place in places_of(member).items():
                found.setdefault(key, []).append(place)
        return Curve(self.label, self.look, sorted(map(_together, found.values())))


def _together(places: Sequence[Place]) -> Place:
    if len(places) == 1:
        return places[0]
    middle = mean([place.y for place in places])
    return Place(fmean(place.x for place in places), middle.value, *middle.interval)


def groups(found: Iterable[Tested], but: Collection[str] = ()) -> list[Group]:
    """Those that differ in nothing but their seed together; but runs of one seed apart, for they tell nothing of it.

    Args:
        but: keys of other settings in which they may differ too.
    """
    together: dict[Hashable, list[Tested]] = {}
    seen: Counter[Hashable] = Counter()
    for tested in found:
        key = json.dumps(_that_matter(tested.config, but), sort_keys=True)
        own = (key, *(json.dumps(at(tested.config, name)) for name in (SEED, *but)))
        together.setdefault((key, seen[own]), []).append(tested)
        seen[own] += 1
    members = [*together.values()]
    configs = [_that_matter(of[0].config, but) for of in members]
    names = [_name([tested.run.name for tested in of]) for of in members]
    unclear = len(set(names)) < len(names)
    labels = _labels(configs, [of[0].run.name for of in members] if unclear else names)
    parts = [[kind(config.get(part)) for config in configs] for part in ("model", "task")]
    # Where many have the same model or task, that tells them no more apart.
    alike = next((names for names in parts if len(set(names)) > 1 and len(names) <= 2 * len(set(names))), labels)
    return [Group(*row) for row in zip(map(plain, labels), looks(alike), members, strict=True)]


def _name(names: Sequence[str]) -> str:
    """What names of runs have in common: of detect-seed_1 and detect-seed_2, detect."""
    if len(names) == 1:
        return names[0]
    common = "".join(some[0] for some in takewhile(lambda some: len({*some}) == 1, zip(*names, strict=False)))
    return re.sub(r"[-_ /]*(seed|s)?[-_ =/]*$", "", common) or names[0]


def _that_matter(config: Mapping[str, Any], but: Collection[str]) -> dict[str, Any]:
    """The settings of which one that differs makes another curve."""
    return {
        name: {key: value for key, value in part.items() if f"{name}.{key}" not in but}
        if isinstance(part, dict)
        else part
        for name, part in config.items()
        if name not in _NO_MATTER
    }


def at(config: Mapping[str, Any], key: str) -> Any:
    """A setting by its dotted key; None if there is none."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _labels(configs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """What tells each from the others, in as few words as it takes: a component, or settings; else the run's name."""
    if len(configs) == 1:
        return [""]
    parts = list(dict.fromkeys(name for config in configs for name in config if isinstance(config[name], dict)))
    kinds = {part: [kind(config.get(part)) for config in configs] for part in parts}
    telling = [kinds[part] for part in parts if len(set(kinds[part])) > 1]
    labels = [", ".join(words) for words in zip(*telling, strict=True)] or [""] * len(configs)
    for label in {label for label in labels if labels.count(label) > 1}:
        alike = [number for number, one in enumerate(labels) if one == label]
        # What one setting follows from another says the same twice.
        told = {tuple(values): key for key, values in reversed(differences([configs[n] for n in alike]).items())}
        for number, values in zip(alike, zip(*told, strict=True), strict=False):
            words = (
                value if key == "checkpoint" else f"{key.rpartition('.')[2]} {value}"
                for key, value in zip(told.values(), values, strict=True)
            )
            labels[number] = ", ".join(filter(None, (label, *words)))
    clear = len(set(labels)) == len(labels) and all(0 < len(label) <= _LONG for label in labels)
    return labels if clear else [name if len(name) <= _LONG else f"…{name[1 - _LONG :]}" for name in names]


def by_length(tested: Tested) -> dict[Hashable, Row]:
    """For each length that was asked for, the test of most questions."""
    best: dict[Hashable, Row] = {}
    for row in sorted((row for test in tested.tests for row in test.rows), key=lambda row: row["samples"]):
        key = ("tokens", row["tokens"]) if "tokens" in row else ("segments", row["segments"])
        # An earlier test may tell of memory what a later one does not.
        best[key] = {name: value for name, value in best.get(key, {}).items() if name.endswith("_mb")} | row
    return best


def in_tokens(found: Iterable[Tested]) -> bool:
    """Whether lengths are to be compared in tokens: some were asked for so, or segments are not as long everywhere."""
    rows = [(tested, row) for tested in found for row in by_length(tested).values()]
    sizes = {at(tested.config, "model.segment_length") for tested, _ in rows}
    asked = any("tokens" in row for _, row in rows)
    return (asked or len(sizes) > 1) and all("text_tokens" in row for _, row in rows)


def accuracy(axis: str) -> PlacesOf:
    """Points of accuracy against length, in a column of evaluation.csv."""
    return lambda tested: {
        key: Place(row[axis], row["accuracy"], row["low"], row["high"]) for key, row in by_length(tested).items()
    }


def trained_to(tested: Tested) -> int | None:
    """Segments of the longest inputs that the tested weights were trained on, if stages are lengths."""
    grows = at(tested.config, "curriculum.grow") in (None, "segments")
    stages = [test.stage for test in tested.tests if test.stage]
    return max(stages, default=tested.run.reached) or None if grows else None


def megabytes(axis: str) -> PlacesOf:
    """Points of the memory that reading takes against length."""
    return lambda tested: {
        key: Place(row[axis], used) for key, row in by_length(tested).items() if (used := memory(row)) is not None
    }


def kept(tested: Tested) -> dict[Hashable, Place]:
    """Points of the share of memories that answer, of those that were followed in the largest number."""
    ways = [
        list(rows)
        for test in tested.tests
        for _, rows in groupby(test.followed, key=lambda row: (row.get("follow"), row.get("every"), row["streams"]))
    ]
    followed = max(ways, key=lambda rows: (rows[0]["streams"], rows[-1]["age"]), default=[])
    shares = {
        row["age"]: (row["right"] / row["streams"], int(row["streams"])) for row in followed if row["streams"] >= 1
    }
    return {age: Place(age, share, *wilson(share, streams)) for age, (share, streams) in shares.items()}


def steps(tested: Tested) -> dict[Hashable, Place]:
    """Points of the steps after which each stage was passed."""
    taken, places = 0, dict[Hashable, Place]()
    for stage in tested.run.stages:
        taken += stage.steps
        if stage.converged:
            places[stage.number] = Place(stage.number, taken)
    return places


def mastered(tested: Tested) -> dict[Hashable, Place]:
    """Points of the accuracy at the end of each stage."""
    samples = at(tested.config, "data.validation_samples")
    return {
        stage.number: Place(stage.number, stage.accuracy, *wilson(stage.accuracy, samples))
        for stage in tested.run.stages
        if stage.converged is not None and not tested.alone
    }


def pairs(tested: Tested) -> dict[Hashable, Place]:
    """The point of how many pairs are held, of how many that were told, at the longest test."""
    rows = [row for row in by_length(tested).values() if CAPACITY in row and PAIRS_TOLD in row]
    longest = max(rows, key=lambda row: row["segments"], default=None)
    if longest is None:
        return {}
    told = longest[PAIRS_TOLD]
    return {told: Place(told, longest[CAPACITY], *held(longest, tested.config.get("task", {})))}


def history(tested: Tested) -> list[tuple[int, int, float]]:
    """Step, stage and accuracy of each validation of a curriculum."""
    points = tested.run.curves.get(ACCURACY, [])
    stages = ((point, point.place.removeprefix("stage ")) for point in points)
    return [(point.step, int(stage), point.value) for point, stage in stages if stage.isdecimal() and stage != "0"]
