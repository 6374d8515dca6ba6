"""What a run tells about the model that is exported from it, for its model card."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hydra.utils import get_object
from omegaconf import DictConfig

from rmt_lightning.app.results import rate_in_words
from rmt_lightning.app.resume import saved_config
from rmt_lightning.app.trust import Trust
from rmt_lightning.core.run_folder import BACKBONE, LAST, PREDICTIONS
from rmt_lightning.reporting.reading import read_runs
from rmt_lightning.reporting.redaction import public_text
from rmt_lightning.reporting.runs import AT_THE_END, Evaluation, Row, Run, kind

_UNFINISHED = "interrupted or running"
# Tasks that speak English.
_ENGLISH = {"Detect", "Memorize", "Reasoning", "Carried", "Whereabouts"}


def told(folder: Path, checkpoint: Path, trust: Trust, text_length: int) -> dict[str, Any]:
    """What a run's folder tells, as `generate_model_card` takes it: a title, a question, sections and metadata.

    What is not known is left out.

    Args:
        folder: the run's.
        checkpoint: the one that is exported.
        trust: modules whose classes the run's config may name.
        text_length: tokens of text in a segment.
    """
    runs, _ = read_runs([str(folder)])
    if not runs:
        return {}
    (run,) = runs
    config = saved_config(folder, trust)
    tests = list(_tests(run, checkpoint))
    title = f"{kind(run.config['model'])}, trained on {_task(run)}"
    question = _question(folder)
    sections = [_task_section(config, question), _training(run, folder, checkpoint, text_length)]
    sections += [part for part in (_results(run, checkpoint, tests), _limits(run, tests)) if part]
    asked = {"question": question["question"]} if question else {}
    return {"title": title, "sections": sections, **asked, **_metadata(run, folder, checkpoint, tests)}


def _task(run: Run) -> str:
    return str(run.config["task"].get("_target_", "")).rpartition(".")[2]


def _settings(part: Any) -> str:
    """A part of a config in words: its class, and what it is set to; nothing if there is no such part."""
    if not isinstance(part, dict):
        return ""
    said = ", ".join(f"{name}={value}" for name, value in part.items() if name != "_target_")
    return f"{str(part.get('_target_', '')).rpartition('.')[2]}" + (f" ({said})" if said else "")


def _task_section(config: DictConfig, question: dict[str, str] | None) -> str:
    lines = ["## Task", (inspect.getdoc(get_object(config.task._target_)) or "").partition("\n\nArgs:")[0]]
    if question:
        asked, answer = (_plain(question[name]) for name in ("question", "target"))
        lines.append(f"One of the questions it was tested with: *{asked}* → {answer}")
    return "\n\n".join(line for line in lines if line)


def _question(folder: Path) -> dict[str, str] | None:
    """The first question that the run was tested with, if that was written down."""
    try:
        with (folder / PREDICTIONS).open(encoding="utf-8") as file:
            found = json.loads(file.readline())
        return {name: public_text(" ".join(str(found[name]).split())) for name in ("question", "target")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _training(run: Run, folder: Path, checkpoint: Path, text_length: int) -> str:
    config = run.config
    parts = {"task": "task", "text": "noise", "backbone": "backbone", "of the backbone is trained": "finetune"}
    parts["optimizer"] = "optim"
    rows: dict[str, Any] = {name: _settings(config.get(part)) for name, part in parts.items()}
    if "name" in config["backbone"]:
        rows["license of the backbone"] = _license(run, folder) or "unknown"
    if longest := _longest(run, checkpoint):
        rows["lengths"] = f"up to {longest} segments of {text_length} tokens, {longest * text_length:,} tokens"
    if checkpoint.name == LAST:
        rows["phases"] = "; ".join(f"{phase.title}, {phase.steps:,} steps" for phase in run.phases if phase.steps)
        rows["ended"] = run.status
    else:
        rows["checkpoint"] = checkpoint.name
    rows |= {"batch size": _data(run).get("batch_size"), "seed": config.get("seed")} | _machine(run)
    known = {name: value for name, value in rows.items() if value not in (None, "")}
    return "## Training\n\n" + _table(["", ""], [[name, str(value)] for name, value in known.items()])


def _data(run: Run) -> dict[str, Any]:
    """The settings of the data, if the config has some."""
    found = run.config.get("data")
    return found if isinstance(found, dict) else {}


def _machine(run: Run) -> dict[str, Any]:
    """What the run has ended on."""
    if not run.hardware:
        return {}
    machine = run.hardware[-1]
    libraries = [name for name in ("python", "torch", "lightning", "transformers") if name in machine]
    gpus = machine.get("gpus")
    return {
        "hardware": ", ".join(map(str, gpus if gpus and isinstance(gpus, list) else [machine.get("cpu", "")])),
        "precision": machine.get("precision"),
        "versions": ", ".join(f"{name} {machine[name]}" for name in libraries),
        "commit of rmt_lightning": machine.get("commit"),
    }


def _longest(run: Run, checkpoint: Path) -> int | None:
    """The segments of the longest inputs that the weights were trained on."""
    if not run.stages:
        segments = _data(run).get("num_segments")
        return segments if isinstance(segments, int) else None
    stage = checkpoint.stem.removeprefix("stage-")
    return int(stage) if stage.isdigit() else run.reached


def _tests(run: Run, checkpoint: Path) -> Iterator[Evaluation]:
    """What these weights were tested on; the test at the end of the run is one of the last ones."""
    with checkpoint.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    for test in run.evaluations:
        if test.label == AT_THE_END:
            if checkpoint.name == LAST and run.status != _UNFINISHED:
                yield test
        elif test.sha256 == sha256:
            yield test


def _results(run: Run, checkpoint: Path, tests: list[Evaluation]) -> str:
    rows = [
        [
            _on(run, test), f"{row['segments']:,.0f}", f"{row['text_tokens']:,.0f}" if "text_tokens" in row else "",
            f"{row['right']:,.0f} of {row['samples']:,.0f}", *_share(row),
        ]
        for test in tests for row in test.rows
    ]  # fmt: skip
    parts = ["## Results"]
    if rows:
        parts.append(_table(["tested on", "segments", "tokens", "right", "accuracy", "95% interval (Wilson)"], rows))
    parts += [f"{rate_in_words(row)}." for test in tests for row in test.rates]
    if run.text_score and checkpoint.name == LAST and run.status != _UNFINISHED:
        names = ("documents", "tokens", "perplexity", "bits_per_byte")
        cells = [f"{run.text_score[name]:,.5g}" for name in names if name in run.text_score]
        parts.append(_table([name.replace("_", " ") for name in names if name in run.text_score], [cells]))
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _share(row: Row) -> tuple[str, str]:
    """An accuracy and its interval."""
    return f"{row['accuracy']:.1%}", f"{row['low']:.1%} – {row['high']:.1%}"


def _on(run: Run, test: Evaluation) -> str:
    """What a test asked about, in what text, if that was another than in training."""
    parts = [test.settings.get(part, run.config[part]) for part in ("task", "noise")]
    return ", ".join(kind(part) for part in parts)


def _limits(run: Run, tests: list[Evaluation]) -> str:
    if run.text_score:
        return ""
    probes = [(name, row) for test in tests for name, row in test.probes]
    if not probes:
        return (
            "## Limits\n\nNo probes have been asked of it, so nothing tells whether it has learnt more than to spot "
            "keywords."
        )
    spotted = [max(row["last_place"], row["commonest_place"]) / row["samples"] for _, row in probes]
    better = sum(row["low"] > share for (_, row), share in zip(probes, spotted, strict=True))
    rows = [
        [name, f"{row['segments']:,.0f}", *_share(row), f"{share:.1%}"]
        for (name, row), share in zip(probes, spotted, strict=True)
    ]
    return (
        "## Limits\n\nProbes are small worlds that tell keyword spotting from knowing who is where. Beside what the "
        "model answers right stands what a reader would that only spots places, and names the last or the commonest. "
        + (
            f"On {better} of {len(probes)} the model is better than that.\n\n"
            if better
            else "On none of them is the model better than that, so nothing tells that it does more.\n\n"
        )
        + _table(["probe", "segments", "right", "95% interval", "who spots places"], rows)
    )


def _metadata(run: Run, folder: Path, checkpoint: Path, tests: list[Evaluation]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    name = str(run.config["backbone"].get("name", ""))
    if name:
        data["license"] = _license(run, folder) or "unknown"
    if _on_the_hub(name):
        data["base_model"] = name
    if _task(run) in _ENGLISH or (_task(run) == "LanguageModeling" and kind(run.config["noise"]) == "Prose"):
        data["language"] = "en"
    results = [
        EvalResult(
            task_type="text-classification", dataset_type=_task(run).lower(), metric_type="accuracy",
            dataset_name=_on(run, test), dataset_config=f"segments={row['segments']:.0f}", dataset_split="test",
            metric_value=round(row["accuracy"], 4), metric_name=f"accuracy of {row['samples']:.0f}",
        )
        for test in tests for row in test.rows
    ]  # fmt: skip
    if run.text_score and checkpoint.name == LAST and run.status != _UNFINISHED:
        results = [
            EvalResult(
                task_type="text-generation", dataset_type=kind(run.config["noise"]).lower(), metric_type="perplexity",
                dataset_name=kind(run.config["noise"]), dataset_split="test",
                metric_value=round(run.text_score["perplexity"], 2),
            )
        ]  # fmt: skip
    if results:
        data |= {"eval_results": results, "metrics": sorted({result.metric_type for result in results})}
    return data


def _on_the_hub(name: str) -> bool:
    """Whether that is the id of a model on the Hugging Face Hub, as far as can be told without asking it."""
    with suppress(HFValidationError):
        validate_repo_id(name)
        return not Path(name).exists()
    return False


def _license(run: Run, folder: Path) -> str | None:
    """The license of a pretrained backbone, if its card or its config is here and tells it."""
    name = str(run.config["backbone"]["name"])
    page = try_to_load_from_cache(name, "README.md") if _on_the_hub(name) else os.path.join(name, "README.md")
    found = None
    with suppress(OSError, ValueError, TypeError, yaml.YAMLError):
        found = getattr(ModelCard(Path(str(page)).read_text(encoding="utf-8")).data, "license", None)
    with suppress(OSError, ValueError, AttributeError):
        found = found or json.loads((folder / BACKBONE / "config.json").read_text(encoding="utf-8")).get("license")
    return found if isinstance(found, str) else None


def _plain(text: str) -> str:
    """A text in one line, without tags: a run may come from elsewhere."""
    return " ".join(text.split()).replace("<", "&lt;")


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [[_plain(cell).replace("|", r"\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
