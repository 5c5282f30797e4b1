"""The sampler against transformers, the softmax, and itself in other circumstances."""

import random

import pytest
import torch
from conftest import random_ids, reference, small_model

from model.sampler import counter_uniform, generate, generate_stream, sample

PROMPTS = [random_ids(random.Random(n), n) for n in (3, 11, 1, 7, 20, 5, 2, 9, 4)]


@pytest.mark.parametrize(
    "shape",
    [dict(sliding_window=16), dict(num_key_value_heads=4), dict(num_attention_heads=8, num_key_value_heads=1),
     dict(num_key_value_heads=1, tie_word_embeddings=True)],
)  # fmt: skip
def test_64_greedy_tokens_equal_transformers_generate_on_32_ragged_prompts(shape):
    model = small_model(**shape)
    other = reference(model)
    rng = random.Random(0)
    prompts = [random_ids(rng, rng.randrange(1, 50)) for _ in range(32)]
    ours = generate(model, prompts, max_new_tokens=64, slots=7)
    for prompt, response in zip(prompts, ours):
        theirs = other.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert response == theirs[0, len(prompt) :].tolist()
    assert len({tuple(response[-8:]) for response in ours}) > 16  # and it is no single cycle that they all end in


@pytest.mark.parametrize("settings", [dict(temperature=1.0), dict(temperature=0.7, top_p=0.8)])
def test_a_response_depends_on_neither_slots_nor_order_nor_company(settings):
    model = small_model()
    settings = dict(max_new_tokens=20, seed=5, eos_id=2, **settings)
    expected = generate(model, PROMPTS, slots=64, **settings)
    assert len({tuple(response) for response in expected}) > 1
    for slots, prefill_tokens in ((1, 8192), (3, 8192), (4, 1)):
        assert generate(model, PROMPTS, slots=slots, prefill_tokens=prefill_tokens, **settings) == expected
    order = [4, 0, 8, 2]
    chosen = [PROMPTS[i] for i in order]
    assert generate(model, chosen, streams=order, slots=2, **settings) == [expected[i] for i in order]


def test_seed_and_stream_each_change_the_text():
    model = small_model()
    texts = [
        generate(model, [PROMPTS[0]], max_new_tokens=20, temperature=1.0, seed=seed, streams=[stream])[0]
        for seed in (0, 1)
        for stream in (0, 1)
    ]
    assert len(set(map(tuple, texts))) == 4


def test_a_response_ends_with_end_of_sequence_or_at_the_limit():
    model = small_model()
    free = generate(model, PROMPTS, max_new_tokens=20, temperature=1.0)
    eos = max(set(sum(free, [])), key=sum(free, []).count)
    ended = generate(model, PROMPTS, max_new_tokens=20, temperature=1.0, eos_id=eos)
    for whole, cut in zip(free, ended):
        assert cut == (whole[: whole.index(eos) + 1] if eos in whole else whole)
    assert any(len(response) < 20 for response in ended)
    assert dict(generate_stream(model, PROMPTS, max_new_tokens=1)) == {i: r[:1] for i, r in
        enumerate(generate(model, PROMPTS, max_new_tokens=3))}  # fmt: skip


def test_ids_beyond_the_tokenizers_are_never_chosen():
    for temperature in (0.0, 1.0):
        settings = dict(max_new_tokens=20, temperature=temperature)
        free = generate(small_model(), PROMPTS, **settings)
        limited = generate(small_model(), PROMPTS, vocab_limit=30, **settings)
        assert max(map(max, free)) >= 30 > max(map(max, limited))


def test_no_prompts_and_impossible_ones():
    model = small_model()
    assert generate(model, [], max_new_tokens=4) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[5], []], max_new_tokens=4)
    for bad in (dict(max_new_tokens=0), dict(max_new_tokens=1, top_p=0.0), dict(max_new_tokens=1, temperature=-1)):
        with pytest.raises(ValueError, match="need max_new_tokens"):
            generate(model, [[5]], **bad)


def test_sampled_log_probabilities_are_those_of_a_full_forward():
    """Decode with the cache, score again without it: the distributions that tokens came from must agree."""
    model = small_model()
    (response,) = generate(model, [PROMPTS[1]], max_new_tokens=30, temperature=1.0, seed=3)
    from model.attention import Segments

    ids = torch.tensor(PROMPTS[1] + response)
    with torch.no_grad():
        logits = model(ids[:-1], torch.arange(len(ids) - 1), Segments.causal([len(ids) - 1]))[len(PROMPTS[1]) - 1 :]
    uniforms = counter_uniform(3, torch.zeros(30, dtype=torch.int64), torch.arange(30))
    assert sample(logits, 1.0, 1.0, uniforms).tolist() == response


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("by", ["stream", "step"])
def test_sampled_tokens_have_the_softmax_distribution(by):
    # 19 degrees of freedom: 43.8 is the 99.9% quantile of chi-square.
    draws = 200_000
    torch.manual_seed(0)
    logits = torch.randn(20)
    counter, other = torch.arange(draws), torch.full((draws,), 7)
    uniforms = counter_uniform(11, *((counter, other) if by == "stream" else (other, counter)))
    tokens = sample(logits.expand(draws, -1), 1.0, 1.0, uniforms)
    counts = torch.bincount(tokens, minlength=20)
    assert chi_square(counts, logits.softmax(-1) * draws) < 43.8


def test_uniform_numbers_are_uniform_and_neighbours_independent():
    # 99 and 99 degrees of freedom: 148.2 is the 99.9% quantile.
    streams, steps = torch.meshgrid(torch.arange(400), torch.arange(250), indexing="ij")
    uniforms = counter_uniform(0, streams.flatten(), steps.flatten())
    assert uniforms.min() >= 0 and uniforms.max() < 1 and len(uniforms.unique()) == 100_000
    assert chi_square(torch.histc(uniforms, 100, 0, 1), torch.full((100,), 1000.0)) < 148.2
    for a, b in ((uniforms[:-1], uniforms[1:]), (uniforms[:-250], uniforms[250:])):  # next step, next stream
        cell = (a * 10).long() * 10 + (b * 10).long()
        assert chi_square(torch.bincount(cell, minlength=100), torch.full((100,), len(a) / 100)) < 148.2


def test_counter_hash_is_splitmix64():
    # First output of the published SplitMix64 for seed 1234567: its finaliser on seed + golden gamma.
    from model.sampler import _mix, _signed

    state = torch.tensor([_signed(1234567 + 0x9E3779B97F4A7C15)])
    assert _mix(state).item() % 2**64 == 6457827717110365317


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 0.9), (1.3, 0.4), (1.0, 1e-6)])
def test_kept_tokens_and_probabilities_are_those_of_transformers_warpers(temperature, top_p):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    torch.manual_seed(1)
    logits = torch.randn(1, 50) * 3
    warpers = [TemperatureLogitsWarper(temperature)] + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])
    expected = LogitsProcessorList(warpers)(None, logits).softmax(-1)[0].double()
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # evenly: frequencies are probabilities
    tokens = sample(logits.expand(len(grid), -1), temperature, top_p, grid)
    frequencies = torch.bincount(tokens, minlength=50).double() / len(grid)
    torch.testing.assert_close(frequencies, expected, atol=2e-5, rtol=0)
    assert not frequencies[expected == 0].any()
