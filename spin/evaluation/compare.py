"""Two evaluations, document by document: what flipped, and whether the difference is more than chance."""

import json
import math
from pathlib import Path

from spin.engine.files import read_json
from spin.evaluation.statistics import paired_test, sign_test

METRICS = ("acc", "acc_norm", "exact_match", "exact_match_flexible", "exact_match_sampled", "logp")
SHOWN = 12


def compare(a: Path, b: Path) -> str:
    """Markdown: for each task in both, the metrics of each, documents that flipped, and p of a paired test.

    The test is McNemar's exact one where a document is right or wrong, else the normal one on paired
    differences. Raises FileNotFoundError, or ValueError where there is nothing in common or the documents
    were not the same.
    """
    summaries = []
    for directory in (a, b):
        if not (directory / "summary.json").is_file():
            raise FileNotFoundError(
                f"{directory / 'summary.json'}: no such file; an evaluation's directory is needed"
            )
        summaries.append(read_json(directory / "summary.json"))
    lines = [
        "| task | metric | documents | A | B | B - A | only A right | only B right | p |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    flips, others = [], []
    names = [
        name
        for name in summaries[0]["tasks"]
        if name in summaries[1]["tasks"] and (a / f"{name}.jsonl").is_file()
    ]
    for name in names:
        rows = [_rows(directory / f"{name}.jsonl") for directory in (a, b)]
        # The data's own digest may differ where the documents asked do not.
        origins = [summary.get("origins", {}).get(name, {}) for summary in summaries]
        asked = [origin | {"data": [_identity(row) for row in part]} for origin, part in zip(origins, rows)]
        if differing := [key for key in asked[0] if asked[0][key] != asked[1].get(key)]:
            kinds = ["documents or examples" if key in ("data", "documents") else key for key in differing]
            others.append(f"{name} (another {', '.join(dict.fromkeys(kinds))})")
            continue
        for metric in (metric for metric in METRICS if metric in rows[0][0]):
            lines.append(_line(name, metric, *([row[metric] for row in part] for part in rows)))
            if isinstance(rows[0][0][metric], int):
                lost, won = (
                    [str(x["doc"]) for x, y in zip(*rows) if (x[metric], y[metric]) == pair]
                    for pair in ((1, 0), (0, 1))
                )
                for what, docs in (("only A right", lost), ("only B right", won)):
                    if docs:
                        more = f" and {len(docs) - SHOWN} more" if len(docs) > SHOWN else ""
                        flips.append(f"- {name} {metric}, {what}: {', '.join(docs[:SHOWN])}{more}")
    if len(lines) == 2:
        which = f"; not asked the same: {', '.join(others)}" if others else ""
        raise ValueError(f"{a} and {b} have no task with scores to compare{which}")
    note = (
        "p: two-sided, of a difference as large if A and B were equally good; not corrected for the "
        "number of tasks."
    )
    left_out = [f"Not compared, for they were not asked the same: {', '.join(others)}.\n"] if others else []
    flipped = ["Documents that flipped, by number:\n", *flips, ""] if flips else []
    return "\n".join([*flipped, *left_out, f"A: {a}\nB: {b}\n", *lines, "", note])


def _line(name: str, metric: str, a: list[float], b: list[float]) -> str:
    means = [sum(values) / len(values) for values in (a, b)]
    if all(isinstance(value, int) for value in a + b):
        lost, won = sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))
        counts, p = f"{lost} | {won}", sign_test(lost, won)
    else:
        counts, p = " | ", paired_test([y - x for x, y in zip(a, b)])
    shown = [f"{mean:.4f}" for mean in means] + [f"{means[1] - means[0]:+.4f}"]
    return f"| {name} | {metric} | {len(a)} | {' | '.join(shown)} | {counts} | {_p(p)} |"


def _p(p: float) -> str:
    return "" if math.isnan(p) else "<0.0001" if p < 1e-4 else f"{p:.4f}"


def _identity(row: dict) -> tuple:
    return row["doc"], row.get("hash", row.get("prompt", row.get("question_id")))


def _rows(file: Path) -> list[dict]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
