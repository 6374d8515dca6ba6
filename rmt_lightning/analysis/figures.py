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


def perplexity(history: Sequence[tuple[int, float]], test: float, title: str) -> Figure:
    """How a language model learnt.

    Args:
        history: (step, perplexity) of every validation.
        test: perplexity of the final test.
        title: names the run.
    """
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    steps, values = [step for step, _ in history], [value for _, value in history]
    axes.plot(steps, values, "o-", color="tab:blue", markersize=3.5, label="validation")
    axes.axhline(test, color="tab:orange", linestyle="--", linewidth=1, label=f"test: {test:.2f}")
    axes.set(xlabel="optimizer step", ylabel="perplexity", title=title)
    axes.set_yscale("log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def language_models(perplexity: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Variants of a language model side by side, a dot for each seed and a line at their mean.

    Args:
        perplexity: of each seed, by text and variant.
    """
    variants = list(next(iter(perplexity.values())))
    figure = Figure(figsize=(10, 0.8 + 0.36 * len(variants)), layout="constrained")
    panels = figure.subplots(1, len(perplexity), squeeze=False)[0]
    for axes, (text, found) in zip(panels, perplexity.items(), strict=True):
        for place, variant in enumerate(variants):
            values = found[variant]
            axes.plot(values, [place] * len(values), "o", color="tab:blue", markersize=5, alpha=0.7)
            axes.plot([sum(values) / len(values)], [place], "|", color="black", markersize=14)
        axes.set(xlabel="test perplexity", title=text, yticks=range(len(variants)), ylim=(len(variants) - 0.5, -0.5))
        axes.set_yticklabels(variants if axes.get_subplotspec().is_first_col() else [])
        axes.grid(axis="y", color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
