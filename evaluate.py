"""Evaluate a run's base model and iterations, or any checkpoint; compare two results; write a run's report.

torchrun evaluate.py --config configs/zephyr-7b.toml --iter base,0-3
python evaluate.py --model DIR --tasks leaderboard --data data/eval --out DIR        # any checkpoint
python evaluate.py --compare runs/a/iter0/evaluation runs/a/iter3/evaluation
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from spin.config import Config, Recipe
from spin.engine import cli
from spin.engine.distributed import ranks
from spin.engine.files import only_process
from spin.evaluation.compare import compare
from spin.evaluation.runner import evaluate, load_tasks
from spin.iteration import check_model, evaluate_model, working_on
from spin.report.leaderboard import benchmarks, leaderboard_table, results_table
from spin.report.run import asked_report, evaluations, table, write_report

SETTINGS = ("tasks", "data", "harness", "dtype", "limit")  # of [evaluate], with flags of their own


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--iter", help="which of the run's models: base, 0, 0-3, or several with commas")
    what.add_argument("--model", type=Path, help="a model directory instead; needs --out")
    what.add_argument(
        "--compare", type=Path, nargs=2, metavar="DIR", help="two evaluations, document by document"
    )
    what.add_argument("--report", action="store_true", help="write the run's report from what is there")
    parser.add_argument("--out", type=Path, help="with --model: where the results go")
    parser.add_argument(
        "--show", action="append", default=[], metavar="TEXT", help="with --report: prompts with this in them"
    )
    for name in SETTINGS:
        parser.add_argument(f"--{name}", help=f"short for --evaluate.{name}=…")
    with cli.errors_in_words():
        known, _ = parser.parse_known_args(argv)
        given = [
            f"--evaluate.{name}={getattr(known, name)}"
            for name in SETTINGS
            if getattr(known, name) is not None
        ]
        if known.compare:
            sys.stdout.write(compare(*known.compare) + "\n")
            return
        # A checkpoint of unknown origin is not asked by the default recipe's settings, but by the defaults.
        parser.set_defaults(config="" if known.model else "configs/tiny.toml")
        arguments, recipe = cli.parse(parser, argv, given)
        if arguments.model:
            evaluate_directory(recipe.at(0), arguments.model, arguments.out)
        elif arguments.report:
            sys.stdout.write(f"{asked_report(Path(recipe.at(0).run.dir), arguments.show)}\n")
        else:
            evaluate_run(recipe, cli.iterations(arguments.iter, base=True))


def evaluate_directory(config: Config, model: Path, out: Path | None) -> None:
    """Any model directory, results to `out`, printed as a table."""
    if not out:
        raise ValueError("--model needs --out DIR, where the results go")
    check(config, model)
    with ranks() as group, only_process(out, hold=group.first):
        summary, _ = evaluate(config, model, out.resolve(), group)
        if group.first:
            names = [task.name for task in load_tasks(config)]
            sys.stdout.write(results_table(summary, names) + "\n")


def evaluate_run(recipe: Recipe, numbers: list[int]) -> None:
    """A run's models, each by its iteration's settings; the run's report, its tables printed."""
    configs = {n: recipe.at(max(n, 0)) for n in numbers}
    for n, config in configs.items():
        if not config.model_dir(n).is_dir():
            command = f"train.py {f'--iter {max(n, 0)}'}"
            raise FileNotFoundError(f"{config.model_dir(n)}: no such model; run {command} first")
        check(config, config.model_dir(n))
    run = Path(recipe.at(0).run.dir)
    with ranks() as group, working_on(recipe.at(0), group):
        for n, config in configs.items():
            evaluate_model(config, n, group)
        if group.first:
            report, found = write_report(run), benchmarks(run)
            tables = [table(run)] * any(evaluations(run)) + [leaderboard_table(found)] * bool(found)
            sys.stdout.write("\n" + "\n\n".join(tables) + f"\n\n{report}: the tables with their figures\n")


def check(config: Config, model: Path) -> None:
    """Raise ValueError or OSError for whatever would stop the evaluation later on."""
    if not config.evaluates:
        raise ValueError("nothing to evaluate on: set evaluate.tasks, or evaluate.heldout, or give --tasks")
    if not model.is_dir():
        raise FileNotFoundError(f"{model}: no such model directory")
    if not (model / "config.json").is_file() and (model / "model" / "config.json").is_file():
        raise FileNotFoundError(f"{model}: the model is in {model / 'model'}")
    load_tasks(config)
    check_model(model, config, (config.evaluate,))


if __name__ == "__main__":
    main()
