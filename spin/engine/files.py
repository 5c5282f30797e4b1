"""Results that appear at once or not at all."""

import fcntl
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_directory(path: Path):
    """Yields a directory to fill beside `path`, flushed and renamed to it at the end; nothing appears on an
    error.

    Leftovers of a killed attempt are cleared away first.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    commit(partial, path)


def commit(partial: Path, path: Path) -> None:
    """Flush the files of a directory and rename it to its final name."""
    for file in [*partial.rglob("*"), partial]:
        _flush(file)
    os.rename(partial, path)
    _flush(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    commit_bytes(path, text.encode())


def commit_bytes(path: Path, content: bytes) -> None:
    """Write a file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)
    _flush(path.parent)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def to_json(value) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def cut_unfinished_line(path: Path) -> None:
    """Cut what follows the last line's end: a killed writer's half line."""
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


@contextmanager
def only_process(directory: Path, hold: bool = True):
    """Hold a directory for this process. Raises ValueError if another one holds it; a killed one holds
    nothing.

    With `hold` False it does nothing: for ranks whose first one holds it.
    """
    if not hold:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{directory}: another process is at work here; wait for it, or stop it"
            ) from None
        yield


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
