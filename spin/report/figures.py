"""How figures look: Okabe and Ito's colors for the color-blind; line styles, markers, hatches for print."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from spin.engine.files import write_whole
from spin.report.results import Model, shown

COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#666666")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")


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


def plot_steps(models: Sequence[Model], panels: Mapping, file: Path, ylabel: str, note: str = "") -> str:
    """Draw {panel: a cell (value, error) for each model}: a curve for each run, a line for an evaluation.

    Models along the way of an iteration are a curve of their own.
    """
    figure, grid = subplots(1, len(panels), (1.6 + 4.8 * len(panels), 4.2), sharey=True)
    ticks = {m.x: shown(m.step).removeprefix("iteration ") for m in models if m.step and not m.on_the_way}
    for axes, (title, cells) in zip(grid[0], panels.items()):
        lines: dict[str, list[tuple]] = {}
        for model, (value, error) in zip(models, cells):
            name = model.name.partition(", epoch ")[0] + ", by epoch" if model.on_the_way else model.run
            if not math.isnan(value):
                lines.setdefault(name, []).append((model.x, value, error))
        for place, (name, points) in enumerate(lines.items()):
            x, y, bars = map(np.array, zip(*sorted(points)))
            if np.isnan(x).all():
                axes.axhline(y[0], color=COLORS[place % 7], linestyle=LINES[place % 4], label=name)
            else:  # moved apart, so that no error bar hides another one
                curve(axes, x + 0.02 * (place - (len(lines) - 1) / 2), y, place, yerr=bars, label=name)
        axes.set_xticks([*ticks], [*ticks.values()])
        axes.set_xlabel("iteration" * any(model.step.startswith("iteration") for model in models))
        finish(axes, title, ylabel if axes is grid[0, 0] else "", legend=False)
    legend(figure, *axes.get_legend_handles_labels())
    figure.suptitle(note, fontsize=9)
    return save(figure, file, file.stem)


def plot_bars(
    path: Path, panels: Mapping[str, Mapping[str, Sequence]], ylabel: str, what: str, note=""
) -> str:
    """Draw {panel: {bar: (value, error, the paper's value)}} with axes that don't start at 0."""
    rows = 1 if len(panels) <= 3 else 2
    width = math.ceil(len(panels) / rows)
    figure, grid = subplots(rows, width, (1 + 3.4 * width, 0.9 + 2.7 * rows))
    for axes, (title, bars) in zip(grid.flat, panels.items()):
        value, error, paper = np.array([*bars.values()]).T
        error, x = np.nan_to_num(error), np.arange(len(value))
        style = {"color": np.resize(COLORS, len(x)), "hatch": [HATCHES[(i + i // 7) % 7] for i in x]}
        drawn = axes.bar(x, value, yerr=error, capsize=3, edgecolor="white", **style)
        axes.hlines(paper, x - 0.45, x + 0.45, color="black", linewidth=1.6)
        low, high = np.fmin(value - error, paper), np.fmax(value + error, paper)
        span = np.nanmax(high) - np.nanmin(low)
        for place in np.flatnonzero(~np.isnan(value)):
            text, at = f"{value[place]:#.3g}", (place, high[place])
            axes.annotate(text, at, (0, 3), textcoords="offset points", ha="center", fontsize=8)
        axes.set_ylim(max(0, np.nanmin(low) - 0.3 * span), np.nanmax(high) + 0.2 * span)
        axes.set_xticks([])
        finish(axes, title, ylabel if axes in grid[:, 0] else "")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    legend(figure, drawn, [*bars])
    figure.suptitle(note, fontsize=9)
    return save(figure, path, what)


def finish(axes, title: str, ylabel: str = "", legend: bool = True) -> None:
    """Add title, label and grid, and a legend if more than one curve has a label."""
    axes.set_title(title, fontsize=11)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if legend and len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(edgecolor="none", framealpha=0.8)


def legend(figure, handles: Sequence, labels: Sequence[str]) -> None:
    """Add a legend below the panels."""
    columns = max(2, round(figure.get_figwidth() / 2.4))
    figure.legend(handles, labels, frameon=False, loc="upper center", ncols=columns, bbox_to_anchor=(0.5, 0))


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
