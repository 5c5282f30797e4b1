"""The paper's tables and figures: benchmarks of models (results.py) next to the paper's numbers.

The paper's rows are shown for a run whose recipe has `run.paper = true`, and, next to such a run, for others
with the names "DPO", "SPIN then DPO" and "one more epoch of SFT". A missing score is an empty cell or a gap.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from spin.evaluation.mt_bench import CATEGORIES
from spin.report.figures import plot_bars, plot_steps, radar
from spin.report.markdown import markdown, number
from spin.report.results import Model, errors, having, position, scores, shown, spread, values

# Task, metric, the paper's name for it, and the documents of the whole task. MMLU's metric is the mean over
# subjects, as the leaderboard had it.
LEADERBOARD = (
    ("arc_challenge", "acc_norm", "ARC", 1172),
    ("truthfulqa_mc2", "acc", "TruthfulQA", 817),
    ("winogrande", "acc", "Winogrande", 1267),
    ("gsm8k", "exact_match", "GSM8k", 1319),
    ("hellaswag", "acc_norm", "HellaSwag", 10042),
    ("mmlu", "acc_by_subject", "MMLU", 14042),
)
TABLE_6 = (
    ("mt_bench", "average", "MT-Bench", 80),
    ("bbh_cot_fewshot_causal_judgement", "exact_match", "BBH causal judgement", 187),
    ("bbh_cot_fewshot_formal_fallacies", "exact_match", "BBH formal fallacies", 250),
    ("bbh_cot_fewshot_sports_understanding", "exact_match", "BBH sports understanding", 250),
    ("openbookqa", "acc_norm", "OpenBookQA", 500),
)
MT_BENCH = tuple(("mt_bench", name, name, 80) for name in ("turn 1", "turn 2", "average", *CATEGORIES))
DOCUMENTS = {task: documents for task, _, _, documents in LEADERBOARD + TABLE_6}
# Percent, MT-Bench points: arXiv 2401.01335, tables 3 to 6. The average that it states of SPIN then DPO,
# 64.05, is not its numbers'.
_PAPER = {
    "base": (60.41, 43.73, 74.19, 26.76, 82.85, 60.92, 5.94, 56.15, 49.6, 96.0, 45.4),
    "iteration 0": (63.40, 49.18, 72.69, 35.10, 84.38, 60.03, 6.46, 57.75, 51.6, 95.2, 46.8),
    "iteration 1": (65.19, 55.17, 72.30, 35.78, 84.96, 59.34, 6.65, 58.82, 51.2, 95.2, 47.2),
    "iteration 2": (65.96, 54.91, 73.56, 38.06, 85.41, 59.93, 6.78, 59.36, 51.2, 94.4, 47.6),
    "iteration 3": (65.87, 54.90, 73.72, 38.97, 85.54, 59.99),
    "DPO": (63.65, 55.19, 72.61, 33.43, 84.44, 58.52),
    "SPIN then DPO": (66.47, 60.07, 78.06, 37.98, 86.17, 59.68),
    "one more epoch of SFT": (57.76, 44.39, 75.77, 25.85, 81.69, 57.89),
}
PAPER = {
    name: {column[:2]: value for column, value in zip(LEADERBOARD + TABLE_6, row)}
    for name, row in _PAPER.items()
}
PAPER_EPOCHS = (60.83, 60.80, 61.04, 60.87, 60.96)  # averages of iteration 0, read off figure 4
COUNTS = ("truncated", "empty_choices", "dropped", "prompts_cut", "answers_cut")  # of a task's remarks


def section(models: Sequence[Model], out: Path) -> list[str]:
    """The report's paragraphs about benchmarks, empty without results; writes the figures to `out`."""
    tasks = {task for model in models for of in model.tasks for task in of}
    if not (found := having(models, tasks - {"heldout"})):
        return []
    last = [model for model in found if not model.on_the_way]
    judged, others = having(last, ["mt_bench"]), [c for c in TABLE_6 if having(found, c[:1])]
    parts = ["## Benchmarks", f"Percent, of MT-Bench points, ± {errors(found)}."]
    parts += [table(found, LEADERBOARD, average=True), *plot_average(models, out), *plot_tasks(last, out)]
    parts.append(table(found, others))
    if judged:
        parts += ["### MT-Bench", table(judged, MT_BENCH), "Empty: no verdict in mt_bench_judgment/."]
        rows = {model.name: cells[3:-1, 0] for model, cells in zip(judged, scores(judged, MT_BENCH))}
        if rows := {name: row for name, row in rows.items() if not np.isnan(row).any()}:
            parts.append(radar(out / "mt_bench.png", rows, CATEGORIES, "MT-Bench by category", 0, 10))
    return [*filter(None, parts), "### All metrics", details(found)]


def table(models: Sequence[Model], columns: Sequence[Sequence], form=".2f", average=False) -> str:
    """Markdown: a row for each model, and where the paper has its numbers, one for them and the differences.

    Differences are those of whole tasks. With seeds, also the first run's lead on others, seed by seed. Empty
    if no model has a result.
    """
    models, end = having(models, [task for task, *_ in columns]), len(columns) + average
    rows, leads = [["model", *(title for _, _, title, *_ in columns), *["average"] * average]], []
    first = {model.step: model for model in models if model.run == models[0].run}
    for model in models:
        cells = values(model, columns)[:, :end]
        rows.append([model.name, *(number(value, error, form) for value, error in spread(cells))])
        paper = [PAPER.get(model.paper, {}).get(tuple(column[:2]), math.nan) for column in columns]
        if not np.isnan(paper).all():
            sizes = [[of.get(task, {}).get("documents") for task, *_ in columns] for of in model.tasks]
            whole = [{column[3]} == {*of} for column, of in zip(columns, zip(*sizes))]
            theirs = np.array([*paper, np.mean(paper)])[:end]
            lead = np.where([*whole, all(whole)][:end], spread(cells)[:, 0] - theirs, math.nan)
            rows.append(["— the paper", *map(number, theirs)])
            rows.append(["— difference", *(number(value, form="+.2f") for value in lead)])
        other = first.get(model.step, model)
        if other is not model and len(other.tasks) == len(model.tasks) > 1:
            lead = spread(values(other, columns)[:, :end] - cells)
            name = f"{other.run} − {model.run}: {shown(model.step)}"
            leads.append([name, *(number(value, error, "+" + form) for value, error in lead)])
    return markdown([*rows, *leads]) if models else ""


def details(models: Sequence[Model], subjects: bool = False) -> str:
    """Markdown: every metric of every task, with what it was measured on; `subjects`: also MMLU's."""
    about = ("documents", "few_shot", "harness")
    rows: dict[tuple, dict[str, str]] = {}
    for model in models:
        for name, of in model.tasks[0].items():
            for metric in (key.removesuffix("_stderr") for key in of if key.endswith("_stderr")):
                if subjects or not name.startswith("mmlu_") or "subjects" in of:
                    facts = (name, metric, *(of[key] for key in about), _remark(of))
                    value, error = spread(values(model, [(name, metric)]))[0]
                    rows.setdefault(facts, {})[model.name] = number(value, error, ".3f")
    names = [model.name for model in models]
    head = ["task", "metric, percent of benchmarks", "documents", "few-shot", "harness", "remarks", *names]
    return markdown([head, *([*facts, *(of.get(name, "") for name in names)] for facts, of in rows.items())])


def _remark(task: dict) -> str:
    """What was truncated, dropped, left out or undefined in a task; empty if nothing was."""
    remarks = [f"{task[key]} {key.replace('_', ' ')}" for key in COUNTS if task.get(key)]
    if task.get("subjects", 0) < task.get("of_subjects", 0):
        remarks.append(f"{task['subjects']} of its {task['of_subjects']} subjects")
    if math.isnan(task.get("acc", 0)):
        remarks.append("answers without any probability")
    return ", ".join(remarks)


def plot_average(models: Sequence[Model], out: Path) -> list[str]:
    """average.png: the average over the tasks that all models have, ours and the paper's."""
    models = [model for model in models if having([model], [task for task, *_ in LEADERBOARD])]
    columns = [c for c in LEADERBOARD if models and not np.isnan(scores(models, [c])[:, 0, 0]).any()]
    if not columns:
        return []
    cells, whole = [*scores(models, columns)[:, -1]], len(columns) == len(LEADERBOARD)
    if any(model.paper and model.step for model in models):
        steps = {step: row for step, row in PAPER.items() if step == "base" or step.startswith("iteration")}
        means = {step: fmean(row[column[:2]] for column in columns) for step, row in steps.items()}
        if whole and any(model.on_the_way for model in models):
            means |= {f"iteration 0, epoch {n}": mean for n, mean in enumerate(PAPER_EPOCHS, 1)}
        places = (position(step, Path()) for step in means)
        models += [Model("the paper", s, f"the paper: {s}", (), (), "", x) for s, x in zip(means, places)]
        cells += [(mean, math.nan) for mean in means.values()]
    title = "Average of " + ("the six tasks" if whole else ", ".join(name for _, _, name, _ in columns))
    return [plot_steps(models, {title: cells}, out / "average.png", "percent")]


def plot_tasks(models: Sequence[Model], out: Path) -> list[str]:
    """tasks.png: for each task bars by model with errors, and lines for the paper's numbers."""
    panels = {}
    for column in LEADERBOARD:
        cells = scores(models, [column])[:, 0]
        if not np.isnan(cells[:, 0]).all():
            paper = (PAPER.get(model.paper, {}).get(column[:2], math.nan) for model in models)
            panels[column[2]] = {m.name: (*cell, line) for m, cell, line in zip(models, cells, paper)}
    note = f"Whiskers: {errors(models)}. Axes do not start at 0."
    note += " Black lines: the paper's." * any(model.paper for model in models)
    return [plot_bars(out / "tasks.png", panels, "percent", "tasks by model", note)] if panels else []
