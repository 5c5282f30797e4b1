"""Run SPIN iterations: what is missing of them, from the opponent's responses to the evaluated model.

python train.py --iter 0                                   # one process: a CPU, or one GPU
torchrun --nproc-per-node 8 train.py --config configs/zephyr-7b.toml --iter 0-3
python train.py --sft                                      # the base model alone, by plain SFT
"""

from collections.abc import Sequence
from pathlib import Path

from spin.engine import cli
from spin.engine.distributed import ranks
from spin.iteration import check, evaluate_model, run_base, run_iteration, working_on


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--iter", help="which: 0, or 0-2, or 0,3")
    what.add_argument("--sft", action="store_true", help="train the base model by SFT")
    with cli.errors_in_words():
        arguments, recipe = cli.parse(parser, argv)
        numbers = [] if arguments.sft else cli.iterations(arguments.iter)
        config = recipe.at(0)
        check(recipe, numbers)
        with ranks(config.run.shard_size) as group, working_on(config, group):
            if arguments.sft or (0 in numbers and not config.model.base):
                run_base(config, group)
            if 0 in numbers:
                evaluate_model(config, -1, group)  # what the iterations are compared with
            for n in numbers:
                run_iteration(recipe, n, group)
                if group.first:
                    from spin.report.run import write_report  # matplotlib, at the end

                    write_report(Path(config.run.dir))


if __name__ == "__main__":
    main()
