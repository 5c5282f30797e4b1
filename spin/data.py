"""Prompts, responses and pairs, read from JSONL or Parquet and checked.

A row has one of these forms; the first that fits is used. Of a conversation, data.turns = "first" uses a
system turn, the first user turn and the assistant turn after it (as the paper does); "last" uses all turns,
of which the last assistant turn is the response.

    the columns named by data.prompt_column and data.response_column, two texts
    real, generated    two lists of messages, as in the released SPIN data
    chosen, rejected   preference pairs, as in UltraFeedback: two lists of messages, the last turns compared;
                       or what follows `prompt`, as messages after messages or a text after a text
    messages           a list of {role, content}
    prompt, response   two texts
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from model.tokenizer import Message, Tokenizer
from spin.config import Data
from spin.engine.files import read_rows
from spin.packing import Item

PAIRS = (("real", "generated"), ("chosen", "rejected"))  # columns: of the real response, of the opponent's


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
        example = parse_row(row, data, where, pairs)
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
    rows = [parse_row(row, data, where, pairs=True) for where, row in read_rows(str(directory))]
    groups = [rows[i : i + samples] for i in range(0, len(rows), samples)]
    return [replace(group[0], generated=tuple(row.generated[0] for row in group)) for group in groups]


def parse_row(row: dict, data: Data, where: str, pairs: bool = False) -> Example:
    """One row as an Example. Raises ValueError, naming `where`, for a row of no known form."""
    generated: tuple[str, ...] = ()
    columns = next((names for names in PAIRS if row.keys() >= set(names)), None)
    if pairs and not columns:
        known = " or ".join(f'"{first}" and "{second}"' for first, second in PAIRS)
        raise ValueError(f"{where}: pairs need the columns {known}, found {_columns(row)}")
    if data.prompt_column and not pairs:
        prompt, real = _texts(row, data.prompt_column, data.response_column, where)
    elif columns:
        prompt, real = _response(row, columns[0], data, where)
        if pairs:
            other, text = _response(row, columns[1], data, where)
            generated = (text,)
            if other != prompt:
                raise ValueError(f'{where}: "{columns[0]}" and "{columns[1]}" answer different prompts')
    elif "messages" in row:
        prompt, real = _turns(row["messages"], f'{where}: "messages"', data.turns)
    elif "prompt" in row and "response" in row:
        prompt, real = _texts(row, "prompt", "response", where)
    else:
        raise ValueError(
            f'{where}: found the columns {_columns(row)}, none of the known forms ("messages"; "real" and '
            '"generated"; "chosen" and "rejected"; "prompt" and "response"); set data.prompt_column and '
            "data.response_column"
        )
    if data.empty_system and prompt[0]["role"] != "system":
        prompt = ({"role": "system", "content": ""}, *prompt)
    try:
        "".join([*(turn["content"] for turn in prompt), real, *generated]).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: half a character (a lone surrogate, \\ud800 to \\udfff)") from None
    return Example(prompt, real, generated, where)


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


def _response(row: dict, column: str, data: Data, where: str) -> tuple[tuple[Message, ...], str]:
    """Prompt and response of one column of a pair."""
    messages, prompt = row[column], row.get("prompt")
    if column in PAIRS[0]:
        return _turns(messages, f'{where}: "{column}"', data.turns)
    if isinstance(messages, str):
        return _texts(row, "prompt", column, where)
    if isinstance(messages, list) and isinstance(prompt, list):
        messages = [*prompt, *messages]
    return _turns(messages, f'{where}: "{column}"', "last")


def _turns(messages, where: str, which: str) -> tuple[tuple[Message, ...], str]:
    """The turns before the first or the last assistant turn, a system turn included, and its text."""
    if not isinstance(messages, list):
        raise ValueError(f"{where} must be a list of messages")
    turns: list[Message] = []
    prompt: tuple[Message, ...] = ()
    response = None
    expected: tuple[str, ...] = ("system", "user")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where} has a message without role or content: {message!r:.120}")
        role = message.get("role")
        if role not in expected:
            raise ValueError(f"{where} has a turn of {role!r} where one of {' or '.join(expected)} is needed")
        if role == "assistant":
            prompt, response = tuple(turns), message["content"]
            if which == "first":
                break
        turns.append({"role": role, "content": message["content"]})
        expected = ("assistant",) if role == "user" else ("user",)
    if response is None:
        raise ValueError(f"{where} has no {expected[-1]} turn")
    return prompt, response


def _texts(row: dict, prompt: str, response: str, where: str) -> tuple[tuple[Message, ...], str]:
    """The user's turn and the response, from two columns."""
    for column in (prompt, response):
        if column not in row:
            raise ValueError(f"{where}: no column {column!r}, found {_columns(row)}")
        if not isinstance(row[column], str):
            raise ValueError(f"{where}: {column!r} must be a text, not {type(row[column]).__name__}")
    return ({"role": "user", "content": row[prompt]},), row[response]


def _columns(row: dict) -> str:
    return ", ".join(map(repr, row)) or "none"
