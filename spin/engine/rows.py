"""Rows of JSONL and Parquet files, and the forms that prompts, responses and pairs have in them.

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

import glob
from collections.abc import Iterator
from pathlib import Path

from model.tokenizer import Message
from spin.config import Data
from spin.engine.files import read_jsonl

PAIRS = (("real", "generated"), ("chosen", "rejected"))  # columns: of the real response, of the opponent's


def parse_row(
    row: dict, data: Data, where: str, pairs: bool = False
) -> tuple[tuple[Message, ...], str, tuple[str, ...]]:
    """Prompt, real response and, with `pairs`, the generated one.

    Raises ValueError, naming `where`, for a row of no known form.
    """
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
    return prompt, real, generated


def data_files(path: str) -> list[Path]:
    """The files that a data path stands for. Raises FileNotFoundError if there are none."""
    if Path(path).is_dir():
        files = [file for file in Path(path).iterdir() if file.suffix in (".jsonl", ".parquet")]
    elif Path(path).is_file():
        files = [Path(path)]
    else:
        files = [Path(file) for file in glob.glob(path, recursive=True)]
    if not files:
        raise FileNotFoundError(f"{path}: no such file, directory with .jsonl or .parquet files, or pattern")
    return sorted(files)


def read_rows(path: str) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of every row of the path's files."""
    for file in data_files(path):
        if file.suffix == ".parquet":
            yield from _parquet_rows(file)
        elif file.suffix == ".jsonl":
            yield from read_jsonl(file)
        else:
            raise ValueError(f"{file}: not a .jsonl or .parquet file")


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable Parquet file ({error})") from None


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
