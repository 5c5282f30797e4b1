"""What benchmarks/roofline.py charges an operator, by hand; and what it finds in the model."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu import SHAPES, ultrachat_like
from benchmarks.roofline import Rates, Roofline, decoding, micro_batches_of, scoring, seen, training
from model.attention import Segments
from model.mistral import Mistral
from spin.engine.batches import flops
from spin.packing import Item, pack

SLOW = Rates(matmul=1e6, copy=1e3)  # next to which a kernel's least time is nothing


def charged(work) -> dict[str, float]:
    with FakeTensorMode(), Roofline(SLOW) as roofline:
        work()
    return roofline.seconds


def test_each_operator_is_charged_its_bytes_or_its_flops():
    a, b = torch.Size((30, 20)), torch.Size((20, 10))
    assert charged(lambda: torch.ones(a) @ torch.ones(b))["mm"] == pytest.approx((600 + 200 + 300) * 4 / 1e3)
    fast = Rates(matmul=1e3, copy=1e9)
    with FakeTensorMode(), Roofline(fast) as roofline:
        torch.ones(a) @ torch.ones(b)
    assert roofline.seconds["mm"] == pytest.approx(2 * 30 * 20 * 10 / 1e3)
    x = charged(lambda: torch.empty(100).bfloat16().float())
    assert x == {"_to_copy": pytest.approx(2 * 100 * (4 + 2) / 1e3)}  # allocating is nothing
    assert charged(lambda: torch.empty(100).view(10, 10).t()[2:]) == {}  # nor is a view
    assert charged(lambda: torch.empty(100).mul_(torch.empty(100))) == {"mul_": pytest.approx(3 * 400 / 1e3)}
    assert charged(lambda: torch.empty(100).copy_(torch.empty(100))) == {
        "copy_": pytest.approx(2 * 400 / 1e3)
    }
    assert charged(lambda: torch.empty(50, 8)[torch.empty(3, dtype=torch.int64)])["index"] == pytest.approx(
        2 * 96 / 1e3
    )


def test_keys_seen_are_those_of_every_token_of_a_pair():
    pairs = [Item([1] * 5, ([1] * 4, [1] * 7)), Item([1] * 9, ([1], [1] * 2))]
    by_hand = sum(place + 1 for item in pairs for place in range(len(item.prompt)))
    by_hand += sum(
        len(item.prompt) + i + 1
        for item in pairs
        for response in item.responses
        for i in range(len(response) - 1)
    )
    assert seen(pack(pairs).segments) == by_hand
    assert seen(Segments.causal([3, 2])) == 6 + 3


@pytest.mark.parametrize("checkpointing, forwards", [("none", 3), ("full", 4)])
def test_products_are_the_useful_flops_and_those_done_again(checkpointing, forwards):
    shape = SHAPES["tiny"]
    items, rates = ultrachat_like(shape, 4), Rates(matmul=1e3, copy=1e30)
    of = training(shape, rates, items, 8192, {"activation_checkpointing": checkpointing})
    (batch,) = micro_batches_of(shape, items, 8192)
    useful = sum(flops(shape.config, item) for item in batch)
    heads = shape.config.num_attention_heads * shape.config.head_dim
    attention = 4 * shape.config.num_hidden_layers * heads * seen(pack(batch).segments)
    head = (
        2
        * shape.config.vocab_size
        * shape.config.hidden_size
        * sum(len(r) for item in batch for r in item.responses)
    )
    # of the head the logits are computed again, in any case
    expected = forwards * (useful - attention - head) + 4 * head
    if checkpointing == "full":  # a block's last product is not: nothing needs it
        last = shape.config.num_hidden_layers * shape.config.hidden_size * shape.config.intermediate_size
        expected -= 2 * last * len(pack(batch).tokens)
    assert of.seconds["mm"] * rates.matmul == pytest.approx(expected, rel=1e-6)


def test_a_decoding_step_reads_the_weights_and_what_the_slots_hold():
    shape, config, slots = SHAPES["tiny"], SHAPES["tiny"].config, 4
    of = decoding(shape, Rates(matmul=1e30, copy=1e6), slots, held=50)
    width, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    e, f = config.hidden_size, config.intermediate_size
    block = [(e, width), (e, kv), (e, kv), (width, e), (e, f), (e, f), (f, e)]
    elements = sum(
        a * b + slots * (a + b) for a, b in config.num_hidden_layers * block + [(e, config.vocab_size)]
    )
    assert of.seconds["mm"] * 1e6 == pytest.approx(2 * elements)
    assert of.seconds["_flash_attention_forward"] * 1e6 == pytest.approx(
        2 * slots * 50 * kv * 2 * config.num_hidden_layers
    )


def test_operators_that_return_nothing_are_charged_too():
    a, b = torch.Size((40,)), torch.Size((60,))
    scaled = charged(lambda: torch._foreach_mul_([torch.empty(a), torch.empty(b)], 2.0))
    assert scaled == {"_foreach_mul_": pytest.approx(2 * 100 * 4 / 1e3)}
    items, shape = ultrachat_like(SHAPES["tiny"], 2), SHAPES["tiny"]
    of = training(shape, Rates(matmul=1e30, copy=1e6), items, 4096, {"activation_checkpointing": "none"})
    with torch.device("meta"):
        count = sum(weight.numel() for weight in Mistral(shape.config).parameters())
    # a gradient in bf16, to fp32
    assert of.seconds["chunk_cat"] * 1e6 == pytest.approx((2 + 4) * count, rel=1e-3)


def test_scoring_is_a_forward_pass():
    shape = SHAPES["tiny"]
    of = scoring(shape, Rates(matmul=1e3, copy=1e30), ultrachat_like(shape, 2), 4096)
    attention = [name for name in of.seconds if name.startswith("_flash")]
    assert attention == ["_flash_attention_forward"]
