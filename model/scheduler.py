"""Which sequences run in which slots of the KV cache, and what each forward pass computes."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class ActiveSequence:
    index: int  # of the response
    number: int  # decides the slot with fixed_slots
    stream: int  # of its random numbers
    prompt: Sequence[int]
    tokens: int = 0  # of the response so far


@dataclass
class Pass:
    """One forward pass: slots 0..decoding-1 take a step, and sequences that begin have their prompts read."""

    decoding: int
    fresh: list[ActiveSequence]
    first: int  # slot of fresh[0]; the others are in the slots after it
    longest: int  # tokens of the longest sequence that decodes
    slots: list[int]  # those of sequences that get a token


class Scheduler:
    """Which sequence runs in which slot.

    A free slot gets the next sequence in the queue, the longest prompts first, so that none is left for the
    end. The slots in use are the first ones: when a sequence ends, the last one moves into its slot. With
    `fixed`, each slot has its own queue and sequences stay where they are.
    """

    def __init__(
        self, sequences: list[ActiveSequence], slots: int, fixed: bool, prefill_tokens: int, graphs: bool
    ):
        self.slots = slots if fixed else min(slots, len(sequences))
        self.fixed, self.prefill_tokens = fixed, prefill_tokens
        self.queues: list[deque[ActiveSequence]] = [deque() for _ in range(self.slots if fixed else 1)]
        for sequence in sorted(sequences, key=lambda sequence: -len(sequence.prompt)):
            self.queues[sequence.number % len(self.queues)].append(sequence)
        self.active: dict[int, ActiveSequence] = {}  # by slot
        # A pass that reads prompts is not replayed as a CUDA graph: wait until some slots are free.
        self.refill = max(1, self.slots // 32) if graphs else 1
        self.filling = False

    def next_pass(self) -> Pass | None:
        """The next forward pass; None when every sequence has ended."""
        if not self.active and not any(self.queues):
            return None
        longest = max((len(s.prompt) + s.tokens for s in self.active.values()), default=0)
        first, fresh = self._next_in_own_slot() if self.fixed else (len(self.active), self._next_waiting())
        begun = dict(enumerate(fresh, first))
        self.active |= begun
        if not self.fixed:
            return Pass(first, fresh, first, longest, sorted(self.active))
        if fresh:
            return Pass(0, fresh, first, longest, [first])
        return Pass(self.slots, [], 0, longest, sorted(self.active))

    def _next_in_own_slot(self) -> tuple[int, list[ActiveSequence]]:
        """A sequence whose slot is free, with the slot."""
        for slot, queue in enumerate(self.queues):
            if queue and slot not in self.active:
                return slot, [queue.popleft()]
        return 0, []

    def _next_waiting(self) -> list[ActiveSequence]:
        """As many sequences as there are free slots, within the budget of prompt tokens."""
        (waiting,), free = self.queues, self.slots - len(self.active)
        self.filling = bool(waiting) and free > 0 and (self.filling or free >= min(self.refill, len(waiting)))
        fresh: list[ActiveSequence] = []
        room = self.prefill_tokens
        while self.filling and waiting and len(fresh) < free:
            if fresh and len(waiting[0].prompt) > room:
                break
            fresh.append(waiting.popleft())
            room -= len(fresh[-1].prompt)
        return fresh

    def end(self, slot: int) -> int | None:
        """Free a slot. Returns the slot whose sequence moves into it, if one does."""
        del self.active[slot]
        last = len(self.active)
        if self.fixed or slot == last:
            return None
        self.active[slot] = self.active.pop(last)
        return last
