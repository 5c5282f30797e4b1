"""Which sequence runs in which slot of the KV cache, and what each forward pass computes."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class ActiveSequence:
    index: int  # of the response
    number: int  # selects the slot with fixed_slots
    stream: int  # of its random numbers
    prompt: Sequence[int]
    tokens: int = 0  # of the response so far

    @property
    def length(self) -> int:
        return len(self.prompt) + self.tokens


@dataclass
class Pass:
    """One forward pass: slots 0..decoding-1 decode a token, and new sequences' prompts are prefilled."""

    decoding: int
    fresh: list[ActiveSequence]  # the new sequences
    first: int  # slot of fresh[0]; the others are in the slots after it
    longest: int  # tokens of the longest sequence that decodes
    sampled: dict[int, ActiveSequence]  # {slot: sequence} of those that get a token, slots ascending


class Scheduler:
    """A free slot gets the next sequence in the queue, longest prompts first, so that none starts late.

    The slots in use are the first ones: when a sequence ends, the last one moves to its slot. With `fixed`,
    each slot has its own queue and sequences do not move.
    """

    def __init__(self, sequences, slots: int, fixed: bool, prefill_tokens: int, graphs: bool):
        self.slots = slots if fixed else min(slots, len(sequences))
        self.fixed, self.prefill_tokens = fixed, prefill_tokens
        self.queues: list[deque[ActiveSequence]] = [deque() for _ in range(self.slots if fixed else 1)]
        for sequence in sorted(sequences, key=lambda sequence: -len(sequence.prompt)):
            self.queues[sequence.number % len(self.queues)].append(sequence)
        self.active: dict[int, ActiveSequence] = {}  # by slot
        # A pass with a prefill is not replayed as a CUDA graph: wait until several slots are free.
        self.refill = max(1, self.slots // 32) if graphs else 1
        self.filling = False

    def next_pass(self) -> Pass | None:
        """The next forward pass; None when every sequence has ended."""
        if not self.active and not any(self.queues):
            return None
        longest = max((sequence.length for sequence in self.active.values()), default=0)
        if not self.fixed:
            first, fresh = len(self.active), self._next_waiting()
            self.active |= dict(enumerate(fresh, first))
            return Pass(first, fresh, first, longest, dict(sorted(self.active.items())))
        for slot, queue in enumerate(self.queues):
            if queue and slot not in self.active:
                self.active[slot] = queue.popleft()
                return Pass(0, [self.active[slot]], slot, longest, {slot: self.active[slot]})
        return Pass(self.slots, [], 0, longest, dict(sorted(self.active.items())))

    def _next_waiting(self) -> list[ActiveSequence]:
        """As many sequences as there are free slots, within the budget of prompt tokens."""
        (waiting,), free = self.queues, self.slots - len(self.active)
        self.filling = bool(waiting) and free > 0 and (self.filling or free >= min(self.refill, len(waiting)))
        fresh: list[ActiveSequence] = []
        room = self.prefill_tokens
        while self.filling and waiting and len(fresh) < free:
            room -= len(waiting[0].prompt)
            if fresh and room < 0:
                break
            fresh.append(waiting.popleft())
        return fresh

    def end(self, slot: int) -> tuple[int, int]:
        """Free a slot. Returns the slot whose sequence moves to it (itself if none does), and its length."""
        ended = self.active.pop(slot)
        last = len(self.active)
        if self.fixed or slot == last:
            return slot, ended.length
        self.active[slot] = self.active.pop(last)
        return last, self.active[slot].length
