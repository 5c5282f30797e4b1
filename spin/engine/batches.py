"""Steps split over ranks and into micro-batches, by their tokens and floating-point operations."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from model.config import ModelConfig
from spin.engine.distributed import Ranks
from spin.packing import Item, Packed, pack


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


def item_batches(
    steps: Iterable[Sequence[int]],
    items: Sequence[Item],
    architecture: ModelConfig,
    token_budget: int,
    ranks: Ranks,
) -> Generator[tuple[MicroBatch, Packed]]:
    """`packed_batches` of this rank's micro-batches of each step, a step being places in `items`."""

    def plan() -> Iterator[MicroBatch]:
        for step in steps:
            lengths = [items[i].packed_length for i in step]
            costs = [flops(architecture, items[i]) for i in step]
            batches = micro_batches(lengths, costs, ranks.world_size, token_budget)[ranks.rank]
            for number, places in enumerate(batches, 1):
                yield MicroBatch([step[place] for place in places], step, number == len(batches))

    return packed_batches(plan(), lambda chosen: pack([items[i] for i in chosen]), ranks.device)


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
