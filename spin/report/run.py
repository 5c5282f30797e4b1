"""The report of a run, or of several next to one another: tables and figures from the results so far."""

from collections.abc import Sequence
from itertools import islice, product
from pathlib import Path
from statistics import fmean

import numpy as np

from spin.engine.files import read_jsonl, write_whole
from spin.engine.metrics import read_log, stage_seconds
from spin.evaluation.compare import compare
from spin.loss import initial_loss
from spin.report.figures import THIN, by_iteration, curve, finish, save, subplots
from spin.report.leaderboard import section
from spin.report.markdown import escaped, markdown, number
from spin.report.results import (
    Model,
    by_run,
    directories,
    errors,
    evaluated,
    evaluations,
    having,
    scores,
    setting,
    shown,
    spread,
    values,
    with_others,
)

SHOWN_PROMPTS = 10
METRICS = {
    "exact_match_sampled": "right when sampled",
    "exact_match": "right when greedy",
    "logp": "log p(right answer), nats",
}
COLUMNS = [("heldout", metric) for metric in METRICS]
PANELS = {
    "loss, by iteration": ("loss", "heldout_loss"),
    "accuracy: real told from generated": ("accuracy", "heldout_accuracy"),
    "margin, nats (before β)": ("margin", "heldout_margin"),
    "reward: β · log-ratio to the opponent": ("reward_real", "reward_generated"),
    "log p(response), nats": ("logps_real", "logps_generated"),
    "gradient norm": ("grad_norm",),
}
STAGES = ("generate", "score", "train")
PAPER_HOURS = {"generate": (1.45, 1.45, 1.45, 1.45), "train": (4.32, 8.64, 8.64, 8.64)}  # table 2


def write_report(run: Path) -> Path:
    """Write <run>/report.md and its figures, with its control and what beside/ has; returns its path."""
    return write_reports(with_others([run]), run)


def write_reports(named: dict[str, list[Path]], out: Path) -> Path:
    """Write report.md and its figures to `out`, of runs and evaluations by name; returns the report's path.

    Training is the first run's.
    """
    models, run = evaluated(named), next(iter(named.values()))[0]
    parts = [f"# {run}"]
    if sum(map(len, named.values())) > 1:
        runs = [f"- {name}: {', '.join(map(str, paths))}" for name, paths in named.items()]
        parts = ["# " + escaped(", ".join(named)), escaped("\n".join(runs))]
    parts += section(models, out)
    if found := having(models, ["heldout"]):
        note = f"Means over {found[0].tasks[0]['heldout']['documents']} held-out prompts ± {errors(found)}."
        parts += ["## Held-out answers", heldout_table(found), note, plot_accuracy(models, out)]
    parts += compared(models)
    if metrics(run):
        parts += ["## Training", training_table(run), plot_training(run, out)]
    if found:
        parts += ["## What each model answers", answers(found)]
    write_whole(out / "report.md", "\n\n".join(parts) + "\n")
    return out / "report.md"


def check_results(path: Path) -> None:
    """Raise ValueError or FileNotFoundError unless a directory has something to report."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory of a run or an evaluation")
    if not (evaluations(path) or metrics(path)):
        raise ValueError(f"{path}: no steps of self-play and no evaluation yet")


def metrics(run: Path) -> dict[str, list[dict]]:
    """{iteration: its steps so far}, of self-play."""
    logs = {step: read_log(directory / "metrics.jsonl") for step, directory in directories(run).items()}
    return {step: rows for step, rows in logs.items() if step != "base" and rows and "margin" in rows[0]}


def heldout_table(models: Sequence[Model]) -> str:
    """Markdown: held-out metrics, and with seeds the first run's lead on others; empty without results."""
    found = having(models, ["heldout"])
    rows = [["model", *METRICS.values()]]
    rows += [[m.name, *_cells(values(m, COLUMNS), ".3f")] for m in found]
    first = {model.step: model for model in found if model.run == found[0].run}
    for model in found:
        other = first.get(model.step, model)
        if other is not model and len(other.tasks) == len(model.tasks) > 1:
            differences = values(other, COLUMNS) - values(model, COLUMNS)
            rows.append([f"{other.run} − {model.run}: {shown(model.step)}", *_cells(differences, "+.3f")])
    return markdown(rows) if found else ""


def _cells(by_seed: np.ndarray, form: str) -> list[str]:
    return [number(value, error, form) for value, error in spread(by_seed)[:-1]]


def compared(models: Sequence[Model]) -> list[str]:
    """Paired comparisons of the last models: the first run's with each other's, unless there are seeds."""
    parts: list[str] = []
    last = [*{model.run: model for model in models}.values()]
    for first, other in product(last[:1], last[1:]):
        if len(first.tasks) == len(other.tasks) == 1:
            try:
                text = compare(other.directories[0], first.directories[0])
            except (ValueError, OSError) as error:
                text = f"Not compared: {escaped(str(error))}"
            parts += [f"## {escaped(first.name)} compared with {escaped(other.name)}", text]
    return parts


def training_table(run: Path) -> str:
    """Markdown: each iteration's first loss, its metrics over the last tenth of the steps, and its hours."""
    keys = ("loss", "accuracy", "margin", "reward_real", "reward_generated")
    paper = PAPER_HOURS if setting(run, "run.paper") else {}
    head = ["iteration", "steps", "loss at step 1", *(key.replace("_", " ") for key in keys)]
    head += [f"{stage}, hours" for stage in STAGES] + [f"the paper: {stage}" for stage in paper]
    logs, rows = metrics(run), [head]
    for n, directory in enumerate([*directories(run).values()][1:]):
        steps, spent = logs.get(f"iteration {n}", []), stage_seconds(directory)
        last = steps[-max(1, len(steps) // 10) :]
        means = [number(fmean(step[key] for step in last), form=".3f") if last else "" for key in keys]
        hours = ["≥ " * (spent[s][1] > 0) + f"{spent[s][0] / 3600:.3g}" if s in spent else "" for s in STAGES]
        first = f"{steps[0]['loss']:.4f}" if steps else ""
        rows.append(
            [str(n), str(len(steps)), first, *means, *hours, *(str(of[min(n, 3)]) for of in paper.values())]
        )
    note = (
        "Metrics: means over the last tenth of the steps. Hours: ≥ where a process was killed or is at work."
    )
    if setting(run, "train.loss") == "logistic":
        note += f" The logistic loss starts at log 2 = {initial_loss('logistic'):.4f}."
    note += " The paper's hours are those of 8 A100; its training includes scoring." * bool(paper)
    return f"{markdown(rows)}\n\n{note}"


def answers(models: Sequence[Model]) -> str:
    """Markdown: sampled answers to the first prompts, of the first run's models and of the others' last."""
    last = {model.run: model for model in models}
    rows: dict[str, list[dict]] = {}
    for model in (model for model in models if model.run == models[0].run or model is last[model.run]):
        if (file := model.directories[0] / "heldout.jsonl").is_file():
            rows[model.name] = [row for _, row in islice(read_jsonl(file), SHOWN_PROMPTS)]
    first = next(iter(rows.values()), [])
    asked = [row["prompt"] for row in first]
    rows = {name: of for name, of in rows.items() if [row["prompt"] for row in of] == asked}
    table = [["prompt", "right answer", *rows]]
    for row, *of in zip(first, *rows.values()):
        texts = [escaped(r["sampled"].strip()) + " ✓" * bool(r["exact_match_sampled"]) for r in of]
        table.append([escaped(row["prompt"]), escaped(row["target"]), *texts])
    return f"{markdown(table)}\n\nSampled answers to the first held-out prompts, ✓ where right."


def plot_accuracy(models: Sequence[Model], out: Path) -> str:
    """accuracy.png: right answers by iteration, sampled and greedy, of each run."""
    figure, grid = subplots(1, 2, (10, 4.2), sharey=True)
    for column, (axes, title) in enumerate(zip(grid[0], METRICS.values())):
        by_iteration(axes, by_run(models, scores(models, COLUMNS)[:, column]))
        finish(axes, f"Held-out answers, {title}", "" if column else "share")
    figure.suptitle(f"Bars: {errors(models)}.", fontsize=9)
    return save(figure, out / "accuracy.png", "accuracy by iteration")


def plot_training(run: Path, out: Path) -> str:
    """training.png: the metrics of PANELS over the steps of all iterations."""
    figure, grid = subplots(2, 3, (12, 6.4), sharex=True)
    grid[0, 0].axhline(initial_loss(setting(run, "train.loss")), **THIN)
    start = 0
    for name, steps in metrics(run).items():
        grid[0, 0].annotate(
            name.split()[1], (start + 1, 0.03), xycoords=("data", "axes fraction"), fontsize=9
        )
        for axes, keys in zip(grid.flat, PANELS.values()):
            axes.axvline(start + 0.5, linestyle=":", **THIN)
            for place, key in enumerate(keys):
                _plot_metric(axes, steps, key, place, start)
        start += len(steps)
    for axes, title in zip(grid.flat, PANELS):
        finish(axes, title)
        axes.set_xlabel("step, over all iterations" * (axes in grid[1]))
    return save(figure, out / "training.png", "training curves")


def _plot_metric(axes, steps: list[dict], key: str, place: int, start: int) -> None:
    """Draw an iteration's metric after `start` steps: raw, and as a running mean over 5% of them."""
    x = [start + step["step"] for step in steps if key in step]
    y = [step[key] for step in steps if key in step]
    label = None if start else key.replace("_", " ")
    if key.startswith("heldout") and x:
        curve(axes, x, y, place, markersize=3, label=label)
    elif x:
        half = max(1, len(y) // 40)
        means = [fmean(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]
        curve(axes, x, y, place, marker="", linestyle="-", alpha=0.25, linewidth=0.8)
        curve(axes, x, means, place, marker="", label=label)
