"""Write the opponent's responses of an iteration, and nothing after them; train.py goes on from there.

    torchrun --nproc-per-node 8 generate.py --config configs/zephyr-7b.toml --iter 0
"""

from spin import cli
from spin.distributed import ranks
from spin.iteration import check, run_base, run_iteration, working_on


def main() -> None:
    parser = cli.parser(__doc__.splitlines()[0])
    parser.add_argument("--iter", required=True, help="which iteration's opponent: 0 is the base model")
    with cli.errors_in_words():
        arguments, recipe = cli.parse(parser)
        if len(cli.iterations(arguments.iter)) > 1:
            raise ValueError(f"--iter {arguments.iter}: one at a time; the next opponent does not exist yet")
        n = cli.iterations(arguments.iter)[0]
        config = recipe.at(n)
        check(recipe, [n])
        with ranks() as group, working_on(config, group):
            if n == 0 and not config.model.base:
                run_base(config, group)
            run_iteration(recipe, n, group, last_stage="generate")


if __name__ == "__main__":
    main()
