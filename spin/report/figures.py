"""How figures look: Okabe and Ito's colours, told apart by the colour-blind; styles and hatches tell them
apart in print.
"""

from pathlib import Path

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
COLORS = (BLUE, ORANGE, GREEN, "#E69F00", "#CC79A7", "#56B4E9", GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo")


def pyplot():
    """matplotlib.pyplot, for files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(plt, figure, path: Path) -> Path:
    """Write a figure and close it; returns its path."""
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path
