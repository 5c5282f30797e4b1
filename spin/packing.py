"""Prompts with their responses → one packed stream of tokens, and the log-probabilities of its responses.

The prompt stands once, its responses after it: [x][y][y']. Every response sees the prompt and itself
(arXiv 2410.20305 calls this prefix sharing). Not only pairs: SFT packs one response, a multiple-choice
question packs its choices.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from model.attention import Segments, moved
from model.config import ModelConfig
from model.mistral import Mistral


@dataclass(frozen=True)
class Item:
    """A prompt and its responses as ids, each of at least one; a response ends with end-of-sequence unless it
    was cut.
    """

    prompt: list[int]
    responses: tuple[list[int], ...]
    where: str = ""  # the file and line that it comes from, for messages

    @property
    def packed_length(self) -> int:
        """Tokens that this item takes in a stream."""
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses)


@dataclass
class Packed:
    """A stream of T tokens in which R response tokens of C responses are predicted."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, each response's positions following its prompt's
    segments: Segments
    at: Tensor  # (R,) rows that predict
    targets: Tensor  # (R,) the ids to predict
    lengths: Tensor  # (C,) how many of the R belong to each response, in turn

    def to(self, device) -> "Packed":
        names = ("tokens", "positions", "at", "targets", "lengths")
        return Packed(
            segments=self.segments.to(device), **{name: moved(getattr(self, name), device) for name in names}
        )


def pack(items: Sequence[Item]) -> Packed:
    """Lay items one after the other. No items give a stream of one token in which nothing is predicted.

    A response's last token is predicted and predicts nothing, so it is not in the stream: an item of prompt x
    and responses y, y' takes len(x) + len(y) - 1 + len(y') - 1 tokens.
    """
    if not items:
        empty = torch.zeros(0, dtype=torch.int64)
        return Packed(
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            Segments.causal([1]),
            empty,
            empty,
            empty,
        )
    tokens: list[int] = []
    positions: list[int] = []
    q_lengths: list[int] = []
    k_lengths: list[int] = []
    key_index: list[int] = []
    at: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for item in items:
        start, prompt = len(tokens), len(item.prompt)
        tokens += item.prompt
        positions += range(prompt)
        for i, response in enumerate(item.responses):
            first, length = len(tokens), len(response) - 1
            tokens += response[:-1]
            positions += range(prompt, prompt + length)
            at += [start + prompt - 1, *range(first, first + length)]
            targets += response
            lengths.append(len(response))
            # the first response shares the prompt's segment; one of a single token has none
            if i == 0 or length:
                q_lengths.append(prompt + length if i == 0 else length)
                k_lengths.append(prompt + length)
                key_index += [*range(start, start + prompt), *range(first, first + length)]
    segments = Segments([0, *accumulate(q_lengths)], [0, *accumulate(k_lengths)], torch.tensor(key_index))

    def as_tensor(values):
        return torch.tensor(values, dtype=torch.int64)

    return Packed(
        as_tensor(tokens),
        as_tensor(positions),
        segments,
        as_tensor(at),
        as_tensor(targets),
        as_tensor(lengths),
    )


def response_logps(model: Mistral, packed: Packed, chunk: int = 256) -> Tensor:
    """log p(response | prompt) of every response (C,), fp32, in nats, summed over its tokens, end-of-sequence
    included.

    Differentiable, and summed in a fixed order. `chunk` rows of logits exist at a time. A stream without
    responses gives an empty tensor that is still connected to every parameter, so that its backward pass
    takes part in the collectives.
    """
    token_logps = model(
        packed.tokens, packed.positions, packed.segments, at=packed.at, targets=packed.targets, chunk=chunk
    )  # (R,)
    if not len(packed.lengths):
        return token_logps
    # Without unsafe, the lengths are read back and checked, which stalls a GPU.
    return torch.segment_reduce(token_logps, "sum", lengths=packed.lengths, unsafe=True)


def identical_pairs(items: Sequence[Item]) -> Tensor:
    """Which pairs have one text as both responses (B,) bool."""
    return torch.tensor([item.responses[0] == item.responses[1] for item in items], dtype=torch.bool)


def flops(architecture: ModelConfig, item: Item) -> int:
    """Floating-point operations that a forward pass over an item needs, two for a multiply-add: the matrices
    for each token, attention for what each token sees, the head where something is predicted. A backward pass
    needs twice as many.
    """
    c, prompt = architecture, len(item.prompt)
    heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    matrices = 2 * c.hidden_size * (heads + kv_heads) + 3 * c.hidden_size * c.intermediate_size  # of a block
    seen = _seen(0, prompt, c.sliding_window)
    seen += sum(_seen(prompt, prompt + len(response) - 1, c.sliding_window) for response in item.responses)
    predicted = sum(map(len, item.responses))
    layers = c.num_hidden_layers * (matrices * item.packed_length + 2 * heads * seen)
    return 2 * (layers + c.vocab_size * c.hidden_size * predicted)


def _seen(first: int, last: int, window: int | None) -> int:
    """Keys that the tokens at positions first .. last - 1 see, all together: position i sees min(i + 1,
    window).
    """
    full = last if window is None else min(last, max(first, window))  # those that see all before them
    return (full * (full + 1) - first * (first + 1)) // 2 + (last - full) * (window or 0)


def micro_batches(
    lengths: Sequence[int], costs: Sequence[float], world_size: int, token_budget: int
) -> list[list[list[int]]]:
    """Split a step's items over ranks by cost, then each rank's into micro-batches of at most `token_budget`
    tokens.

    Returns, for each rank, its micro-batches as lists of places in `lengths`: every place once, the same
    number of micro-batches on every rank (collectives pair up), some empty where there is too little to do.
    An item longer than the budget gets a micro-batch of its own. A fixed function of its arguments, so ranks
    agree without talking.
    """
    shares: list[list[int]] = [[] for _ in range(world_size)]
    load = [0.0] * world_size
    for i in sorted(range(len(lengths)), key=lambda i: (-costs[i], i)):
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += costs[i]
    result = []
    for share in shares:
        batches: list[list[int]] = []
        room: list[int] = []
        for i in sorted(share, key=lambda i: (-lengths[i], i)):  # first fit, the longest first
            place = next((b for b, left in enumerate(room) if lengths[i] <= left), None)
            if place is None:
                batches.append([])
                room.append(token_budget)
                place = len(batches) - 1
            batches[place].append(i)
            room[place] -= lengths[i]
        result.append(batches)
    most = max(map(len, result))
    return [batches + [[]] * (most - len(batches)) for batches in result]


def prefetched(values: Iterator) -> Generator:
    """The same values; while one is in use, the next is made in a thread."""
    with ThreadPoolExecutor(1) as thread:
        end = object()
        coming = thread.submit(next, values, end)
        while (value := coming.result()) is not end:
            coming = thread.submit(next, values, end)
            yield value
