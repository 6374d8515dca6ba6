"""The scripts beside the results: what they would run can be composed, and what they found can be drawn."""

from __future__ import annotations

import runpy

import hydra
import pytest
from conftest import ROOT
from hydra.core.global_hydra import GlobalHydra

from rmt_lightning.app.schema import CONF
from rmt_lightning.core.files import read_csv
from rmt_lightning.reporting import figures

EXPERIMENTS = ROOT / "experiments"
COMPARISON = runpy.run_path(str(EXPERIMENTS / "models_on_detect" / "run.py"))


@pytest.mark.parametrize("name", COMPARISON["MODELS"])
def test_every_compared_model_can_be_composed(name: str) -> None:
    settings = COMPARISON["MODELS"][name].split()
    if not (CONF / "model" / f"{settings[0].removeprefix('model=')}.yaml").exists():
        pytest.skip("this model is yet to come")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = hydra.compose("train", [*COMPARISON["TRAIN"], *settings])
        hydra.compose("evaluate", [*COMPARISON["EVALUATE"]])
    GlobalHydra.instance().clear()
    assert config.curriculum.max_segments == COMPARISON["TRAINED_TO"]


def test_models_side_by_side() -> None:
    rows = [
        {"model": model, "trained_to": 2, "segments": segments, "accuracy": 0.75}
        for model, lengths in {"stops": (1, 2), "goes on": (1, 2, 4)}.items()
        for segments in lengths
    ]
    (axes,) = figures.models(rows).axes
    marked = [line for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_xydata().tolist() for line in marked] == [[[2, 0.75]]]


def test_the_cost_of_attention_is_drawn_from_its_csv() -> None:
    rows = read_csv(EXPERIMENTS / "attention_cost" / "results.csv")
    time, memory = figures.cost(rows).axes
    assert [len(axes.lines) for axes in (time, memory)] == [3, 3]
    own = [(int(row["segments"]), float(row["megabytes"])) for row in rows if row["model"] == "RMT"]
    assert [tuple(point) for point in memory.lines[0].get_xydata()] == own
