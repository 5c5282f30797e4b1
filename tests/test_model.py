"""The transformer against transformers' MistralForCausalLM, and the cache against the full forward."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention import Segments
from model.kv_cache import KVCache
from model.mistral import Mistral, TokenLogps
from spin.packing import Item, pack, response_logps
from tests.helpers import FAMILIES, naive_logps, random_ids, reference, small_config, small_model

SHAPES = {
    "gqa 2": {},
    "gqa 1": dict(num_key_value_heads=4),
    "gqa 4": dict(num_key_value_heads=1),
    "gqa 8": dict(num_attention_heads=8, num_key_value_heads=1),
    "gqa 8, tied, window": dict(
        num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True, sliding_window=6
    ),
    "tied": dict(tie_word_embeddings=True),
    "wide heads": dict(head_dim=16),
    "window": dict(sliding_window=5),
    "theta": dict(rope_theta=1e6, rms_norm_eps=1e-6),
    **FAMILIES,
}


def logits_of(model, sequences):
    """One packed forward; a list of (length, V)."""
    lengths = [len(s) for s in sequences]
    tokens = torch.tensor([t for s in sequences for t in s])
    positions = torch.cat([torch.arange(n) for n in lengths])
    return model(tokens, positions, Segments.causal(lengths)).split(lengths)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_logits_equal_transformers_one_sequence_at_a_time(shape):
    model = small_model(**SHAPES[shape])
    other = reference(model)
    rng = random.Random(0)
    sequences = [random_ids(rng, n) for n in (1, 7, 40, 3, 19)]
    with torch.no_grad():
        for sequence, ours in zip(sequences, logits_of(model, sequences)):
            theirs = other(torch.tensor([sequence])).logits[0]
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_in_bf16_are_as_near_to_fp32_as_transformers_own(shape):
    model = small_model(**SHAPES[shape])
    exact, low = reference(model), reference(model).bfloat16()
    model.bfloat16()
    rng = random.Random(0)
    ours, theirs = [], []
    with torch.no_grad():
        for sequence in [random_ids(rng, n) for n in (1, 7, 40, 3, 19, 100, 60)]:
            expected = exact(torch.tensor([sequence])).logits[0]
            ours.append(logits_of(model, [sequence])[0] - expected)
            theirs.append(low(torch.tensor([sequence])).logits[0].float() - expected)
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    # Means, for the largest of thousands goes either way; 1.1, for other vector units round otherwise.
    assert 0 < ours.square().mean() <= 1.1 * theirs.square().mean()


def test_the_window_matters_in_that_comparison():
    sequence = random_ids(random.Random(1), 40)
    with torch.no_grad():
        (narrow,), (wide,) = (logits_of(small_model(sliding_window=w), [sequence]) for w in (5, None))
    torch.testing.assert_close(narrow[:5], wide[:5])
    assert (narrow[5:] - wide[5:]).abs().max() > 1e-2


@pytest.mark.parametrize("shape", ["gqa 2", "gqa 4", "window", *FAMILIES])
def test_cached_ragged_decoding_equals_a_full_forward(shape):
    model = small_model(**SHAPES[shape])
    rng = random.Random(2)
    sequences = [random_ids(rng, n) for n in (12, 15, 30)]
    prompts = [1, 7, 22]  # lengths read by the prefill; the rest is fed token by token
    with torch.no_grad():
        expected = logits_of(model, sequences)
        cache = KVCache(model.config, 3, 32, torch.float32)
        prefill = torch.tensor([t for s, n in zip(sequences, prompts) for t in s[:n]])
        positions = torch.cat([torch.arange(n) for n in prompts])
        slots = torch.arange(3).repeat_interleave(torch.tensor(prompts))
        last = torch.tensor(prompts).cumsum(0) - 1
        logits = model(prefill, positions, Segments.causal(prompts), cache, slots, at=last)
        for step in range(8):
            for row in range(3):
                torch.testing.assert_close(
                    logits[row], expected[row][prompts[row] - 1 + step], atol=1e-4, rtol=1e-4
                )
            tokens = torch.tensor([s[n + step] for s, n in zip(sequences, prompts)])
            at = torch.tensor(prompts) + step
            cache.longest = int(at.max()) + 1
            logits = model(tokens, at, cache=cache, slots=torch.arange(3))


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_logps_and_gradients_equal_transformers_on_separate_sequences(shape):
    model = small_model(**SHAPES[shape])
    other = reference(model)
    rng = random.Random(3)
    items = [
        Item(random_ids(rng, prompt), tuple(random_ids(rng, n) for n in responses))
        for prompt, responses in ((9, (5, 12)), (1, (1, 8)), (25, (3, 1)), (4, (6,)), (6, (2, 9, 4)))
    ]
    coefficients = torch.randn(sum(len(item.responses) for item in items))
    ours = response_logps(model, pack(items), chunk=7)
    theirs = torch.stack([logp for item in items for logp in naive_logps(other, item)])
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-4)
    (ours * coefficients).sum().backward()
    (theirs * coefficients).sum().backward()
    reference_gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    for name, parameter in model.named_parameters():
        expected = reference_gradients[name]
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_log_softmax_and_its_gradient_are_torchs(chunk):
    torch.manual_seed(0)
    x, weight = torch.randn(11, 6, requires_grad=True), torch.randn(13, 6, requires_grad=True)
    targets, grad = torch.randint(13, (11,)), torch.randn(11)
    expected = torch.log_softmax(x @ weight.T, -1)[torch.arange(11), targets]
    wanted = torch.autograd.grad(expected, (x, weight), grad)
    ours = TokenLogps.apply(x, weight, targets, chunk)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, weight), grad), wanted)


@pytest.mark.parametrize("shape", ["gqa 2", *FAMILIES])
def test_recomputing_blocks_changes_no_gradient(shape):
    item = Item(
        random_ids(random.Random(4), 6), (random_ids(random.Random(5), 5), random_ids(random.Random(6), 9))
    )
    gradients = []
    for checkpointing in ("none", "selective", "full"):
        model = small_model(**SHAPES[shape])
        for block in model.model["layers"]:
            block.checkpointing = checkpointing
        response_logps(model, pack([item])).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for others in gradients[1:]:
        torch.testing.assert_close(gradients[0], others, rtol=0, atol=0)


class Products(TorchDispatchMode):
    """Counts matrix products, with and without a bias."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", ["gqa 2", "qwen2"])
def test_selective_checkpointing_recomputes_no_matrix_product(shape):
    counts = []
    for checkpointing in ("none", "selective", "full"):
        model = small_model(**SHAPES[shape])
        for block in model.model["layers"]:
            block.checkpointing = checkpointing
        loss = response_logps(model, pack([Item([5, 6, 7], ([8, 9], [10]))])).sum()
        with Products() as products:
            loss.backward()
        counts.append(products.count)
    assert counts[0] == counts[1] < counts[2]


def test_new_weights_have_zero_biases_and_unit_norms():
    for changes in (FAMILIES["qwen2"], FAMILIES["qwen3"]):
        for name, weight in Mistral(small_config(**changes)).init_weights(0).named_parameters():
            if weight.dim() == 1:
                assert torch.all(weight == (0 if name.endswith("bias") else 1)), name


def test_a_stream_without_responses_still_reaches_every_parameter():
    model = small_model()
    response_logps(model, pack([])).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
