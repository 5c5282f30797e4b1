"""A target that moves: of the opponent's own responses to a prompt, the one that scores best is the real one.

    python generate.py --iter 0 --generate.samples=2 --model.base=BASE --run.dir=runs/samples
    python -m miniature.dynamic_target runs/samples/iter0/generated --out pairs.jsonl --score module:function
    python train.py --iter 0 --data.pairs=pairs.jsonl --model.base=BASE --run.dir=runs/dynamic

The function is called with prompt, real and response, three texts, and returns a number. The default is the
miniature's own check; docs/variants.md has two rounds.
"""

import argparse
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from miniature.world import PHRASINGS, answer
from spin.data import Example
from spin.engine import cli
from spin.engine.files import to_jsonl, write_whole
from spin.opponent import read_pairs


def right(prompt: str, real: str, response: str) -> float:
    """1 for the right answer to a prompt of the miniature's world, which `real` may not be; else 0."""
    for skill, phrasings in PHRASINGS.items():
        for before, after in (phrasing.split("{}") for phrasing in phrasings):
            if prompt.startswith(before) and prompt.endswith(after):
                return float(response.strip() == answer(skill, prompt[len(before) :].removesuffix(after)))
    raise ValueError(f"{prompt!r}: not a prompt of the miniature's world; set --score")


def contests(
    examples: Iterable[Example], score: Callable[[str, str, str], float], with_real: bool = False
) -> Iterator[Example]:
    """The best response of each prompt as the real one, the worst as the generated one; no ties.

    Only its generated responses compete, or also the real one. Empty ones do not: data.pairs can't have them.
    """
    for example in examples:
        texts = filter(str.strip, [*example.generated, *[example.real] * with_real])
        scores = {text: score(example.question, example.real, text) for text in texts}
        if scores and max(scores.values()) > min(scores.values()):
            best, worst = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
            yield replace(example, real=best, generated=(worst,))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("generated", type=Path, help="directory of a generate stage, of several samples")
    parser.add_argument("--out", type=Path, required=True, help="file of pairs, for data.pairs")
    parser.add_argument("--score", default="miniature.dynamic_target:right", help="default: %(default)s")
    parser.add_argument("--with-real", action="store_true", help="the real response competes, too")
    options = parser.parse_args(argv)
    module, _, function = options.score.partition(":")
    score = getattr(importlib.import_module(module), function)
    with cli.errors_in_words():
        examples = read_pairs(options.generated, {})
        pairs = list(contests(examples, score, options.with_real))
        if not pairs:
            raise ValueError(f"{options.generated}: only ties; sample more (--generate.samples=4)")
        write_whole(options.out, to_jsonl(row for pair in pairs for row in pair.to_pairs()))
    print(f"{options.out}: {len(pairs)} pairs; {len(examples) - len(pairs)} ties dropped")


if __name__ == "__main__":
    main()
