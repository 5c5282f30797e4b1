"""The paper's figures in miniature, over several seeds: each has its own world, base model and self-play.

    python -m miniature.paper --seeds 4 --out runs/paper                   # everything: `make paper`
    python -m miniature.paper --figures 2 --seeds 5 -- --train.beta=1      # one figure, with other settings

Writes OUT/report.md and a figure for each; a killed run resumes. What follows `--` overrides settings of
configs/tiny.toml in all runs of self-play.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import nan
from pathlib import Path

from miniature import world
from spin.engine.files import read_json, write_whole
from spin.report.figures import plot_bars, plot_steps
from spin.report.leaderboard import table
from spin.report.results import Model, scores, shown
from spin.report.run import HELDOUT

SIZES = (160, 320, 640)  # prompts
EPOCHS, SFT_EPOCHS = 5, 3
Curves = dict[str, dict[str, str]]  # {curve: {what it is trained on: its directory in a seed's folder}}
SPIN = {"base": "run/base"} | {f"iteration {n}": f"run/iter{n}" for n in range(4)}
FIGURES: dict[str, tuple[str, Curves]] = {
    "2": (
        "Figure 2: by iteration, with continued SFT (table 5)",
        {
            "SPIN": SPIN,
            "continued SFT": {step: path.replace("/iter", "/control/iter") for step, path in SPIN.items()},
        },
    ),
    "3": (
        "Figure 3: next to DPO on preference pairs (table 3)",
        {"SPIN": SPIN, "DPO": {"": "dpo/iter0"}, "SPIN then DPO": {"": "spin-dpo/iter0"}},
    ),
    "4": (
        "Figure 4: more epochs of iteration 0",
        {
            "iteration 0": {f"epoch {n}": f"epochs/iter0/epoch{n}" for n in range(1, EPOCHS)}
            | {f"epoch {EPOCHS}": "epochs/iter0"},
            "iteration 1, after 2 + 2 epochs": {"epoch 4": "run/iter1"},
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
    data, settings = folder / "world", settings_of(seed, folder)
    if not (data / "preferences.jsonl").is_file():
        world.write(seed, data)
    base, spin = f"--model.base={folder}/run/base/model", f"--model.base={folder}/run/iter3/model"

    def train(run: str, iterations: str, *more: str) -> None:
        what = ("--sft",) if iterations == "sft" else ("--iter", iterations)
        script("train.py", *what, *settings, f"--run.dir={folder / run}", *more, *overrides)

    pretraining = [f"--run.dir={folder}/pretraining", f"--data.path={data}/pretraining.jsonl"]
    tokenizer = [f"--sft.tokenizer={data}/tokenizer.model", f"--sft.seed={seed}"]
    script("train.py", "--sft", "--config", "configs/tiny-base.toml", *pretraining, *tokenizer)
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
        script("evaluate.py", "--iter", "base", *settings, f"--run.dir={folder}/sft", *overrides)


def settings_of(seed: int, folder: Path) -> list[str]:
    """What the runs of a seed have in common."""
    data = folder / "world"
    settings = [f"--{section}.seed={seed}" for section in ("sft", "generate", "train")]
    settings += [f"--data.path={data}/sft.jsonl", f"--evaluate.heldout={data}/heldout.jsonl"]
    return [*settings, f"--sft.init={folder}/pretraining/base/model"]


def script(*arguments: str) -> None:
    """Run one of the scripts in a process of its own."""
    print("python", *arguments, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the models are too small for more
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr[-2000:]}")


def models(folders: Sequence[Path], curves: Curves) -> list[Model]:
    """The models of a figure, evaluated in each seed."""
    found, places = [], list(dict.fromkeys(step for points in curves.values() for step in points))
    for run, points in curves.items():
        for step, path in points.items():
            paths = tuple(folder / path / "evaluation" for folder in folders)
            tasks = tuple(read_json(path / "summary.json")["tasks"] for path in paths)
            name = shown(step) if step == "base" else f"{run}: {step}" if step else run
            found.append(Model(run, step, name, paths, tasks, "", places.index(step)))
    return found


def figure(name: str, folders: Sequence[Path], out: Path) -> list[str]:
    """A figure and its table, in Markdown: means over the seeds, and the first curve's leads seed by seed."""
    title, curves = FIGURES[name]
    found = models(folders, curves)
    panels = {column[2]: scores(found, [column])[:, 0] for column in HELDOUT[:2]}
    file, what = out / f"figure{name}.png", "share of held-out prompts"
    if name == "3":
        bars = {
            panel: {m.name: (*cell, nan) for m, cell in zip(found, cells)} for panel, cells in panels.items()
        }
        drawn = plot_bars(file, bars, what, title)
    else:
        drawn = plot_steps(found, panels, file, what)
    return [f"## {title}", drawn, table(found, HELDOUT[:2], ".3f")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="default: %(default)s")
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=[*FIGURES], help="default: all")
    parser.add_argument("overrides", nargs="*", help="after --: settings of self-play")
    options = parser.parse_args()
    folders = [options.out / f"seed{seed}" for seed in range(options.seeds)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        more = options.figures, options.overrides
        for run in [pool.submit(run_seed, *each, *more) for each in enumerate(folders)]:
            run.result()
    parts = [f"# The paper in miniature, {options.seeds} seeds", *options.overrides]
    for name in options.figures:
        parts += figure(name, folders, options.out)
    parts.append("Means over the seeds ± standard deviation between them, 1,000 held-out prompts each.")
    write_whole(options.out / "report.md", "\n\n".join(parts) + "\n")
    print(options.out / "report.md")


if __name__ == "__main__":
    main()
