"""The sampler: token ids in, token ids out, through a KV cache whose slots are refilled as sequences end.

N active slots, V vocabulary. A sampled token is a function of (seed, stream, step) and the logits alone: its random
number comes from a counter-based hash, so the text depends neither on the batch, nor on the order, nor on what an
interruption left to do (but for what the batch's shape does to the logits' last bits, where a kernel's rounding depends
on it).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.attention import Segments
from model.kv_cache import KVCache
from model.mistral import Mistral


def generate(model: Mistral, prompts: Sequence[Sequence[int]], **settings) -> list[list[int]]:
    """Responses in the order of the prompts; `settings` as in `generate_stream`."""
    responses: list[list[int]] = [[] for _ in prompts]
    for index, response in generate_stream(model, prompts, **settings):
        responses[index] = response
    return responses


@dataclass
class _Sequence:
    index: int  # which prompt
    length: int  # tokens in the cache once the next step has run: prompt and response
    response: list[int] = field(default_factory=list)


@torch.inference_mode()
def generate_stream(
    model: Mistral,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    streams: Sequence[int] | None = None,
    slots: int = 64,
    prefill_tokens: int = 8192,
    vocab_limit: int | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Answer every prompt, yielding (index of the prompt, response ids) as soon as each is done.

    Args:
        prompts: lists of token ids, none empty
        max_new_tokens: length at which a response is cut
        temperature: 0 is greedy; top_p: nucleus (arXiv 1904.09751), 1 keeps everything
        eos_id: ends a response, of which it is the last id; a response without it was cut
        streams: a number for each prompt that its random draws depend on; its index if absent
        slots: sequences decoded side by side
        vocab_limit: ids from here on are never chosen, where a model has more than its tokenizer
        prefill_tokens: most prompt tokens read in one forward pass (a longer prompt gets a pass of its own)

    Raises ValueError for an empty prompt or a setting out of range.
    """
    if max_new_tokens < 1 or slots < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"need max_new_tokens >= 1, slots >= 1, temperature >= 0 and 0 < top_p <= 1, got "
            f"{max_new_tokens}, {slots}, {temperature}, {top_p}"
        )
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: there is no token to predict from")
    if not prompts:
        return
    streams = range(len(prompts)) if streams is None else streams
    device = next(model.parameters()).device
    slots = min(slots, len(prompts))
    longest = max(map(len, prompts)) + max_new_tokens
    cache = KVCache(model.config, slots, longest, next(model.parameters()).dtype, device)
    waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))  # the longest first: no late straggler
    active: list[_Sequence] = []  # active[s] is in slot s: the slots in use are always the first ones

    def draw(logits: Tensor, sequences: list[_Sequence]) -> None:
        """Append a token to each sequence from its row of logits."""
        uniforms = None
        if temperature:
            draws = [(streams[s.index], len(s.response)) for s in sequences]
            uniforms = counter_uniform(seed, *torch.tensor(draws, dtype=torch.int64, device=device).T)
        tokens = sample(logits[:, :vocab_limit], temperature, top_p, uniforms)
        for sequence, token in zip(sequences, tokens.tolist()):
            sequence.response.append(token)
            sequence.length += 1

    while waiting or active:
        fresh: list[_Sequence] = []
        room = prefill_tokens
        while waiting and len(active) < slots and (not fresh or len(prompts[waiting[0]]) <= room):
            fresh.append(_Sequence(waiting[0], len(prompts[waiting[0]])))
            active.append(fresh[-1])
            room -= len(prompts[waiting.popleft()])
        if fresh:
            draw(_prefill(model, [prompts[s.index] for s in fresh], cache, len(active) - len(fresh)), fresh)
        else:
            cache.longest = max(s.length for s in active)
            tokens = torch.tensor([s.response[-1] for s in active], device=device)
            positions = torch.tensor([s.length - 1 for s in active], device=device)
            logits = model(tokens, positions, cache=cache, slots=torch.arange(len(active), device=device))
            draw(logits, active)
        for slot in reversed(range(len(active))):
            sequence = active[slot]
            if sequence.response[-1] == eos_id or len(sequence.response) == max_new_tokens:
                yield sequence.index, sequence.response
                last = active.pop()
                if slot < len(active):  # close the gap, so that a step reads whole slots and nothing else
                    cache.move(len(active), slot)
                    active[slot] = last


def _prefill(model: Mistral, prompts: Sequence[Sequence[int]], cache: KVCache, first_slot: int) -> Tensor:
    """Read prompts into slots first_slot, first_slot + 1, …; returns the logits after each (len(prompts), V)."""
    device = cache.k.device
    lengths = [len(prompt) for prompt in prompts]
    return model(
        torch.tensor([token for prompt in prompts for token in prompt], device=device),
        torch.cat([torch.arange(n, device=device) for n in lengths]),
        Segments.causal(lengths, device),
        cache,
        slots=torch.arange(first_slot, first_slot + len(prompts), device=device).repeat_interleave(
            torch.tensor(lengths, device=device)
        ),
        at=torch.tensor(lengths, device=device).cumsum(0) - 1,
    )


def sample(logits: Tensor, temperature: float, top_p: float, uniforms: Tensor | None) -> Tensor:
    """One token per row: argmax, or the inverse of the cumulative distribution at a given uniform number.

    Args:
        logits: (N, V) fp32    uniforms: (N,) fp64 in [0, 1), needed when temperature > 0

    Returns: (N,) int64
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities  # mass of the more probable tokens
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)  # (N, V)
    token = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    token = token.clamp(max=logits.shape[-1] - 1)
    return (token if order is None else order.gather(-1, token)).squeeze(-1)


def counter_uniform(seed: int, streams: Tensor, steps: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) that are a fixed function of (seed, stream, step): (N,), (N,) int64 → (N,) fp64.

    Each argument is folded in through the 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    """
    state = torch.full_like(streams, _signed(seed * 0x9E3779B97F4A7C15))
    for counter in (streams, steps):
        state = _mix(state) + (counter + 1) * _signed(0x9E3779B97F4A7C15)
    return _shift(_mix(state), 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (>> keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the low 64 bits of x."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x
