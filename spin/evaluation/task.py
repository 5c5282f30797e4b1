"""What a task is, and the model that it evaluates."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from model.mistral import Mistral
from model.sampler import Response, generate_stream
from model.tokenizer import Tokenizer
from spin.config import Evaluate
from spin.engine.distributed import Ranks
from spin.evaluation.scoring import Encoder


@dataclass
class LoadedModel:
    """A model on this rank, with what tasks need to evaluate it."""

    name: str  # in progress bars and MT-Bench's answers: tiny-base, tiny-iter0, …
    settings: Evaluate
    model: Mistral
    tokenizer: Tokenizer
    encoder: Encoder
    ranks: Ranks

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    def generate(self, prompts: Sequence[Sequence[int]], **sampling) -> Iterator[Response]:
        """`generate_stream` with the settings' slots and the tokenizer's vocabulary."""
        sampling |= {"eos_id": self.tokenizer.eos_ids, "vocab_limit": self.tokenizer.vocab_size}
        sampling |= {"slots": self.settings.slots, "memory": self.ranks.free_memory()}
        return generate_stream(self.model, prompts, **sampling)


@dataclass(frozen=True)
class Task:
    """A benchmark with its documents, numbered from 0: all that the runner knows of it."""

    name: str
    documents: Sequence[Any]
    record: dict  # what the results depend on, except for the model: JSON values
    # (model, numbers of documents) -> a row for each, in any order, its number as "doc".
    answer: Callable[[LoadedModel, Sequence[int]], Iterator[dict]]
    summarise: Callable[[Sequence[dict]], dict]  # rows -> metrics, and what a reader must know about them
    max_new_tokens: int = 0  # of a generated answer; the model must read more
