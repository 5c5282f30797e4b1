"""The sampler: token ids in, token ids out, by continuous batching over the slots of a KV cache.

N active slots, V vocabulary. A sampled token is a function of (seed, stream, step) and the logits alone: its
random numbers come from a counter-based hash, so the text depends neither on the batch, nor on the order, nor
on what an interruption left to do (but for what the batch's shape does to the logits' last bits: see
`fixed_slots`).

One forward pass is one step of every active sequence, and with it the packed prompts of the sequences that
begin. What a step needs stays on the device; the host reads one token id per sequence, to see which have
ended.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Segments
from model.kv_cache import KVCache, free_memory
from model.mistral import Mistral

# More slots gain nothing: by then a step's arithmetic takes as long as reading the weights, or longer.
MOST_SLOTS = {"cuda": 512, "cpu": 128}
# So much of the free memory may be cache; the rest is for activations and logits.
CACHE_SHARE = 0.8
# Where launching a step's kernels one by one takes longer than running them.
GRAPHS_ON = ("cuda",)
# Tokens in a block of the vocabulary, when one is drawn.
BLOCK = 256
LOWEST_TEMPERATURE = 1e-6  # below it logits over temperature may leave fp32


class Token(NamedTuple):
    """One more token of a response."""

    index: int  # type: ignore[assignment]  # hides tuple.index; which response: prompt · samples + sample
    id: int
    logp: float | None  # log p(token | prompt, response so far) of the model itself, in nats, where asked for
    last: bool


class Response(NamedTuple):
    index: int  # type: ignore[assignment]  # hides tuple.index; which response: prompt · samples + sample
    ids: list[int]  # the last one is eos_id, unless the response was cut
    logps: list[float] | None  # as in Token


def generate(model: Mistral, prompts: Sequence[Sequence[int]], **settings) -> list[list[int]]:
    """Responses in the order of the prompts, the samples of one prompt side by side; `settings` as in
    `generate_tokens`.
    """
    return [response.ids for response in sorted(generate_stream(model, prompts, **settings))]


def generate_stream(model: Mistral, prompts: Sequence[Sequence[int]], **settings) -> Iterator[Response]:
    """Each response as soon as it is complete; `settings` as in `generate_tokens`."""
    begun: dict[int, Response] = {}
    for token in generate_tokens(model, prompts, **settings):
        if token.index not in begun:
            begun[token.index] = Response(token.index, [], None if token.logp is None else [])
        response = begun[token.index]
        response.ids.append(token.id)
        if token.logp is not None and response.logps is not None:
            response.logps.append(token.logp)
        if token.last:
            yield begun.pop(token.index)


@dataclass
class _Sequence:
    index: int  # which response
    stream: int  # the stream of its random numbers
    prompt: Sequence[int]
    tokens: int = 0  # of the response so far

    @property
    def length(self) -> int:
        return len(self.prompt) + self.tokens


def generate_tokens(
    model: Mistral,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    samples: int = 1,
    streams: Sequence[int] | None = None,
    logps: bool = False,
    slots: int = 0,
    memory: int = 0,
    slot_length: int = 0,
    fixed_slots: bool = False,
    prefill_tokens: int = 2048,
    vocab_limit: int | None = None,
    stop: Callable[[int, int], bool] | None = None,
) -> Iterator[Token]:
    """Answer every prompt, yielding each token as it comes, those of different responses in turn.

    Args:
        prompts: lists of token ids, none empty
        max_new_tokens: length at which a response is cut
        temperature: 0 is greedy; then top_k (0 keeps everything) and top_p (nucleus, arXiv 1904.09751; 1
            keeps everything)
        eos_id: ends a response, of which it is the last id; a response without it was cut
        samples: responses to each prompt, with random numbers of their own
        streams: a number from 0 to 2**31 - 1 for each prompt that its random numbers depend on; its index if
            absent
        logps: give log-probabilities too; temperature, top_k and top_p do not change them
        slots: sequences decoded side by side; 0: as many as memory holds, at most MOST_SLOTS
        memory: bytes that may be used for that; 0: what the device, or the machine, has free
        slot_length: tokens that a slot has room for; 0: what the longest prompt needs
        fixed_slots: batch-invariant: the bits of a response do not depend on the other prompts. Every step
            computes all slots, idle ones included, every prompt is read by itself, and a sequence decodes in
            the slot of its number, (stream · samples + sample) mod slots. So the operands of each kernel have
            the same shapes, and a sequence the same rows in them, whatever runs beside it; a kernel may round
            by either. Conditions: the same slots, slot_length, device and, on a CPU, number of threads. Costs
            the idle rows and the lone prompts
        prefill_tokens: most prompt tokens read in one forward pass (a longer prompt gets a pass of its own)
        vocab_limit: ids from here on are never chosen, where a model has more than its tokenizer
        stop: is told each token (index, id), those of a response in turn, and says whether the response ends
            with it

    Raises ValueError for an empty prompt, a setting out of range, a slot that free memory does not hold, or
    logits that are not finite at the first prompts.
    """
    if (
        max_new_tokens < 1
        or slots < 0
        or samples < 1
        or not temperature >= 0
        or top_k < 0
        or not 0 < top_p <= 1
    ):
        raise ValueError(
            "need max_new_tokens >= 1, slots >= 0, samples >= 1, temperature >= 0, top_k >= 0 and 0 < top_p "
            f"<= 1, got {max_new_tokens}, {slots}, {samples}, {temperature}, {top_k}, {top_p}"
        )
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise ValueError(f"temperature = {temperature} is too near 0; 0 is greedy")
    if streams is not None and len(streams) != len(prompts):
        raise ValueError(f"{len(streams)} streams for {len(prompts)} prompts")
    if fixed_slots and not slots:
        raise ValueError("fixed_slots needs a number of slots: the text is the same for the same slots")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: there is no token to predict from")
    if not prompts:
        return
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    length = max(map(len, prompts)) + max_new_tokens
    if slot_length and slot_length < length:
        raise ValueError(
            f"slot_length = {slot_length}, but a prompt and its response may have {length} tokens"
        )
    length = slot_length or length
    slots = slots or fitting_slots(model, length, memory or free_memory(device))
    if not fixed_slots:
        slots = min(slots, len(prompts) * samples)
    # The longest prompts first: no late straggler. With fixed slots, each slot has a queue of its own.
    queues: list[deque[_Sequence]] = [deque() for _ in range(slots if fixed_slots else 1)]
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        number = i if streams is None else streams[i]
        for copy in range(samples):
            queue = queues[(number * samples + copy) % len(queues)]
            queue.append(_Sequence(i * samples + copy, number + (copy << 32), prompts[i]))
    waiting = queues[0]  # without fixed slots, of all
    active: dict[int, _Sequence] = {}  # by slot; without fixed slots always the first ones
    graphs = device.type in GRAPHS_ON  # they always look at whole slots
    # A free slot gets the next prompt at once; only where steps are replayed, which a pass with prompts in it
    # is not, are a few of many let run free before there is such a pass.
    refill = max(1, slots // 32) if graphs and not fixed_slots else 1
    filling = False

    with torch.inference_mode():
        cache = KVCache(model.config, slots, length, dtype, device)
        # One row per slot: its newest token, that token's place, how many of the response there are, its
        # random stream.
        state = torch.zeros(4, slots, dtype=torch.int64, device=device)
        tokens, positions, counts, stream = state
        token_logps = torch.zeros(slots, device=device)
        numbers = torch.arange(max(slots, length), device=device)

    def step(decoding: int, fresh: Sequence[_Sequence] = (), first: int = 0) -> None:
        """A token more for slots 0..decoding-1, and the first one for fresh sequences, in slots first, first
        + 1, …
        """
        ids, places, into, segments, at = (
            tokens[:decoding],
            positions[:decoding],
            numbers[:decoding],
            None,
            None,
        )
        rows = slice(0, decoding)
        if fresh:
            lengths = [len(sequence.prompt) for sequence in fresh]
            begin = slice(first, first + len(fresh))
            rows = slice(first - decoding, first + len(fresh))
            sizes = torch.tensor(lengths, device=device)
            packed = torch.tensor([token for sequence in fresh for token in sequence.prompt], device=device)
            ids = torch.cat((ids, packed))
            places = torch.cat((places, *(numbers[:n] for n in lengths)))
            into = torch.cat((into, numbers[begin].repeat_interleave(sizes, output_size=len(packed))))
            at = torch.cat((numbers[:decoding], decoding + sizes.cumsum(0) - 1))
            segments = Segments.causal(lengths, device)
            positions[begin], counts[begin] = sizes - 1, 0
            stream[begin] = torch.tensor([sequence.stream for sequence in fresh], device=device)
        logits = model(ids, places, segments, cache, slots=into, at=at)  # (N, V)
        if fresh and not decoding and not first and not logits.isfinite().all():
            raise ValueError("the model's logits are not finite; are its weights damaged?")
        uniforms = counter_uniform(seed, stream[rows], counts[rows]) if temperature else None
        tokens[rows] = sample(logits[:, :vocab_limit], temperature, top_k, top_p, uniforms)
        if logps:
            token_logps[rows] = logits.log_softmax(-1).gather(-1, tokens[rows, None]).squeeze(-1)
        # An idle slot may be carried along for ever, and must stay inside of the cache.
        positions[rows] = (positions[rows] + 1).clamp(max=length - 1)
        counts[rows] += 1

    replay = _replayed(step, state, slots) if graphs else step

    def next_pass() -> tuple[int, list[_Sequence], int]:
        """What the next forward pass has: rows that decode, sequences that begin, the first one's slot."""
        nonlocal filling
        if fixed_slots:  # a prompt by itself, or a step of all slots
            free = [slot for slot, queue in enumerate(queues) if queue and slot not in active][:1]
            return (0, [queues[free[0]].popleft()], free[0]) if free else (slots, [], 0)
        fresh: list[_Sequence] = []
        first, room = len(active), prefill_tokens
        filling = bool(waiting) and first < slots and (filling or slots - first >= min(refill, len(waiting)))
        if filling:
            while waiting and first + len(fresh) < slots and (not fresh or len(waiting[0].prompt) <= room):
                fresh.append(waiting.popleft())
                room -= len(fresh[-1].prompt)
        return first, fresh, first

    @torch.inference_mode()
    def advance() -> list[Token]:
        """One forward pass, and the tokens that it gives."""
        if active and not graphs and not fixed_slots:
            cache.longest = max(sequence.length for sequence in active.values())
        decoding, fresh, first = next_pass()
        if fresh:
            step(decoding, fresh, first)
        else:
            replay(decoding)
        begun = dict(enumerate(fresh, first))
        active.update(begun)

        ids, values = tokens.tolist(), token_logps.tolist() if logps else [None] * slots
        given, ended = [], []
        for slot in sorted(active if decoding else begun):
            sequence = active[slot]
            sequence.tokens += 1
            last = ids[slot] == eos_id or sequence.tokens == max_new_tokens
            last = last or (stop is not None and stop(sequence.index, ids[slot]))
            if last:
                ended.append(slot)
            given.append(Token(sequence.index, ids[slot], values[slot], last))
        for slot in reversed(ended):
            active.pop(slot)
            positions[slot] = 0  # idle: little to read
            if not fixed_slots and slot < (moved := len(active)):
                # Close the gap, so that a step reads the first slots and nothing else.
                active[slot] = active.pop(moved)
                cache.move(moved, slot, active[slot].length)
                state[:, slot] = state[:, moved]
                positions[moved] = 0
        return given

    while active or any(queues):
        yield from advance()  # out of inference mode, which would be left and entered with every token


def fitting_slots(model: Mistral, length: int, free: int) -> int:
    """How many slots of `length` tokens go into `free` bytes, at most MOST_SLOTS. Raises ValueError if not
    one does.
    """
    weight = next(model.parameters())
    size = KVCache.bytes_per_slot(model.config, length, weight.dtype)
    if free * CACHE_SHARE < size:
        raise ValueError(
            f"a cache for one sequence of {length} tokens takes {size / 1e6:.1f} MB, and of "
            f"{free / 1e6:.1f} MB free memory {CACHE_SHARE:.0%} may be used; lower max_new_tokens or the "
            "longest prompt, or make room"
        )
    return min(int(free * CACHE_SHARE / size), MOST_SLOTS[weight.device.type])


def _replayed(step: Callable[[int], None], state: Tensor, slots: int) -> Callable[[int], None]:
    """`step` as CUDA graphs, for a few numbers of rows: the host takes longer to launch its kernels than they
    run.

    A number between is rounded up, and idle slots are carried along.
    """
    sizes = sorted({min(1 << i, slots) for i in range(slots.bit_length() + 1)})
    graphs: dict[int, Callable[[], None]] = {}
    pool = torch.cuda.graph_pool_handle()  # one for all: none of them leaves anything behind in it

    def replay(rows: int) -> None:
        size = next(size for size in sizes if size >= rows)
        with torch.cuda.device(state.device):  # streams are the current device's
            if size not in graphs:
                graphs[size] = _captured(lambda: step(size), state, pool)
            graphs[size]()

    return replay


def _captured(work: Callable[[], None], state: Tensor, pool) -> Callable[[], None]:
    """`work` as a CUDA graph, `state` left as it is. `work` must only read and write memory that stays where
    it is.
    """
    before = state.clone()
    side = _side_stream(state.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # once for what is made at the first call, workspaces and handles, and may not be captured
    torch.cuda.current_stream().wait_stream(side)
    state.copy_(before)
    graph = torch.cuda.CUDAGraph()
    # Other threads (NCCL's watchdog) may go on calling CUDA meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        work()
    return graph.replay


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole process: cuBLAS keeps a workspace for every stream that it has met."""
    return torch.cuda.Stream(device)


def sample(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, uniforms: Tensor | None = None
) -> Tensor:
    """One token per row: argmax, or drawn by given uniform numbers.

    Args:
        logits: (N, V) fp32    uniforms: (N, 2) fp64 in [0, 1), needed when temperature > 0

    Returns: (N,) int64
    """
    if temperature == 0:
        return logits.max(-1).indices  # of equal ones the first, like argmax, and sooner
    assert uniforms is not None
    scores = logits if temperature == 1 else logits / temperature
    return at_quantiles(restricted(scores, top_k, top_p).softmax(-1), uniforms)


def at_quantiles(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row, (N, V) → (N,) int64: a block of the vocabulary by one number of uniforms (N, 2), a
    place in it by the other.

    With a single number, one sum would run over the whole vocabulary, and its rounding would move the ends of
    thousands of improbable tokens: of 512 sampled texts, 23 came out otherwise in another batch. Now a few
    hundred ends matter.
    """
    n, vocabulary = probabilities.shape
    if vocabulary % BLOCK:
        probabilities = F.pad(probabilities, (0, -vocabulary % BLOCK))
    blocks = probabilities.view(n, -1, BLOCK)
    block = _quantile(blocks.sum(-1), uniforms[:, 1])
    return block * BLOCK + _quantile(blocks[torch.arange(n, device=block.device), block], uniforms[:, 0])


def _quantile(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first place up to which more than a share `uniforms` (N,) of a row's weights (N, M) lies: (N,)
    int64.
    """
    ends = weights.cumsum(-1, dtype=torch.float64)
    target = uniforms.clamp(max=1 - 2**-52)[:, None] * ends[:, -1:]  # below the last end, however rounded
    return torch.searchsorted(ends, target, right=True).squeeze(-1)


def restricted(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores (N, V) with -inf for the tokens that top-k, and after it top-p, leave out.

    As transformers' warpers do it: what equals the k-th best stays; the nucleus is counted from the least
    probable token up, in fp32; the most probable one always stays.
    """
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort(dim=-1)
        out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        out[:, -1] = False
        scores = scores.masked_fill(out.scatter(-1, order, out), -torch.inf)
    return scores


def counter_uniform(seed: int, streams: Tensor, steps: Tensor) -> Tensor:
    """Two uniform numbers in [0, 1), a fixed function of (seed, stream, step): (N,), (N,) int64 → (N, 2)
    fp64.

    Each argument is folded in through the 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    """
    state = torch.full_like(streams, _signed(seed * 0x9E3779B97F4A7C15))
    for counter in (streams, steps):
        state = _mix(state) + (counter + 1) * _signed(0x9E3779B97F4A7C15)
    first = _mix(state)
    both = torch.stack((first, _mix(first + _signed(0x9E3779B97F4A7C15))), dim=-1)
    return _shift(both, 11).double() * 2.0**-53


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
