"""The sampler: token ids in, token ids out, by continuous batching over the slots of a KV cache.

N decoding slots, V vocabulary. `generate_tokens` repeats three steps:

1. schedule: choose the slots that decode and the prompts that are read in the same pass (model/scheduler.py);
2. run: one forward pass, and one sampled token for each sequence in it (`Runner`);
3. postprocess: yield the tokens and free the slots of sequences that have ended (`_postprocess`).

A sampled token is a function of the logits and of (seed, stream, step) alone: its random numbers come from a
counter-based hash (model/sampling.py). So the text depends neither on the batch nor on the order of the
prompts, except for what the batch's shape does to the last bits of the logits (see `fixed_slots`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import Segments
from model.cuda_graphs import replayed
from model.kv_cache import KVCache, free_memory
from model.mistral import Mistral
from model.sampling import LOWEST_TEMPERATURE, counter_uniform, sample
from model.scheduler import ActiveSequence, Pass, Scheduler

# With more slots, a step's arithmetic takes as long as reading the weights or longer: nothing is gained.
MOST_SLOTS = {"cuda": 512, "cpu": 128}
CACHE_SHARE = 0.8  # of free memory that the cache may take; the rest is for activations and logits
GRAPHS_ON = ("cuda",)  # devices on which launching a step's kernels takes longer than running them


class Token(NamedTuple):
    """One more token of a response."""

    index: int  # type: ignore[assignment]  # of the response, prompt · samples + sample; hides tuple's index()
    id: int
    logp: float | None  # log p(token | prompt, response so far) of the model itself, in nats, if asked for
    last: bool


class Response(NamedTuple):
    index: int  # type: ignore[assignment]  # as in Token
    ids: list[int]  # the last one is eos_id, unless the response was cut
    logps: list[float] | None  # as in Token


def generate(model: Mistral, prompts: Sequence[Sequence[int]], **settings) -> list[list[int]]:
    """Responses in the order of the prompts, the samples of one prompt next to each other.

    `settings` are those of `generate_tokens`.
    """
    return [response.ids for response in sorted(generate_stream(model, prompts, **settings))]


def generate_stream(model: Mistral, prompts: Sequence[Sequence[int]], **settings) -> Iterator[Response]:
    """Each response as soon as it is complete; `settings` are those of `generate_tokens`."""
    begun: dict[int, list[Token]] = {}
    for token in generate_tokens(model, prompts, **settings):
        begun.setdefault(token.index, []).append(token)
        if token.last:
            tokens = begun.pop(token.index)
            logps = None if token.logp is None else [t.logp for t in tokens if t.logp is not None]
            yield Response(token.index, [t.id for t in tokens], logps)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; see `generate_tokens`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    vocab_limit: int | None = None
    logps: bool = False

    def __post_init__(self):
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ValueError(f"need temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {self}")
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(f"temperature = {self.temperature} is too near 0; 0 is greedy")


def generate_tokens(
    model: Mistral,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    samples: int = 1,
    streams: Sequence[int] | None = None,
    slots: int = 0,
    memory: int = 0,
    slot_length: int = 0,
    fixed_slots: bool = False,
    prefill_tokens: int = 2048,
    stop: Callable[[int, int], bool] | None = None,
    **sampling,
) -> Iterator[Token]:
    """Answer every prompt, yielding each token when it is sampled; the responses' tokens interleave.

    Args:
        prompts: lists of token ids, none empty
        max_new_tokens: length at which a response is cut
        eos_id: ends a response, of which it is the last id; a response without it was cut
        samples: responses to each prompt, with random numbers of their own
        streams: a number from 0 to 2**31 - 1 for each prompt, which selects its random numbers; default: its
            index
        slots: sequences decoded in one batch; 0: as many as memory holds, at most MOST_SLOTS
        memory: bytes available for them; 0: what the device, or the machine, has free
        slot_length: tokens that a slot has room for; 0: what the longest prompt needs
        fixed_slots: batch-invariant: the bits of a response do not depend on the other prompts. Every step
            computes all slots, idle ones included, every prompt is read by itself, and a sequence decodes in
            the slot of its number, (stream · samples + sample) mod slots. So the operands of each kernel have
            the same shapes, and a sequence the same rows in them, whatever else is asked; a kernel may round
            by either. Conditions: the same slots, slot_length, device and, on a CPU, number of threads. Costs
            the idle rows and the separate prompts
        prefill_tokens: most prompt tokens read in one forward pass; a longer prompt gets a pass of its own
        stop: called with each token (index, id); returns whether the response ends with it
        temperature: 0 (default) is greedy
        top_k, top_p: keep the k most probable tokens (0: all), then the nucleus (arXiv 1904.09751; 1: all)
        seed: of the random numbers
        vocab_limit: ids from here on are never chosen, for a model with more ids than its tokenizer
        logps: also return log-probabilities, which temperature, top_k and top_p do not change

    Raises ValueError for an empty prompt, a setting out of range, a slot that free memory does not hold, or
    logits that are not finite at the first prompts.
    """
    chosen_by = Sampling(**sampling)
    if max_new_tokens < 1 or slots < 0 or samples < 1:
        raise ValueError(
            f"need max_new_tokens >= 1, slots >= 0 and samples >= 1, got {max_new_tokens}, {slots}, {samples}"
        )
    if streams is not None and len(streams) != len(prompts):
        raise ValueError(f"{len(streams)} streams for {len(prompts)} prompts")
    if fixed_slots and not slots:
        raise ValueError("fixed_slots needs a number of slots, on which the text depends")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: there is no token to predict from")
    if not prompts:
        return
    needed = max(map(len, prompts)) + max_new_tokens
    if slot_length and slot_length < needed:
        raise ValueError(
            f"slot_length = {slot_length}, but a prompt and its response may have {needed} tokens"
        )
    length, device = slot_length or needed, next(model.parameters()).device
    slots = slots or fitting_slots(model, length, memory or free_memory(device))

    def ends(sequence: ActiveSequence, token: int) -> bool:
        if token == eos_id or sequence.tokens == max_new_tokens:
            return True
        return stop is not None and stop(sequence.index, token)

    sequences = [
        ActiveSequence(i * samples + copy, number * samples + copy, number + (copy << 32), prompts[i])
        for i, number in enumerate(range(len(prompts)) if streams is None else streams)
        for copy in range(samples)
    ]
    scheduler = Scheduler(sequences, slots, fixed_slots, prefill_tokens, device.type in GRAPHS_ON)
    runner = Runner(model, scheduler.slots, length, fixed_slots, chosen_by)
    while work := scheduler.next_pass():
        ids, logps = runner.run(work)
        yield from _postprocess(work, ids, logps, scheduler, runner, ends)


class Runner:
    """The model, its KV cache, and the state of every slot, which stays on the model's device."""

    def __init__(self, model: Mistral, slots: int, length: int, fixed: bool, sampling: Sampling):
        weight = next(model.parameters())
        device = weight.device
        self.model, self.length, self.sampling = model, length, sampling
        graphs = device.type in GRAPHS_ON
        self.whole_slots = graphs or fixed  # attention reads slots to their ends: one shape for every step
        with torch.inference_mode():
            self.cache = KVCache(model.config, slots, length, weight.dtype, device)
            # For each slot: its newest token, that token's position, tokens of the response, random stream.
            self.state = torch.zeros(4, slots, dtype=torch.int64, device=device)
            self.tokens, self.positions, self.counts, self.streams = self.state
            self.token_logps = torch.zeros(slots, device=device)
            self.numbers = torch.arange(max(slots, length), device=device)
        self.checked = False  # whether logits have been seen to be finite
        self.decode = replayed(self._step, self.state, slots) if graphs else self._step

    @torch.inference_mode()
    def run(self, work: Pass) -> tuple[list[int], list[float] | None]:
        """Newest token of every slot after one forward pass, and its log-probability if asked for."""
        if work.longest and not self.whole_slots:
            self.cache.longest = work.longest
        if work.fresh:
            self._step(work.decoding, work.fresh, work.first)
        else:
            self.decode(work.decoding)
        return self.tokens.tolist(), self.token_logps.tolist() if self.sampling.logps else None

    def _step(self, decoding: int, fresh: Sequence[ActiveSequence] = (), first: int = 0) -> None:
        """One token for each of slots 0..decoding-1, and for `fresh` in slots first, first + 1, …"""
        ids, positions = self.tokens[:decoding], self.positions[:decoding]
        slots, segments, at = self.numbers[:decoding], None, None
        rows = slice(0, decoding)  # the slots that get a token
        if fresh:
            begin = slice(first, first + len(fresh))
            rows = slice(first - decoding, begin.stop)  # decoding is 0 or first
            lengths = [len(sequence.prompt) for sequence in fresh]
            device = self.state.device
            sizes = torch.tensor(lengths, device=device)
            packed = torch.tensor([token for sequence in fresh for token in sequence.prompt], device=device)
            ids = torch.cat((ids, packed))  # (T,)
            positions = torch.cat((positions, *(self.numbers[:n] for n in lengths)))
            into = self.numbers[begin].repeat_interleave(sizes, output_size=len(packed))
            slots = torch.cat((slots, into))
            at = torch.cat((self.numbers[:decoding], decoding + sizes.cumsum(0) - 1))  # (N,)
            segments = Segments.causal(lengths, device)
            self.positions[begin], self.counts[begin] = sizes - 1, 0
            self.streams[begin] = torch.tensor([sequence.stream for sequence in fresh], device=device)
        logits = self.model(ids, positions, segments, self.cache, slots=slots, at=at)  # (N, V)
        if not self.checked and not logits.isfinite().all():
            raise ValueError("the model's logits are not finite; are its weights damaged?")
        self.checked = True
        self._sample(logits, rows)

    def _sample(self, logits: Tensor, rows: slice) -> None:
        """Choose a token for each of the slots `rows` from logits (N, V), and move on to its position."""
        s = self.sampling
        uniforms = counter_uniform(s.seed, self.streams[rows], self.counts[rows]) if s.temperature else None
        self.tokens[rows] = sample(logits[:, : s.vocab_limit], s.temperature, s.top_k, s.top_p, uniforms)
        if s.logps:
            chosen = self.tokens[rows, None]
            self.token_logps[rows] = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)
        # An idle slot may be computed for as long as the others run, and must stay inside of the cache.
        self.positions[rows] = (self.positions[rows] + 1).clamp(max=self.length - 1)
        self.counts[rows] += 1

    @torch.inference_mode()
    def free(self, slot: int, moved: int | None, length: int) -> None:
        """Empty a slot, or replace its sequence by that of slot `moved`, of `length` tokens."""
        if moved is not None:
            self.cache.move(moved, slot, length)
            self.state[:, slot] = self.state[:, moved]
            slot = moved
        self.positions[slot] = 0  # idle: little to read


def _postprocess(
    work: Pass,
    ids: list[int],
    logps: list[float] | None,
    scheduler: Scheduler,
    runner: Runner,
    ends: Callable[[ActiveSequence, int], bool],
) -> list[Token]:
    """The pass's tokens; sequences that end with them leave their slots."""
    tokens, ended = [], []
    for slot in work.slots:
        sequence = scheduler.active[slot]
        sequence.tokens += 1
        last = ends(sequence, ids[slot])
        if last:
            ended.append(slot)
        tokens.append(Token(sequence.index, ids[slot], logps[slot] if logps else None, last))
    for slot in reversed(ended):
        moved = scheduler.end(slot)
        now = scheduler.active.get(slot)
        runner.free(slot, moved, len(now.prompt) + now.tokens if now else 0)
    return tokens


def fitting_slots(model: Mistral, length: int, free: int) -> int:
    """How many slots of `length` tokens fit into `free` bytes, at most MOST_SLOTS. Raises ValueError if none
    does.
    """
    weight = next(model.parameters())
    size = KVCache.bytes_per_slot(model.config, length, weight.dtype)
    if free * CACHE_SHARE < size:
        raise ValueError(
            f"a cache for one sequence of {length} tokens takes {size / 1e6:.1f} MB, and of {free / 1e6:.1f} "
            f"MB free memory {CACHE_SHARE:.0%} may be used; lower max_new_tokens or the longest prompt"
        )
    return min(int(free * CACHE_SHARE / size), MOST_SLOTS[weight.device.type])
