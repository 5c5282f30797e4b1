"""Layout of a packed stream, and how a step is split."""

import random

import pytest

from spin.engine.batches import flops, micro_batches
from spin.packing import Item, pack
from tests.helpers import random_ids, small_config, small_model


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
        item = Item(
            random_ids(rng, rng.randint(1, 9)), tuple(random_ids(rng, rng.randint(1, 9)) for _ in range(3))
        )
        assert len(pack([item]).tokens) == item.packed_length


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


@pytest.mark.parametrize("window", [None, 3, 5, 9, 40])
def test_flops_are_those_counted_by_hand(window):
    c = small_config(sliding_window=window)  # E 32, F 64, 3 layers, 4 heads of 8, 2 key heads, V 97
    item = Item([5] * 7, ([6] * 5, [7] * 4))
    weights = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    # 14 tokens: a response's last one is not in the stream
    positions = [*range(7), *range(7, 11), *range(7, 10)]
    seen = sum(min(position + 1, window or 99) for position in positions)
    assert flops(c, item) == 3 * (2 * weights * 14 + 4 * 4 * 8 * seen) + 2 * 97 * 32 * 9


def test_flops_agree_with_torch_counter_on_the_matrices():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from spin.packing import response_logps

    item, model = Item([5] * 7, ([6] * 5, [7] * 4)), small_model()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        response_logps(model, pack([item]))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    seen = 7 * 8 // 2 + sum(range(8, 12)) + sum(range(8, 11))
    assert products == flops(model.config, item) - 3 * 4 * 4 * 8 * seen
