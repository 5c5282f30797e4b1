"""The paper's figures in miniature, over several seeds: each has its own world, base model and self-play.

    python -m miniature.paper --seeds 4 --out runs/paper                   # everything: `make paper`
    python -m miniature.paper --figures 2 --seeds 5 -- --train.beta=1      # one figure, with other settings

Writes OUT/report.md and a figure for each; a killed run resumes. What follows `--` overrides settings of
configs/tiny.toml in all runs of self-play.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from miniature import world
from spin.engine.files import read_json, write_whole
from spin.report.figures import COLORS, HATCHES, curve, finish, save, subplots
from spin.report.markdown import markdown

METRICS = {"exact_match_sampled": "right when sampled", "exact_match": "right when greedy"}
SIZES = (160, 320, 640)  # prompts
EPOCHS, SFT_EPOCHS = 5, 3
Evaluations = dict[str, dict[str, str]]  # {curve: {what it is trained on: its evaluation in a seed's folder}}
ITERATIONS = [f"iteration {n}" for n in range(4)]
SPIN = {name: f"run/iter{n}" for n, name in enumerate(ITERATIONS)}
FIGURES: dict[str, tuple[str, Evaluations]] = {
    "2": (
        "Figure 2: by iteration, with continued SFT (table 5)",
        {
            "SPIN": {"SFT": "run/base"} | SPIN,
            "continued SFT": {"SFT": "run/base"}
            | {n: p.replace("run", "run/control") for n, p in SPIN.items()},
        },
    ),
    "3": (
        "Figure 3: next to DPO on preference pairs (table 3)",
        {"": {"SFT": "run/base", **SPIN, "DPO": "dpo/iter0", "SPIN, then DPO": "spin-dpo/iter0"}},
    ),
    "4": (
        "Figure 4: more epochs of iteration 0",
        {
            "iteration 0": {f"{n}": f"epochs/iter0/epoch{n}" for n in range(1, EPOCHS)}
            | {f"{EPOCHS}": "epochs/iter0"},
            "iteration 1, after 2 + 2 epochs": {"4": "run/iter1"},
        },
    ),
    "5": (
        "Figure 5: training size",
        {
            "SPIN, one epoch": {f"{n}": f"size{n}/iter0" for n in SIZES},
            "SFT, 1 to 3 epochs of 640": {f"epoch {n}": f"sft/base/epoch{n}" for n in range(1, SFT_EPOCHS)}
            | {f"epoch {SFT_EPOCHS}": "sft/base"},
        },
    ),
}


def run_seed(seed: int, folder: Path, figures: Sequence[str], overrides: Sequence[str]) -> None:
    """Everything that the figures need of one seed, or what is missing of it."""
    data = folder / "world"
    if not (data / "preferences.jsonl").is_file():
        world.write(seed, data)
    settings = [f"--{section}.seed={seed}" for section in ("sft", "generate", "train")]
    settings += [f"--data.path={data}/sft.jsonl", f"--evaluate.heldout={data}/heldout.jsonl"]
    settings += [f"--sft.init={folder}/pretraining/base/model"]
    base, spin = f"--model.base={folder}/run/base/model", f"--model.base={folder}/run/iter3/model"

    def train(run: str, iterations: str, *more: str) -> None:
        what = ("--sft",) if iterations == "sft" else ("--iter", iterations)
        _script("train.py", *what, *settings, f"--run.dir={folder / run}", *more, *overrides)

    pretraining = [f"--run.dir={folder}/pretraining", f"--data.path={data}/pretraining.jsonl"]
    tokenizer = [f"--sft.tokenizer={data}/tokenizer.model", f"--sft.seed={seed}"]
    _script("train.py", "--sft", "--config", "configs/tiny-base.toml", *pretraining, *tokenizer)
    train("run", "0-3")
    if "2" in figures:
        train("run/control", "0-3", base, "--train.objective=sft")
    if "3" in figures:
        pairs = f"--data.pairs={data}/preferences.jsonl"
        train("dpo", "0", base, pairs)
        train("spin-dpo", "0", spin, pairs)
    if "4" in figures:
        longer = [
            f"--train.epochs={EPOCHS}",
            f"--train.schedule_epochs={EPOCHS + 1}",
            "--train.export_every=1",
        ]
        train("epochs", "0", base, *longer)
    if "5" in figures:
        for size in SIZES:
            train(f"size{size}", "0", base, f"--data.num_prompts={size}", "--train.epochs=1")
        train("sft", "sft", f"--sft.epochs={SFT_EPOCHS}", "--sft.export_every=1")
        _script("evaluate.py", "--iter", "base", *settings, f"--run.dir={folder}/sft")


def _script(*arguments: str) -> None:
    print("python", *arguments, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the models are too small for more
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr[-2000:]}")


def values(folders: Sequence[Path], path: str, metric: str) -> list[float]:
    """A model's held-out metric in each seed."""
    files = (folder / path / "evaluation" / "summary.json" for folder in folders)
    return [read_json(file)["tasks"]["heldout"][metric] for file in files]


def mean_sd(numbers: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def table(folders: Sequence[Path], curves: Evaluations) -> str:
    """Markdown: mean ± standard deviation between seeds; for later curves also their lead, seed by seed."""
    rows = [["", "", *METRICS.values()]]
    for name, points in curves.items():
        for x, path in points.items():
            cells = (mean_sd(values(folders, path, metric)) for metric in METRICS)
            rows.append([name, x, *(f"{mean:.3f} ± {sd:.3f}" for mean, sd in cells)])
    first = next(iter(curves))
    for name in [*curves][1:]:
        for x in (x for x in curves[first] if x in curves[name] and x != "SFT"):
            pairs = (
                [a - b for a, b in zip(*(values(folders, curves[c][x], metric) for c in (first, name)))]
                for metric in METRICS
            )
            rows.append([f"{first} − {name}", x, *("{:+.3f} ± {:.3f}".format(*mean_sd(d)) for d in pairs)])
    return markdown(rows)


def draw(folders: Sequence[Path], title: str, curves: Evaluations, file: Path) -> str:
    """A panel for each metric: curves with error bars, or bars if there is only one."""
    figure, grid = subplots(1, len(METRICS), (11, 4.2), sharey=True)
    places = list(dict.fromkeys(x for points in curves.values() for x in points))
    for axes, (metric, label) in zip(grid[0], METRICS.items()):
        for number, (name, points) in enumerate(curves.items()):
            means, sds = zip(*(mean_sd(values(folders, path, metric)) for path in points.values()))
            x = [places.index(point) for point in points]
            if len(curves) == 1:
                for i, place in enumerate(x):
                    style = {"color": COLORS[i % 7], "hatch": HATCHES[i % 7], "edgecolor": "white"}
                    axes.bar(place, means[i], yerr=sds[i], capsize=3, **style)
            else:
                curve(axes, x, means, number, yerr=sds, label=name)
        slant = {"rotation": 30, "ha": "right"} if max(map(len, places)) > 2 else {}
        axes.set_xticks(range(len(places)), places, **slant)
        finish(axes, label, "share of held-out prompts" if axes is grid[0, 0] else "")
    return save(figure, file, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="default: %(default)s")
    parser.add_argument("--figures", default="2,3,4,5", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", help="after --: settings of self-play")
    options = parser.parse_args()
    figures = [name for name in options.figures.split(",") if name in FIGURES]
    folders = [options.out / f"seed{seed}" for seed in range(options.seeds)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [pool.submit(run_seed, *each, figures, options.overrides) for each in enumerate(folders)]
        for run in runs:
            run.result()
    parts = [f"# The paper in miniature, {options.seeds} seeds", *options.overrides]
    for name in figures:
        title, curves = FIGURES[name]
        figure = draw(folders, title, curves, options.out / f"figure{name}.png")
        parts += [f"## {title}", figure, table(folders, curves)]
    parts.append("Means over the seeds ± standard deviation between them, 1,000 held-out prompts each.")
    write_whole(options.out / "report.md", "\n\n".join(parts) + "\n")
    print(options.out / "report.md")


if __name__ == "__main__":
    main()
