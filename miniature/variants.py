"""SPIN and its variants in miniature, over several seeds: docs/variants.md.

    python -m miniature.variants --seeds 5 --out runs/variants      # `make variants`
    python -m miniature.variants --only IPO "SPACE, μ = 1/2"        # and SPIN

Each is run with several values of λ on the first two seeds, and with the best of them on all. All train the
same number of steps on the same prompts; seeds have their own worlds and base models. Writes OUT/report.md
and a figure; a killed run resumes.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import nan
from pathlib import Path

import numpy as np
from tqdm import tqdm

from miniature.paper import run_seed, script, settings_of
from spin.engine.files import read_json, write_whole
from spin.report.figures import COLORS, finish, save, subplots
from spin.report.markdown import markdown, number

TUNING = 2  # seeds with several values of λ
BETAS = (0.5, 1.0, 2.0, 4.0)
LOSSES: dict[str, tuple[str, tuple[float, ...]]] = {  # {name: (settings, λ)}
    "SPIN": ("", BETAS),
    "hinge": ("--train.loss=hinge", (0.25, 0.5, 1.0)),
    "exponential": ("--train.loss=exponential", (0.25, 0.5, 1.0, 2.0)),
    "correlation": ("--train.loss=correlation", (0.5, 1.0, 2.0)),
    "IPO": ("--train.loss=ipo", (0.05, 0.1, 0.2, 0.4)),
    "per token": ("--train.loss=per-token", (2.5, 5.0, 10.0, 20.0)),
    "SPPO": ("--train.loss=sppo", (0.05, 0.1, 0.2, 0.4)),
    "GSIL": ("--train.loss=gsil", BETAS),
    "SPACE, μ = 1/2": ("--train.loss=space --train.mu=0.5", BETAS),
    "T-SPIN": ("--train.loss=t-spin --train.reference=none", (0.03, 0.1, 0.3, 1.0)),
    "two negatives": ("--generate.samples=2", BETAS),
}
# The first iteration of these is SPIN's with the same λ: there the opponent is the base.
LATER = {
    "base as reference": ("--train.reference=base", BETAS),
    "α-SPIN, α = 0.75": ("--train.reference=mixture --train.alpha=0.75", BETAS),
    "fictitious play": ("--train.replay=9 --train.replay_share=equal --train.epochs=4", BETAS),
    "half answered afresh": ("--generate.share=0.5", BETAS),
}
METRICS = {
    "exact_match_sampled": "right when sampled",
    "exact_match": "right when greedy",
    "logp": "log p(right answer), nats",
}


def path(name: str, beta: float) -> str:
    """Directory of a variant's run in a seed's folder."""
    return f"{''.join(c for c in name if c.isascii() and c.isalnum())}-{beta:g}"


def run(seed: int, folder: Path, chosen: Mapping[str, Sequence[float]], bar: tqdm) -> None:
    """Make what is missing of a seed: {variant: values of λ}."""
    run_seed(seed, folder, ["2"], [])
    for name, beta in ((name, beta) for name, betas in chosen.items() for beta in betas):
        changes, _ = (LOSSES | LATER)[name]
        source, iterations = (path("SPIN", beta), "1-3") if name in LATER else ("run", "0-3")
        directory = folder / path(name, beta)
        if name in LATER and not finished(folder / source):
            run(seed, folder, {"SPIN": [beta]}, tqdm(disable=True))
        if not finished(directory):
            where = ("--from", f"{folder}/{source}", "--iter", iterations, f"--run.dir={directory}")
            script("train.py", *where, *settings_of(seed, folder), f"--train.beta={beta}", *changes.split())
        bar.update()


def finished(run: Path) -> bool:
    return (run / "iter3" / "evaluation" / "summary.json").is_file()


def run_seeds(seeds: Sequence[tuple[int, Path]], chosen: Mapping[str, Sequence[float]]) -> None:
    total = len(seeds) * sum(map(len, chosen.values()))
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=total, unit="run") as bar:
        for done in [pool.submit(run, *seed, chosen, bar) for seed in seeds]:
            done.result()


def values(folders: Sequence[Path], where: str, metric: str) -> np.ndarray:
    """(seeds, 4): a metric of the held-out answers after each iteration."""
    files = [[f / where / f"iter{n}" / "evaluation" / "summary.json" for n in range(4)] for f in folders]
    return np.array([[read_json(file)["tasks"]["heldout"][metric] for file in row] for row in files])


def table(folders: Sequence[Path], betas: Mapping[str, Sequence[float]], best: Mapping[str, float]) -> str:
    """Markdown: by iteration, and the lead on SPIN at its best λ, seed by seed."""
    rows = [["", "λ", "seeds", *METRICS.values(), "sampled − SPIN, iteration 3"]]
    runs = [
        (name, f"{beta:g}", path(name, beta), beta == best[name]) for name in betas for beta in betas[name]
    ]
    for name, beta, where, is_best in [*runs, ("continued SFT", "", "run/control", True)]:
        seeds = folders if is_best else folders[:TUNING]
        found = {metric: values(seeds, where, metric) for metric in METRICS}
        spin = values(seeds, path("SPIN", best["SPIN"]), "exact_match_sampled")
        lead = (found["exact_match_sampled"] - spin)[:, 3]
        cells = [*map(by_iteration, found.values()), mean_sd(lead, "+.3f")]
        rows.append([name, beta, str(len(seeds)), *(f"**{cell}**" if is_best else cell for cell in cells)])
    return markdown(rows)


def mean_sd(each: np.ndarray, form: str) -> str:
    """Mean and standard deviation between seeds."""
    return number(each.mean(), each.std(ddof=1) if len(each) > 1 else nan, form)


def by_iteration(found: np.ndarray) -> str:
    """Means after each iteration; of the last also the standard deviation between seeds."""
    return ", ".join([*(f"{mean:.3f}" for mean in found.mean(0)[:3]), mean_sd(found[:, 3], ".3f")])


def draw(folders: Sequence[Path], runs: dict[str, str], file: Path) -> str:
    """A row for each variant, at its best λ, and in it a marker for each iteration."""
    figure, grid = subplots(1, 2, (11, 1 + 0.33 * len(runs)), sharey=True)
    for axes, metric in zip(grid[0], METRICS):
        for place, where in enumerate(runs.values()):
            found = values(folders, where, metric)
            for n in range(4):
                sd = found[:, n].std(ddof=1) if n == 3 and len(found) > 1 else None
                style = {"marker": "o^sD"[n], "color": COLORS[n], "linestyle": "none", "capsize": 3}
                label = f"iteration {n}" if place == 0 else None
                axes.errorbar(found[:, n].mean(), place, xerr=sd, label=label, **style)
        axes.set_yticks(range(len(runs)), [*runs])
        axes.set_xlabel("share of held-out prompts")
        finish(axes, METRICS[metric])
    grid[0, 0].invert_yaxis()
    return save(figure, file, "Variants")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/variants"), help="default: %(default)s")
    names = [*LOSSES, *LATER]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="and SPIN; default: all")
    options = parser.parse_args()
    betas = {name: of for name, (_, of) in (LOSSES | LATER).items() if name in ["SPIN", *options.only]}
    seeds = [(seed, options.out / f"seed{seed}") for seed in range(options.seeds)]
    folders = [folder for _, folder in seeds]
    run_seeds(seeds[:TUNING], betas)

    def sampled(name: str, beta: float) -> float:
        return values(folders[:TUNING], path(name, beta), "exact_match_sampled")[:, 3].mean()

    best = {name: max(of, key=lambda beta: sampled(name, beta)) for name, of in betas.items()}
    run_seeds(seeds[TUNING:], {name: [beta] for name, beta in best.items()})
    drawn = {f"{name}, λ = {beta:g}": path(name, beta) for name, beta in best.items()}
    figure = draw(folders, drawn | {"continued SFT": "run/control"}, options.out / "variants.png")
    note = (
        "After iterations 0 to 3: means over the seeds, of the last ± standard deviation between them; 1,000 "
        f"held-out prompts each. Bold: the best λ, by sampled answers after iteration 3 in {TUNING} seeds."
    )
    title, rows = f"# Variants of SPIN in miniature, {options.seeds} seeds", table(folders, betas, best)
    write_whole(options.out / "report.md", "\n\n".join([title, figure, rows, note]) + "\n")
    print(options.out / "report.md")


if __name__ == "__main__":
    main()
