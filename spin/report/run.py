"""The report of a run, or of several next to one another: tables and figures from the results so far."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean

from spin.engine.files import read_jsonl, write_whole
from spin.engine.metrics import read_log, stage_seconds
from spin.evaluation.compare import compare
from spin.report.figures import COLORS, curve, finish, plot_steps, save, subplots
from spin.report.leaderboard import section, table
from spin.report.markdown import escaped, markdown, number
from spin.report.results import Model, directories, errors, evaluated, having, scores, setting, with_others

SHOWN_PROMPTS = 10
HELDOUT = (
    ("heldout", "exact_match_sampled", "right when sampled"),
    ("heldout", "exact_match", "right when greedy"),
    ("heldout", "logp", "log p(right answer), nats"),
)
PANELS = {
    "loss, by iteration": ("loss", "heldout_loss"),
    "accuracy: real told from generated": ("accuracy", "heldout_accuracy"),
    "margin, nats (before β)": ("margin", "heldout_margin"),
    "reward: β · log-ratio to the reference": ("reward_real", "reward_generated"),
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
        panels = {HELDOUT[i][2]: scores(models, HELDOUT)[:, i] for i in (0, 1)}
        figure = plot_steps(models, panels, out / "accuracy.png", "share of held-out prompts", note)
        parts += ["## Held-out answers", table(found, HELDOUT, ".3f"), note, figure]
    last = [*{model.run: model for model in models if not model.on_the_way}.values()]
    parts += compared(last)
    if metrics(run):
        parts += [
            "## Training" + f" of {escaped(next(iter(named)))}" * (len(named) > 1),
            training_table(run),
            plot_training(run, out),
        ]
    if found:
        parts += [
            "## What each model answers",
            answers([m for m in found if m.run == found[0].run or m in last]),
        ]
    write_whole(out / "report.md", "\n\n".join(parts) + "\n")
    return out / "report.md"


def metrics(run: Path) -> dict[str, list[dict]]:
    """{iteration: its steps so far}, of self-play."""
    logs = {step: read_log(directory / "metrics.jsonl") for step, directory in directories(run).items()}
    return {step: rows for step, rows in logs.items() if step != "base" and rows and "margin" in rows[0]}


def compared(models: Sequence[Model]) -> list[str]:
    """Paired comparisons of the first of the models with each other one, unless there are seeds."""
    parts: list[str] = []
    for other in models[1:]:
        if len(models[0].tasks) == len(other.tasks) == 1:
            try:
                text = compare(other.directories[0], models[0].directories[0])
            except (ValueError, OSError) as error:
                text = f"Not compared: {escaped(str(error))}"
            parts += [f"## {escaped(models[0].name)} compared with {escaped(other.name)}", text]
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
        theirs = [str(of[min(n, 3)]) for of in paper.values()]
        rows.append([str(n), str(len(steps)), first, *means, *hours, *theirs])
    note = (
        "Metrics: means over the last tenth of the steps. Hours: ≥ where a process was killed or is at work."
    )
    note += " The paper's hours are those of 8 A100; its training includes scoring." * bool(paper)
    return f"{markdown(rows)}\n\n{note}"


def answers(models: Sequence[Model]) -> str:
    """Markdown: sampled answers to the first prompts."""
    texts: dict[tuple, dict[str, str]] = {}
    for model in models:
        for _, row in islice(read_jsonl(model.directories[0] / "heldout.jsonl"), SHOWN_PROMPTS):
            text = escaped(row["sampled"].strip()) + " ✓" * bool(row["exact_match_sampled"])
            texts.setdefault((escaped(row["prompt"]), escaped(row["target"])), {})[model.name] = text
    names = [model.name for model in models]
    rows = ([*asked, *(of.get(name, "") for name in names)] for asked, of in texts.items())
    note = "Sampled answers to the first held-out prompts, ✓ where right."
    return markdown([["prompt", "right answer", *names], *rows]) + "\n\n" + note


def plot_training(run: Path, out: Path) -> str:
    """training.png: the metrics of PANELS over all iterations' steps, and running means over 5% of them."""
    figure, grid = subplots(2, 3, (12, 6.4), sharex=True)
    start = 0
    for steps in metrics(run).values():
        for axes, keys in zip(grid.flat, PANELS.values()):
            axes.axvline(start + 0.5, linestyle=":", color=COLORS[-1], linewidth=0.8)
            for place, key in enumerate(keys):
                x = [start + step["step"] for step in steps if key in step]
                y = [step[key] for step in steps if key in step]
                if not y:
                    continue
                half = 0 if key.startswith("heldout") else max(1, len(y) // 40)
                means = [fmean(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]
                style = {"marker": "", "linestyle": "-"} if half else {"markersize": 3}
                curve(axes, x, y, place, alpha=0.25, **style)
                curve(axes, x, means, place, label=None if start else key.replace("_", " "), **style)
        start += len(steps)
    for axes, title in zip(grid.flat, PANELS):
        finish(axes, title)
        axes.set_xlabel("step, over all iterations" * (axes in grid[1]))
    return save(figure, out / "training.png", "training curves")
