"""A benchmark's documents: read from data sets of the Hugging Face Hub, with few-shot examples before them.

Data sets are stored as `hf download` leaves them, in Parquet or JSONL with the same columns:

    <data>/<repository's name>/<configuration>/<split>-00000-of-00001.parquet   or <split>.jsonl
"""

import random
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spin.engine.rows import read_rows

FEW_SHOT_SEED = 1234  # lm-evaluation-harness's own


@dataclass(frozen=True)
class Source:
    """A data set on the Hub."""

    repository: str
    configuration: str
    split: str
    examples: str = ""  # the split of the few-shot examples

    @property
    def name(self) -> str:
        return self.repository.split("/")[1]

    def files(self, data: Path, split: str) -> list[Path]:
        """The files of a split; none if it is missing."""
        found = (data / self.name / self.configuration).glob(f"{split}[-.]*")
        return sorted(file for file in found if file.suffix in (".parquet", ".jsonl"))

    def missing(self, data: Path) -> str:
        """Which splits are missing, with the command that downloads them; "" if none is."""
        absent = [split for split in (self.split, self.examples) if split and not self.files(data, split)]
        if not absent:
            return ""
        command = self.command(data, "--include", f"{self.configuration}/*")
        where = data / self.name / self.configuration
        return f"{where}: no {' and no '.join(absent)} split; get it by\n    {command}"

    def command(self, data: Path, *include: str) -> str:
        """The shell command that downloads the data set."""
        download = ["hf", "download", "--repo-type", "dataset", self.repository]
        return shlex.join([*download, *include, "--local-dir", str(data / self.name)])

    def rows(self, data: Path, split: str) -> list[tuple[str, dict]]:
        """("file:line", row) of a split, in file order."""
        return [row for file in self.files(data, split) for row in read_rows(str(file))]


@dataclass(frozen=True)
class Question:
    """The text before each choice, the choices, and the right ones. Of a generated answer: its one choice."""

    texts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: tuple[int, ...] = (0,)

    @property
    def solved(self) -> str:
        """The question with its answer, as a few-shot example."""
        return f"{self.texts[self.gold[0]]} {self.choices[self.gold[0]]}\n\n"


class Document(NamedTuple):
    where: str  # "file:line", for error messages
    context: str  # description and few-shot examples, before the question
    question: Question


@dataclass(frozen=True)
class Benchmark:
    """An entry of the table in tasks.py: where a task's documents are, how they are asked and measured."""

    name: str
    source: Source
    question: Callable[[dict], Question]  # of a row; raises an error for one that cannot be asked
    measure: Callable[[Question, Any], dict]  # question, scores or text -> prediction, target and metrics
    few_shot: int = 0
    first: bool = False  # the examples are the first of their split instead of drawn at random
    spare: bool = False  # one more example is drawn, so that the document itself can be left out
    description: str = ""
    prompt: Callable[[], str] | None = None  # a description with solved examples, read from a file
    max_new_tokens: int = 0  # of a generated answer; 0: choices are scored
    stops: Sequence[str] = ()  # strings that end a generated answer

    def documents(self, data: Path, limit: int) -> list[Document]:
        """The first `limit` documents, 0 for all.

        Raises FileNotFoundError with the download command, or ValueError with file and row for a bad one.
        """
        if missing := self.source.missing(data):
            raise FileNotFoundError(missing)
        rows = self.source.rows(data, self.source.split)
        # BIG-bench has rows without choices, which the harness leaves out.
        rows = [(where, row) for where, row in rows if row.get("multiple_choice_targets") != []]
        rows = rows[: limit or None]
        before = self.prompt() if self.prompt else self.description
        contexts = [before] * len(rows)
        if self.few_shot and self.source.examples:
            pool = self.source.rows(data, self.source.examples)
            solved = [self._read(where, row).solved for where, row in pool]
            chosen = draw_examples(rows, pool, self.few_shot, self.first, self.spare)
            contexts = [before + "".join(solved[i] for i in places) for places in chosen]
        return [
            Document(where, context, self._read(where, row)) for (where, row), context in zip(rows, contexts)
        ]

    def _read(self, where: str, row: dict) -> Question:
        try:
            return self.question(row)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: is it a row of {self.source.repository}? {error!r}") from None


def draw_examples(rows: Sequence, pool: Sequence, count: int, first=False, spare=False) -> list[list[int]]:
    """Places in the pool of each document's examples, drawn from one stream of random numbers for all."""
    if first:
        return [list(range(count))] * len(rows)
    rng = random.Random(FEW_SHOT_SEED)
    result = []
    for _, row in rows:
        chosen = rng.sample(range(len(pool)), count + spare)
        result.append([i for i in chosen if not spare or pool[i][1] != row][:count])
    return result
