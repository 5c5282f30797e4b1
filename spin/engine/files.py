"""Reading with the file's name in every error; writing that leaves a file complete or absent."""

import fcntl
import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.config import read_object as read_json  # noqa: F401  the rest of spin/ imports it from here


def read_toml(path: Path) -> dict:
    """The tables of a TOML file, UTF-8 with or without a byte-order mark."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not TOML ({error})") from None


def read_jsonl(path: Path, whole_lines: bool = False) -> Iterator[tuple[str, dict]]:
    """("file:line", object) of each line. `whole_lines` skips a last line that is still being written.

    Raises ValueError, naming file and line, for a line that is not a JSON object.
    """
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if whole_lines and not line.endswith("\n"):
                    return
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"an object is needed, not {type(row).__name__}")
                yield f"{path}:{number}", row
    except ValueError as error:
        raise ValueError(f"{path}:{number}: invalid row ({error})") from None


def to_json(value) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def to_jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def no_link(path: str, flags: int) -> int:
    """An opener for `open` that refuses symbolic links: a planted one would redirect a write elsewhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb", opener=no_link) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(partial)  # a full disk's error has none
        raise
    os.rename(partial, path)
    _flush(path.parent)


@contextmanager
def whole_directory(path: Path):
    """Yield a new directory next to `path` that is renamed to `path` at the end; after an error it isn't."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run
    partial.mkdir(parents=True)
    yield partial
    commit(partial, path)


def commit(partial: Path, path: Path) -> None:
    """Flush the files of a directory to disk and rename it to its final name."""
    for file in [*partial.rglob("*"), partial]:
        _flush(file)
    os.rename(partial, path)
    _flush(path.parent)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def only_process(directory: Path, hold: bool = True):
    """Hold a directory for this process; without `hold`, for a rank whose first rank holds it, do nothing.

    Raises ValueError if another process holds it. The lock ends with the process.
    """
    if not hold:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "wb", opener=no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{directory}: another process works here; wait for it, or stop it") from None
        yield


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
