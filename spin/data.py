"""Prompts, responses and pairs, from JSONL or Parquet, with their checks.

A row is taken in the first of these forms that it has (only the first user turn and the first assistant turn
are used; a system turn before them is kept):

    the columns named by data.prompt_column and data.response_column, two texts
    real, generated    two lists of messages, as in the released SPIN data
    messages           a list of {role, content}
    prompt, response   two texts
"""

import glob
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from model.tokenizer import Message, Tokenizer
from spin.config import Data
from spin.packing import Item


@dataclass(frozen=True)
class Example:
    """One prompt with its real response, and an opponent's where there is one."""

    prompt: tuple[Message, ...]  # an optional system turn and the user's
    real: str
    generated: str | None = None
    where: str = ""  # "file:line", for messages

    @property
    def question(self) -> str:
        """The user's text."""
        return self.prompt[-1]["content"]

    def to_pair(self) -> dict[str, list[Message]]:
        """The released form: {"real": [...], "generated": [...]}."""

        def turn(text):
            return [*self.prompt, {"role": "assistant", "content": text}]

        return {"real": turn(self.real), "generated": turn(self.generated)}


def load_examples(path: str, data: Data, counts: Counter, need_generated: bool = False) -> list[Example]:
    """All examples of `path`: a file, a directory of .jsonl or .parquet files, or a pattern, in the order of
    names.

    With data.empty = "drop", examples with an empty prompt or response are left out and counted in `counts`.
    Raises FileNotFoundError, or ValueError with file and line for a row that is not as this module's head
    says.
    """
    examples = []
    for where, row in read_rows(path):
        example = parse_row(row, data, where, need_generated)
        try:
            "".join(
                [*(turn["content"] for turn in example.prompt), example.real, example.generated or ""]
            ).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{where}: half a character (a lone surrogate, \\ud800 to \\udfff) in a text"
            ) from None
        blank = _blank(example)
        if not blank:
            examples.append(example)
        elif data.empty == "drop":
            counts[f"examples dropped for an empty {blank}"] += 1
        else:
            raise ValueError(
                f"{where}: empty {blank}; mend it, or leave such examples out with --data.empty=drop"
            )
    if not examples:
        raise ValueError(f"{path}: no examples in it")
    return examples


def load_generated(directory: Path, data: Data) -> list[Example]:
    """The pairs that this code's opponent left in `directory`; its empty responses are its own, and stay."""
    return [parse_row(row, data, where, need_generated=True) for where, row in read_rows(str(directory))]


def parse_row(row: dict, data: Data, where: str, need_generated: bool = False) -> Example:
    """One row as an Example. Raises ValueError, naming `where`, for a row in none of the known forms."""
    prompt: tuple[Message, ...]
    generated = None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object, not {type(row).__name__}")
    if bool(data.prompt_column) != bool(data.response_column):
        raise ValueError("data.prompt_column and data.response_column go together: set both or none")
    if data.prompt_column and not need_generated:
        prompt = ({"role": "user", "content": _text(row, data.prompt_column, where)},)
        real = _text(row, data.response_column, where)
    elif "real" in row and "generated" in row:
        prompt, real = _first_turns(row["real"], f'{where}: "real"')
        other, generated = _first_turns(row["generated"], f'{where}: "generated"')
        if other != prompt:
            raise ValueError(f'{where}: "real" and "generated" answer different prompts')
    elif need_generated:
        raise ValueError(f'{where}: pairs need the columns "real" and "generated", found {_columns(row)}')
    elif "messages" in row:
        prompt, real = _first_turns(row["messages"], f'{where}: "messages"')
    elif "prompt" in row and "response" in row:
        prompt = ({"role": "user", "content": _text(row, "prompt", where)},)
        real = _text(row, "response", where)
    else:
        raise ValueError(
            f'{where}: found the columns {_columns(row)}, none of the known forms ("messages"; "real" and '
            '"generated"; '
            '"prompt" and "response"); name two with data.prompt_column and data.response_column'
        )
    if data.empty_system and prompt[0]["role"] != "system":
        prompt = ({"role": "system", "content": ""}, *prompt)
    return Example(prompt, real, generated, where)


def real_only(examples: Iterable[Example]) -> list[Example]:
    """The examples without an opponent's responses, for SFT and for scoring right answers."""
    return [replace(example, generated=None) for example in examples]


def _blank(example: Example) -> str | None:
    """Which text of the example has nothing to read, if any."""
    texts = {"prompt": example.question, "response": example.real, '"generated"': example.generated}
    return next((what for what, text in texts.items() if text is not None and not text.strip()), None)


def choose(examples: list[Example], data: Data) -> list[Example]:
    """The seeded sample of data.num_prompts, in an order of its own; all of them, in file order, when 0."""
    if not data.num_prompts:
        return examples
    if data.num_prompts > len(examples):
        raise ValueError(
            f"data.num_prompts = {data.num_prompts}, but {data.path} has {len(examples)} examples"
        )
    return random.Random(data.seed).sample(examples, data.num_prompts)


def tokenize(
    examples: Iterable[Example], tokenizer: Tokenizer, template: str, data: Data, counts: Counter
) -> list[Item]:
    """Ids of each example: its prompt, and as responses the real one and, where there is one, the generated
    one.

    As in the official code: when the prompt and the longer response exceed max_length, the prompt keeps its
    last max_prompt_length tokens; if that is not enough, responses are cut at max_length - max_prompt_length
    tokens (and lose their end-of-sequence). Each cut is counted in `counts`.
    """
    items = []
    for example in examples:
        prompt = tokenizer.encode_prompt(example.prompt, template)
        if not prompt:
            raise ValueError(f"{example.where}: the prompt has no token under the template {template}")
        texts = [example.real] if example.generated is None else [example.real, example.generated]
        responses = [tokenizer.encode_response(text) for text in texts]
        longest = max(map(len, responses))
        if len(prompt) + longest > data.max_length:
            if len(prompt) > data.max_prompt_length:
                prompt = prompt[-data.max_prompt_length :]
                counts["prompts cut at the left"] += 1
            if len(prompt) + longest > data.max_length:
                most = data.max_length - data.max_prompt_length
                counts["responses cut"] += sum(len(response) > most for response in responses)
                responses = [response[:most] for response in responses]
        items.append(Item(prompt, tuple(responses), example.where))
    return items


def encode_prompts(
    examples: Iterable[Example], tokenizer: Tokenizer, template: str, data: Data, counts: Counter
):
    """Ids of the prompts alone, each keeping its last max_prompt_length tokens: what the sampler reads."""
    prompts = [tokenizer.encode_prompt(example.prompt, template) for example in examples]
    counts["prompts cut at the left"] += sum(len(prompt) > data.max_prompt_length for prompt in prompts)
    return [prompt[-data.max_prompt_length :] for prompt in prompts]


def digest(examples: Sequence[Example]) -> str:
    """A SHA-256 of the texts, to tell whether data has changed."""
    text = json.dumps([[example.prompt, example.real, example.generated] for example in examples])
    return hashlib.sha256(text.encode()).hexdigest()


def data_files(path: str) -> list[Path]:
    """The files that a data path means. Raises FileNotFoundError if none."""
    if Path(path).is_dir():
        files = [f for f in Path(path).iterdir() if f.suffix in (".jsonl", ".parquet")]
    elif Path(path).is_file():
        files = [Path(path)]
    else:
        files = [Path(f) for f in glob.glob(path, recursive=True)]
    if not files:
        raise FileNotFoundError(
            f"{path}: no such file, no directory with .jsonl or .parquet in it, and no pattern's match"
        )
    return sorted(files)


def read_rows(path: str) -> Iterator[tuple[str, dict]]:
    for file in data_files(path):
        if file.suffix == ".parquet":
            yield from _parquet_rows(file)
        elif file.suffix == ".jsonl":
            with open(file, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        yield f"{file}:{number}", json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{file}:{number}: not JSON ({error})") from None
        else:
            raise ValueError(f"{file}: data is read from .jsonl or .parquet")


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        batches = parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a Parquet file ({error})") from None
    number = 0
    for batch in batches.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{file}:{number}", row


def _first_turns(messages, where: str) -> tuple[tuple[Message, ...], str]:
    """(system turn if any, first user turn), and the text of the first assistant turn after it."""
    if not isinstance(messages, list):
        raise ValueError(f"{where} must be a list of messages")
    system, user = [], None
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where} has a message without role or content: {message!r:.120}")
        turn = {"role": message.get("role"), "content": message["content"]}
        if turn["role"] == "system" and user is None:
            system = [turn]
        elif turn["role"] == "user" and user is None:
            user = turn
        elif turn["role"] == "assistant" and user is not None:
            return (*system, user), turn["content"]
        elif turn["role"] not in ("system", "user", "assistant"):
            raise ValueError(
                f"{where} has a message with the role {turn['role']!r}; known: system, user, assistant"
            )
    raise ValueError(f"{where} has no {'assistant turn after the user' if user else 'user turn'}")


def _text(row: dict, column: str, where: str) -> str:
    if column not in row:
        raise ValueError(f"{where}: no column {column!r}, found {_columns(row)}")
    if not isinstance(row[column], str):
        raise ValueError(f"{where}: {column!r} must be a text, not {type(row[column]).__name__}")
    return row[column]


def _columns(row: dict) -> str:
    return ", ".join(map(repr, row)) or "none"
