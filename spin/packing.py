"""Prompts with their responses, packed into one stream of tokens; the log-probs of the responses.

The prompt stands once, its responses after it: [x][y][y']. Every response sees the prompt and itself
(arXiv 2410.20305 calls this prefix sharing). SFT packs one response; multiple-choice questions pack choices.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import Segments, to_device
from model.config import ModelConfig
from model.mistral import Mistral


@dataclass(frozen=True)
class Item:
    """Ids of a prompt and of its responses, none empty. A response ends with EOS unless it was cut."""

    prompt: list[int]
    responses: tuple[list[int], ...]
    where: str = ""  # "file:line", for error messages

    @property
    def packed_length(self) -> int:
        """Tokens of this item in a stream: a response's last token is predicted and predicts nothing."""
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses)


@dataclass
class Packed:
    """A stream of T tokens in which the R tokens of C responses are predicted. All tensors are int64."""

    tokens: Tensor  # (T,)
    positions: Tensor  # (T,) a response's positions follow its prompt's
    segments: Segments
    at: Tensor  # (R,) rows that predict
    targets: Tensor  # (R,) the ids to predict
    lengths: Tensor  # (C,) tokens of each response; they sum to R

    def to(self, device) -> "Packed":
        tensors = (self.tokens, self.positions, self.at, self.targets, self.lengths)
        tokens, positions, at, targets, lengths = (to_device(tensor, device) for tensor in tensors)
        return Packed(tokens, positions, self.segments.to(device), at, targets, lengths)


def pack(items: Sequence[Item]) -> Packed:
    """Lay items one after the other. No items give a stream of one token in which nothing is predicted."""
    tokens: list[int] = []
    positions: list[int] = []
    key_index: list[int] = []  # rows of the stream that the segments attend to
    q_lengths: list[int] = []
    k_lengths: list[int] = []
    at: list[int] = []
    for item in items:
        start, prompt = len(tokens), len(item.prompt)
        tokens += item.prompt
        positions += range(prompt)
        for i, response in enumerate(item.responses):
            first, length = len(tokens), len(response) - 1
            tokens += response[:-1]
            positions += range(prompt, prompt + length)
            at += [start + prompt - 1, *range(first, first + length)]
            # The first response shares its prompt's segment; a later one of a single token has none.
            if i == 0 or length:
                q_lengths.append(prompt + length if i == 0 else length)
                k_lengths.append(prompt + length)
                key_index += [*range(start, start + prompt), *range(first, first + length)]
    responses = [response for item in items for response in item.responses]
    if not items:
        tokens, positions, q_lengths, k_lengths, key_index = [0], [0], [1], [1], [0]
    q_offsets, k_offsets = ([0, *accumulate(lengths)] for lengths in (q_lengths, k_lengths))
    return Packed(
        torch.tensor(tokens),
        torch.tensor(positions),
        Segments(q_offsets, k_offsets, torch.tensor(key_index)),
        torch.tensor(at, dtype=torch.int64),
        torch.tensor([token for response in responses for token in response], dtype=torch.int64),
        torch.tensor([len(response) for response in responses], dtype=torch.int64),
    )


def response_logps(model: Mistral, packed: Packed, chunk: int = 256) -> Tensor:
    """log p(response | prompt) of every response (C,), fp32, in nats, summed over its tokens with EOS.

    Differentiable, and summed in a fixed order. `chunk` rows of logits exist at a time. A stream without
    responses gives an empty tensor that still depends on every parameter, so that its backward pass takes
    part in the collectives.
    """
    p = packed
    token_logps = model(p.tokens, p.positions, p.segments, at=p.at, targets=p.targets, chunk=chunk)  # (R,)
    if not len(p.lengths):
        return token_logps
    # Without unsafe, the lengths are read back and checked, which stalls a GPU.
    return torch.segment_reduce(token_logps, "sum", lengths=p.lengths, unsafe=True)


def response_places(items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """Of items with C responses each: the first response with the same tokens, and lengths; (B, C) int64."""
    same = [[item.responses.index(response) for response in item.responses] for item in items]
    lengths = [[len(response) for response in item.responses] for item in items]
    return torch.tensor(same), torch.tensor(lengths)


def flops(architecture: ModelConfig, item: Item) -> int:
    """Floating-point operations of a forward pass over an item, two for a multiply-add.

    Counts the matrices for each token, attention for the keys that each token sees, and the head where
    something is predicted. A backward pass needs twice as many.
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
    """Keys seen by the tokens at positions first to last - 1 in total: position i sees min(i + 1, window)."""
    full = last if window is None else min(last, max(first, window))  # up to here, all keys are seen
    return (full * (full + 1) - first * (first + 1)) // 2 + (last - full) * (window or 0)


def micro_batches(
    lengths: Sequence[int], costs: Sequence[float], world_size: int, token_budget: int
) -> list[list[list[int]]]:
    """Split items over ranks by cost, then each rank's into micro-batches of at most `token_budget` tokens.

    Returns, for each rank, its micro-batches as lists of places in `lengths`: every place once, the same
    number of micro-batches on every rank (collectives pair up), so some may be empty. An item longer than
    the budget gets a micro-batch of its own. Deterministic, so ranks agree without communication.
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
            place = next((b for b, left in enumerate(room) if lengths[i] <= left), len(batches))
            if place == len(batches):
                batches.append([])
                room.append(token_budget)
            batches[place].append(i)
            room[place] -= lengths[i]
        result.append(batches)
    most = max(map(len, result))
    return [batches + [[]] * (most - len(batches)) for batches in result]


class MicroBatch(NamedTuple):
    """The items of one forward pass on this rank, as places in the list of all items."""

    items: list[int]
    step: Sequence[int] = ()  # the items of the whole step, over all micro-batches and ranks
    last: bool = False  # whether it is this rank's last one of the step


def planned(
    steps: Iterable[Sequence[int]],
    items: Sequence[Item],
    architecture: ModelConfig,
    token_budget: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of each step, a step being places in `items`."""
    for step in steps:
        lengths = [items[i].packed_length for i in step]
        costs = [flops(architecture, items[i]) for i in step]
        batches = micro_batches(lengths, costs, world_size, token_budget)[rank]
        for number, places in enumerate(batches, 1):
            yield MicroBatch([step[place] for place in places], step, number == len(batches))


def packed_batches(
    plan: Iterable[MicroBatch], pack_items: Callable[[list[int]], Packed], device
) -> Generator[tuple[MicroBatch, Packed]]:
    """Each micro-batch with its stream on the device; a thread packs the next one in the meantime.

    Training, held-out pairs, scoring and evaluation all read their items through this generator. Close it
    (contextlib.closing) to end the thread.
    """
    batches = ((batch, pack_items(batch.items).to(device)) for batch in plan)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while value := coming.result():
            coming = thread.submit(next, batches, None)
            yield value
