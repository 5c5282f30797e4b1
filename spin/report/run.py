"""A run's tables and figures, from what its stages left: whatever there is, also while it runs.

A run in <run>/control (the same recipe with --train.objective=sft) stands beside it.

    python -m spin.report runs/tiny  # report.md and figures, at any time
"""

import json
from collections.abc import Sequence
from pathlib import Path

from spin.config import Config, Data, flat, read_toml
from spin.data import load_generated
from spin.engine.files import read_json, write_whole
from spin.engine.metrics import read_log
from spin.loss import initial_loss
from spin.report.figures import BLUE, GREEN, GREY, ORANGE, pyplot, save
from spin.report.leaderboard import benchmarks, section, shown
from spin.report.markdown import escaped, markdown, marked

SHOWN_PROMPTS = 10
SHOWN_SAMPLES = 3
METRICS = {
    "exact_match_sampled": "right when sampled",
    "exact_match": "right when greedy",
    "logp": "log p(right answer), nats",
}


def write_report(run: Path, show: Sequence[str] = ()) -> Path:
    """Write <run>/report.md and its figures; returns the report's path.

    `show`: texts; prompts that contain one of them are shown with what each opponent wrote. Raises ValueError
    if none does.
    """
    parts = [f"# {run}\n", *section(run)]
    if any(evaluations(run)):
        parts += ["## Held-out answers\n", table(run) + "\n"]
        documents = next(iter(evaluations(run).values()))["documents"]
        parts.append(f"Means over {documents} held-out prompts, with standard errors.\n")
        parts.append(f"![accuracy by iteration]({plot_accuracy(run).name})\n")
    if any(metrics(run)):
        parts += [
            "## Training\n",
            training_table(run) + "\n",
            f"![training curves]({plot_training(run).name})\n",
        ]
    if any(evaluations(run)):
        parts += ["## What each iteration answers\n", answers(run) + "\n"]
    if any(generated(run)):
        parts += ["## What each opponent wrote\n", samples(run, show) + "\n"]
    file = run / "report.md"
    write_whole(file, "\n".join(parts))
    return file


def asked_report(run: Path, show: Sequence[str] = ()) -> Path:
    """`write_report` of a run of which something is there; ValueError if nothing is."""
    if not (any(metrics(run)) or any(evaluations(run)) or benchmarks(run) or generated(run)):
        raise ValueError(f"{run}: no steps of self-play, no pairs and no evaluation yet")
    return write_report(run, show)


def models(run: Path) -> dict[str, Path]:
    """The base and the iterations that a run has, as {"base": directory, "iteration 0": …}."""
    found = {"base": run / "base"}
    n = 0
    while (run / f"iter{n}").is_dir():
        found[f"iteration {n}"] = run / f"iter{n}"
        n += 1
    return found


def evaluations(run: Path) -> dict[str, dict]:
    """{model: its held-out metrics}, of the models that have been evaluated."""
    files = {name: directory / "evaluation" / "summary.json" for name, directory in models(run).items()}
    found = {name: read_json(file)["tasks"] for name, file in files.items() if file.is_file()}
    return {name: tasks["heldout"] for name, tasks in found.items() if "heldout" in tasks}


def metrics(run: Path) -> dict[str, list[dict]]:
    """{iteration: its steps}, of self-play as far as it has come."""
    files = {name: directory / "metrics.jsonl" for name, directory in models(run).items() if name != "base"}
    logs = {name: read_log(file) for name, file in files.items()}
    return {name: steps for name, steps in logs.items() if steps and "margin" in steps[0]}


def table(run: Path) -> str:
    """Markdown: a row for each model, the control's after them. The base is the SFT model that SPIN starts
    from.
    """
    rows = [["model", *METRICS.values()]]
    for prefix, directory in (("", run), ("control, SFT: ", run / "control")):
        for name, values in evaluations(directory).items():
            if not (prefix and name == "base"):
                cells = [_with_error(values[key], values[f"{key}_stderr"]) for key in METRICS]
                rows.append([prefix + shown(name), *cells])
    return markdown(rows)


def training_table(run: Path) -> str:
    """Markdown: first and last loss, and the last tenth's means, of each iteration."""
    rows = [
        [
            "iteration",
            "steps",
            "loss at step 1",
            "loss",
            "accuracy",
            "margin",
            "reward real",
            "reward generated",
        ]
    ]
    for name, steps in metrics(run).items():
        last = steps[-max(1, len(steps) // 10) :]
        keys = ("loss", "accuracy", "margin", "reward_real", "reward_generated")
        means = [f"{sum(step[key] for step in last) / len(last):.3f}" for key in keys]
        rows.append([name.removeprefix("iteration "), str(len(steps)), f"{steps[0]['loss']:.4f}", *means])
    note = "Means over the last tenth of the steps."
    if _setting(run, "train.loss") == "logistic":
        note += f" The logistic loss starts at log 2 = {initial_loss('logistic'):.4f}."
    return f"{markdown(rows)}\n\n{note}"


def answers(run: Path) -> str:
    """Markdown: the first held-out prompts, with what each model answers when sampled."""
    documents = {}
    for name in evaluations(run):
        with open(models(run)[name] / "evaluation" / "heldout.jsonl", encoding="utf-8") as lines:
            documents[name] = [json.loads(line) for line in lines]
    rows = [["prompt", "right answer", *map(shown, documents)]]
    for texts in list(zip(*documents.values()))[:SHOWN_PROMPTS]:
        rows.append([escaped(texts[0]["prompt"]), escaped(texts[0]["target"]), *map(_marked, texts)])
    return f"{markdown(rows)}\n\nSampled answers to the first held-out prompts, ✓ where right."


def generated(run: Path) -> dict[str, dict[str, str]]:
    """{model: {prompt: its response}} of the opponents whose pairs are there, with the real responses as
    "data".
    """
    found: dict[str, dict[str, str]] = {}
    opponent = "base"
    for name, directory in models(run).items():
        if name != "base":
            if (directory / "generated").is_dir():
                pairs = load_generated(directory / "generated", Data())
                found.setdefault("data", {}).update((pair.question, pair.real) for pair in pairs)
                found[opponent] = {pair.question: pair.generated or "" for pair in pairs}
            opponent = name
    return found


def samples(run: Path, show: Sequence[str] = ()) -> str:
    """Markdown: chosen prompts, else the first ones that every opponent answered, with what each wrote.

    What a response has and the one before it (the real one for the first) has not is bold.
    """
    texts = generated(run)
    opponents = [name for name in texts if name != "data"]
    common = [prompt for prompt in texts["data"] if all(prompt in texts[name] for name in opponents)]
    chosen = (
        [prompt for text in show for prompt in common if text in prompt] if show else common[:SHOWN_SAMPLES]
    )
    for text in show:
        if not any(text in prompt for prompt in common):
            raise ValueError(f"{run}: no prompt that every opponent answered contains {text!r}")
    lines = []
    for prompt in chosen[: max(SHOWN_SAMPLES, len(show))]:
        lines += [
            f"**Prompt.** {marked(prompt, prompt)}\n",
            f"*data:* {marked(texts['data'][prompt], texts['data'][prompt])}\n",
        ]
        before = texts["data"][prompt]
        for name in opponents:
            lines.append(f"*{shown(name)}:* {marked(before, texts[name][prompt])}\n")
            before = texts[name][prompt]
        lines.append("---\n")
    return "\n".join([*lines, "Bold: what the response above it does not have in its place."])


def plot_accuracy(run: Path) -> Path:
    """accuracy.png: right answers by iteration, sampled and greedy, with the control."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    names = list(models(run))
    own = "SPIN, " if _setting(run, "train.objective") == "spin" else "continued SFT, "
    for prefix, directory, style in ((own, run, "-"), ("continued SFT, ", run / "control", "--")):
        found = {name: values for name, values in evaluations(directory).items() if name in names}
        if directory != run and found and "base" in evaluations(run):
            found = {"base": evaluations(run)["base"]} | found
        for key, what, color, marker in (
            ("exact_match_sampled", "sampled", BLUE, "o"),
            ("exact_match", "greedy", ORANGE, "s"),
        ):
            if found:
                axes.errorbar(
                    [names.index(name) for name in found],
                    [values[key] for values in found.values()],
                    yerr=[values[f"{key}_stderr"] for values in found.values()],
                    label=prefix + what,
                    color=color,
                    linestyle=style,
                    marker=marker,
                    markerfacecolor=color if style == "-" else "white",
                    capsize=3,
                )
    axes.set_xticks(range(len(names)), [shown(name) for name in names])
    axes.set_ylabel("share of right answers")
    axes.set_title("Held-out accuracy by iteration (bars: one standard error)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    return save(plt, figure, run / "accuracy.png")


def plot_training(run: Path) -> Path:
    """training.png: loss, accuracy, margin, rewards and log-ratios over the steps of all iterations."""
    plt = pyplot()
    panels = (
        ("loss, by iteration", {"loss": ("loss", BLUE, "-")}),
        ("accuracy: real told from generated", {"accuracy": ("accuracy", BLUE, "-")}),
        ("margin, nats (before β)", {"margin": ("margin", BLUE, "-")}),
        (
            "reward: β · log-ratio to the opponent",
            {"reward_real": ("real", BLUE, "-"), "reward_generated": ("generated", ORANGE, "--")},
        ),
        (
            "log p(response), nats",
            {"logps_real": ("real", BLUE, "-"), "logps_generated": ("generated", ORANGE, "--")},
        ),
        ("gradient norm", {"grad_norm": ("norm", GREEN, "-")}),
    )
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.4), sharex=True)
    for axes, (title, curves) in zip(grid.flat, panels):
        start = 0
        for name, steps in metrics(run).items():
            for key, (label, color, style) in curves.items():
                values = [step[key] for step in steps]
                at = range(start + 1, start + len(values) + 1)
                axes.plot(at, values, color=color, alpha=0.25, linewidth=0.8)
                axes.plot(at, _smooth(values), color=color, linestyle=style, label=None if start else label)
                aside = [
                    (start + step["step"], step[f"heldout_{key}"])
                    for step in steps
                    if f"heldout_{key}" in step
                ]
                if aside:
                    axes.plot(
                        *zip(*aside),
                        color=ORANGE,
                        marker="o",
                        markersize=3,
                        label=None if start else "held out",
                    )
            axes.axvline(start + 0.5, color=GREY, linewidth=0.8, linestyle=":")
            if "loss" in curves:
                label = name.removeprefix("iteration ")
                axes.annotate(label, (start + 1, 0.03), xycoords=("data", "axes fraction"), fontsize=9)
            start += len(steps)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(frameon=False)
    grid[0, 0].axhline(initial_loss(_setting(run, "train.loss")), color=GREY, linewidth=0.8)
    for axes in grid[1]:
        axes.set_xlabel("step, over all iterations")
    return save(plt, figure, run / "training.png")


def _setting(run: Path, name: str):
    """A setting of the run's first iteration that was recorded, or its default."""
    files = sorted(run.glob("iter*/config.toml"))
    return (read_toml(files[0]) if files else flat(Config()))[name]


def _smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Running mean over a window of `share` of the curve, for the eye."""
    half = max(1, int(len(values) * share / 2))
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _with_error(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


def _marked(row: dict) -> str:
    return escaped(row["sampled"].strip()) + (" ✓" if row["exact_match_sampled"] else "")
