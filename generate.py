"""Write the opponent's responses of an iteration, or talk to models.

torchrun --nproc-per-node 8 generate.py --config configs/zephyr-7b.toml --iter 0   # then train.py
python generate.py --iter base,0,1 --prompt "…"                                    # side by side
python generate.py --iter base,0-2 --prompt "…" "…" --markdown FILE                # as the paper's table 7
python generate.py --model DIR --interactive                                       # any checkpoint
"""

from collections.abc import Sequence
from pathlib import Path

from spin.engine import cli
from spin.engine.distributed import ranks
from spin.engine.files import only_process
from spin.engine.prepare import prepare_all
from spin.iteration import run_iteration
from spin.talk import ask, interact, models


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--iter", help="N: answer iteration N's prompts; when talking: models, as in base,0,1")
    which.add_argument("--model", type=Path, nargs="+", help="when talking: model directories instead")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", nargs="+", help="answer questions, formatted with train.template")
    what.add_argument("--interactive", action="store_true", help="answer each line of standard input")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="with --prompt: write answers to FILE")
    with cli.errors_in_words():
        arguments, recipe = cli.parse(parser, argv)
        if arguments.markdown and not arguments.prompt:
            raise ValueError("--markdown FILE needs --prompt")
        if arguments.prompt or arguments.interactive:
            numbers = cli.iterations(arguments.iter, base=True) if arguments.iter else []
            found = models(recipe, numbers, arguments.model or [])
            interact(found) if arguments.interactive else ask(found, arguments.prompt, arguments.markdown)
        elif arguments.model or not arguments.iter.isdigit():
            raise ValueError("--model and several --iter need --prompt or --interactive")
        else:
            prepared = prepare_all(recipe, cli.iterations(arguments.iter))
            if not prepared[-1].generates:
                raise ValueError("data.pairs or train.objective = sft is set, so nothing is generated")
            run = recipe.at(0).run
            with ranks(run.shard_size) as group, only_process(Path(run.dir), group.first):
                for iteration in prepared:
                    run_iteration(iteration, group, "generate" if iteration.n >= 0 else "export")


if __name__ == "__main__":
    main()
