"""The evaluated models of runs, by the runs' names. Runs of one name differ in their seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

import numpy as np

from spin.config import Config
from spin.engine.files import read_json
from spin.engine.recipe import flat, read_config


@dataclass(frozen=True)
class Model:
    """A row of the tables and a point of the figures: a model, in all the runs that have evaluated it."""

    run: str  # the name of its runs
    step: str  # "base", "iteration 0", …; "" if its evaluation was given instead of a run
    name: str  # its own, in tables
    directories: tuple[Path, ...]  # its evaluations, one for each seed
    tasks: tuple[dict, ...]  # {task: metrics} of each
    paper: str  # which of the paper's models it is (leaderboard.PAPER); "": none


def directories(run: Path) -> dict[str, Path]:
    """{"base": directory, "iteration 0": …}: the base and the iterations of a run."""
    iterations = takewhile(Path.is_dir, (run / f"iter{n}" for n in count()))
    return {"base": run / "base"} | {f"iteration {n}": path for n, path in enumerate(iterations)}


def setting(run: Path, name: str):
    """A setting that the run's first iteration recorded, or its default."""
    files = sorted(run.glob("iter*/config.toml"))
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
    """{step: its evaluation} of a run; {"": run} if that is an evaluation itself."""
    found = {step: directory / "evaluation" for step, directory in directories(run).items()}
    return {step: path for step, path in ({"": run} | found).items() if (path / "summary.json").is_file()}


def evaluated(named: dict[str, list[Path]]) -> list[Model]:
    """The evaluated models of named runs, those of each name in the order of their steps."""
    found = {name: [evaluations(run) for run in runs] for name, runs in named.items()}
    several = sum(any(set(steps) - {""} for steps in seeds) for seeds in found.values()) > 1
    of_paper = any(setting(run, "run.paper") for runs in named.values() for run in runs)
    models: list[Model] = []
    for run, seeds in found.items():
        own = setting(named[run][0], "run.paper") and setting(named[run][0], "train.objective") == "spin"
        for step in sorted({step for steps in seeds for step in steps}, key=by_number):
            paths = tuple(steps[step] for steps in seeds if step in steps)
            tasks = tuple(read_json(path / "summary.json")["tasks"] for path in paths)
            same = step == "base" and all(tasks == other.tasks for other in models if other.step == "base")
            name = ": ".join([run] * (several and not same) + [shown(step)]) if step else run
            name += f" ({len(paths)} of {len(seeds)} runs)" * (len(paths) < len(seeds))
            paper = step if own else "" if step or not of_paper else run
            models.append(Model(run, step, name, paths, tasks, paper))
    return models


def shown(step: str) -> str:
    return "SFT model" if step == "base" else step


def by_number(step: str) -> tuple[int, str]:
    """A key to sort steps: "base", "iteration 0", …, "iteration 10"."""
    return len(step), step


def having(models: Sequence[Model], tasks: Iterable[str]) -> list[Model]:
    """The models with a result of one of the tasks; a base that runs share once."""
    found: dict[str, Model] = {}
    for model in models:
        if any(set(tasks) & set(of) for of in model.tasks):
            found.setdefault(model.name, model)
    return list(found.values())


def by_run(models: Sequence[Model], cells: np.ndarray) -> dict[str, dict]:
    """{run: {step: its cell}} with one of the cells for each model."""
    result: dict[str, dict] = {}
    for model, cell in zip(models, cells):
        result.setdefault(model.run, {})[model.step] = cell
    return result


def values(model: Model, columns: Sequence[Sequence[str]]) -> np.ndarray:
    """Value and standard error, NaN if missing, of each column (task, metric, …), and the columns' mean.

    Returns an array of (runs, columns + 1, 2).
    """
    found = [[model_tasks.get(task, {}) for task, *_ in columns] for model_tasks in model.tasks]
    keys = [(metric, f"{metric}_stderr") for _, metric, *_ in columns]
    cells = [[[of.get(k, np.nan) for k in pair] for of, pair in zip(seed, keys)] for seed in found]
    means = [[[np.mean([value for value, _ in seed]), np.nan]] for seed in cells]
    return np.concatenate([cells, means], axis=1)


def scores(models: Sequence[Model], columns: Sequence[Sequence[str]]) -> np.ndarray:
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
