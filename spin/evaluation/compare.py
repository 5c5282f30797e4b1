"""Compare two evaluations document by document: what flipped, and whether the difference is significant."""

import math
from pathlib import Path

from spin.engine.files import read_json, read_jsonl
from spin.evaluation.statistics import METRICS, paired_test, sign_test

SHOWN = 12  # documents that are listed of each kind of flip
HEADER = """\
| task | metric | documents | A | B | B - A | only A right | only B right | p |
|---|---|---|---|---|---|---|---|---|"""
NOTE = "p: two-sided, if A and B were equally good; not corrected for the number of tasks."


def compare(a: Path, b: Path) -> str:
    """Markdown: for each task in both, both metrics, the documents that flipped, and p of a paired test.

    The test is McNemar's exact one where a document is right or wrong, else the normal one on paired
    differences. Raises FileNotFoundError, or ValueError if no task was evaluated the same way in both.
    """
    records = [read_json(directory / "summary.json").get("records", {}) for directory in (a, b)]
    lines: list[str] = []
    flips: list[str] = []
    others: list[str] = []
    for name in (name for name in records[0] if name in records[1]):
        rows = [[row for _, row in read_jsonl(directory / f"{name}.jsonl")] for directory in (a, b)]
        if differing := _differing(*(record[name] for record in records), *rows):
            others.append(f"{name} (another {', '.join(differing)})")
            continue
        for metric in (metric for metric in METRICS if metric in rows[0][0]):
            values = [[row[metric] for row in part] for part in rows]
            lines.append(_line(name, metric, *values))
            flips += _flips(f"{name} {metric}", *values)
    left_out = f"not evaluated the same way: {', '.join(others)}"
    if not lines:
        raise ValueError(f"{a} and {b} have no task to compare{f'; {left_out}' if others else ''}")
    flipped = ["Documents that flipped, by number:\n", *flips, ""] if flips else []
    excluded = [f"Excluded, {left_out}.\n"] if others else []
    return "\n".join([*flipped, *excluded, f"A: {a}\nB: {b}\n", HEADER, *lines, "", NOTE])


def _differing(a: dict, b: dict, rows_a: list[dict], rows_b: list[dict]) -> list[str]:
    """Which keys of two records differ, apart from the model. Data may differ in documents not evaluated."""
    keys = [key for key in a if key not in ("model", "dtype", "data", "documents") and a[key] != b.get(key)]
    asked = [
        [(row["doc"], row.get("hash", row.get("prompt", row.get("question_id")))) for row in rows]
        for rows in (rows_a, rows_b)
    ]
    return keys + ["documents or examples"] * (asked[0] != asked[1])


def _flips(what: str, a: list, b: list) -> list[str]:
    """A line for the documents that only A has right, and one for those that only B has right."""
    result = []
    for side, pair in (("A", (1, 0)), ("B", (0, 1))):
        docs = [str(doc) for doc, values in enumerate(zip(a, b)) if values == pair and isinstance(a[0], int)]
        more = f" and {len(docs) - SHOWN} more" if len(docs) > SHOWN else ""
        if docs:
            result.append(f"- {what}, only {side} right: {', '.join(docs[:SHOWN])}{more}")
    return result


def _line(name: str, metric: str, a: list[float], b: list[float]) -> str:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    if all(isinstance(value, int) for value in a + b):
        lost, won = sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))
        counts, p = f"{lost} | {won}", sign_test(lost, won)
    else:
        counts, p = " | ", paired_test([y - x for x, y in zip(a, b)])
    shown = "" if math.isnan(p) else "<0.0001" if p < 1e-4 else f"{p:.4f}"
    values = f"{mean_a:.4f} | {mean_b:.4f} | {mean_b - mean_a:+.4f}"
    return f"| {name} | {metric} | {len(a)} | {values} | {counts} | {shown} |"
