"""The paper's tables and figures: a run's benchmarks next to the paper's numbers.

Other models are shown too if they were evaluated into <run>/beside/<name> (evaluate.py --model … --out …).
A missing score or NaN is an empty cell or a gap.
"""

import math
from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path

import numpy as np

from spin.engine.files import read_json
from spin.evaluation.mt_bench import read_judgments
from spin.report.figures import COLORS, HATCHES, curve, finish, label, save, subplots
from spin.report.markdown import markdown, number

# Task, metric, and the paper's name for it. MMLU's is the mean over subjects, as the leaderboard had it.
LEADERBOARD = (
    ("arc_challenge", "acc_norm", "ARC"),
    ("truthfulqa_mc2", "acc", "TruthfulQA"),
    ("winogrande", "acc", "Winogrande"),
    ("gsm8k", "exact_match", "GSM8k"),
    ("hellaswag", "acc_norm", "HellaSwag"),
    ("mmlu", "acc_by_subject", "MMLU"),
)
DOCUMENTS = (1172, 817, 1267, 1319, 10042, 14042)  # of the whole tasks, in LEADERBOARD's order
# Percent, in the same order: arXiv 2401.01335, the table of all iterations.
PAPER = {
    "base": (60.41, 43.73, 74.19, 26.76, 82.85, 60.92),
    "iteration 0": (63.40, 49.18, 72.69, 35.10, 84.38, 60.03),
    "iteration 1": (65.19, 55.17, 72.30, 35.78, 84.96, 59.34),
    "iteration 2": (65.96, 54.91, 73.56, 38.06, 85.41, 59.93),
    "iteration 3": (65.87, 54.90, 73.72, 38.97, 85.54, 59.99),
}
BIGBENCH = ("causal_judgment", "sports_understanding", "formal_fallacies_syllogisms_negation")
OTHERS = ["truthfulqa_mc1", *(f"bigbench_{task}" for task in BIGBENCH)]  # by acc, after openbookqa
OTHERS += [f"mmlu_{group}" for group in ("stem", "humanities", "social_sciences", "other")]
COUNTS = ("truncated", "empty_choices", "dropped", "prompts_cut", "answers_cut")  # of a task's remarks


def models(run: Path) -> dict[str, Path]:
    """{"base": directory, "iteration 0": …}: the base and the iterations of a run."""
    iterations = takewhile(Path.is_dir, (run / f"iter{n}" for n in count()))
    return {"base": run / "base"} | {f"iteration {n}": path for n, path in enumerate(iterations)}


def shown(model: str) -> str:
    """A model's name in tables and figures."""
    return "SFT model" if model == "base" else model


def results(directory: Path) -> dict[str, dict]:
    """{task: its metrics} of an evaluation; empty if there is none."""
    file = directory / "summary.json"
    return read_json(file)["tasks"] if file.is_file() else {}


def benchmarks(run: Path) -> dict[str, dict]:
    """{model: its tasks' metrics}, of the run and of <run>/beside, of models with benchmark results."""
    found = {name: results(directory / "evaluation") for name, directory in models(run).items()}
    found |= {directory.name: results(directory) for directory in sorted((run / "beside").glob("*"))}
    return {name: tasks for name, tasks in found.items() if set(tasks) - {"heldout"}}


def scores(found: dict[str, dict], columns: Sequence[Sequence[str]] = LEADERBOARD) -> np.ndarray:
    """Percent and standard error by (task, metric, …) column (models, columns, 2); NaN if missing."""
    values = np.full((len(found), len(columns), 2), math.nan)
    for i, tasks in enumerate(found.values()):
        for j, (task, metric, *_) in enumerate(columns):
            if task in tasks:
                values[i, j] = tasks[task][metric], tasks[task].get(f"{metric}_stderr", math.nan)
    return 100 * values


def section(run: Path) -> list[str]:
    """The report's paragraphs about benchmarks, empty without results; writes the figures."""
    if not (found := benchmarks(run)):
        return []
    figures = [plot(run, found) for plot in (plot_average, plot_tasks, plot_radar)]
    parts = ["## Benchmarks", leaderboard_table(found), notes(found), *filter(None, figures)]
    others = [("openbookqa", "acc_norm"), *((task, "acc") for task in OTHERS)]
    columns = [column for column in others if any(column[0] in tasks for tasks in found.values())]
    if columns:
        rows = [["model", *map(" ".join, columns)]]
        for model, values in zip(found, scores(found, columns)):
            rows.append([shown(model), *(number(*cell) for cell in values)])
        parts.append(markdown(rows))
    answered = {model: tasks["mt_bench"]["model_id"] for model, tasks in found.items() if "mt_bench" in tasks}
    return parts + (["### MT-Bench", judged_table(run, answered)] if answered else [])


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


def leaderboard_table(found: dict[str, dict]) -> str:
    """Markdown: percent with standard errors, the paper's numbers, and the differences on whole tasks."""
    rows = [["model", *(name for *_, name in LEADERBOARD), "average"]]
    for model, values in zip(found, scores(found)):
        ours = [*values[:, 0], values[:, 0].mean()]
        rows.append([shown(model), *(number(*cell) for cell in values), number(ours[-1])])
        if model in PAPER:
            theirs = [*PAPER[model], float(np.mean(PAPER[model]))]
            sizes = [found[model].get(task, {}).get("documents") for task, *_ in LEADERBOARD]
            whole = np.equal(sizes, DOCUMENTS)
            pairs = zip(ours, theirs, [*whole, whole.all()])
            differences = [number(a - b, form="+.2f") if complete else "" for a, b, complete in pairs]
            rows.append(["— the paper", *(number(value) for value in theirs)])
            rows.append(["— difference", *differences])
    return markdown(rows)


def notes(found: dict[str, dict]) -> str:
    """Version of the harness, documents and remarks, stated once for all models that share them."""
    models_of: dict[str, list[str]] = {}
    for model, tasks in found.items():
        versions = {task["harness"] for task in tasks.values() if task["harness"][0].isdigit()}
        facts = f"scored as lm-evaluation-harness {' and '.join(sorted(versions))} does. " if versions else ""
        single = {name: task for name, task in tasks.items() if not name.startswith("mmlu_")}
        remarks = {name: f" ({remark})" if (remark := _remark(task)) else "" for name, task in single.items()}
        sizes = [f"{name} {task['documents']}{remarks[name]}" for name, task in single.items()]
        models_of.setdefault(f"{facts}Documents: {', '.join(sizes)}.", []).append(shown(model))
    lines = [f"{', '.join(names)}: {facts}" for facts, names in models_of.items()]
    return "\n\n".join(["Percent ± one standard error.", *lines])


def _remark(task: dict) -> str:
    """What was truncated, dropped, left out or undefined in a task."""
    remarks = [f"{task[key]} {key.replace('_', ' ')}" for key in COUNTS if task.get(key)]
    if task.get("subjects", 0) < task.get("of_subjects", 0):
        remarks.append(f"{task['subjects']} of its {task['of_subjects']} subjects")
    if math.isnan(task.get("acc", 0)):
        remarks.append("answers without any probability")
    return ", ".join(remarks)


def judged_table(run: Path, answered: dict[str, str]) -> str:
    """Markdown: MT-Bench's scores from the judge's file in <run>/mt_bench_judgment, by {model: model_id}."""
    judged = read_judgments(run / "mt_bench_judgment")
    rows = [["model", "turn 1", "turn 2", "average"]]
    for model, name in answered.items():
        rows.append([shown(model), *(number(judged.get(name, {}).get(key, math.nan)) for key in rows[0][1:])])
    note = "The paper: 5.94 for the SFT model, 6.78 after SPIN. Empty: no verdict in mt_bench_judgment/."
    return f"{markdown(rows)}\n\n{note}"


def plot_average(run: Path, found: dict[str, dict]) -> str:
    """average.png: the average by iteration, ours and the paper's, over the tasks that all models have."""
    own = {model: found[model] for model in models(run) if model in found}
    values = scores(own)[..., 0]
    common = ~np.isnan(values).any(axis=0)
    if not own or not common.any():
        return ""
    ours = dict(zip(own, values[:, common].mean(axis=1)))
    paper = dict(zip(PAPER, np.array([*PAPER.values()])[:, common].mean(axis=1)))
    places = list(dict.fromkeys([*PAPER, *own]))
    figure, ((axes,),) = subplots()
    for place, (name, means, other) in enumerate((("this run", ours, paper), ("the paper", paper, ours))):
        curve(axes, map(places.index, means), means.values(), place, label=name)
        for model, mean in means.items():
            offset = -14 if other.get(model, 0) > mean else 7
            label(axes, places.index(model), mean, f"{mean:.2f}", offset, color=COLORS[place])
    axes.set_xticks(range(len(places)), map(shown, places))
    axes.margins(y=0.15)
    names = [name for (*_, name), kept in zip(LEADERBOARD, common) if kept]
    finish(axes, f"Average by iteration: {'the six tasks' if common.all() else ', '.join(names)}", "percent")
    return save(figure, run / "average.png", "average by iteration")


def plot_tasks(run: Path, found: dict[str, dict]) -> str:
    """tasks.png: for each task bars by model with standard errors, and lines for the paper's numbers."""
    values = scores(found)
    present = np.flatnonzero(~np.isnan(values[..., 0]).all(axis=0))
    if not len(present):
        return ""
    rows = 1 if len(present) <= 3 else 2
    columns = math.ceil(len(present) / rows)
    figure, grid = subplots(rows, columns, (1 + 3.4 * columns, 0.6 + 2.9 * rows))
    x = np.arange(len(found))
    names = [shown(model).removesuffix(" model").replace("iteration", "iter.") for model in found]
    cycles = {"color": np.resize(COLORS, len(x)), "hatch": np.resize(HATCHES, len(x))}
    slant = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if set(found) - set(PAPER) else {}
    for axes, i in zip(grid.flat, present):
        value, error = values[:, i, 0], np.nan_to_num(values[:, i, 1])
        paper = [PAPER[model][i] if model in PAPER else math.nan for model in found]
        axes.bar(x, value, yerr=error, capsize=3, edgecolor="white", **cycles)
        axes.hlines(paper, x - 0.45, x + 0.45, color="black", linewidth=1.6)
        low, high = np.fmin(value - error, paper), np.fmax(value + error, paper)
        for place in np.flatnonzero(~np.isnan(value)):
            label(axes, place, high[place], f"{value[place]:.1f}", 3)
        span = np.nanmax(high) - np.nanmin(low)
        axes.set_ylim(max(0, np.nanmin(low) - 0.3 * span - 1), np.nanmax(high) + 0.2 * span + 1)
        axes.set_xticks(x, names, fontsize=9, **slant)
        finish(axes, f"{LEADERBOARD[i][2]}, percent")
    for axes in grid.flat[len(present) :]:
        axes.remove()
    what = "Black lines: the paper's. Whiskers: one standard error. Axes do not start at 0."
    figure.suptitle(what, fontsize=9)
    return save(figure, run / "tasks.png", "tasks by iteration")


def plot_radar(run: Path, found: dict[str, dict]) -> str:
    """radar.png: the base, the last iteration and the models in beside/; needs three tasks and two models."""
    own = [model for model in models(run) if model in found]
    chosen = list(dict.fromkeys([*own[:1], *own[-1:], *(model for model in found if model not in own)]))
    values = scores({model: found[model] for model in chosen})[..., 0]
    common = np.flatnonzero(~np.isnan(values).any(axis=0))
    if len(common) < 3 or len(chosen) < 2:
        return ""
    figure, ((axes,),) = subplots(size=(6.4, 5.6), subplot_kw={"projection": "polar"})
    angles = 2 * math.pi * np.arange(len(common)) / len(common)
    for place, (model, row) in enumerate(zip(chosen, values[:, common])):
        curve(axes, [*angles, 0], [*row, row[0]], place, label=shown(model))
    axes.set_xticks(angles, [LEADERBOARD[i][2] for i in common])
    axes.tick_params(axis="x", pad=14)
    axes.set_rlabel_position(30)
    axes.set_ylim(max(0, 10 * math.floor(values[:, common].min() / 10 - 0.5)), None)
    axes.set_title("Percent by task", fontsize=11, pad=22)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.08, 1.08))
    return save(figure, run / "radar.png", "radar")
