"""Evaluate a run's base model and iterations, or any checkpoint; compare two results; write a run's report.

    torchrun evaluate.py --config configs/zephyr-7b.toml --iter base,0-3
    python evaluate.py --model DIR --tasks leaderboard --data data/eval --out DIR        # any checkpoint
    python evaluate.py --compare runs/a/iter0/evaluation runs/a/iter3/evaluation
"""

import sys
from pathlib import Path

from spin import cli
from spin.distributed import ranks
from spin.evaluation.compare import compare
from spin.evaluation.runner import evaluate, load_tasks
from spin.iteration import check_model, evaluate_model, working_on
from spin.leaderboard import benchmarks, leaderboard_table, results_table
from spin.report import asked_report, evaluations, table, write_report

SETTINGS = ("tasks", "data", "harness", "dtype", "limit")  # of [evaluate], with flags of their own


def main() -> None:
    parser = cli.parser(__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--iter", help="which of the run's models: base, 0, 0-3, or several with commas")
    what.add_argument("--model", type=Path, help="a model directory instead; needs --out")
    what.add_argument("--compare", type=Path, nargs=2, metavar="DIR", help="two evaluations, document by document")
    what.add_argument("--report", action="store_true", help="write the run's report from what is there")
    parser.add_argument("--out", type=Path, help="with --model: where the results go")
    parser.add_argument("--show", action="append", default=[], metavar="TEXT", help="with --report: prompts with this in them")
    for name in SETTINGS:
        parser.add_argument(f"--{name}", help=f"short for --evaluate.{name}=…")
    with cli.errors_in_words():
        known, _ = parser.parse_known_args()
        given = [f"--evaluate.{name}={getattr(known, name)}" for name in SETTINGS if getattr(known, name) is not None]
        if known.compare:
            sys.stdout.write(compare(*known.compare) + "\n")
            return
        arguments, recipe = cli.parse(parser, given)
        config = recipe.at(0)
        if arguments.report:
            sys.stdout.write(f"{asked_report(Path(config.run.dir), arguments.show)}\n")
            return
        if not config.evaluates:
            raise ValueError(f"{recipe.path}: neither evaluate.tasks nor evaluate.heldout names something to evaluate on")
        if arguments.model:
            if not arguments.out:
                raise ValueError("--model needs --out DIR, where the results go")
            check_model(arguments.model, config, (config.evaluate,))
            tasks = load_tasks(config)
            with ranks() as group:
                summary, _ = evaluate(config, arguments.model, arguments.out.resolve(), group, tasks)
                if group.first:
                    sys.stdout.write(results_table(summary) + "\n")
            return
        numbers = cli.iterations(arguments.iter, base=True)
        absent = [n for n in numbers if not recipe.at(max(n, 0)).model_dir(n).is_dir()]
        if absent:
            path = recipe.at(max(absent[0], 0)).model_dir(absent[0])
            raise FileNotFoundError(f"{path}: no such model; run train.py {f'--iter {max(absent[0], 0)}'} first")
        for n in numbers:
            check_model(recipe.at(max(n, 0)).model_dir(n), config, (config.evaluate,))
        tasks = {recipe.at(max(n, 0)).evaluate: None for n in numbers}
        tasks = {settings: load_tasks(recipe.at(max(n, 0))) for settings, n in zip(tasks, numbers)}
        with ranks() as group, working_on(config, group):
            for n in numbers:
                own = recipe.at(max(n, 0))
                evaluate_model(own, n, group, tasks.get(own.evaluate))
            if group.first:
                run = Path(config.run.dir)
                report = write_report(run)
                tables = [table(run)] * any(evaluations(run)) + [leaderboard_table(found) for found in [benchmarks(run)] if found]
                sys.stdout.write("\n" + "\n\n".join(tables) + f"\n\n{report}: the tables with their figures\n")


if __name__ == "__main__":
    main()
