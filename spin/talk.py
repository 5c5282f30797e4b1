"""Talking to models: a question, and what each of them answers, as it comes or side by side."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch

from model.mistral import Mistral
from model.sampler import generate_tokens
from model.tokenizer import Tokenizer
from model.weights import load_model
from spin.config import Config
from spin.engine.distributed import this_device

NARROWEST = 24  # characters; in columns narrower than this, answers stand one below the other


class Speaker:
    """A model that answers questions under the recipe's training template."""

    def __init__(self, name: str, path: Path, config: Config):
        self.name, self.config = name, config
        self.tokenizer = Tokenizer(path)
        dtype = getattr(torch, config.generate.dtype)
        self.model: Mistral = load_model(path, dtype, this_device(), config.model.attention)

    def answer(self, question: str) -> Iterator[str]:
        """The answer's text, piece by piece. Each question stands alone, as in the training data."""
        settings = self.config.generate
        prompt = self.tokenizer.encode_prompt(
            [{"role": "user", "content": question}], self.config.train.template
        )
        if not prompt:
            raise ValueError(f"the prompt has no token under the template {self.config.train.template}")
        tokens = generate_tokens(
            self.model,
            [prompt],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed,
            eos_id=self.tokenizer.eos_id,
            slots=1,
            vocab_limit=self.tokenizer.vocab_size,
        )
        ended = False

        def ids() -> Iterator[int]:
            nonlocal ended
            for token in tokens:
                ended = token.id == self.tokenizer.eos_id
                yield token.id

        yield from self.tokenizer.stream(ids())
        if not ended:
            yield f" [cut at {settings.max_new_tokens} tokens]"


def side_by_side(texts: dict[str, str], width: int) -> str:
    """Texts in columns under their names, in lines of at most `width` characters; one below the other if that
    is tight.
    """
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    if column < NARROWEST:
        return "\n\n".join(f"{name}\n{'-' * len(name)}\n{text}" for name, text in texts.items())
    columns = []
    for name, text in texts.items():
        lines = [piece for line in text.split("\n") for piece in textwrap.wrap(line, column) or [""]]
        columns.append([*textwrap.wrap(name, column)[:1], "-" * column, *lines])
    height = max(map(len, columns))
    padded = [[*lines, *[""] * (height - len(lines))] for lines in columns]
    return "\n".join(" | ".join(piece.ljust(column) for piece in row).rstrip() for row in zip(*padded))
