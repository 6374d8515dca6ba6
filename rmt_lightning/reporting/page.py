"""Runs in, one HTML page out that needs no network."""

from __future__ import annotations

import gzip
import re
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader
from PIL import Image
from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from rmt_lightning.reporting import figures, plots, style
from rmt_lightning.reporting.runs import ACCURACY, DEVICE_MEMORY, HOST_MEMORY, LOSS, SPEED, Run, differences, kind
from rmt_lightning.reporting.sweeps import Sweep, in_words, with_interval

# Making one smaller takes a quarter of a second; a page with more of them is large anyway.
_SMALL = 16
# More curves in a plot and columns in a table are of no use to anybody.
MOST = 50


def page(runs: Sequence[Run], skipped: Sequence[str], sweeps: Sequence[Sweep] = ()) -> str:
    """The report.

    Args:
        runs: at least one; the last `MOST` of them are shown, and the others are in the summary alone.
        skipped: places that could not be read, and why.
        sweeps: those that some of the runs belong to.
    """
    template = _environment().get_template("report.html")
    others, runs = runs[:-MOST], runs[-MOST:]
    shown = [(run, plots.style(number)) for number, run in enumerate(runs)]
    metrics = _metrics(runs)
    drawn = _figures(runs) | {name: figure for name, _, _, figure in metrics}
    return template.render(
        runs=shown,
        summary=[*shown, *((run, None) for run in others)],
        skipped=skipped,
        made=datetime.now(UTC),
        sweeps=[(sweep, style.rendered(figures.sweep(sweep)) if sweep.drawable else None) for sweep in sweeps],
        metrics=metrics,
        probed=[
            (number, *pair, test) for number, pair in enumerate(shown) for test in pair[0].evaluations if test.probes
        ],
        figures={name: _packed(figure.to_json()) for name, figure in drawn.items() if figure.data},
        differences=differences([run.config for run in runs]),
        many=sum(len(run.attention) for run in runs) > _SMALL,
        plotly=_packed(get_plotlyjs()),
    )


# How the axis of a metric of validation looks, how a value is written, and what there is to say about it.
_LOOKS: dict[str, tuple[dict[str, Any], str, str]] = {
    ACCURACY: (
        {"range": [-0.03, 1.1], "tickformat": ".0%"}, ".1%",
        "On the longest inputs of the stage; it falls when a segment is added.",
    ),
    "val/perplexity": (
        {"type": "log", "tickformat": "~g"}, ".2f", "Of documents that were not trained on, on a logarithmic axis.",
    ),
}  # fmt: skip


def _metrics(runs: Sequence[Run]) -> list[tuple[str, str, str, go.Figure]]:
    """For each metric of validation that a run has logged: the name of its plot, title, caption and figure."""
    found = []
    for name in dict.fromkeys(name for run in runs for name in run.curves if name.startswith("val/")):
        title = f"validation {name.removeprefix('val/').replace('_', ' ')}"
        axis, value, caption = _LOOKS.get(name, ({}, ".4g", ""))
        curve = plots.curve(runs, name, title, value, markers=True, **axis)
        found.append((re.sub(r"\W", "_", name), title, caption, curve))
    return found


def _figures(runs: Sequence[Run]) -> dict[str, go.Figure]:
    return {
        "timeline_steps": plots.timeline(runs, "steps"),
        "timeline_seconds": plots.timeline(runs, "seconds"),
        "loss": plots.curve(runs, LOSS, "training loss (nats)", ".3g", type="log", tickformat="~g"),
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
        "cell": _cell,
        "yaml": lambda config: yaml.dump(config, Dumper=_DUMPER, sort_keys=False, allow_unicode=True),
        "data_uri": _data_uri,
    }
    environment.globals |= {
        "with_interval": with_interval,
        "typical_speed": lambda run: median(run.logged(SPEED)) if run.logged(SPEED) else None,
        "peak_memory": lambda run: [max(run.logged(name), default=None) for name in (HOST_MEMORY, DEVICE_MEMORY)],
    }
    return environment


# The one written in C, where there is one, takes a tenth of the time.
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def _packed(text: str) -> str:
    """A text as the page unpacks it, which takes a third of its size; always the same for the same text."""
    return b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _data_uri(picture: bytes, as_it_is: bool = False) -> str:
    """A png with the same pixels in a quarter of its bytes, unless it is damaged or has too many of them."""
    content, kind = BytesIO(), "webp"
    try:
        with Image.open(BytesIO(b"" if as_it_is else picture)) as image:
            image.convert("RGB").save(content, kind, lossless=True)
    except Exception:  # Pillow has many ways to say so
        content, kind = BytesIO(picture), "png"
    return f"data:image/{kind};base64,{b64encode(content.getvalue()).decode()}"


def _commit(described: str | None) -> str:
    number, _, changed = (described or "–").partition("-")
    return f"{number[:12]} + changes" if changed else number[:12]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _cell(text: str) -> str:
    """A cell of a csv file; a long number is rounded."""
    try:
        return f"{float(text):.5g}" if "." in text else text
    except ValueError:
        return text


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.3g} s"
