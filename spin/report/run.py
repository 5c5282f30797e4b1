"""A run's report: tables and figures from the results so far, also during the run.

A run in <run>/control (the same recipe with --train.objective=sft) is compared with it.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from spin.config import Config, Data
from spin.data import load_generated
from spin.engine.files import read_jsonl, write_whole
from spin.engine.metrics import read_log
from spin.engine.recipe import flat, read_config
from spin.loss import initial_loss
from spin.report.figures import THIN, curve, finish, save, subplots
from spin.report.leaderboard import benchmarks, models, results, section, shown
from spin.report.markdown import escaped, markdown, marked, number

SHOWN_PROMPTS = 10
SHOWN_SAMPLES = 3
METRICS = {
    "exact_match_sampled": "right when sampled",
    "exact_match": "right when greedy",
    "logp": "log p(right answer), nats",
}
PANELS = {
    "loss, by iteration": ("loss",),
    "accuracy: real told from generated": ("accuracy",),
    "margin, nats (before β)": ("margin",),
    "reward: β · log-ratio to the opponent": ("reward_real", "reward_generated"),
    "log p(response), nats": ("logps_real", "logps_generated"),
    "gradient norm": ("grad_norm",),
}


def write_report(run: Path, show: Sequence[str] = ()) -> Path:
    """Write <run>/report.md and its figures; returns the report's path. For `show` see `samples`."""
    parts = [f"# {run}", *section(run)]
    if found := evaluations(run):
        documents = next(iter(found.values()))["documents"]
        note = f"Means over {documents} held-out prompts, with standard errors."
        parts += ["## Held-out answers", table(run), note, plot_accuracy(run)]
    if metrics(run):
        parts += ["## Training", training_table(run), plot_training(run)]
    if found:
        parts += ["## What each iteration answers", answers(run)]
    if generated(run):
        parts += ["## What each opponent wrote", samples(run, show)]
    write_whole(run / "report.md", "\n\n".join(parts) + "\n")
    return run / "report.md"


def asked_report(run: Path, show: Sequence[str] = ()) -> Path:
    """`write_report` of a run that has results; raises ValueError if it has none."""
    if not (metrics(run) or evaluations(run) or benchmarks(run) or generated(run)):
        raise ValueError(f"{run}: no steps of self-play, no pairs and no evaluation yet")
    return write_report(run, show)


def evaluations(run: Path) -> dict[str, dict]:
    """{model: its held-out metrics}, of the models that have been evaluated."""
    found = {name: results(directory / "evaluation") for name, directory in models(run).items()}
    return {name: tasks["heldout"] for name, tasks in found.items() if "heldout" in tasks}


def metrics(run: Path) -> dict[str, list[dict]]:
    """{iteration: its steps so far}, of self-play."""
    logs = {name: read_log(directory / "metrics.jsonl") for name, directory in models(run).items()}
    return {name: steps for name, steps in logs.items() if name != "base" and steps and "margin" in steps[0]}


def table(run: Path) -> str:
    """Markdown: held-out metrics of the run's models, then of the control's iterations."""
    rows = [["model", *METRICS.values()]]
    for prefix, directory in (("", run), ("control, SFT: ", run / "control")):
        for name, values in evaluations(directory).items():
            if not (prefix and name == "base"):
                cells = [number(values[key], values[f"{key}_stderr"], ".3f") for key in METRICS]
                rows.append([prefix + shown(name), *cells])
    return markdown(rows)


def training_table(run: Path) -> str:
    """Markdown: for each iteration the first loss, and means over the last tenth of the steps."""
    keys = ("loss", "accuracy", "margin", "reward_real", "reward_generated")
    rows = [["iteration", "steps", "loss at step 1", *(key.replace("_", " ") for key in keys)]]
    for name, steps in metrics(run).items():
        last = steps[-max(1, len(steps) // 10) :]
        means = [number(fmean(step[key] for step in last), form=".3f") for key in keys]
        rows.append([name.removeprefix("iteration "), str(len(steps)), f"{steps[0]['loss']:.4f}", *means])
    note = "Means over the last tenth of the steps."
    if _setting(run, "train.loss") == "logistic":
        note += f" The logistic loss starts at log 2 = {initial_loss('logistic'):.4f}."
    return f"{markdown(rows)}\n\n{note}"


def answers(run: Path) -> str:
    """Markdown: the first held-out prompts, with each model's sampled answer."""
    documents = {}
    for name in evaluations(run):
        documents[name] = [row for _, row in read_jsonl(models(run)[name] / "evaluation/heldout.jsonl")]
    rows = [["prompt", "right answer", *map(shown, documents)]]
    for texts in list(zip(*documents.values()))[:SHOWN_PROMPTS]:
        sampled = [escaped(row["sampled"].strip()) + " ✓" * bool(row["exact_match_sampled"]) for row in texts]
        rows.append([escaped(texts[0]["prompt"]), escaped(texts[0]["target"]), *sampled])
    return f"{markdown(rows)}\n\nSampled answers to the first held-out prompts, ✓ where right."


def generated(run: Path) -> dict[str, dict[str, str]]:
    """{"data": {prompt: real response}, opponent: {prompt: its response}, …}; empty without pairs."""
    found: dict[str, dict[str, str]] = {}
    for (opponent, _), (_, directory) in pairwise(models(run).items()):
        if (directory / "generated").is_dir():
            pairs = load_generated(directory / "generated", Data(turns="last"))
            found.setdefault("data", {}).update((pair.question, pair.real) for pair in pairs)
            found[opponent] = {pair.question: pair.generated or "" for pair in pairs}
    return found


def samples(run: Path, show: Sequence[str] = ()) -> str:
    """Markdown: prompts that every opponent answered, the first or those of `show`, with all responses.

    Words that differ from the response above are bold. Raises ValueError if no prompt contains a text.
    """
    texts = generated(run)
    common = [prompt for prompt in texts["data"] if all(prompt in written for written in texts.values())]
    for text in show:
        if not any(text in prompt for prompt in common):
            raise ValueError(f"{run}: no prompt that every opponent answered contains {text!r}")
    chosen = [prompt for text in show for prompt in common if text in prompt] if show else common
    parts = []
    for prompt in chosen[: max(SHOWN_SAMPLES, len(show))]:
        parts.append(f"**Prompt.** {marked(prompt, prompt)}")
        before = texts["data"][prompt]
        for name, written in texts.items():
            parts.append(f"*{shown(name)}:* {marked(before, written[prompt])}")
            before = written[prompt]
        parts.append("---")
    return "\n\n".join([*parts, "Bold: words that differ from the response above."])


def plot_accuracy(run: Path) -> str:
    """accuracy.png: right answers by iteration, sampled and greedy, with the control."""
    figure, ((axes,),) = subplots()
    names, found = list(models(run)), evaluations(run)
    control = {name: values for name, values in evaluations(run / "control").items() if name in names}
    if control and "base" in found:  # the control starts from the same base
        control = {"base": found["base"]} | control
    own = "SPIN" if _setting(run, "train.objective") == "spin" else "continued SFT"
    dashed = {"linestyle": "--", "markerfacecolor": "white"}
    for who, rows, style in ((own, found, {"linestyle": "-"}), ("continued SFT", control, dashed)):
        for place, (what, key) in enumerate((("sampled", "exact_match_sampled"), ("greedy", "exact_match"))):
            values, errors = ([row[name] for row in rows.values()] for name in (key, f"{key}_stderr"))
            if rows:
                x = map(names.index, rows)
                curve(axes, x, values, place, yerr=errors, label=f"{who}, {what}", **style)
    axes.set_xticks(range(len(names)), map(shown, names))
    finish(axes, "Held-out accuracy by iteration (bars: one standard error)", "share of right answers")
    return save(figure, run / "accuracy.png", "accuracy by iteration")


def plot_training(run: Path) -> str:
    """training.png: the metrics of PANELS over the steps of all iterations."""
    figure, grid = subplots(2, 3, (12, 6.4), sharex=True)
    grid[0, 0].axhline(initial_loss(_setting(run, "train.loss")), **THIN)
    start = 0
    for name, steps in metrics(run).items():
        number = name.removeprefix("iteration ")
        grid[0, 0].annotate(number, (start + 1, 0.03), xycoords=("data", "axes fraction"), fontsize=9)
        for axes, keys in zip(grid.flat, PANELS.values()):
            axes.axvline(start + 0.5, linestyle=":", **THIN)
            for place, key in enumerate(keys):
                _plot_metric(axes, steps, key, place, start)
        start += len(steps)
    for axes, title in zip(grid.flat, PANELS):
        finish(axes, title)
    for axes in grid[1]:
        axes.set_xlabel("step, over all iterations")
    return save(figure, run / "training.png", "training curves")


def _plot_metric(axes, steps: list[dict], key: str, place: int, start: int) -> None:
    """Draw an iteration's metric after `start` steps: raw, as a running mean over 5%, on held-out pairs."""
    x = [start + step["step"] for step in steps]
    values = [step[key] for step in steps]
    half = max(1, len(values) // 40)
    means = [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    heldout = {i: step[f"heldout_{key}"] for i, step in zip(x, steps) if f"heldout_{key}" in step}
    curve(axes, x, values, place, marker="", linestyle="-", alpha=0.25, linewidth=0.8)
    curve(axes, x, means, place, marker="", label=None if start else key.split("_")[-1])
    if heldout:
        style = {"marker": "o", "markersize": 3, "linestyle": "-", "label": None if start else "held out"}
        curve(axes, heldout, heldout.values(), place + 1, **style)


def _setting(run: Path, name: str):
    """A setting that the run's first iteration recorded, or its default."""
    files = sorted(run.glob("iter*/config.toml"))
    return (read_config(files[0]) if files else flat(Config()))[name]
