"""Prompts, responses and pairs, checked and tokenized. spin/engine/rows.py has the forms of their rows."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from model.tokenizer import Message, Tokenizer
from spin.config import Data
from spin.engine.rows import parse_row, read_rows
from spin.packing import Item


@dataclass(frozen=True)
class Example:
    """A prompt with its real response, and with the opponent's: one in a pair, or several."""

    prompt: tuple[Message, ...]  # the turns before the response, the last one the user's
    real: str
    generated: tuple[str, ...] = ()
    where: str = ""  # "file:line", for error messages

    @property
    def question(self) -> str:
        """The user's last text."""
        return self.prompt[-1]["content"]

    def to_pairs(self) -> list[dict[str, list[Message]]]:
        """The released form: {"real": [...], "generated": [...]} for each generated response."""

        def turn(text):
            return [*self.prompt, {"role": "assistant", "content": text}]

        return [{"real": turn(self.real), "generated": turn(text)} for text in self.generated]


def load_examples(path: str, data: Data, counts: Counter, pairs: bool = False) -> list[Example]:
    """All examples of a file, a directory of .jsonl or .parquet files, or a pattern, in the order of names.

    With `pairs`, rows must have two responses. Without, a generated response is not read. Examples with an
    empty text are dropped where data.empty is "drop". `counts` counts them, and prompts that repeat an
    earlier one. Raises FileNotFoundError, or ValueError with file and line.
    """
    examples = []
    for where, row in read_rows(path):
        example = Example(*parse_row(row, data, where, pairs), where)
        names = ("prompt", "response", "second response")
        texts = (example.question, example.real, *example.generated)
        empty = [name for name, text in zip(names, texts) if not text.strip()]
        if not empty:
            examples.append(example)
        elif data.empty == "drop":
            counts[f"examples dropped for an empty {empty[0]}"] += 1
        else:
            raise ValueError(f"{where}: empty {empty[0]}; correct it, or drop such rows: --data.empty=drop")
    if not examples:
        raise ValueError(f"{path}: no examples")
    repeated = len(examples) - len({str(example.prompt) for example in examples})
    counts["prompts of the data repeat an earlier one"] += repeated
    return examples


def load_generated(directory: Path, samples: int = 1) -> list[Example]:
    """The pairs of a generate stage, `samples` rows a prompt; the opponent's responses may be empty."""
    data = Data(turns="last")  # as `to_pairs` writes them, whatever turn of data.path was the response
    found = read_rows(str(directory))
    rows = [Example(*parse_row(row, data, where, pairs=True), where) for where, row in found]
    groups = [rows[i : i + samples] for i in range(0, len(rows), samples)]
    return [replace(group[0], generated=tuple(row.generated[0] for row in group)) for group in groups]


def choose(examples: list[Example], data: Data) -> list[Example]:
    """The first data.num_prompts examples of one seeded order: a larger sample contains a smaller one.

    All of them, in file order, if that is 0 or their number.
    """
    count = len(examples)
    if data.num_prompts > count:
        raise ValueError(f"data.num_prompts = {data.num_prompts}, but {data.path} has {count} examples")
    if data.num_prompts in (0, count):
        return examples
    # A sample of everything: the order of a smaller one would depend on its size.
    return random.Random(data.seed).sample(examples, count)[: data.num_prompts]


def tokenize(
    examples: Iterable[Example], tokenizer: Tokenizer, template: str, data: Data, counts: Counter
) -> list[Item]:
    """Ids of each example: its prompt, its real response and the generated ones.

    As in the official code: where the prompt and the longest response exceed max_length, the prompt keeps its
    last max_prompt_length tokens; if that is not enough, responses are truncated to max_length -
    max_prompt_length tokens and lose their EOS. `counts` counts both.
    """
    items = []
    for example in examples:
        prompt = _encode_prompt(example, tokenizer, template)
        if not prompt:
            raise ValueError(f"{example.where}: the prompt has no token under the template {template}")
        responses = [tokenizer.encode_response(text) for text in (example.real, *example.generated)]
        longest = max(map(len, responses))
        if len(prompt) + longest > data.max_length:
            counts["prompts cut at the left"] += len(prompt) > data.max_prompt_length
            prompt = prompt[-data.max_prompt_length :]
            if len(prompt) + longest > data.max_length:
                most = data.max_length - data.max_prompt_length
                counts["responses cut"] += sum(len(response) > most for response in responses)
                responses = [response[:most] for response in responses]
        items.append(Item(prompt, tuple(responses), example.where))
    return items


def encode_prompts(
    examples: Iterable[Example], tokenizer: Tokenizer, template: str, data: Data, counts: Counter
) -> list[list[int]]:
    """Ids of the prompts alone, each truncated to its last max_prompt_length tokens, for the sampler."""
    prompts = [_encode_prompt(example, tokenizer, template) for example in examples]
    counts["prompts cut at the left"] += sum(len(prompt) > data.max_prompt_length for prompt in prompts)
    return [prompt[-data.max_prompt_length :] for prompt in prompts]


def _encode_prompt(example: Example, tokenizer: Tokenizer, template: str) -> list[int]:
    try:
        return tokenizer.encode_prompt(example.prompt, template)
    except ValueError as error:
        raise ValueError(f"{example.where}: {error}") from None


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of the texts, to detect changed data."""
    text = json.dumps([[e.prompt, e.real, *(e.generated or [None])] for e in examples])
    return hashlib.sha256(text.encode()).hexdigest()
