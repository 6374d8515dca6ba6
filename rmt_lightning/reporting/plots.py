"""Runs in, interactive plotly Figure out.

Backgrounds are transparent, and the page colors text and lines, so that a figure is readable on white and on black.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import ceil, log2, log10
from statistics import fmean
from textwrap import wrap
from typing import Any, Literal

from plotly import graph_objects as go

from rmt_lightning.reporting.runs import Evaluation, Point, Row, Run, memory

# Five colors that differ to color-blind eyes too (least CIELAB distance 21 with protanopia or deuteranopia simulated
# after Machado et al. 2009), each with a contrast of 3 or more on the page's white and on its black.
COLORS = ("#1e6ecc", "#d55e00", "#00966c", "#a4417f", "#2f9cc3")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star")
GLYPHS = "●■◆▲▼★"
DASHES = ("solid", "dash", "dot", "dashdot")

# Longer curves are drawn as means of neighboring points.
POINTS = 1000
# That have room on a phone.
_LETTERS = 44

_FAINT = "rgba(128, 134, 145, 0.22)"
_FONT = {"family": "system-ui, sans-serif", "size": 13, "color": "#7b828c"}
_AXIS = {"gridcolor": _FAINT, "zeroline": False, "automargin": True, "title": {"standoff": 12, "font": {"size": 13}}}
_TEMPLATE = go.layout.Template(
    layout={
        "font": _FONT,
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "margin": {"l": 8, "r": 12, "t": 28, "b": 8},
        "height": 360,
        "uniformtext": {"minsize": 9, "mode": "hide"},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "hoverlabel": {"bgcolor": "#20252c", "bordercolor": "#20252c", "font": {"color": "#fff"}, "namelength": -1},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "maxheight": 0.3, "itemwidth": 42},
    }
)


@dataclass(frozen=True)
class Style:
    """How a run looks in all plots and tables: two runs differ in color, in symbol and glyph, or in dash."""

    color: str
    symbol: str
    glyph: str
    dash: str


def style(number: int) -> Style:
    """The style of the n-th run, counted from 0."""
    turn, place = divmod(number, len(COLORS))
    symbol = (place + turn) % len(SYMBOLS)
    return Style(COLORS[place], SYMBOLS[symbol], GLYPHS[symbol], DASHES[turn % len(DASHES)])


def timeline(runs: Sequence[Run], of: Literal["steps", "seconds"]) -> go.Figure:
    """The stages and phases of each run, one after the other, by the steps or the seconds they took."""
    rows = [(number, run, bars) for number, run in enumerate(runs) if (bars := _bars(run, of))]
    unit, scale = ("optimizer steps", 1)
    if of == "seconds":
        unit, scale = _time_unit(max((sum(bar.width for bar in bars) for _, _, bars in rows), default=0))
    figure = _figure(height=80 + 56 * len(rows), barmode="overlay")
    bars_of = ((_identity(run, number) | _drawn(bars, number, unit, scale), bars) for number, run, bars in rows)
    figure.add_traces([go.Bar(**look, y=[place] * len(bars)) for place, (look, bars) in enumerate(bars_of)])
    label = {"x": 0, "xref": "paper", "xanchor": "left", "yshift": 24, "showarrow": False}
    # Of a long name the end tells most.
    names = [run.name if len(run.name) <= _LETTERS else f"…{run.name[1 - _LETTERS :]}" for _, run, _ in rows]
    named = [label | {"text": _text(name), "y": place} for place, name in enumerate(names)]
    figure.update_layout(annotations=named)
    figure.update_xaxes(title_text=unit, rangemode="tozero", tickformat=",")
    figure.update_yaxes(range=[len(rows) - 0.6, -0.8], showticklabels=False, showgrid=False)
    return figure


@dataclass(frozen=True)
class _Bar:
    """A stage or a phase in the timeline of a run: its text, width and hatching, and what hovering tells."""

    label: str
    width: float
    hatch: str
    told: str


def _bars(run: Run, of: Literal["steps", "seconds"]) -> list[_Bar]:
    hatches = {True: "", False: "/", None: "."}
    outcomes = {True: "passed", False: "did not converge", None: "goes on"}
    bars = []
    for phase in run.phases:
        for stage in run.stages if phase.staged else []:
            told = f"stage {stage.number}, {outcomes[stage.converged]}<br>accuracy {stage.accuracy:.1%}"
            if width := stage.steps if of == "steps" else stage.seconds:
                bars.append(_Bar(str(stage.number), width, hatches[stage.converged], told))
        # How long it took is written down for stages alone.
        if not phase.staged and phase.steps and of == "steps":
            outcome = False if phase.stuck else phase.finished or None
            told = f"{_text(phase.title)}, {outcomes[outcome]}"
            bars.append(_Bar(_text(phase.title), phase.steps, hatches[outcome], told))
    return bars


def _drawn(bars: list[_Bar], number: int, unit: str, scale: int) -> dict[str, Any]:
    widths = [bar.width / scale for bar in bars]
    return {
        "orientation": "h",
        "width": 0.42,
        "x": [_short(width) for width in widths],
        "base": [_short(sum(widths[:place])) for place in range(len(widths))],
        "text": [bar.label for bar in bars],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "textfont": {"color": "#fff"},
        "marker": {
            "color": style(number).color,
            "line": {"width": 1},
            "pattern": {
                "shape": [bar.hatch for bar in bars],
                "fillmode": "overlay",
                "fgcolor": "rgba(255, 255, 255, 0.55)",
                "size": 8,
            },
        },
        "customdata": [bar.told for bar in bars],
        "hovertemplate": f"%{{customdata}}<br>%{{x:,}} {unit}",
    }


def curve(runs: Sequence[Run], metric: str, axis: str, value: str, markers: bool = False, **yaxis: Any) -> go.Figure:
    """A logged metric over the steps of each run, with the stage or the phase on hover.

    Args:
        metric: its name in metrics.csv.
        axis: its name and unit.
        value: how hovering shows one, in the format language of d3.
        markers: whether to mark each point, if there are few, and with a single run each stage and phase at its end.
        yaxis: how the axis looks.
    """
    figure, traces = _figure(), list[go.Scatter]()
    for number, run in enumerate(runs):
        if points := _thinned(run.curves.get(metric, [])):
            ends = _ends(points) if markers and len(runs) == 1 else [""] * len(points)
            traces.append(
                go.Scatter(
                    **_identity(run, number),
                    x=[point.step for point in points],
                    y=[_short(point.value) for point in points],
                    customdata=[f", {_text(point.place)}" if point.place else "" for point in points],
                    text=ends,
                    textposition="top center",
                    mode="lines+markers+text" if markers and len(points) <= 60 else "lines",
                    line={"width": 1.8, "color": style(number).color, "dash": style(number).dash},
                    marker={"size": 6, "symbol": style(number).symbol},
                    hovertemplate=f"step %{{x:,}}%{{customdata}}<br>{axis} %{{y:{value}}}",
                )
            )
    figure.add_traces(traces)
    figure.update_xaxes(title_text="optimizer steps", rangemode="tozero", tickformat=",")
    figure.update_yaxes(title_text=axis, **yaxis)
    return figure


def _thinned(points: list[Point]) -> list[Point]:
    """At most some `POINTS`, each the mean of its neighbors in the same stage or phase."""
    together = ceil(len(points) / POINTS)
    if together == 1:
        return points
    groups = groupby(enumerate(points), key=lambda item: (item[0] // together, item[1].place))
    parts = [[point for _, point in group] for _, group in groups]
    return [Point(part[-1].step, part[-1].place, fmean(point.value for point in part)) for part in parts]


def _ends(points: list[Point]) -> list[str]:
    """The number of each stage, or the title of each phase, at its last point."""
    following = [*(point.place for point in points[1:]), None]
    ends = zip(points, following, strict=True)
    return [_text(point.place.removeprefix("stage ")) if point.place != after else "" for point, after in ends]


def accuracy_by_length(runs: Sequence[Run]) -> go.Figure:
    """Accuracy with 95% intervals on inputs of each length; open symbols, off the shade, are longer than trained on."""
    figure = _by_length(
        runs,
        lambda evaluation: {
            "y": [row["accuracy"] for row in evaluation.rows],
            "error_y": {
                "array": [_short(row["high"] - row["accuracy"]) for row in evaluation.rows],
                "arrayminus": [_short(row["accuracy"] - row["low"]) for row in evaluation.rows],
                "thickness": 1.2,
                "width": 3,
            },
            "customdata": [[row["low"], row["high"], row["samples"], _questions(row)] for row in evaluation.rows],
            "hovertemplate": "%{y:.1%} (%{customdata[0]:.1%} – %{customdata[1]:.1%} of %{customdata[2]:,}"
            "%{customdata[3]})",
        },
    )
    for reached in {run.reached for run in runs if run.evaluations} - {0}:
        figure.add_vrect(x0=0.5, x1=reached * 2**0.25, fillcolor=_FAINT, line_width=0, layer="below", opacity=0.4)
    figure.update_layout(height=440)
    figure.update_yaxes(title_text="accuracy (95% interval)", range=[-0.03, 1.06], tickformat=".0%")
    return figure


def _questions(row: Row) -> str:
    """How many different questions stand behind a test, and how many inputs of this length have no room for."""
    told = f", {row['questions']:,.0f} different questions" if "questions" in row else ""
    return told + (f", {1 - row['fits']:.1%} do not fit" if row.get("fits", 1) < 1 else "")


def loss_rate(runs: Sequence[Run]) -> go.Figure:
    """The rate at which old memories were lost in training, with 95% intervals, over the steps of the phase."""
    figure, traces = _figure(), list[go.Scatter]()
    for number, run in enumerate(runs):
        if rows := run.losses:
            traces.append(
                go.Scatter(
                    **_identity(run, number),
                    x=[row["step"] for row in rows],
                    y=[row["rate"] for row in rows],
                    error_y={
                        "array": [_short(row["rate_high"] - row["rate"]) for row in rows],
                        "arrayminus": [_short(row["rate"] - row["rate_low"]) for row in rows],
                        "thickness": 1.2,
                        "width": 3,
                    },
                    mode="lines+markers",
                    line={"width": 1.8, "color": style(number).color, "dash": style(number).dash},
                    marker={"size": 6, "symbol": style(number).symbol},
                    customdata=[[row["rate_low"], row["rate_high"]] for row in rows],
                    hovertemplate="step %{x:,}<br>%{y:.2%} a segment (%{customdata[0]:.2%} – %{customdata[1]:.2%})",
                )
            )
    figure.add_traces(traces)
    figure.update_xaxes(title_text="optimizer steps", tickformat=",")
    figure.update_yaxes(title_text="memories lost per segment", rangemode="tozero", tickformat="~%")
    return figure


def retention(runs: Sequence[Run]) -> go.Figure:
    """Which share of memories still answers, by the number of segments they have read."""
    figure, traces = _figure(), list[go.Scatter]()
    for number, run in enumerate(runs):
        for place, test in enumerate(run.evaluations):
            # A line for each way in which memories were followed; earlier versions had one.
            ways = groupby(test.followed, key=lambda row: (row.get("follow"), row.get("every"), row["streams"]))
            for rows in (list(lines) for _, lines in ways):
                traces.append(
                    go.Scatter(
                        **_identity(run, number),
                        x=[row["age"] for row in rows],
                        y=[row["right"] / row["streams"] for row in rows],
                        customdata=[row["streams"] for row in rows],
                        mode="lines",
                        line={"width": 1.8, "color": style(number).color, "dash": DASHES[place % len(DASHES)]},
                        hovertemplate=f"{_text(test.label)}<br>%{{y:.1%}} of %{{customdata:,}} after %{{x:,}} segments",
                    )
                )
    figure.add_traces(traces)
    figure.update_xaxes(title_text="segments read since", rangemode="tozero", tickformat=",")
    figure.update_yaxes(title_text="memories that answer", range=[-0.03, 1.06], tickformat=".0%")
    return figure


def memory_by_length(runs: Sequence[Run]) -> go.Figure:
    """The largest memory while testing each length: of the GPU, or without one of the process."""
    figure = _by_length(
        runs,
        lambda evaluation: {"y": [memory(row) for row in evaluation.rows], "hovertemplate": "%{y:,.0f} MB"},
    )
    figure.update_yaxes(title_text="memory (MB)", rangemode="tozero")
    return figure


def _by_length(runs: Sequence[Run], values: Callable[[Evaluation], dict[str, Any]]) -> go.Figure:
    figure, traces = _figure(hovermode="x unified", showlegend=True), list[go.Scatter]()
    lengths: set[float] = set()
    for number, run in enumerate(runs):
        for place, evaluation in enumerate(run.evaluations):
            shown = values(evaluation)
            if all(value is None for value in shown["y"]):
                continue
            segments = [row["segments"] for row in evaluation.rows]
            lengths |= set(segments)
            look = style(number)
            trained_to = evaluation.stage or run.reached
            symbols = [look.symbol if length <= trained_to else f"{look.symbol}-open" for length in segments]
            several = len(run.evaluations) > 1
            label = {"name": _in_lines(f"{run.name}, {evaluation.label}")} if several else {}
            traces.append(
                go.Scatter(
                    **_identity(run, number) | label,
                    showlegend=several,
                    opacity=1 if evaluation.own else 0.6,
                    x=segments,
                    mode="lines+markers",
                    line={"width": 1.8, "color": look.color, "dash": DASHES[place % len(DASHES)]},
                    marker={"size": 10, "symbol": symbols, "line": {"width": 1.8, "color": look.color}},
                    **shown,
                )
            )
    figure.add_traces(traces)
    figure.update_xaxes(title_text="segments of the input", type="log", **_powers_of_two(lengths))
    figure.update_xaxes(unifiedhovertitle_text="%{x:,} segments")
    return figure


def _powers_of_two(lengths: Iterable[float]) -> dict[str, Any]:
    if not (numbers := sorted(lengths)):
        return {}
    exponents = range(int(log2(numbers[0])), ceil(log2(numbers[-1])) + 1)
    ticks = [2**exponent for exponent in exponents][:: ceil(len(exponents) / 8)]
    return {
        "range": [log10(numbers[0]) - 0.12, log10(numbers[-1]) + 0.12],
        "tickvals": ticks,
        "ticktext": [f"{tick:,}" for tick in ticks],
    }


def _figure(**layout: Any) -> go.Figure:
    return go.Figure(layout=go.Layout(template=_TEMPLATE, **{"showlegend": False, **layout}))


def _identity(run: Run, number: int) -> dict[str, Any]:
    # The page hides and shows all that belongs to a run at once.
    return {"name": _text(run.name), "meta": number}


def _in_lines(name: str) -> str:
    return "<br>".join(map(_text, wrap(name, _LETTERS)))


def _text(name: str) -> str:
    """Plotly reads its texts as a kind of HTML."""
    return escape(name, quote=False)


def _short(number: float) -> float:
    return float(f"{number:.5g}")


def _time_unit(seconds: float) -> tuple[str, int]:
    if seconds < 180:
        return "seconds", 1
    return ("minutes", 60) if seconds < 3 * 3600 else ("hours", 3600)
