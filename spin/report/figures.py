"""How figures look: Okabe and Ito's colors for the color-blind; line styles, markers, hatches for print."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from spin.engine.files import write_whole
from spin.report.results import by_number, shown

COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#666666")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
THIN = {"color": COLORS[-1], "linewidth": 0.8}  # auxiliary lines


def subplots(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.2), **settings):
    """A figure of `size` inches, and its axes as an array (rows, columns)."""
    from matplotlib.figure import Figure  # not above, because evaluate.py imports this file on every rank

    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def curve(axes, x: Iterable, y: Iterable, place: int, **settings) -> None:
    """Draw y over x, with error bars if `yerr` is given, in the style at `place` of the cycles above."""
    cycles = {"color": COLORS, "marker": MARKERS, "linestyle": LINES}
    style = {name: cycle[place % len(cycle)] for name, cycle in cycles.items()}
    axes.errorbar(list(x), list(y), **{"capsize": 3} | style | settings)


def by_iteration(axes, lines: Mapping[str, Mapping]) -> None:
    """Draw {run: {step: (value, error)}}: a curve over the iterations; a horizontal line for the step ""."""
    steps = sorted({step for points in lines.values() for step in points} - {""}, key=by_number)
    for place, (name, points) in enumerate(lines.items()):
        known = {step: point for step, point in points.items() if not math.isnan(point[0])}
        apart = 0.02 * (place - (len(lines) - 1) / 2)  # so that no error bar hides another one
        if "" in known:
            color, style = COLORS[place % len(COLORS)], LINES[place % len(LINES)]
            axes.axhline(known[""][0], color=color, linestyle=style, label=name)
        elif known:
            means, errors = zip(*known.values())
            curve(axes, [steps.index(step) + apart for step in known], means, place, yerr=errors, label=name)
    axes.set_xticks(range(len(steps)), [shown(step).split()[step != "base"] for step in steps])
    axes.set_xlabel("iteration")


def label(axes, x: float, y: float, text: str, offset: int, **settings) -> None:
    """Write a small text, `offset` points above a point."""
    axes.annotate(text, (x, y), (0, offset), textcoords="offset points", ha="center", fontsize=8, **settings)


def finish(axes, title: str, ylabel: str = "") -> None:
    """Add title, label and grid, and a legend if more than one curve has a label."""
    axes.set_title(title, fontsize=11)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(edgecolor="none", framealpha=0.8)


def radar(
    path: Path, rows: Mapping[str, Sequence], names: Sequence[str], title: str, low: float, high=None
) -> str:
    """Draw {label: values} around a circle, an axis for each name; for the rest see `save`."""
    figure, ((axes,),) = subplots(size=(6.4, 5.6), subplot_kw={"projection": "polar"})
    angles = [2 * math.pi * i / len(names) for i in range(len(names))]
    for place, (name, row) in enumerate(rows.items()):
        curve(axes, [*angles, 0], [*row, row[0]], place, label=name)
    axes.set_xticks(angles, names)
    axes.tick_params(axis="x", pad=14)
    axes.set_rlabel_position(180 / len(names))  # between two axes
    axes.set_ylim(low, high)
    axes.set_title(title, fontsize=11, pad=22)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.08, 1.08))
    return save(figure, path, title)


def save(figure, path: Path, what: str) -> str:
    """Write a figure as PNG without following a symlink at `path`; returns its Markdown."""
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, bbox_inches="tight")
    write_whole(path, content.getvalue())
    return f"![{what}]({path.name})"
