"""What a task is, and what it asks the model by."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from model.mistral import Mistral
from model.sampler import generate_stream
from model.tokenizer import Tokenizer
from spin.config import Evaluate
from spin.engine.distributed import Ranks
from spin.evaluation.scoring import Encoder


@dataclass
class Engine:
    """A model on this rank, with what tasks need to ask it."""

    name: str  # what the model is called: tiny-base, tiny-iter0, …
    settings: Evaluate
    model: Mistral
    tokenizer: Tokenizer
    encoder: Encoder
    ranks: Ranks
    tick: Callable[[float], object] = lambda cost: None  # is told how much of a task's cost is done

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    def generate(self, prompts: Sequence[Sequence[int]], **settings) -> Iterator:
        """`generate_stream` in the slots and within the vocabulary that the settings give."""
        return generate_stream(
            self.model,
            prompts,
            eos_id=self.tokenizer.eos_id,
            slots=self.settings.slots,
            memory=self.ranks.free_memory(),
            vocab_limit=self.tokenizer.vocab_size,
            **settings,
        )


class Task(Protocol):
    name: str

    def __len__(self) -> int: ...

    def origin(self) -> dict:
        """What its results depend on, beside the model and what all tasks share."""

    def check(self, tokenizer: Tokenizer, max_length: int) -> None:
        """Raise ValueError for what a model that reads max_length tokens cannot be asked."""

    def cost(self, doc: int) -> float:
        """About how many tokens a document takes; a generated one counts several."""

    def answers(self, engine: Engine, docs: Sequence[int]) -> Iterator[dict]:
        """A row for each document, in any order, with its index as "doc"."""

    def summary(self, rows: Sequence[dict]) -> dict:
        """Metrics with standard errors, and whatever a reader of them must know."""
