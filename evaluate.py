"""Evaluate a run's base model and iterations, or any checkpoint; compare two results.

torchrun evaluate.py --config configs/zephyr-7b.toml --iter base,0-3
python evaluate.py --model DIR --tasks leaderboard --data data/eval --out DIR        # any checkpoint
python evaluate.py --compare runs/a/iter0/evaluation runs/a/iter3/evaluation
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from spin.config import Config
from spin.engine import cli
from spin.engine.distributed import ranks
from spin.engine.files import only_process
from spin.engine.prepare import open_model
from spin.engine.recipe import Recipe
from spin.evaluation.compare import compare
from spin.evaluation.runner import OWN, evaluate, load_tasks
from spin.iteration import evaluate_model
from spin.report.leaderboard import LEADERBOARD, details, table
from spin.report.results import evaluated, with_others
from spin.report.run import HELDOUT, write_report

SETTINGS = ("tasks", "data", "harness", "dtype", "limit")  # of [evaluate], with flags of their own


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--iter", help="models of the run: base, 0, 0-3, or several with commas")
    what.add_argument("--model", type=Path, help="a model directory; needs --out")
    what.add_argument("--compare", type=Path, nargs=2, metavar="DIR", help="two evaluations")
    parser.add_argument("--out", type=Path, help="with --model: directory of the results")
    for name in SETTINGS:
        parser.add_argument(f"--{name}", help=f"short for --evaluate.{name}=…")
    with cli.errors_in_words():
        known, _ = parser.parse_known_args(argv)
        if bool(known.out) != bool(known.model):
            raise ValueError("--model DIR and --out DIR, where its results are written, go together")
        if known.compare:
            sys.stdout.write(compare(*known.compare) + "\n")
            return
        # A checkpoint of unknown origin is evaluated with the defaults instead of a recipe's settings.
        parser.set_defaults(config="" if known.model else "configs/tiny.toml")
        given = {name: getattr(known, name) for name in SETTINGS}
        more = [f"--evaluate.{name}={value}" for name, value in given.items() if value is not None]
        arguments, recipe = cli.parse(parser, argv, more)
        if arguments.model:
            evaluate_directory(recipe.at(0), arguments.model, arguments.out)
        else:
            evaluate_run(recipe, cli.iterations(arguments.iter, base=True))


def evaluate_directory(config: Config, model: Path, out: Path) -> None:
    """Evaluate any model directory; print a table."""
    check(config, model)
    with ranks() as group, only_process(out, hold=group.first):
        evaluate(config, model, out.resolve(), group)
        if group.first:
            sys.stdout.write(details(evaluated({model.name: [out]}), subjects=True) + "\n")


def evaluate_run(recipe: Recipe, numbers: list[int]) -> None:
    """Evaluate a run's models, each with its iteration's settings; write the report and print its tables."""
    configs = {n: recipe.at(max(n, 0)) for n in numbers}
    for n, config in configs.items():
        check(config, config.model_dir(n), f"; run train.py --iter {max(n, 0)} first")
    run = Path(recipe.at(0).run.dir)
    with ranks() as group, only_process(Path(recipe.at(0).run.dir), group.first):
        for n, config in configs.items():
            evaluate_model(config, n, group)
        if group.first:
            report, models = write_report(run), evaluated(with_others([run]))
            tables = filter(None, (table(models, HELDOUT, ".3f"), table(models, LEADERBOARD, average=True)))
            sys.stdout.write("\n" + "\n\n".join(tables) + f"\n\n{report}: the tables with their figures\n")


def check(config: Config, model: Path, remedy: str = "") -> None:
    """Raise ValueError or OSError for what would stop the evaluation later."""
    if not config.evaluates:
        raise ValueError("nothing to evaluate on: set evaluate.tasks, or evaluate.heldout, or give --tasks")
    if not model.is_dir():
        raise FileNotFoundError(f"{model}: no such model directory{remedy}")
    if not (model / "config.json").is_file() and (model / "model" / "config.json").is_file():
        raise FileNotFoundError(f"{model}: the model is in {model / 'model'}")
    tasks, (_, tokenizer) = load_tasks(config), open_model(model)
    if any(task.name in OWN for task in tasks):  # those that have prompts
        tokenizer.encode_prompt([{"role": "user", "content": "Hi"}], config.train.template)


if __name__ == "__main__":
    main()
