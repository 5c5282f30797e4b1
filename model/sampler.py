"""The sampler: token ids in, token ids out, by continuous batching over the slots of a KV cache.

N decoding slots, T tokens of a pass, V vocabulary. A sampled token is a function of the logits and of (seed,
stream, step): its random numbers come from a counter-based hash (model/sampling.py). So a response depends on
neither the batch nor the order of the prompts, except that the batch's shape changes the last bits of the
logits (see `fixed_slots`).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
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

# With more slots, a step is compute-bound and throughput no longer rises.
MOST_SLOTS = {"cuda": 512, "cpu": 128}
CACHE_SHARE = 0.8  # of free memory for the cache; the rest is for activations and logits
GRAPHS_ON = ("cuda",)  # devices on which launching a step's kernels takes longer than running them


class Token(NamedTuple):
    index: int  # type: ignore[assignment]  # of the response, prompt · samples + sample; hides tuple.index
    id: int
    logp: float | None  # log p(token | prompt, response so far) of the model itself, in nats, if requested
    last: bool


class Response(NamedTuple):
    index: int  # type: ignore[assignment]  # as for Token
    ids: list[int]  # the last one ends it (eos_id), unless the response was cut
    logps: list[float] | None  # as for Token


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # keep the k most probable tokens; 0: all
    top_p: float = 1.0  # of these, keep the nucleus (arXiv 1904.09751); 1: all
    seed: int = 0  # of the random numbers
    vocab_limit: int | None = None  # never choose ids from here on: a model may have more than its tokenizer
    logps: bool = False  # also return log-probabilities, which temperature, top_k and top_p do not change

    def __post_init__(self):
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ValueError(f"need temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {self}")
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(f"temperature = {self.temperature} is too near 0; 0 is greedy")


def generate(model: Mistral, prompts: Sequence[Sequence[int]], **settings) -> list[list[int]]:
    """Responses in the order of the prompts, the samples of one prompt adjacent; see `generate_tokens`."""
    return [response.ids for response in sorted(generate_stream(model, prompts, **settings))]


def generate_stream(model: Mistral, prompts: Sequence[Sequence[int]], **settings) -> Iterator[Response]:
    """Each response as soon as it is complete; `settings` as for `generate_tokens`."""
    unfinished: dict[int, list[Token]] = {}
    for token in generate_tokens(model, prompts, **settings):
        unfinished.setdefault(token.index, []).append(token)
        if token.last:
            tokens = unfinished.pop(token.index)
            logps = None if token.logp is None else [t.logp for t in tokens if t.logp is not None]
            yield Response(token.index, [t.id for t in tokens], logps)


def generate_tokens(
    model: Mistral,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | Collection[int] | None = None,
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
    """Respond to every prompt, yielding each token when it is sampled by `Sampling(**sampling)`.

    Args:
        max_new_tokens, eos_id: a response is cut at this length, or ends with this id or one of these
        samples: responses to each prompt, with different random numbers
        streams: for each prompt a number below 2**31 that selects its random numbers; default: its index
        slots: sequences decoded in one batch; 0: as many as fit in `memory` bytes (0: the free memory)
        slot_length: tokens per slot; 0: what the longest prompt needs
        fixed_slots: batch invariance: for the same slots, slot_length, device and CPU threads, the bits of a
            response do not depend on the other prompts. Every step computes all slots, a prompt is prefilled
            alone, and a sequence decodes in slot (stream · samples + sample) mod slots: always in one row
        prefill_tokens: most prompt tokens in one forward pass; a longer prompt gets a pass of its own
        stop: called with each token (index, id); returns whether the response ends with it

    Raises ValueError for a setting out of range, too little memory, or logits that are not finite at first.
    """
    if max_new_tokens < 1 or slots < 0 or samples < 1:
        given = f"{max_new_tokens}, {slots}, {samples}"
        raise ValueError(f"need max_new_tokens >= 1, slots >= 0 and samples >= 1, got {given}")
    if fixed_slots and not slots:
        raise ValueError("fixed_slots needs a number of slots, on which the text depends")
    if not prompts:
        return
    ends = {eos_id} if eos_id is None or isinstance(eos_id, int) else set(eos_id)
    sequences = _sequences(prompts, samples, streams)
    needed = max(map(len, prompts)) + max_new_tokens
    if slot_length and slot_length < needed:
        raise ValueError(f"slot_length = {slot_length}, but prompt and response may have {needed} tokens")
    length, device = slot_length or needed, next(model.parameters()).device
    slots = slots or fitting_slots(model, length, memory or free_memory(device))
    scheduler = Scheduler(sequences, slots, fixed_slots, prefill_tokens, device.type in GRAPHS_ON)
    runner = Runner(model, scheduler.slots, length, fixed_slots, Sampling(**sampling))
    while work := scheduler.next_pass():  # schedule: which slots decode, which prompts are prefilled
        ids, logps = runner.run(work)  # run: one forward pass, one sampled token for each sequence in it
        tokens = []  # postprocess: yield the tokens and free the slots of sequences that have ended
        for slot, sequence in work.sampled.items():
            sequence.tokens += 1
            last = ids[slot] in ends or sequence.tokens == max_new_tokens
            last = last or (stop is not None and stop(sequence.index, ids[slot]))
            tokens.append(Token(sequence.index, ids[slot], logps[slot] if logps else None, last))
        for slot in [slot for slot, token in zip(work.sampled, tokens) if token.last][::-1]:
            runner.free(slot, *scheduler.end(slot))
        yield from tokens


def _sequences(prompts, samples: int, streams: Sequence[int] | None) -> list[ActiveSequence]:
    if streams is not None and len(streams) != len(prompts):
        raise ValueError(f"{len(streams)} streams for {len(prompts)} prompts")
    sequences = []
    for i, (prompt, stream) in enumerate(zip(prompts, range(len(prompts)) if streams is None else streams)):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: there is no token to predict from")
        for copy in range(samples):
            index, number = i * samples + copy, stream * samples + copy
            sequences.append(ActiveSequence(index, number, stream + (copy << 32), prompt))
    return sequences


def fitting_slots(model: Mistral, length: int, free: int) -> int:
    """How many slots of `length` tokens fit in `free` bytes, at most MOST_SLOTS. Raises ValueError if 0."""
    weight = next(model.parameters())
    size = KVCache.bytes_per_slot(model.config, length, weight.dtype)
    if free * CACHE_SHARE < size:
        cause = f"a cache for one sequence of {length} tokens takes {size / 1e6:.1f} MB, and of"
        usable = f"{free / 1e6:.1f} MB free memory {CACHE_SHARE:.0%} may be used"
        raise ValueError(f"{cause} {usable}; lower max_new_tokens or the longest prompt")
    return min(int(free * CACHE_SHARE / size), MOST_SLOTS[weight.device.type])


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
        self.checked = False  # whether logits have been checked to be finite
        self.decode = replayed(self._step, self.state, slots) if graphs else self._step

    @torch.inference_mode()
    def run(self, work: Pass) -> tuple[list[int], list[float] | None]:
        """The newest token of every slot after one forward pass, and its log-probability if requested."""
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
            lengths, device = [len(sequence.prompt) for sequence in fresh], self.state.device
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
        """Choose a token for each of the slots `rows` from logits (N, V), and advance to its position."""
        s = self.sampling
        uniforms = counter_uniform(s.seed, self.streams[rows], self.counts[rows]) if s.temperature else None
        self.tokens[rows] = sample(logits[:, : s.vocab_limit], s.temperature, s.top_k, s.top_p, uniforms)
        if s.logps:
            chosen = self.tokens[rows, None]
            self.token_logps[rows] = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)
        # An idle slot may be computed for as long as the others run, and must stay within the cache.
        self.positions[rows] = (self.positions[rows] + 1).clamp(max=self.length - 1)
        self.counts[rows] += 1

    @torch.inference_mode()
    def free(self, slot: int, source: int, length: int) -> None:
        """Move the sequence of `length` tokens in slot `source` to `slot`, and make `source` idle."""
        if source != slot:
            for part in (self.cache.k, self.cache.v):
                part[:, slot, :length] = part[:, source, :length]
            self.state[:, slot] = self.state[:, source]
        self.positions[source] = 0  # so that a step reads little of an idle slot
