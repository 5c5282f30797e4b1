"""How figures look: Okabe and Ito's colors for the color-blind; line styles, markers, hatches for print."""

import io
from collections.abc import Iterable
from pathlib import Path

from spin.engine.files import write_whole

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
        axes.legend(frameon=False)


def save(figure, path: Path, what: str) -> str:
    """Write a figure as PNG without following a symlink at `path`; returns its Markdown."""
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, bbox_inches="tight")
    write_whole(path, content.getvalue())
    return f"![{what}]({path.name})"
