"""The W&B workspace of the runs that logger=wandb has logged: saved as a new view, or written to a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import write_atomically

# wandb takes seconds to import, and wandb-workspaces may not be installed.
if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace


def lay_out(project: str, entity: str | None, name: str, output: Path) -> None:
    """Save the workspace as a new view on W&B, or write it to `output` if that cannot be done.

    Raises:
        UserError: if wandb-workspaces is missing, or the file cannot be written.
    """
    try:
        from wandb_workspaces.workspaces import Workspace
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing; pip install 'rmt-lightning[dashboard]'") from None
    workspace = Workspace(entity=entity or "", project=project, name=name, sections=_sections())
    if obstacle := _save(workspace):
        _write(workspace, output)
        print(
            f"W&B: {obstacle}\n{os.path.relpath(output)} holds the view; this command saves it once W&B can be reached"
        )
    else:
        print(f"{workspace.url} shows {workspace.entity}/{project}")


def _save(workspace: Workspace) -> str | None:
    """Save the workspace, in the project of the key's owner if no other is named, or tell what stands in the way."""
    import wandb

    # It would tell in many lines what is told here in one.
    wandb.setup(wandb.Settings(silent=True))
    if os.environ.get("WANDB_MODE", "online") != "online":
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    try:
        if not wandb.login(prompt=False, verify=False):
            return "no key; wandb login keeps one"
        workspace.entity = workspace.entity or wandb.Api(timeout=10).default_entity
        workspace.save()
    except Exception as error:  # no network, a wrong key and a refusal have a type each, not all of them public
        return " ".join(str(error).split())
    return None


def _write(workspace: Workspace, output: Path) -> None:
    """Write the view that would have been saved, unless something else stands there."""
    if output.exists() and not (output.is_file() and _is_view(output)):
        raise UserError(f"--output={output}: is something else than a dashboard; give another name")
    view = workspace._to_model()
    content = {
        "entity": view.entity,
        "project": view.project,
        "name": view.display_name,
        "spec": json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True)),
    }
    try:
        write_atomically(output, json.dumps(content, indent=2).encode())
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written: {error.strerror}; give another place") from None


def _is_view(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"project", "name", "spec"} <= content.keys()


def _sections() -> list[Section]:
    """What logger=wandb logs, from the course of one run to the comparison of many."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.workspaces import Section, SectionLayoutSettings

    settings = [wr.Config(name) for name in ("model.memory_size", "model.bptt_depth", "curriculum.max_segments")]
    # The summary holds that of the longest input.
    farthest = wr.SummaryMetric("test/accuracy")
    tested = {"x": "test/segments", "y": ["test/accuracy"], "log_x": True, "range_y": (0, 1)}
    curriculum = [
        wr.LinePlot(title="Accuracy at the stage's length", y=["val/accuracy"], range_y=(0, 1)),
        wr.LinePlot(title="Loss", y=["train/loss"], log_y=True),
        wr.LinePlot(title="Stage", y=["stage"]),
        wr.LinePlot(title="Steps of each stage", x="curriculum/stage", y=["curriculum/steps"]),
        wr.LinePlot(title="Accuracy after each stage", x="curriculum/stage", y=["curriculum/accuracy"], range_y=(0, 1)),
        wr.LinePlot(title="Memories lost per segment", x="state_passing/step", y=["state_passing/rate"]),
        wr.LinePlot(title="Accuracy by length", metric_regex=r"val/accuracy_segments_\d+", range_y=(0, 1)),
        wr.LinePlot(title="Accuracy by distance", metric_regex=r"val/accuracy_distance_\d+", range_y=(0, 1)),
        wr.MediaBrowser(title="Curriculum", media_keys=["results/curriculum"]),
        wr.WeavePanelSummaryTable(table_name="results/stages"),
    ]
    extrapolation = [
        wr.LinePlot(title="Test accuracy against segments", **tested),
        wr.MediaBrowser(title="What memory attends to", media_keys=["results/attention/last"]),
        wr.WeavePanelSummaryTable(table_name="results/evaluation"),
    ]
    sweeps = [
        wr.ParallelCoordinatesPlot(
            title="Settings, and accuracy on the longest input",
            columns=[wr.ParallelCoordinatesPlotColumn(metric=metric) for metric in (*settings, farthest)],
        ),
        *(
            wr.ScatterPlot(title=f"{setting.name}: accuracy on the longest input", x=setting, y=farthest)
            for setting in settings
        ),
        wr.LinePlot(
            title="Test accuracy against segments, by group", groupby="Group", groupby_rangefunc="minmax", **tested
        ),
        wr.ParameterImportancePlot(with_respect_to="test/accuracy"),
    ]
    text = [
        wr.LinePlot(title="Perplexity", y=["val/perplexity"], log_y=True),
        wr.LinePlot(title="Bits per byte", y=["val/bits_per_byte"]),
        wr.MediaBrowser(title="Perplexity", media_keys=["results/perplexity"]),
        wr.WeavePanelSummaryTable(table_name="results/documents"),
    ]
    hardware = [
        wr.LinePlot(title="Tokens per second", y=["train/tokens_per_second"]),
        wr.LinePlot(title="Largest host memory, MB", y=["train/host_memory_mb"]),
        wr.LinePlot(title="Largest GPU memory, MB", y=["train/device_memory_mb"]),
    ]
    return [
        Section(name="Curriculum", panels=curriculum, is_open=True, layout_settings=SectionLayoutSettings(rows=3)),
        Section(name="Extrapolation", panels=extrapolation, is_open=True),
        Section(name="Sweeps", panels=sweeps, is_open=True),
        Section(name="Running text", panels=text),
        Section(name="Hardware", panels=hardware, is_open=True),
    ]
