"""The evaluated models of runs, by the runs' names. Runs of one name differ in their seeds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

import numpy as np

from spin.config import Config
from spin.engine.files import read_json
from spin.engine.recipe import flat, read_config
from spin.evaluation.mt_bench import read_judgments


@dataclass(frozen=True)
class Model:
    """A row of the tables and a point of the figures: a model, in all the runs that have evaluated it."""

    run: str  # the name of its runs
    step: str  # "base", "iteration 0", "iteration 0, epoch 1"; "" if an evaluation was given, not a run
    name: str  # its own, in tables
    directories: tuple[Path, ...]  # its evaluations, one for each seed
    tasks: tuple[dict, ...]  # {task: metrics} of each
    paper: str  # which of the paper's models it is (leaderboard.PAPER); "": none
    x: float = math.nan  # its place in figures: 0 for the base, 1 for iteration 0, …; NaN without a step

    @property
    def on_the_way(self) -> bool:
        """Whether training went on after it was exported."""
        return ", epoch " in self.step


def directories(run: Path) -> dict[str, Path]:
    """{"base": directory, "iteration 0": …}: the base and the iterations of a run."""
    iterations = takewhile(Path.is_dir, (run / f"iter{n}" for n in count()))
    return {"base": run / "base"} | {f"iteration {n}": path for n, path in enumerate(iterations)}


def setting(run: Path, name: str):
    """A setting that the run's first iteration, or only its base, recorded; or its default."""
    files = [*sorted(run.glob("iter*/config.toml")), *run.glob("base/config.toml")]
    return (flat(Config()) | (read_config(files[0]) if files else {}))[name]


def with_others(runs: Sequence[Path], name: str = "") -> dict[str, list[Path]]:
    """Runs of one name and, by their directories' names, their controls and what was put into beside/."""
    own = name or ("SPIN" if setting(runs[0], "train.objective") == "spin" else "continued SFT")
    named = {own: list(runs)}
    for path in (path for run in runs for path in (run / "control", *sorted((run / "beside").glob("*")))):
        other = "continued SFT" if path.name == "control" else path.name
        if path.is_dir():
            named.setdefault(other if other != own else str(path), []).append(path)
    return named


def evaluations(run: Path) -> dict[str, Path]:
    """{step: its evaluation} of a run and its models along the way; {"": run} if that is an evaluation."""
    found = {"": run}
    for step, directory in directories(run).items():
        found[step] = directory / "evaluation"
        for path in directory.glob("epoch*"):
            found[f"{step}, epoch {path.name.removeprefix('epoch')}"] = path / "evaluation"
    return {step: path for step, path in found.items() if (path / "summary.json").is_file()}


def evaluated(named: dict[str, list[Path]]) -> list[Model]:
    """The evaluated models of named runs, those of each name in the order of their steps."""
    found = {name: [evaluations(run) for run in runs] for name, runs in named.items()}
    several = sum(any(set(steps) - {""} for steps in seeds) for seeds in found.values()) > 1
    runs = [run for of in named.values() for run in of]
    of_paper = any(setting(run, "run.paper") for run in runs)
    judged = {id: of for run in runs for id, of in read_judgments(run / "mt_bench_judgment").items()}
    models: list[Model] = []
    for run, seeds in found.items():
        own = setting(named[run][0], "run.paper") and setting(named[run][0], "train.objective") == "spin"
        # "base", "iteration 0", …, "iteration 10", "iteration 0, epoch 1"
        for step in sorted({step for steps in seeds for step in steps}, key=lambda step: (len(step), step)):
            paths = tuple(steps[step] for steps in seeds if step in steps)
            tasks = tuple(read_json(path / "summary.json")["tasks"] for path in paths)
            for answered in (of["mt_bench"] for of in tasks if "mt_bench" in of):
                answered |= judged.get(answered["model_id"], {})
            same = step == "base" and all(tasks == other.tasks for other in models if other.step == "base")
            name = ": ".join([run] * (several and not same) + [shown(step)]) if step else run
            name += f" ({len(paths)} of {len(seeds)} runs)" * (len(paths) < len(seeds))
            paper = step if own else run if of_paper and step != "base" else ""
            models.append(Model(run, step, name, paths, tasks, paper, position(step, named[run][0])))
    return models


def shown(step: str) -> str:
    return step.replace("base", "SFT model")


def position(step: str, run: Path) -> float:
    """A step's `Model.x`; its iteration's epochs divide the way from one iteration to the next."""
    n, _, epoch = step.replace("base", "-1").removeprefix("iteration ").partition(", epoch ")
    epochs = setting(run, "sft.epochs" if n == "-1" else "train.epochs")
    return int(n) + float(epoch or epochs) / epochs if step else math.nan


def having(models: Sequence[Model], tasks: Iterable[str]) -> list[Model]:
    """The models with a result of one of the tasks; a base that runs share once."""
    found: dict[str, Model] = {}
    for model in models:
        if any({*tasks} & {*of} for of in model.tasks):
            found.setdefault(model.name, model)
    return [*found.values()]


def values(model: Model, columns: Sequence[Sequence]) -> np.ndarray:
    """Value and standard error, NaN if missing, of each column (task, metric, …), and the columns' mean.

    Returns an array of (runs, columns + 1, 2): percent of benchmarks, others as they are.
    """
    cells = np.full((len(model.tasks), len(columns) + 1, 2), np.nan)
    for of, row in zip(model.tasks, cells):
        for (task, metric, *_), cell in zip(columns, row):
            found = [of.get(task, {}).get(key, np.nan) for key in (metric, f"{metric}_stderr")]
            cell[:] = np.array(found) * (1 if task in ("heldout", "mt_bench") else 100)
    cells[:, -1, 0] = cells[:, :-1, 0].mean(axis=1)
    return cells


def scores(models: Sequence[Model], columns: Sequence[Sequence]) -> np.ndarray:
    """(models, columns + 1, 2): the `spread` of each model's values."""
    return np.array([spread(values(model, columns)) for model in models])


def spread(cells: np.ndarray) -> np.ndarray:
    """(columns, 2) from (runs, columns, 2): a single run's; or means and standard deviations between runs."""
    if len(cells) == 1:
        return cells[0]
    return np.stack([cells[..., 0].mean(axis=0), cells[..., 0].std(axis=0, ddof=1)], axis=-1)


def errors(models: Sequence[Model]) -> str:
    """What ± stands for."""
    seeds = max(len(model.tasks) for model in models)
    return f"standard deviation between {seeds} runs" if seeds > 1 else "one standard error"
