"""Runs in, one HTML page out that needs no network."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from rmt_lightning.reporting import plots
from rmt_lightning.reporting.runs import (
    ACCURACY,
    DEVICE_MEMORY,
    HOST_MEMORY,
    LOSS,
    PERPLEXITY,
    SPEED,
    Run,
    differences,
    kind,
)
from rmt_lightning.reporting.sweeps import Sweep, in_words, with_interval


def page(runs: Sequence[Run], skipped: Sequence[str], sweeps: Sequence[Sweep] = ()) -> str:
    """The report.

    Args:
        runs: at least one.
        skipped: places that could not be read, and why.
        sweeps: those that some of the runs belong to.
    """
    template = _environment().get_template("report.html")
    return template.render(
        runs=[(run, plots.style(number)) for number, run in enumerate(runs)],
        skipped=skipped,
        made=datetime.now(UTC),
        sweeps=sweeps,
        figures={name: _embedded(figure) for name, figure in _figures(runs, sweeps).items() if figure.data},
        differences=differences([run.config for run in runs]),
        plotly=Markup(get_plotlyjs()),
    )


def _figures(runs: Sequence[Run], sweeps: Sequence[Sweep]) -> dict[str, go.Figure]:
    return {
        f"sweep_{number}_{place}": figure
        for number, sweep in enumerate(sweeps)
        for place, figure in enumerate(plots.sweep(sweep))
    } | {
        "timeline_steps": plots.timeline(runs, "steps"),
        "timeline_seconds": plots.timeline(runs, "seconds"),
        "loss": plots.curve(runs, LOSS, "training loss (nats)", ".3g", type="log", tickformat="~g"),
        "accuracy": plots.curve(
            runs, ACCURACY, "validation accuracy", ".1%", markers=True, range=[-0.03, 1.1], tickformat=".0%"
        ),
        "perplexity": plots.curve(
            runs, PERPLEXITY, "validation perplexity", ".2f", markers=True, type="log", tickformat="~g"
        ),
        "lengths": plots.accuracy_by_length(runs),
        "loss_rate": plots.loss_rate(runs),
        "retention": plots.retention(runs),
        "speed": plots.curve(runs, SPEED, "tokens per second", ",.0f", rangemode="tozero"),
        "memory": plots.memory_by_length(runs),
    }


def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters |= {
        "duration": _duration,
        "number": _number,
        "percent": _percent,
        "kind": kind,
        "commit": _commit,
        "in_words": in_words,
        "yaml": lambda config: yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "data_uri": _data_uri,
    }
    environment.globals |= {
        "with_interval": with_interval,
        "typical_speed": lambda run: median(run.logged(SPEED)) if run.logged(SPEED) else None,
        "peak_memory": lambda run: [max(run.logged(name), default=None) for name in (HOST_MEMORY, DEVICE_MEMORY)],
    }
    return environment


def _embedded(figure: go.Figure) -> Markup:
    # Nothing in it may end the script element that it stands in.
    return Markup(figure.to_json().replace("<", "\\u003c"))


def _data_uri(picture: bytes) -> str:
    return f"data:image/png;base64,{b64encode(picture).decode()}"


def _commit(described: str | None) -> str:
    number, _, changed = (described or "–").partition("-")
    return f"{number[:12]} + changes" if changed else number[:12]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.3g} s"
