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


def read_text(path: Path) -> str:
    """UTF-8 text, with or without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def read_toml(path: Path) -> dict:
    """The tables of a TOML file."""
    try:
        return tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
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
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: not JSON ({error})") from None


def to_json(value) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def to_jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def open_own(path: Path, mode: str):
    """Open a file of a run directory for writing, in binary mode.

    Raises OSError, naming the file, also where the disk is full, and for a symbolic link in the file's place:
    a run directory may come from somebody else, and a link in it must not lead a write elsewhere.
    """

    def no_link(name, flags):
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    try:
        with open(path, mode + "b", opener=no_link) as file:
            yield file
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is complete or absent."""
    commit_bytes(path, text.encode())


def commit_bytes(path: Path, content: bytes) -> None:
    """Write a file that is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open_own(partial, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
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
    with open_own(directory / ".lock", "w") as file:
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
