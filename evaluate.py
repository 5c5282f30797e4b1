"""Evaluate the base model and iterations on the recipe's held-out file, write the run's report, print its table.

    torchrun evaluate.py --iter base,0-3
    python evaluate.py --model DIR --out DIR        # any checkpoint
"""

from pathlib import Path

from spin import cli
from spin.distributed import ranks
from spin.evaluation.heldout import evaluate_heldout
from spin.iteration import evaluate_model, working_on
from spin.report import table, write_report


def main() -> None:
    parser = cli.parser(__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--iter", help="which of the run's models: base, 0, 0-3, or several with commas")
    what.add_argument("--model", type=Path, help="a model directory instead; needs --out")
    parser.add_argument("--out", type=Path, help="with --model: where the results go")
    with cli.errors_in_words():
        arguments, recipe = cli.parse(parser)
        config = recipe.at(0)
        if not config.evaluate.heldout:
            raise ValueError(f"{recipe.path}: evaluate.heldout is not set, so there is nothing to evaluate on")
        if arguments.model and not arguments.out:
            raise ValueError("--model needs --out DIR, where the results go")
        if arguments.model:
            with ranks() as group:
                summary = evaluate_heldout(config, arguments.model, arguments.out.resolve(), group)
                if group.first:
                    print("\n".join(f"{name} = {value}" for name, value in summary["tasks"]["heldout"].items()))
            return
        numbers = cli.iterations(arguments.iter, base=True)
        absent = [n for n in numbers if not recipe.at(max(n, 0)).model_dir(n).is_dir()]
        if absent:
            path = recipe.at(max(absent[0], 0)).model_dir(absent[0])
            raise FileNotFoundError(f"{path}: no such model; run train.py {f'--iter {max(absent[0], 0)}'} first")
        with ranks() as group, working_on(config, group):
            for n in numbers:
                evaluate_model(recipe.at(max(n, 0)), n, group)
            if group.first:
                report = write_report(Path(config.run.dir))
                print(f"\n{table(Path(config.run.dir))}\n\n{report}: the table with its figures")


if __name__ == "__main__":
    main()
