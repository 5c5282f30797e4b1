"""Tables and marked differences in Markdown."""

import difflib
import re
from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[object]], longest: int = 200) -> str:
    """A table of the rows, the first its head; a cell is one line of at most so many characters."""
    cells = [
        [re.sub(r"(?<!\\)\|", r"\\|", " ".join(str(cell).split()))[:longest] for cell in row] for row in rows
    ]
    cells.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def escaped(text: str) -> str:
    """A text from data, so that Markdown and HTML in it are shown and not rendered."""
    return re.sub(r"([\\`*_<>#|\[\]])", r"\\\1", text)


def marked(before: str, text: str) -> str:
    """`text` as one paragraph in which words that `before` does not have in their place are bold."""
    old, new = before.split(), text.split()
    parts = []
    for what, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words = escaped(" ".join(new[start:end]))
        if words:
            parts.append(words if what == "equal" else f"**{words}**")
    return " ".join(parts)
