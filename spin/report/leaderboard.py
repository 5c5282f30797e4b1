"""The paper's tables and figures, a run's evaluations beside the paper's numbers: whatever there is.

Other models stand beside the run's where they were evaluated into <run>/beside/<name> (evaluate.py --model …
--out …).
"""

import math
from collections.abc import Sequence
from pathlib import Path

from spin.engine.files import read_json
from spin.evaluation.mt_bench import read_judgments
from spin.report.figures import COLORS, HATCHES, MARKERS, pyplot, save
from spin.report.markdown import markdown

# Task, metric, and the paper's name for it. MMLU's is the mean over subjects, as the leaderboard had it.
LEADERBOARD = (
    ("arc_challenge", "acc_norm", "ARC"),
    ("truthfulqa_mc2", "acc", "TruthfulQA"),
    ("winogrande", "acc", "Winogrande"),
    ("gsm8k", "exact_match", "GSM8k"),
    ("hellaswag", "acc_norm", "HellaSwag"),
    ("mmlu", "acc_by_subject", "MMLU"),
)
OTHERS = (
    ("openbookqa", "acc_norm"),
    ("truthfulqa_mc1", "acc"),
    ("bigbench_causal_judgment", "acc"),
    ("bigbench_sports_understanding", "acc"),
    ("bigbench_formal_fallacies_syllogisms_negation", "acc"),
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


def results_table(summary: dict, wanted: Sequence[str]) -> str:
    """Markdown: the metrics of one evaluation's wanted tasks and of MMLU's groups, with standard errors;
    subjects last.
    """
    rows = [["task", "metric", "value", "standard error", "documents", "few-shot", "harness", "remarks"]]
    groups = [name for name, task in summary["tasks"].items() if "subjects" in task]
    wanted = [name for name in wanted if name in summary["tasks"]]
    subjects = [name for name in wanted if name.startswith("mmlu_")]
    names = [name for name in wanted if name not in subjects] + groups * bool(subjects) + subjects
    for name, task in ((name, summary["tasks"][name]) for name in names):
        for metric in (key.removesuffix("_stderr") for key in task if key.endswith("_stderr")):
            error = task[f"{metric}_stderr"]
            values = [
                f"{task[metric]:.4f}",
                "" if math.isnan(error) else f"{error:.4f}",
                str(task["documents"]),
            ]
            rows.append([name, metric, *values, str(task["few_shot"]), task["harness"], _remark(task)])
    return markdown(rows)


def benchmarks(run: Path) -> dict[str, dict]:
    """{model: its tasks} of the base, the iterations and the models beside them that have benchmarks'
    results.
    """
    directories = {"base": run / "base/evaluation"}
    directories |= {
        f"iteration {n}": run / f"iter{n}/evaluation" for n in range(len(list(run.glob("iter*"))))
    }
    directories |= {directory.name: directory for directory in sorted((run / "beside").glob("*"))}
    files = {name: directory / "summary.json" for name, directory in directories.items()}
    tasks = {name: read_json(file)["tasks"] for name, file in files.items() if file.is_file()}
    return {name: found for name, found in tasks.items() if set(found) - {"heldout"}}


def scores(tasks: dict) -> list[float | None]:
    """Percent on the leaderboard's six, in its order; None where there is none."""
    return [100 * tasks[task][metric] if task in tasks else None for task, metric, _ in LEADERBOARD]


def section(run: Path) -> list[str]:
    """The report's paragraphs about benchmarks, with the figures written; none if there are no results."""
    found = benchmarks(run)
    if not found:
        return []
    parts = ["## Benchmarks\n", leaderboard_table(found) + "\n", notes(found) + "\n"]
    if any(value is not None for tasks in found.values() for value in scores(tasks)):
        for plot, what in (
            (plot_average, "average by iteration"),
            (plot_tasks, "tasks by iteration"),
            (plot_radar, "radar"),
        ):
            if figure := plot(run, found):
                parts += [f"![{what}]({figure.name})\n"]
    if others := other_table(found):
        parts += [others + "\n"]
    if judged := judged_table(run, found):
        parts += ["### MT-Bench\n", judged + "\n"]
    return parts


def leaderboard_table(found: dict[str, dict]) -> str:
    """Markdown: percent with standard errors; under each model of the paper's its numbers, and the difference
    on whole tasks.
    """
    rows = [["model", *(name for _, _, name in LEADERBOARD), "average"]]
    for model, tasks in found.items():
        ours = scores(tasks)
        errors = [tasks.get(task, {}).get(f"{metric}_stderr") for task, metric, _ in LEADERBOARD]
        cells = ["" if value is None else _with_error(value, error) for value, error in zip(ours, errors)]
        rows.append([shown(model), *cells, _percent(_average(ours))])
        if model in PAPER:
            theirs = [*PAPER[model], sum(PAPER[model]) / len(PAPER[model])]
            rows.append(["— the paper", *map(_percent, theirs)])
            whole = [
                tasks.get(task, {}).get("documents") == count
                for (task, *_), count in zip(LEADERBOARD, DOCUMENTS)
            ]
            pairs = zip([*ours, _average(ours)], theirs, [*whole, all(whole)])
            rows.append(
                [
                    "— difference",
                    *(f"{a - b:+.2f}" if a is not None and complete else "" for a, b, complete in pairs),
                ]
            )
    return markdown(rows)


def notes(found: dict[str, dict]) -> str:
    """What a reader must know of the numbers, once for all models of which it is the same."""
    of: dict[str, list[str]] = {}
    for model, tasks in found.items():
        of.setdefault(_facts(tasks), []).append(shown(model))
    if len(of) == 1:
        return "Percent ± one standard error. " + next(iter(of))
    return "\n\n".join(
        ["Percent ± one standard error.", *(f"{', '.join(models)}: {facts}" for facts, models in of.items())]
    )


def _facts(tasks: dict) -> str:
    """Harness, numbers of documents, what was cut: of one model."""
    harness = sorted({task["harness"] for task in tasks.values() if task["harness"][0].isdigit()})
    lines = [f"Scored as lm-evaluation-harness {' and '.join(harness)} does."] if harness else []
    sizes = {name: tasks[name]["documents"] for name, *_ in LEADERBOARD if name in tasks}
    lines += (
        ["Documents: " + ", ".join(f"{name} {size}" for name, size in sizes.items()) + "."] if sizes else []
    )
    if "mmlu" in tasks and tasks["mmlu"]["subjects"] < tasks["mmlu"]["of_subjects"]:
        lines.append(f"MMLU: {tasks['mmlu']['subjects']} of its {tasks['mmlu']['of_subjects']} subjects.")
    for name, task in tasks.items():
        if not name.startswith("mmlu_") and (remark := _remark(task)):
            lines.append(f"{name}: {remark}.")
    return " ".join(lines)


def _remark(task: dict) -> str:
    """What befell a task's documents."""
    parts = [f"{task['truncated']} contexts cut at the left"] if task.get("truncated") else []
    parts += [f"{task['empty_choices']} empty choices"] if task.get("empty_choices") else []
    parts += ["answers without any probability"] if math.isnan(task.get("acc", 0)) else []
    parts += [
        f"{task[what]} {what.replace('_', ' ')}"
        for what in ("dropped", "prompts_cut", "answers_cut")
        if task.get(what)
    ]
    return ", ".join(parts)


def other_table(found: dict[str, dict]) -> str:
    """Markdown: the tasks beside the leaderboard's, MMLU's groups among them; empty if there are none."""
    columns = [
        *OTHERS,
        *((f"mmlu_{group}", "acc") for group in ("stem", "humanities", "social_sciences", "other")),
    ]
    columns = [(task, metric) for task, metric in columns if any(task in tasks for tasks in found.values())]
    if not columns:
        return ""
    rows = [["model", *(f"{task} {metric}" for task, metric in columns)]]
    for model, tasks in found.items():
        cells = [
            _with_error(100 * tasks[task][metric], tasks[task].get(f"{metric}_stderr"))
            if task in tasks
            else ""
            for task, metric in columns
        ]
        rows.append([shown(model), *cells])
    return markdown(rows)


def judged_table(run: Path, found: dict[str, dict]) -> str:
    """Markdown: MT-Bench's scores from <run>/mt_bench_judgment, the judge's files; empty without answers."""
    answered = {model: tasks["mt_bench"] for model, tasks in found.items() if "mt_bench" in tasks}
    if not answered:
        return ""
    judged = read_judgments(run / "mt_bench_judgment")
    rows = [["model", "turn 1", "turn 2", "average"]]
    for model, task in answered.items():
        of_model = judged.get(task["model_id"], {})
        rows.append(
            [shown(model), *(f"{of_model[key]:.2f}" if key in of_model else "" for key in rows[0][1:])]
        )
    note = "The paper: 5.94 for the SFT model, 6.78 after SPIN."
    if len(judged) < len(answered):
        note += " Without a score: answered, but no verdict of the judge in mt_bench_judgment/."
    return f"{markdown(rows)}\n\n{note}"


def plot_average(run: Path, found: dict[str, dict]) -> Path | None:
    """average.png: the average by iteration, ours and the paper's, over the tasks that every model of ours
    has, if any.
    """
    own = {
        model: {i: score for i, score in enumerate(scores(tasks)) if score is not None}
        for model, tasks in found.items()
        if model in PAPER or model.startswith("iteration")
    }
    common = [i for i in range(len(LEADERBOARD)) if own and all(i in values for values in own.values())]
    if not common:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    places = [*PAPER, *(model for model in own if model not in PAPER)]
    means = [
        {
            places.index(model): sum(values[i] for i in common) / len(common)
            for model, values in of_models.items()
        }
        for of_models in (own, PAPER)
    ]
    for which, (label, style) in enumerate((("this run", "-"), ("the paper", "--"))):
        curve, other = means[which], means[1 - which]
        axes.plot(
            curve.keys(), curve.values(), style, color=COLORS[which], marker=MARKERS[which], label=label
        )
        for x, y in curve.items():
            higher = (y, -which) > (other.get(x, y), which - 1)
            axes.annotate(
                f"{y:.2f}",
                (x, y),
                textcoords="offset points",
                xytext=(0, 7 if higher else -14),
                ha="center",
                fontsize=8,
                color=COLORS[which],
            )
    axes.legend(frameon=False)
    axes.set_xticks(range(len(places)), [shown(model) for model in places])
    names = (
        "the six tasks" if len(common) == len(LEADERBOARD) else ", ".join(LEADERBOARD[i][2] for i in common)
    )
    axes.set_title(f"Average by iteration: {names}", fontsize=11)
    axes.set_ylabel("percent")
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.3)
    return save(plt, figure, run / "average.png")


def plot_tasks(run: Path, found: dict[str, dict]) -> Path:
    """tasks.png: for each task that there is, bars by iteration, one standard error on them, the paper's
    numbers as lines.
    """
    plt = pyplot()
    there = [i for i, (task, *_) in enumerate(LEADERBOARD) if any(task in tasks for tasks in found.values())]
    rows, columns = (2, (len(there) + 1) // 2) if len(there) > 3 else (1, len(there))
    figure, grid = plt.subplots(rows, columns, figsize=(1 + 3.4 * columns, 0.6 + 2.9 * rows), squeeze=False)
    for axes in grid.flat[len(there) :]:
        axes.set_visible(False)
    for i, axes in zip(there, grid.flat):
        task, metric, name = LEADERBOARD[i]
        models = [model for model, tasks in found.items() if task in tasks]
        ends = []
        for x, model in enumerate(models):
            place, value = list(found).index(model), 100 * found[model][task][metric]
            error = 100 * found[model][task].get(f"{metric}_stderr", math.nan)
            error = 0.0 if math.isnan(error) else error
            axes.bar(
                x,
                value,
                color=COLORS[place % len(COLORS)],
                hatch=HATCHES[place % len(HATCHES)],
                edgecolor="white",
                yerr=error or None,
                capsize=3,
            )
            axes.annotate(
                f"{value:.1f}",
                (x, value + error),
                textcoords="offset points",
                xytext=(0, 3),
                ha="center",
                fontsize=8,
            )
            ends += [value - error, value + error]
            if model in PAPER:
                axes.plot([x - 0.45, x + 0.45], [PAPER[model][i]] * 2, color="black", linewidth=1.6)
                ends.append(PAPER[model][i])
        slant = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if set(models) - set(PAPER) else {}
        axes.set_xticks(range(len(models)), [_short(model) for model in models], fontsize=9, **slant)
        span = max(ends) - min(ends)
        axes.set_ylim(max(0, min(ends) - 0.3 * span - 1), max(ends) + 0.2 * span + 1)
        axes.set_title(f"{name}, percent", fontsize=10)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(
        "Black lines: the paper's. Whiskers: one standard error. Axes do not start at 0.", fontsize=9
    )
    return save(plt, figure, run / "tasks.png")


def plot_radar(run: Path, found: dict[str, dict]) -> Path | None:
    """radar.png: the base, the last iteration and the models beside the run; None where fewer than three
    tasks or two models.
    """
    own = [model for model in found if model in PAPER or model.startswith("iteration")]
    models = list(dict.fromkeys([*own[:1], *own[-1:], *(model for model in found if model not in own)]))
    common = [entry for entry in LEADERBOARD if all(entry[0] in found[model] for model in models)]
    if len(common) < 3 or len(models) < 2:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 5.6), subplot_kw={"projection": "polar"})
    angles = [2 * math.pi * k / len(common) for k in range(len(common))]
    curves = {model: [100 * found[model][task][metric] for task, metric, _ in common] for model in models}
    lowest = min(value for values in curves.values() for value in values)
    for place, (model, values) in enumerate(curves.items()):
        axes.plot(
            [*angles, angles[0]],
            [*values, values[0]],
            color=COLORS[place % len(COLORS)],
            marker=MARKERS[place % len(MARKERS)],
            linestyle=("-", "--", "-.", ":")[place % 4],
            label=shown(model),
        )
    axes.set_xticks(angles, [name for *_, name in common])
    axes.tick_params(axis="x", pad=14)
    axes.set_rlabel_position(30)
    axes.set_ylim(max(0, 10 * math.floor(lowest / 10 - 0.5)), None)
    axes.set_title("Percent by task", fontsize=11, pad=22)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.08, 1.08))
    return save(plt, figure, run / "radar.png")


def shown(model: str) -> str:
    """A model's name for people."""
    return "SFT model" if model == "base" else model


def _short(model: str) -> str:
    return "SFT" if model == "base" else model.replace("iteration ", "iter. ")


def _average(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if len(there) == len(values) else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.2f}" if error is None or math.isnan(error) else f"{value:.2f} ± {100 * error:.2f}"
