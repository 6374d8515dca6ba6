"""Data in, matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from rmt_lightning.analysis.extrapolation import LengthResult

CHANCE = "0.6"


def curriculum(
    history: Sequence[tuple[int, int, float]],
    lengths: Sequence[LengthResult],
    trained_to: int,
    chance: float,
    title: str,
) -> Figure:
    """How a run learnt, stage by stage, and what it can do afterwards.

    Args:
        history: (step, stage, accuracy) of every validation.
        lengths: accuracy at each length of the final test.
        trained_to: segments of the last stage.
        chance: accuracy of guessing.
        title: names the run.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)

    stages = sorted({stage for _, stage, _ in history})
    for stage in stages:
        points = [(step, accuracy) for step, of, accuracy in history if of == stage]
        shade = 0.25 + 0.75 * stage / max(stages)
        left.plot(*zip(*points, strict=True), "o-", color=(0.1, 0.3, 0.6, shade), markersize=3.5)
        left.annotate(str(stage), points[-1], textcoords="offset points", xytext=(0, 5), ha="center", fontsize=8)
    left.set(
        xlabel="optimizer step", ylabel="validation accuracy", ylim=(0, 1.1), title="Curriculum (numbers: segments)"
    )

    numbers = [result.segments for result in lengths]
    accuracy = [result.accuracy for result in lengths]
    below = [result.accuracy - result.interval[0] for result in lengths]
    above = [result.interval[1] - result.accuracy for result in lengths]
    right.errorbar(numbers, accuracy, yerr=(below, above), fmt="o-", color="tab:orange", capsize=3, markersize=4)
    right.axvspan(min(numbers), trained_to, color="0.93", zorder=0)
    right.set_xscale("log", base=2)
    right.set_xticks(numbers, [str(number) for number in numbers])
    right.set(
        xlabel="segments of the input", ylabel="test accuracy", ylim=(0, 1.1), title="Test (grey: lengths trained on)"
    )
    for axes in (left, right):
        axes.axhline(chance, color=CHANCE, linestyle=":", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def models(accuracy: Mapping[str, Sequence[LengthResult]], trained_to: int, chance: float) -> Figure:
    """Accuracy against length, a line for each model; × marks where a model's positions end.

    Args:
        accuracy: of each model at each length that it can read.
        trained_to: segments of the longest training inputs.
        chance: accuracy of guessing.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    numbers = sorted({result.segments for results in accuracy.values() for result in results})
    for name, results in accuracy.items():
        points = [(result.segments, result.accuracy) for result in results]
        (line,) = axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=name)
        if points[-1][0] < numbers[-1]:
            axes.plot(*points[-1], "x", color=line.get_color(), markersize=10, markeredgewidth=2)
    axes.axvspan(numbers[0], trained_to, color="0.93", zorder=0)
    axes.axhline(chance, color=CHANCE, linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers], fontsize=8)
    axes.minorticks_off()
    axes.set(xlabel="segments of the input (grey: trained on)", ylabel="test accuracy", ylim=(0, 1.05))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def cost(measured: Mapping[str, Sequence[tuple[int, float, float]]]) -> Figure:
    """What reading costs, against length.

    Args:
        measured: (segments, seconds, MB of memory) of each model.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, points in measured.items():
        segments, *costs = zip(*points, strict=True)
        for axes, values in zip(panels, costs, strict=True):
            axes.plot(segments, values, "o-", markersize=3.5, label=name)
            axes.set_xscale("log", base=2)
            axes.set_xticks(segments, [str(number) for number in segments])
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.set_xlabel("segments of the input")
            axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="seconds of one core", title="Time")
    panels[1].set(ylabel="MB beyond program and weights", title="Peak memory")
    panels[0].legend(fontsize=8, frameon=False)
    return figure
