"""Run SPIN iterations, or the stages of them that are missing, from generation to evaluation.

python train.py --iter 0                                   # one process: a CPU, or one GPU
torchrun --nproc-per-node 8 train.py --config configs/zephyr-7b.toml --iter 0-3
python train.py --sft                                      # only the base model, by SFT
python train.py --from RUN --iter 1-3 --run.dir=NEW --train.beta=1      # from another run's iteration 0
"""

from collections.abc import Sequence
from pathlib import Path

from spin.engine import cli
from spin.engine.distributed import ranks
from spin.engine.files import only_process
from spin.engine.prepare import prepare_all
from spin.engine.stages import fork
from spin.iteration import evaluate_model, run_iteration


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--iter", help="which: 0, or 0-2, or 0,3")
    what.add_argument("--sft", action="store_true", help="train only the base model, by SFT")
    parser.add_argument("--from", dest="fork", metavar="RUN", help="start a new run from RUN's iterations")
    with cli.errors_in_words():
        arguments, recipe = cli.parse(parser, argv)
        run, wanted = recipe.at(0).run, [-1] if arguments.sft else cli.iterations(arguments.iter)
        if run.fork:
            fork(recipe.at(0), wanted[0])
        prepared = prepare_all(recipe, wanted)
        with ranks(run.shard_size) as group, only_process(Path(run.dir), group.first):
            for iteration in prepared:
                if iteration.n == 0:
                    evaluate_model(iteration.config, -1, group)  # the baseline of all iterations
                run_iteration(iteration, group)
                if iteration.n >= 0:
                    evaluate_model(iteration.config, iteration.n, group)
                    if group.first:
                        from spin.report.run import write_report  # not above: it imports the evaluation tasks

                        write_report(Path(run.dir))


if __name__ == "__main__":
    main()
