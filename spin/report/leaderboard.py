"""The paper's tables and figures: benchmarks of models (results.py) next to the paper's numbers.

The paper's rows are shown for a run whose recipe has `run.paper = true`, and, next to such a run, for
evaluations with the names "DPO", "SPIN then DPO" and "one more epoch of SFT". A missing score is an empty
cell or a gap.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spin.report import mt_bench
from spin.report.figures import COLORS, HATCHES, by_iteration, finish, label, save, subplots
from spin.report.markdown import markdown, number
from spin.report.results import Model, by_run, errors, having, scores

# Task, metric, and the paper's name for it. MMLU's is the mean over subjects, as the leaderboard had it.
LEADERBOARD = (
    ("arc_challenge", "acc_norm", "ARC"),
    ("truthfulqa_mc2", "acc", "TruthfulQA"),
    ("winogrande", "acc", "Winogrande"),
    ("gsm8k", "exact_match", "GSM8k"),
    ("hellaswag", "acc_norm", "HellaSwag"),
    ("mmlu", "acc_by_subject", "MMLU"),
)
BBH = (f"bbh_cot_fewshot_{task}" for task in ("causal_judgement", "formal_fallacies", "sports_understanding"))
TASKS = (*(task for task, *_ in LEADERBOARD), *BBH, "openbookqa")
DOCUMENTS = dict(zip(TASKS, (1172, 817, 1267, 1319, 10042, 14042, 187, 250, 250, 500)))  # of whole tasks
# Percent: arXiv 2401.01335, tables 3 to 6. The average that it states of SPIN then DPO, 64.05, is not its
# numbers'.
_PAPER = {
    "base": (60.41, 43.73, 74.19, 26.76, 82.85, 60.92, 56.15, 49.6, 96.0, 45.4),
    "iteration 0": (63.40, 49.18, 72.69, 35.10, 84.38, 60.03, 57.75, 51.6, 95.2, 46.8),
    "iteration 1": (65.19, 55.17, 72.30, 35.78, 84.96, 59.34, 58.82, 51.2, 95.2, 47.2),
    "iteration 2": (65.96, 54.91, 73.56, 38.06, 85.41, 59.93, 59.36, 51.2, 94.4, 47.6),
    "iteration 3": (65.87, 54.90, 73.72, 38.97, 85.54, 59.99),
    "DPO": (63.65, 55.19, 72.61, 33.43, 84.44, 58.52),
    "SPIN then DPO": (66.47, 60.07, 78.06, 37.98, 86.17, 59.68),
    "one more epoch of SFT": (57.76, 44.39, 75.77, 25.85, 81.69, 57.89),
}
PAPER = {model: dict(zip(TASKS, row)) for model, row in _PAPER.items()}
COUNTS = ("truncated", "empty_choices", "dropped", "prompts_cut", "answers_cut")  # of a task's remarks


def section(models: Sequence[Model], out: Path) -> list[str]:
    """The report's paragraphs about benchmarks, empty without results; writes the figures to `out`."""
    if not (found := benchmarked(models)):
        return []
    parts = ["## Benchmarks", leaderboard_table(found), notes(found)]
    parts += filter(None, [plot_average(found, out), plot_tasks(found, out)])
    if columns := others(found):
        rows = _rows(having(found, [task for task, _ in columns]), columns)
        parts.append(markdown([["model", *map(" ".join, columns)], *rows]))
    answered = {m.name: m.tasks[0]["mt_bench"]["model_id"] for m in having(found, ["mt_bench"])}
    return parts + mt_bench.section(out, answered, any(model.paper for model in found))


def benchmarked(models: Sequence[Model]) -> list[Model]:
    """The models with results other than held-out answers."""
    return having(models, {task for model in models for of in model.tasks for task in of} - {"heldout"})


def others(models: Sequence[Model]) -> list[tuple[str, str]]:
    """Task and metric of the benchmarks that the leaderboard lacks. Of MMLU only the groups of subjects."""
    tasks = {task: metrics for model in models for of in model.tasks for task, metrics in of.items()}
    known = {"heldout", *(task for task, *_ in LEADERBOARD)}
    known |= {task for task, of in tasks.items() if task.startswith("mmlu_") and "subjects" not in of}
    metrics = {task: [m for m in ("acc_norm", "exact_match", "acc") if m in of] for task, of in tasks.items()}
    return [(task, found[0]) for task, found in metrics.items() if found and task not in known]


def leaderboard_table(models: Sequence[Model]) -> str:
    """Markdown: percent, the paper's numbers, differences on whole tasks; empty without benchmarks."""
    head = ["model", *(name for *_, name in LEADERBOARD), "average"]
    return markdown([head, *_rows(found, LEADERBOARD, 1)]) if (found := benchmarked(models)) else ""


def _rows(models: Sequence[Model], columns: Sequence[Sequence[str]], average: int = 0) -> list[list[str]]:
    """A row for each model, and where the paper has its numbers, one for them and one for the differences."""
    rows, tasks = [], [task for task, *_ in columns]
    for model, cells in zip(models, 100 * scores(models, columns)[:, : len(columns) + average]):
        rows.append([model.name, *(number(*cell) for cell in cells)])
        theirs = [PAPER.get(model.paper, {}).get(task, math.nan) for task in tasks]
        if not np.isnan(theirs).all():
            whole = [
                all(of.get(t, {}).get("documents") == DOCUMENTS.get(t) for of in model.tasks) for t in tasks
            ]
            paper = np.array([*theirs, np.mean(theirs)])[: len(cells)]
            differences = np.where([*whole, all(whole)][: len(cells)], cells[:, 0] - paper, math.nan)
            rows.append(["— the paper", *map(number, paper)])
            rows.append(["— difference", *(number(value, form="+.2f") for value in differences)])
    return rows


def notes(models: Sequence[Model]) -> str:
    """Version of the harness, documents and remarks, stated once for all models that share them."""
    models_of: dict[str, list[str]] = {}
    for model in models:
        tasks = model.tasks[0]
        versions = {task["harness"] for task in tasks.values() if task["harness"][0].isdigit()}
        facts = f"scored as lm-evaluation-harness {' and '.join(sorted(versions))} does. " if versions else ""
        single = {name: task for name, task in tasks.items() if not name.startswith("mmlu_")}
        sizes = [f"{name} {task['documents']}{_remark(task, ' ({})')}" for name, task in single.items()]
        models_of.setdefault(f"{facts}Documents: {', '.join(sizes)}.", []).append(model.name)
    lines = [f"{', '.join(names)}: {facts}" for facts, names in models_of.items()]
    return "\n\n".join([f"Percent ± {errors(models)}.", *lines])


def results_table(summary: dict, wanted: Sequence[str]) -> str:
    """Markdown: metrics with standard errors of the wanted tasks; MMLU's groups and subjects last."""
    tasks = summary["tasks"]
    subjects = [name for name in wanted if name in tasks and name.startswith("mmlu_")]
    groups = [name for name in tasks if subjects and "subjects" in tasks[name]]
    others = [name for name in wanted if name in tasks and name not in subjects]
    rows = [["task", "metric", "value", "standard error", "documents", "few-shot", "harness", "remarks"]]
    for name, task in ((name, tasks[name]) for name in others + groups + subjects):
        about = [task["documents"], task["few_shot"], task["harness"], _remark(task)]
        for metric in (key.removesuffix("_stderr") for key in task if key.endswith("_stderr")):
            values = [number(task[key], form=".4f") for key in (metric, f"{metric}_stderr")]
            rows.append([name, metric, *values, *about])
    return markdown(rows)


def _remark(task: dict, form: str = "{}") -> str:
    """What was truncated, dropped, left out or undefined in a task; empty if nothing was."""
    remarks = [f"{task[key]} {key.replace('_', ' ')}" for key in COUNTS if task.get(key)]
    if task.get("subjects", 0) < task.get("of_subjects", 0):
        remarks.append(f"{task['subjects']} of its {task['of_subjects']} subjects")
    if math.isnan(task.get("acc", 0)):
        remarks.append("answers without any probability")
    return form.format(", ".join(remarks)) if remarks else ""


def plot_average(models: Sequence[Model], out: Path) -> str:
    """average.png: the average by iteration, ours and the paper's, over the tasks that all models have."""
    columns = [c for c in LEADERBOARD if not np.isnan(scores(models, [c])[:, 0, 0]).any()]
    if not columns:
        return ""
    lines = by_run(models, 100 * scores(models, columns)[:, -1])
    if any(model.paper and model.step for model in models):
        steps = [step for step in PAPER if step == "base" or step.startswith("iteration")]
        lines["the paper"] = {s: (np.mean([PAPER[s][task] for task, *_ in columns]), math.nan) for s in steps}
    figure, ((axes,),) = subplots()
    by_iteration(axes, lines)
    names = [name for *_, name in columns]
    what = "the six tasks" if len(names) == len(LEADERBOARD) else ", ".join(names)
    finish(axes, f"Average by iteration: {what}", "percent")
    return save(figure, out / "average.png", "average by iteration")


def plot_tasks(models: Sequence[Model], out: Path) -> str:
    """tasks.png: for each task bars by model with errors, and lines for the paper's numbers."""
    columns = [c for c in LEADERBOARD if not np.isnan(scores(models, [c])[:, 0, 0]).all()]
    if not columns:
        return ""
    rows = 1 if len(columns) <= 3 else 2
    width = math.ceil(len(columns) / rows)
    figure, grid = subplots(rows, width, (1 + 3.4 * width, 0.9 + 2.7 * rows))
    x = np.arange(len(models))
    style = {"color": np.resize(COLORS, len(x)), "hatch": [HATCHES[(i + i // 7) % 7] for i in x]}
    for axes, (task, *_, title), cells in zip(
        grid.flat, columns, 100 * scores(models, columns).swapaxes(0, 1)
    ):
        value, error = cells[:, 0], np.nan_to_num(cells[:, 1])
        paper = np.array([PAPER.get(model.paper, {}).get(task, math.nan) for model in models])
        bars = axes.bar(x, value, yerr=error, capsize=3, edgecolor="white", **style)
        axes.hlines(paper, x - 0.45, x + 0.45, color="black", linewidth=1.6)
        low, high = np.fmin(value - error, paper), np.fmax(value + error, paper)
        for place in np.flatnonzero(~np.isnan(value)):
            label(axes, place, high[place], f"{value[place]:.1f}", 3)
        span = np.nanmax(high) - np.nanmin(low)
        axes.set_ylim(max(0, np.nanmin(low) - 0.3 * span - 1), np.nanmax(high) + 0.2 * span + 1)
        axes.set_xticks([])
        finish(axes, f"{title}, percent")
    for axes in grid.flat[len(columns) :]:
        axes.remove()
    names = [model.name for model in models]
    figure.legend(bars, names, frameon=False, loc="upper center", ncols=5, bbox_to_anchor=(0.5, 0))
    what = f"Whiskers: {errors(models)}. Axes do not start at 0."
    what += " Black lines: the paper's." * any(model.paper for model in models)
    figure.suptitle(what, fontsize=9)
    return save(figure, out / "tasks.png", "tasks by model")
