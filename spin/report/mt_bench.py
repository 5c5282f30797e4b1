"""MT-Bench: the judge's scores by turn and category as a table, and as the paper's radar (its Figure 6)."""

import math
from pathlib import Path

from spin.evaluation.mt_bench import CATEGORIES, read_judgments
from spin.report.figures import radar
from spin.report.markdown import markdown, number

PAPER = (
    "The paper: 5.94 for the SFT model; 6.46, 6.65 and 6.78 for iterations 0, 1 and 2; none for iteration 3."
)


def section(run: Path, answered: dict[str, str], paper: bool) -> list[str]:
    """The report's paragraphs, for {model: model_id} of the answers; [] if there are none.

    Scores are from the judge's file in <run>/mt_bench_judgment. Writes mt_bench.png, with the models that
    have a score in each category.
    """
    if not answered:
        return []
    judged = read_judgments(run / "mt_bench_judgment")
    scores = {model: judged.get(model_id, {}) for model, model_id in answered.items()}
    columns = ["turn 1", "turn 2", "average", *CATEGORIES]
    rows = [[model, *(number(of.get(key, math.nan)) for key in columns)] for model, of in scores.items()]
    parts = [
        "### MT-Bench",
        markdown([["model", *columns], *rows]),
        "Empty: no verdict in mt_bench_judgment/.",
        *[PAPER] * paper,
    ]
    whole = {model: [of[key] for key in CATEGORIES] for model, of in scores.items() if {*CATEGORIES} <= {*of}}
    if whole:
        parts.append(radar(run / "mt_bench.png", whole, CATEGORIES, "MT-Bench by category", 0, 10))
    return parts
