"""How a stage claims its directory and resumes.

A claimed directory has inputs.json, a flat record of the settings and inputs that its results depend on:

    {"train.lr": 5e-07, …, "opponent": "<fingerprint>", "data": "<digest>"}

It is written before the first result. A later start with another record raises ValueError, and so do results
without a record. `Rows` keeps what ranks produce one by one; other results are complete or absent (files.py).
"""

import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError, safe_open

from spin.config import Config
from spin.engine.distributed import Ranks
from spin.engine.files import no_link, read_json, read_jsonl, to_json, to_jsonl, whole_directory, write_whole

log = logging.getLogger("spin")

RECORD = "inputs.json"
NO_RESULT = (RECORD, "config.toml", ".lock")  # files that may exist before the record does


def check_claim(directory: Path, record: dict, defaults: dict | None = None) -> bool:
    """Whether `directory` is claimed. Raises ValueError for another record, or results without one.

    Only the keys of `record` are compared. `defaults` has the values of settings that did not exist when the
    directory's record was written.
    """
    file = directory / RECORD
    if file.is_file():
        check_record(directory, (defaults or {}) | read_json(file), record)
        return True
    results = [path for path in directory.glob("*") if not path.name.startswith(NO_RESULT)]
    if results:
        raise ValueError(
            f"{file}: missing, so {results[0].name} is of unknown origin; restore it or remove {directory}"
        )
    return False


def claim(directory: Path, record: dict, defaults: dict | None = None) -> None:
    """Record what the results of `directory` depend on, or raise ValueError as `check_claim` does."""
    if not check_claim(directory, record, defaults):
        write_whole(directory / RECORD, to_json(record))


def check_record(directory: Path, recorded: dict, record: dict, results: str = "results") -> None:
    """Raise ValueError, naming what differs, unless the results in `directory` have this record."""
    differing = [key for key, value in record.items() if recorded.get(key) != value]
    changed = ", ".join(_difference(key, recorded.get(key), record[key]) for key in differing)
    if changed:
        raise ValueError(
            f"{directory}: {results} made with {changed}; change it back, write to another directory "
            f"(--run.dir, --out), or remove {directory} to start again"
        )


def fork(config: Config, first: int) -> None:
    """Copy the base and the iterations before `first` of run.fork into run.dir, weights as hard links.

    Every rank may call it: the first one that is done counts. What run.dir has is left alone.
    """
    source, target = Path(config.run.fork), Path(config.run.dir)
    for needed in (f"iter{n}" for n in range(first)):
        if not any((run / needed).is_dir() for run in (source, target)):
            raise FileNotFoundError(
                f"{source / needed}: no such directory, so there is nothing to start from"
            )
    if not config.model.base and not (source / "base/model").is_dir():
        raise FileNotFoundError(f"{source}: no base/model in it; give the --model.base that it started from")
    for name in ("base", *(f"iter{n}" for n in range(first))):
        if (source / name).is_dir() and not (target / name).is_dir():
            target.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=target) as partial:
                ignore = shutil.ignore_patterns("checkpoints")
                shutil.copytree(source / name, f"{partial}/{name}", copy_function=_link, ignore=ignore)
                with suppress(OSError):  # another rank was first
                    os.rename(f"{partial}/{name}", target / name)
                    log.info("%s: taken from %s", target / name, source)


def _link(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        with suppress(OSError):  # of another file system
            return os.link(source, target)
    shutil.copy2(source, target)


def reuse(other: Path, directory: Path, record: dict) -> None:
    """Copy a stage's finished directory from another run, unless it has another record."""
    if not directory.is_dir() and (other / RECORD).is_file() and read_json(other / RECORD) == record:
        with whole_directory(directory) as new:
            shutil.copytree(other, new, dirs_exist_ok=True)
        log.info("%s: taken from %s", directory, other)


def reuse_logps(other: Path, file: Path, record: dict) -> None:
    """Copy another run's log-probs, unless they have another record."""
    if not file.is_file() and other.is_file():
        with suppress(SafetensorError), safe_open(other, framework="pt") as stored:
            if stored.metadata() == {"record": json.dumps(record)}:
                write_whole(file, other.read_bytes())
                log.info("%s: taken from %s", file, other)


def _difference(key: str, was, now) -> str:
    """ "train.lr = 5e-07, now 1e-07"; a long value is shown by its name only."""
    short = all(len(repr(value)) < 40 for value in (was, now))
    return f"{key} = {was!r}, now {now!r}" if short else f"other {key}"


class Rows:
    """Objects that ranks append to <directory>/rank<R>.jsonl as they are made, numbered by their "doc".

    A killed run resumes on any number of ranks: `done` has the existing numbers. An incomplete line is cut.
    """

    def __init__(self, directory: Path, record: dict, ranks: Ranks):
        self.directory, self.ranks = directory, ranks
        self.done: set[int] = ranks.from_first(lambda: self._resume(record))

    def _resume(self, record: dict) -> set[int]:
        claim(self.directory, record)
        for file in self.directory.glob("rank*.jsonl"):
            with open(file, "rb+", opener=no_link) as lines:
                lines.truncate(lines.read().rfind(b"\n") + 1)
        return set(self._read())

    def _read(self) -> dict[int, dict]:
        rows: dict[int, dict] = {}
        for file in sorted(self.directory.glob("rank*.jsonl")):
            for _, row in read_jsonl(file):
                rows.setdefault(row["doc"], row)  # a rank that outlived a killed job may have written twice
        return rows

    def append(self, rows) -> None:
        """Write this rank's rows, each as soon as the iterable gives it."""
        with open(self.directory / f"rank{self.ranks.rank}.jsonl", "ab", opener=no_link) as file:
            for row in rows:
                file.write(to_jsonl([row]).encode())
                file.flush()

    def complete(self, count: int) -> list[dict]:
        """All rows, 0 to `count` - 1. Raises ValueError if one is missing."""
        rows = self._read()
        missing = [i for i in range(count) if i not in rows]
        if missing:
            raise ValueError(
                f"{self.directory}: {len(missing)} of {count} rows are missing; run the command again"
            )
        return [rows[i] for i in range(count)]
