"""Layout of a packed stream, and how a step is split."""

import random

import pytest
from conftest import random_ids

from spin.packing import Item, cost, micro_batches, pack


def test_the_layout_of_two_pairs_written_out():
    packed = pack([Item([10, 11, 12], ([20, 21, 2], [30, 2])), Item([13], ([2], [31, 32, 2]))])
    assert packed.tokens.tolist() == [10, 11, 12, 20, 21, 30, 13, 31, 32]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert packed.at.tolist() == [2, 3, 4, 2, 5, 6, 6, 7, 8]
    assert packed.targets.tolist() == [20, 21, 2, 30, 2, 2, 31, 32, 2]
    assert packed.lengths.tolist() == [3, 2, 1, 3]
    assert packed.segments.q_offsets == [0, 5, 6, 7, 9]
    assert packed.segments.k_offsets == [0, 5, 9, 10, 13]
    assert packed.segments.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 6, 7, 8]


def test_packed_length_is_what_an_item_takes():
    rng = random.Random(0)
    for _ in range(20):
        item = Item(random_ids(rng, rng.randint(1, 9)), tuple(random_ids(rng, rng.randint(1, 9)) for _ in range(3)))
        assert len(pack([item]).tokens) == item.packed_length
        assert cost(item) >= item.packed_length


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [1, 5, 64])
def test_every_item_once_equal_counts_and_no_batch_over_budget(world_size, items):
    rng = random.Random(items)
    lengths = [rng.randint(1, 150) for _ in range(items)]
    lengths[0] = 900  # longer than the budget: alone
    plan = micro_batches(lengths, lengths, world_size, 400)
    assert len(plan) == world_size and len({len(batches) for batches in plan}) == 1
    assert sorted(i for batches in plan for batch in batches for i in batch) == list(range(items))
    for batches in plan:
        for batch in batches:
            assert sum(lengths[i] for i in batch) <= 400 or batch == [0]


def test_ranks_get_about_the_same_cost():
    rng = random.Random(1)
    costs = [rng.randint(50, 1000) for _ in range(64)]
    plan = micro_batches(costs, costs, 8, 4000)
    loads = [sum(costs[i] for batch in batches for i in batch) for batches in plan]
    assert max(loads) < 1.05 * min(loads)
