"""Write the opponent's responses of an iteration, or talk to models.

torchrun --nproc-per-node 8 generate.py --config configs/zephyr-7b.toml --iter 0   # then train.py
python generate.py --iter base,0,1 --prompt "…"                                    # side by side
python generate.py --model DIR --interactive                                       # any checkpoint
"""

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from spin.engine import cli
from spin.engine.distributed import ranks
from spin.iteration import check, check_model, run_base, run_iteration, working_on
from spin.talk import Speaker, side_by_side


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--iter",
        help="N: the prompts of iteration N, answered by the model before it; when talking: the "
        "models themselves, as in base,0,1",
    )
    which.add_argument(
        "--model",
        type=Path,
        nargs="+",
        help="when talking: model directories instead (asked under the recipe's train.template)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="talk: a question, put under the training's template")
    what.add_argument("--interactive", action="store_true", help="talk: a question on each line")
    with cli.errors_in_words():
        arguments, recipe = cli.parse(parser, argv)
        if arguments.interactive or arguments.prompt is not None:
            models = _models(arguments, recipe)
            if arguments.prompt is not None:
                # one in memory at a time
                _respond((Speaker(*model) for model in models), len(models), arguments.prompt)
            else:
                _interact([Speaker(*model) for model in models])
        elif arguments.model:
            raise ValueError(
                '--model goes with --prompt "…" or --interactive; without them, --iter names a job'
            )
        else:
            _generate(arguments, recipe)


def _generate(arguments, recipe) -> None:
    if not arguments.iter.isdigit():
        raise ValueError(
            f"--iter {arguments.iter}: one iteration at a time is generated for; several models, and base, "
            "are for --prompt and --interactive"
        )
    n = int(arguments.iter)
    config = recipe.at(n)
    check(recipe, [n])
    with ranks() as group, working_on(config, group):
        if n == 0 and not config.model.base:
            run_base(config, group)
        run_iteration(recipe, n, group, last_stage="generate")


def _models(arguments, recipe):
    """(name, directory, settings) of the models to talk to. Raises ValueError or OSError if one can't be
    loaded.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "--prompt and --interactive talk from one process; start python generate.py, without torchrun"
        )
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise ValueError("--prompt is empty")
    if arguments.model:
        models = [(path.name, path, recipe.at(0)) for path in arguments.model]
        if len({name for name, *_ in models}) < len(models):
            models = [(str(path), path, config) for _, path, config in models]
    else:
        numbers = cli.iterations(arguments.iter, base=True)
        models = [
            ("base" if n < 0 else f"iteration {n}", recipe.at(max(n, 0)).model_dir(n), recipe.at(max(n, 0)))
            for n in numbers
        ]
    for name, path, config in models:
        if not path.is_dir():
            made_by = "" if arguments.model else f"; {name} is made by train.py"
            raise FileNotFoundError(f"{path}: no such model{made_by}")
        check_model(path, config, (config.generate,))
    return models


def _interact(speakers: Sequence[Speaker]) -> None:
    """Answer each line of standard input."""
    prompt = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing and history for input()

        prompt = "> "
        print("A question on each line; Ctrl-D ends.")
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            continue
        if not prompt:
            print(f"> {line}")  # or nobody could tell which answer is whose
        try:
            _respond(speakers, len(speakers), line)
        except ValueError as error:
            print(f"error: {error}")


def _respond(speakers: Iterable[Speaker], count: int, question: str) -> None:
    """Print one model's answer as it comes, those of several side by side, as wide as the terminal."""
    answers = {}
    for speaker in tqdm(
        speakers, total=count, unit="answer", leave=False, disable=count == 1 or not sys.stderr.isatty()
    ):
        if count == 1:
            for piece in speaker.answer(question):
                print(piece, end="", flush=True)
            print()
            return
        answers[speaker.name] = "".join(speaker.answer(question))
        del speaker
    print(side_by_side(answers, shutil.get_terminal_size().columns))


if __name__ == "__main__":
    main()
