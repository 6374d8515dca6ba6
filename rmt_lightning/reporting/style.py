"""How figures look: their fonts and widths, one color and marker for each name, and the parts that many of them share.

A name of a model or a task looks the same in all figures, whichever others stand beside it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import colormaps, rcParams
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.style import context

from rmt_lightning.core.files import write_atomically
from rmt_lightning.core.quoting import one_line

StyleName = Literal["paper", "talk"]
Width = Literal["column", "page"]
Format = Literal["pdf", "svg", "png"]
# Inches, as the pages of journals and conferences have them, and points.
WIDTHS: dict[Width, float] = {"column": 3.3, "page": 6.9}
FONTS: dict[StyleName, float] = {"paper": 8, "talk": 12}
_ALIKE: dict[str, Any] = {
    # TrueType, which publishers ask for and editors can edit; matplotlib's default is Type 3.
    "pdf.fonttype": 42, "svg.hashsalt": "rmt_lightning",
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": "medium", "axes.titlelocation": "left",
    "figure.titlesize": "medium", "xtick.labelsize": "small", "ytick.labelsize": "small",
    "legend.fontsize": "small", "legend.title_fontsize": "small", "legend.frameon": False,
}  # fmt: skip
_within: ContextVar[bool] = ContextVar("within", default=False)


@contextmanager
def styled(style: StyleName = "paper", width: Width = "page") -> Iterator[None]:
    """Let figures be drawn and saved in a style, whatever else matplotlib was told; within another, that one stays."""
    if _within.get():
        yield
        return
    scale = FONTS[style] / 8
    sizes: dict[str, Any] = {
        "font.size": FONTS[style], "figure.figsize": (WIDTHS[width], WIDTHS[width] / 2), "lines.linewidth": 1.2 * scale,
        "lines.markersize": 3.5 * scale, "axes.linewidth": 0.7 * scale, "errorbar.capsize": 2 * scale,
    }  # fmt: skip
    begun = _within.set(True)
    try:
        with context(["default", _ALIKE | sizes]):
            yield
    finally:
        _within.reset(begun)


@styled()
def rendered(figure: Figure, kind: Format = "png") -> bytes:
    """A figure as a file, whose fonts are in it. The same figure gives the same bytes."""
    content = io.BytesIO()
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    # As sharp as print, and no wider than a large screen.
    dots = min(300, 1500 / figure.get_figwidth())
    figure.savefig(content, format=kind, metadata=undated[kind], dpi=dots)
    return content.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write `<path>.png` and `<path>.pdf`, each whole or not at all."""
    kinds: tuple[Format, ...] = ("png", "pdf")
    for kind in kinds:
        write_atomically(path.with_name(f"{path.name}.{kind}"), rendered(figure, kind))


@dataclass(frozen=True)
class Look:
    """How a curve looks."""

    color: Any
    marker: str = "o"
    dash: str = "-"

    def line(self) -> dict[str, Any]:
        """For `Axes.plot`."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.dash}


# Of Okabe and Ito's palette, and three dark ones of Paul Tol's, which color-blind people can tell apart, each with a
# marker of its own, so that a copy in gray will do.
_LOOKS = [
    Look("#0072b2", "o"), Look("#d55e00", "D"), Look("#009e73", "v"), Look("#cc79a7", "^"), Look("#e69f00", "P"),
    Look("#56b4e9", "s"), Look("#332288", "p"), Look("#882255", "X"), Look("#999933", "h"), Look("black", "*"),
    Look("0.35", "<"), Look("0.6", ">"), Look("#117733", "d"),
]  # fmt: skip
MARKERS = "".join(look.marker for look in _LOOKS)
_NAMES = (
    ("rmtencoder", "armt", "rmtretrieval", "prmt", "transformerxl", "rmtdecoder", "lstm", "rmttransformerxl",
     "memorynetwork", "fullattention", "longformer", "bigbird", "neuralturingmachine"),
    ("memorize", "whereabouts", "reasoning", "carried", "detect", "keyvalue", "remember", "rewrite", "mqar", "qa",
     "babi", "babilong"),
)  # fmt: skip
_LOOK_OF = {name: _LOOKS[place] for names in _NAMES for place, name in enumerate(names)} | {"ntm": _LOOKS[12]}
_DASHES = ("-", "--", "-.", ":")
CHANCE = "0.45"


def looks(names: Sequence[str]) -> list[Look]:
    """How the curves of some names look: as a model or a task always does, others in turn, and no two the same."""
    own = [_LOOK_OF.get(name.lower().replace("_", "")) for name in names]
    others = [look for look in _LOOKS if look not in own] or _LOOKS
    rest: dict[str, Look] = {}
    for name, known in zip(names, own, strict=True):
        if not known:
            rest.setdefault(name, others[len(rest) % len(others)])
    found: list[Look] = []
    for name, known in zip(names, own, strict=True):
        look = known or rest[name]
        turn = sum((one.color, one.marker) == (look.color, look.marker) for one in found)
        found.append(Look(look.color, look.marker, _DASHES[turn % len(_DASHES)]))
    return found


def plain(text: str) -> str:
    """A text as matplotlib shows it unchanged: no formula, and no name that legends leave out."""
    return (" " if text.startswith("_") else "") + one_line(text).replace("$", r"\$")


def shade(place: float) -> Any:
    """A color for one of an ordered series, from 0 for the first to 1 for the last."""
    return colormaps["viridis"](0.9 - 0.9 * place)


class Place(NamedTuple):
    """A point of a curve, with the ends of its 95% interval; not numbers where there is none."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Curve:
    """A line of a figure, and what it is called."""

    label: str
    look: Look
    places: Sequence[Place]


COLUMNS = ("segments", "accuracy", "low", "high")


def curve(label: str, look: Look, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> Curve:
    """The curve of some columns of a table: x, y and the ends of its interval, which it may lack."""
    cells = ([row.get(name, "") for name in columns] for row in rows)
    places = [Place(*(math.nan if cell in ("", None) else float(cell) for cell in of)) for of in cells]
    return Curve(label, look, sorted(places))


class Drawing(Figure):
    """A figure that Jupyter shows, whatever of matplotlib has been imported."""

    def _repr_png_(self) -> bytes:
        return rendered(self)


def canvas(panels: int = 1, height: float | None = None) -> tuple[Figure, list[Axes]]:
    """A figure of the style's width, whose panels stand side by side on a page and one below the other in a column.

    Args:
        height: of a panel, in inches.
    """
    width, scale = rcParams["figure.figsize"][0], rcParams["font.size"] / 8
    columns = panels if width > WIDTHS["column"] else 1
    height = height or min(2.9, max(1.9, 0.62 * width / columns)) * scale**0.5
    figure = Drawing(figsize=(width, height * panels / columns), layout="constrained")
    return figure, list(figure.subplots(panels // columns, columns, squeeze=False).flat)


def draw(axes: Axes, curves: Iterable[Curve]) -> list[Line2D]:
    """Lines with bands of their intervals; a lone point has a bar."""
    lines = []
    for curve in curves:
        # Those of some have no place here: a stage that was never passed.
        x, y, low, high = np.array(curve.places, dtype=float).reshape(-1, 4).T
        every = max(1, math.ceil(len(x) / 16))
        lines += axes.plot(x, y, **curve.look.line(), markevery=every, zorder=2.5)
        color = curve.look.color
        if len(x) > 1:
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        else:
            axes.vlines(x, low, high, color=color)
    return lines


def lengths(axes: Axes, numbers: Iterable[float], label: str = "segments of the input") -> None:
    """A logarithmic axis of lengths, with as many of them named as there is room for."""
    known = sorted({number for number in numbers if number > 0}) or [1]
    base = 2 if known[-1] < 2**13 * known[0] else 10
    low, high = math.floor(math.log(known[0], base) + 1e-9), math.ceil(math.log(known[-1], base) - 1e-9)
    powers = [float(base**power) for power in range(low, high + 1)]
    most = int(66 / rcParams["font.size"])
    ticks = known if 2 < len(known) <= most and _apart(known, most) else powers[:: math.ceil(len(powers) / most)]
    axes.set_xscale("log", base=base)
    axes.set_xticks(ticks, list(map(_short, ticks)))
    axes.minorticks_off()
    axes.set_xlabel(label)


def _apart(numbers: Sequence[float], most: int) -> bool:
    """Whether names of all of them fit on a logarithmic axis that has room for so many."""
    steps = [math.log2(after / before) for before, after in pairwise(numbers)]
    return min(steps) * 1.5 * most >= sum(steps)


def _short(number: float) -> str:
    """A length, in thousands or millions if it is one that nobody counts."""
    if number < 10**4:
        return f"{number:,.0f}"
    return f"{number / 10**6:,.3g}M" if number >= 10**6 else f"{number / 10**3:,.3g}k"


def accuracy(axes: Axes, label: str, chances: Iterable[float] = (), lowest: float = 0) -> list[Line2D]:
    """An axis of accuracy, with a line for what guesses reach, which is returned to be named."""
    axes.set(ylabel=label, ylim=(lowest, 1.04 - 0.04 * lowest))
    lines = [axes.axhline(chance, color=CHANCE, linestyle=":", linewidth=1, label="chance") for chance in set(chances)]
    return lines[:1]


# With more curves than these, a name stands at the end of each.
_IN_A_LEGEND = 4


def name(
    figure: Figure, panels: Sequence[Axes], curves: Sequence[Curve], others: Sequence[Artist] = (), title: str = ""
) -> None:
    """Say which curve is which: at their ends where they are many and there is room, else in a legend above all panels.

    Args:
        curves: of the first panel; those of the others look the same.
        others: what else the legend names, by their labels.
        title: of the legend.
    """
    handles: list[Artist] = [Line2D([], [], label=curve.label, **curve.look.line()) for curve in curves if curve.label]
    font, width = rcParams["font.size"] * 0.833 / 72, figure.get_figwidth()
    longest = max((len(str(handle.get_label())) for handle in (*handles, *others)), default=0) * 0.55 * font
    if len(handles) > _IN_A_LEGEND and longest < 0.3 * width and not title and _end_together(panels[0], curves):
        label(figure, panels[0], [(curve.label, curve.places[-1][:2], curve.look.color) for curve in curves])
        handles = []
    if handles := [*handles, *others]:
        columns = max(1, min(len(handles), int(width / (longest + 5 * font))))
        rows = math.ceil(len(handles) / columns) + bool(title)
        figure.set_figheight(figure.get_figheight() + rows * 1.6 * font)
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, title=title or None, alignment="left")


def _end_together(axes: Axes, curves: Iterable[Curve]) -> bool:
    """Whether all curves end in the right half of a panel."""
    return all(axes.transLimits.transform(axes.transScale.transform(curve.places[-1][:2]))[0] > 0.5 for curve in curves)


def label(figure: Figure, axes: Axes, ends: Iterable[tuple[str, tuple[float, float], Any]], left: bool = False) -> None:
    """Write texts beside curves, apart from each other: right of the panel, or left of where the curves begin.

    Args:
        ends: text, end and color of each.
        left: whether they are beginnings.
    """
    figure.draw_without_rendering()  # by which it is known where everything stands
    box, size = axes.get_window_extent(), 0.833 * rcParams["font.size"]
    gap = 1.2 * size / 72 * figure.dpi / box.height
    points = [(text, end, color, axes.transData.transform(end)) for text, end, color in ends]
    points.sort(key=lambda point: -point[3][1])
    heights: list[float] = []
    for *_, (_, y) in points:
        heights.append(min([(y - box.y0) / box.height, *(above - gap for above in heights[-1:])]))
    for number in reversed(range(len(heights))):
        # Nothing below the panel, for there are its ticks.
        heights[number] = max(heights[number], (len(heights) - 1 - number) * gap)
    for (text, end, color, (x, y)), height in zip(points, heights, strict=True):
        across = (x - box.x0) / box.width - 0.02 if left else 1.03
        moved = abs((y - box.y0) / box.height - height) > gap / 2 or (not left and box.x1 - x > 0.1 * box.width)
        line: dict[str, Any] = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6, "shrinkB": 2}
        line |= {"shrinkA": 1, "relpos": (float(left), 0.5)}
        axes.annotate(
            text, end, xytext=(across, height), textcoords="axes fraction", fontsize=size, color=color, va="center",
            ha="right" if left else "left", annotation_clip=False, arrowprops=line if moved else None,
        )  # fmt: skip
