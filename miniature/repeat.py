"""The default recipe and its control over several seeds: world, base model, SFT model and self-play, all made
anew.

Fills the table in docs/miniature.md.

    python -m miniature.repeat --seeds 5
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from miniature import world
from spin.report.run import evaluations

DOCS = Path("docs/miniature.md")
START, END = "<!-- measured: python -m miniature.repeat -->", "<!-- end -->"
MODELS = ("base", "iteration 0", "iteration 1", "iteration 2", "iteration 3")
MEASURES = {"exact_match_sampled": "sampled", "exact_match": "greedy"}


def run_seed(seed: int, folder: Path) -> None:
    """Everything of one seed, or what is missing of it."""
    if not (folder / "world" / "sft.jsonl").is_file():
        world.write(seed, folder / "world")
    base = [
        f"--run.dir={folder}/pretraining",
        f"--data.path={folder}/world/pretraining.jsonl",
        f"--sft.tokenizer={folder}/world/tokenizer.model",
        f"--sft.seed={seed}",
    ]
    tiny = [
        f"--data.path={folder}/world/sft.jsonl",
        f"--evaluate.heldout={folder}/world/heldout.jsonl",
        f"--sft.init={folder}/pretraining/base/model",
        *(f"--{section}.seed={seed}" for section in ("sft", "generate", "train")),
    ]
    run = folder / "run"
    control = [f"--run.dir={run}/control", f"--model.base={run}/base/model", "--train.objective=sft"]
    _script("train.py", "--sft", "--config", "configs/tiny-base.toml", *base)
    _script("train.py", "--iter", "0-3", *tiny, f"--run.dir={run}")
    _script("train.py", "--iter", "0-3", *tiny, *control)
    _script("evaluate.py", "--iter", "base,0-3", *tiny, f"--run.dir={run}")


def table(folders: list[Path]) -> str:
    """Markdown: mean ± standard deviation over the seeds, and the lead of SPIN seed by seed."""
    lines = ["| held-out, right answers | SFT | iteration 0 | 1 | 2 | 3 |", "|---|---|---|---|---|---|"]
    results = {"SPIN": [evaluations(f / "run") for f in folders]}
    bases = [{"base": values["base"]} for values in results["SPIN"]]
    results["continued SFT"] = [b | evaluations(f / "run" / "control") for b, f in zip(bases, folders)]
    for who, seeds in results.items():
        for key, what in MEASURES.items():
            cells = (_mean_sd([values[model][key] for values in seeds]) for model in MODELS)
            lines.append(f"| {who}, {what} | {' | '.join(cells)} |")
    for key, what in MEASURES.items():
        pairs = list(zip(*results.values()))
        cells = (_mean_sd([ours[m][key] - theirs[m][key] for ours, theirs in pairs], "+") for m in MODELS[1:])
        lines.append(f"| SPIN − continued SFT, seed by seed, {what} | | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{len(folders)} seeds, mean ± standard deviation between seeds."])


def _mean_sd(values: list[float], sign: str = "") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.3f} ± {spread:.3f}"


def _script(*arguments: str) -> None:
    print("python", *arguments, flush=True)
    subprocess.run([sys.executable, *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    folders = [Path("runs/miniature") / f"seed{seed}" for seed in range(seeds)]
    for seed, folder in enumerate(folders):
        run_seed(seed, folder)
    text = table(folders)
    before, after = (
        DOCS.read_text(encoding="utf-8").split(START)[0],
        DOCS.read_text(encoding="utf-8").split(END)[1],
    )
    DOCS.write_text(f"{before}{START}\n{text}\n{END}{after}")
    print(text)


if __name__ == "__main__":
    main()
