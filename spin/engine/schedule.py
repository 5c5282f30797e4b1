"""Which examples a step trains on, and at what learning rate."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from spin.config import Optimization


class Schedule:
    """Steps, their items and their learning rates, which depend on the settings alone, not on the ranks."""

    def __init__(self, part: Optimization, examples: int):
        self.part, self.examples = part, examples
        self.steps_per_epoch = math.ceil(examples / part.batch_size)  # an epoch's last step may be smaller
        self.stop = _ceil(part.epochs * self.steps_per_epoch)
        self.total = _ceil((part.schedule_epochs or part.epochs) * self.steps_per_epoch)
        self.warmup = min(_ceil(part.warmup * self.total), self.total - 1)  # a run of one step has no warm-up
        if not self.stop:
            raise ValueError(f"epochs = {part.epochs} gives no step of {part.batch_size} examples")

    def lr(self, step: int) -> float:
        """Learning rate of step 0, 1, …: linear warm-up from 0, then linear decay to 0 (as transformers)."""
        if step < self.warmup:
            return self.part.lr * step / self.warmup
        return self.part.lr * max(0.0, (self.total - step) / max(1, self.total - self.warmup))

    def batch(self, step: int) -> list[int]:
        """Indices of a step's examples: a slice of the epoch's seeded permutation."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _permutation(self.examples, self.part.seed * 1_000_003 + epoch)
        return order[place * self.part.batch_size :][: self.part.batch_size].tolist()


@lru_cache(1)
def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _ceil(steps: float) -> int:
    return math.ceil(steps - 1e-9)  # 1.1 · 50 is slightly above 55 in floating point


def held_out_items(part: Optimization, examples: int) -> list[int]:
    """Indices of the examples that are not trained on, drawn by the seed."""
    if part.heldout_pairs >= examples:
        raise ValueError(
            f"heldout_pairs = {part.heldout_pairs} leaves none of {examples} examples to train on"
        )
    generator = torch.Generator().manual_seed(part.seed)
    return sorted(torch.randperm(examples, generator=generator)[: part.heldout_pairs].tolist())
