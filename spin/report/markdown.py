"""Tables and numbers in Markdown."""

import math
import re
from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[object]], longest: int = 200) -> str:
    """A table of the rows, the first its head; each cell becomes one line of at most `longest` characters."""
    lines = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", line)[:longest] for line in row] for row in lines]
    cells.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def number(value: float, error: float = math.nan, form: str = ".2f") -> str:
    """A cell with a value ± its standard error, each omitted if it is NaN."""
    if math.isnan(value):
        return ""
    return f"{value:{form}}" + ("" if math.isnan(error) else f" ± {error:{form.lstrip('+')}}")


def escaped(text: str) -> str:
    """A text from data with its Markdown and HTML escaped."""
    return re.sub(r"([\\`*_<>#|\[\]])", r"\\\1", text)
