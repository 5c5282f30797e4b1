"""Tables and marked differences in Markdown."""

import difflib
import re


def markdown(rows: list[list[str]], longest: int = 200) -> str:
    """A table of the rows, the first its head; a cell is one line of at most so many characters."""
    escaped = [[" ".join(str(cell).replace("|", "\\|").split())[:longest] for cell in row] for row in rows]
    escaped.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)


def marked(before: str, text: str) -> str:
    """`text` as one paragraph in which words that `before` does not have in their place are bold."""
    old, new = before.split(), text.split()
    parts = []
    for what, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words = " ".join(re.sub(r"([\\`*_<>#|\[\]])", r"\\\1", word) for word in new[start:end])
        if words:
            parts.append(words if what == "equal" else f"**{words}**")
    return " ".join(parts)
