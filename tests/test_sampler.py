"""The sampler against transformers, the softmax, and itself in other circumstances."""

import contextlib
import itertools
import random

import pytest
import torch

import model.sampler as sampler
from model.attention import Segments
from model.kv_cache import KVCache, cgroup_memory, free_memory
from model.sampler import fitting_slots, generate, generate_stream, generate_tokens
from model.sampling import at_quantiles, counter_uniform, restricted, sample
from tests.helpers import FAMILIES, random_ids, reference, small_model

PROMPTS = [random_ids(random.Random(n), n) for n in (3, 11, 1, 7, 20, 5, 2, 9, 4)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        dict(sliding_window=16),
        dict(num_key_value_heads=4),
        dict(num_attention_heads=8, num_key_value_heads=1),
        dict(num_key_value_heads=1, tie_word_embeddings=True),
        *FAMILIES.values(),
    ],
)
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
    # and it is no single cycle that they all end in
    assert len({tuple(response[-8:]) for response in ours}) > 16


@pytest.mark.parametrize("settings", [dict(temperature=1.0), dict(temperature=0.7, top_p=0.8)])
def test_a_response_depends_on_neither_slots_nor_order_nor_other_prompts(settings):
    model = small_model().double()  # so that shapes move no rounding that matters
    settings = dict(max_new_tokens=20, seed=5, eos_id=2, **settings)
    expected = generate(model, PROMPTS, slots=64, **settings)
    assert len({tuple(response) for response in expected}) > 1
    for slots, prefill_tokens in ((0, 2048), (1, 8192), (3, 8192), (4, 1), (9, 1), (5, 30)):
        assert generate(model, PROMPTS, slots=slots, prefill_tokens=prefill_tokens, **settings) == expected
    assert generate(model, PROMPTS, slots=5, fixed_slots=True, slot_length=64, **settings) == expected
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
    first = generate_stream(model, PROMPTS, max_new_tokens=1)
    assert {r.index: r.ids for r in first} == {
        i: r[:1] for i, r in enumerate(generate(model, PROMPTS, max_new_tokens=3))
    }


def test_any_of_several_ids_ends_a_response():
    model, prompts = small_model(), PROMPTS
    whole = generate(model, prompts, max_new_tokens=30)
    ends = {whole[0][5], whole[1][2], whole[2][9]}
    for text, response in zip(whole, generate(model, prompts, max_new_tokens=30, eos_id=ends)):
        first = next((i for i, id in enumerate(text) if id in ends), len(text))
        assert response == text[: first + 1]


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
    for bad in (
        dict(top_p=0.0),
        dict(temperature=-1),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(samples=0),
        dict(slots=-1),
    ):
        with pytest.raises(ValueError, match=f"need .*{next(iter(bad))} "):
            generate(model, [[5]], **dict(max_new_tokens=1) | bad)
    with pytest.raises(ValueError, match="need max_new_tokens"):
        generate(model, [[5]], max_new_tokens=0)
    with pytest.raises(ValueError, match="slot_length = 3, but prompt and response may have 5"):
        generate(model, [[5]], max_new_tokens=4, slot_length=3)
    with pytest.raises(ValueError, match="3 streams for 1 prompts"):
        generate(model, [[5]], max_new_tokens=4, streams=[1, 2, 3])
    with pytest.raises(ValueError, match="temperature = 1e-09 is too near 0"):
        generate(model, [[5]], max_new_tokens=4, temperature=1e-9)
    with pytest.raises(ValueError, match="fixed_slots needs a number"):
        generate(model, [[5]], max_new_tokens=4, fixed_slots=True)


def test_weights_that_are_not_finite_are_refused_at_the_first_prompts():
    model = small_model()
    with torch.no_grad():
        model.model["layers"][1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="not finite; are its weights damaged"):
        generate(model, PROMPTS, max_new_tokens=4)
    with pytest.raises(ValueError, match="not finite"):  # also where the first prompt is not in slot 0
        generate(model, [[5]], streams=[1], slots=4, fixed_slots=True, max_new_tokens=4)


def full_forward_logps(model, prompt, response) -> torch.Tensor:
    """log p of each response token, from one pass over prompt and response without a cache."""
    ids = torch.tensor(prompt + response)
    with torch.no_grad():
        logits = model(ids[:-1], torch.arange(len(ids) - 1), Segments.causal([len(ids) - 1]))
    return logits.log_softmax(-1)[len(prompt) - 1 :].gather(-1, ids[len(prompt) :, None]).squeeze(-1)


@pytest.mark.parametrize("settings", [{}, dict(temperature=1.0), dict(temperature=0.6, top_k=8, top_p=0.9)])
@pytest.mark.parametrize("slots", [dict(slots=1), dict(slots=4), dict(slots=4, fixed_slots=True)])
def test_returned_log_probabilities_are_a_full_forwards(settings, slots):
    model = small_model(sliding_window=16)
    responses = list(
        generate_stream(model, PROMPTS, max_new_tokens=30, logps=True, seed=3, eos_id=9, **settings, **slots)
    )
    assert sorted(response.index for response in responses) == list(range(len(PROMPTS)))
    for response in responses:
        expected = full_forward_logps(model, PROMPTS[response.index], response.ids)
        torch.testing.assert_close(torch.tensor(response.logps), expected, atol=1e-4, rtol=0)
    assert next(generate_stream(model, PROMPTS, max_new_tokens=2)).logps is None


def test_a_token_comes_as_soon_as_it_is_chosen():
    model = small_model()
    stream = generate_tokens(model, PROMPTS[:2], max_new_tokens=8, slots=2)
    begun = [next(stream) for _ in range(4)]
    assert sorted(token.index for token in begun) == [0, 0, 1, 1] and not any(token.last for token in begun)
    rest = list(stream)
    assert [token.last for token in rest] == [False] * 10 + [True] * 2
    for index, response in enumerate(generate(model, PROMPTS[:2], max_new_tokens=8)):
        assert [token.id for token in begun + rest if token.index == index] == response


def test_samples_of_a_prompt_differ_and_the_first_is_what_one_alone_would_be():
    model = small_model()
    settings = dict(max_new_tokens=20, temperature=1.0, eos_id=2, seed=4)
    three = generate(model, PROMPTS, samples=3, slots=5, **settings)
    assert three[::3] == generate(model, PROMPTS, **settings)
    assert len(set(map(tuple, three))) == 3 * len(PROMPTS)
    alone = generate(model, [PROMPTS[4]], samples=3, streams=[4], **settings)
    assert alone == three[12:15]


def test_a_prompt_longer_than_the_budget_is_read_in_a_pass_of_its_own():
    model, passes = small_model(), []
    rng = random.Random(0)
    prompts = [random_ids(rng, n) for n in (3, 60, 5, 4)]
    expected = [generate(model, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    model.register_forward_pre_hook(lambda _, args: passes.append(args[2].q_offsets if args[2] else None))
    assert generate(model, prompts, max_new_tokens=5, slots=4, prefill_tokens=10) == expected
    assert [offsets for offsets in passes if offsets] == [[0, 60], [0, 5, 9], [0, 3]]


def test_ten_thousand_prompts_of_one_token():
    model = small_model(vocab_size=40, num_hidden_layers=1).double()
    prompts = [[3 + i % 37] for i in range(10_000)]
    responses = generate(model, prompts, max_new_tokens=3, slots=128, eos_id=7)
    expected = {
        prompt[0]: generate(model, [prompt], max_new_tokens=3, eos_id=7)[0] for prompt in prompts[:37]
    }
    assert responses == [expected[prompt[0]] for prompt in prompts]


@pytest.mark.parametrize("fixed", [False, True])
def test_all_responses_end_at_once(fixed):
    model = small_model()
    settings = dict(max_new_tokens=9, slots=4, fixed_slots=fixed)
    assert generate(model, PROMPTS, vocab_limit=1, eos_id=0, **settings) == [[0]] * len(PROMPTS)
    assert generate(model, PROMPTS, vocab_limit=1, eos_id=1, **settings) == [[0] * 9] * len(PROMPTS)


def test_prompts_are_read_while_others_decode_and_a_freed_slot_is_used_at_once():
    """One forward pass has the decoding rows and the new prompts; only the first pass has prompts alone."""
    model, passes = small_model(), []
    model.register_forward_pre_hook(
        lambda _, args: passes.append((len(args[0]), args[2].q_offsets if args[2] else None))
    )
    prompts = [random_ids(random.Random(n), 6) for n in range(4)]
    generate(model, prompts, max_new_tokens=3, slots=2)
    # Two prompts; two steps of both; the next two prompts in their place; two steps.
    assert passes == [(12, [0, 6, 12]), (2, None), (2, None)] * 2
    passes.clear()
    free = generate(model, prompts[:2], max_new_tokens=3)
    eos = free[0][1]
    assert eos not in (free[0][0], *free[1][:2])  # prompt 0 ends at its second token, prompt 1 does not
    passes.clear()
    generate(model, prompts[:3], max_new_tokens=3, slots=2, eos_id=eos)
    # prompt 2 in the same pass as prompt 1's third token
    assert passes[:3] == [(12, [0, 6, 12]), (2, None), (1 + 6, [0, 6])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_fixed_slots_other_prompts_change_no_bit(dtype):
    """Under the claim's conditions: one machine and number of threads, the same slots and slot length."""
    # Wide enough that matrix products round by a row's place and by their height, where the library does so.
    model = small_model(hidden_size=256, intermediate_size=640, vocab_size=1000, head_dim=64).to(dtype)
    rng = random.Random(0)
    prompts = [random_ids(rng, rng.randrange(1, 60), 1000) for _ in range(24)]
    settings = dict(
        max_new_tokens=24,
        temperature=1.0,
        eos_id=2,
        logps=True,
        slots=6,
        fixed_slots=True,
        slot_length=90,
        samples=2,
    )
    read, steps = [], []  # passes over a prompt, and slots of decoding steps

    def record(_, arguments, keywords):
        slots = keywords["slots"].tolist()
        if arguments[2] is None:
            steps.append(slots)
        else:
            read.append((arguments[0].tolist(), slots))

    model.register_forward_pre_hook(record, with_kwargs=True)

    def asked(numbers):
        """The responses to some prompts, once it is sure that each prompt was in the slot of its number."""
        read.clear()
        found = sorted(generate_stream(model, [prompts[i] for i in numbers], streams=numbers, **settings))
        slots = [(prompts[i], [(2 * i + copy) % 6] * len(prompts[i])) for i in numbers for copy in (0, 1)]
        assert sorted(read) == sorted(slots)
        return found

    whole, order = asked(range(24)), rng.sample(range(24), 10)
    part = asked(order)
    assert all(slots == list(range(6)) for slots in steps)
    for place, i in enumerate(order):
        for copy in (0, 1):
            assert part[2 * place + copy][1:] == whole[2 * i + copy][1:]


def test_slots_are_as_many_as_memory_holds():
    # 3 layers, 2 key heads of 8, fp32: keys and values of a token take 2 * 3 * 2 * 8 * 4 bytes
    model = small_model()
    assert KVCache.bytes_per_slot(model.config, 100, torch.float32) == 100 * 384
    cache = KVCache(model.config, 5, 100, torch.float32)
    assert cache.k.nbytes + cache.v.nbytes == 5 * 100 * 384
    assert fitting_slots(model, 100, 10 * 100 * 384) == 8  # four fifths
    assert fitting_slots(model, 100, 1 << 40) == 128  # a CPU gains nothing from more
    with pytest.raises(ValueError, match="one sequence of 100 tokens takes 0.0 MB, and of 0.0 MB"):
        fitting_slots(model, 100, 100 * 384)
    assert 1 << 20 < free_memory(torch.device("cpu")) < 1 << 50


CGROUPS = {  # table, folder, and names of files and field
    "v2": ("0::/job/step\n", "", "max", "current", "inactive_file"),
    "v1": ("4:memory:/job/step\n0::/\n", "memory", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
}


@pytest.mark.parametrize("version", CGROUPS)
def test_memory_is_limited_by_the_process_cgroup_and_by_those_that_contain_it(tmp_path, version):
    table, folder, limit, usage, cache = CGROUPS[version]

    def group(path, most, used, droppable):
        directory = tmp_path / "sys/fs/cgroup" / folder / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"memory.{limit}").write_text(f"{most}\n")
        (directory / f"memory.{usage}").write_text(f"{used}\n")
        (directory / "memory.stat").write_text(f"anon 7\n{cache} {droppable}\n")

    assert cgroup_memory(tmp_path) == 2**63  # no cgroups
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(table)
    group("job/step", 1000, 700, 200)
    assert cgroup_memory(tmp_path) == 500
    group("job", 2000, 1900, 300)
    assert cgroup_memory(tmp_path) == 400
    group("job/step", 1000, 1300, 200)
    assert cgroup_memory(tmp_path) == 0
    group("job/step", "max" if not folder else 2**63 - 4096, 10**12, 0)
    assert cgroup_memory(tmp_path) == 400


def test_steps_replayed_for_a_few_slot_counts_give_the_same(monkeypatch):
    """The path of CUDA graphs, with the step itself in the place of its recording."""
    model, sizes = small_model(), []

    def captured(work, state, pool):
        before = state.clone()
        work()  # as the real one: once before it is recorded, and what it did to the state undone
        state.copy_(before)
        model.register_forward_pre_hook(
            lambda _, args: sizes.append(len(args[0])) if args[2] is None else None
        )
        return work

    settings = dict(max_new_tokens=20, temperature=1.0, eos_id=2, slots=6, logps=True)
    expected = sorted(generate_stream(model, PROMPTS, **settings))
    monkeypatch.setattr(sampler, "GRAPHS_ON", ("cpu",))
    monkeypatch.setattr("model.cuda_graphs.captured", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    ours = sorted(generate_stream(model, PROMPTS, **settings))
    assert [r.ids for r in ours] == [r.ids for r in expected]
    for a, b in zip(ours, expected):
        assert a.logps == pytest.approx(b.logps, abs=1e-5)
    assert set(sizes) <= {1, 2, 4, 6} and 6 in sizes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [dict(), dict(temperature=1.0, top_k=20, top_p=0.9)])
def test_on_a_gpu_the_captured_steps_give_what_single_kernels_give(settings, monkeypatch):
    # Weights that bf16 holds exactly, so that a cast to fp32 and back gives the same model.
    model = small_model(hidden_size=256, intermediate_size=512, head_dim=64).to("cuda", torch.bfloat16)
    prompts = [random_ids(random.Random(n), 1 + n % 40) for n in range(60)]
    settings = dict(
        max_new_tokens=40, eos_id=2, slots=16, slot_length=96, fixed_slots=True, logps=True, **settings
    )
    ours = sorted(generate_stream(model, prompts, **settings))
    # Rounded up to a few counts of rows; in fp32, where that moves no token here.
    model.float()
    ragged = settings | dict(slots=13, fixed_slots=False)
    captured = sorted(generate_stream(model, prompts, **ragged))
    monkeypatch.setattr(sampler, "GRAPHS_ON", ())
    single = sorted(generate_stream(model, prompts, **ragged))
    assert [r.ids for r in captured] == [r.ids for r in single]
    for a, b in zip(captured, single):
        assert a.logps == pytest.approx(b.logps, abs=1e-4)
    assert ours == sorted(generate_stream(model.bfloat16(), prompts, **settings))


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("by", ["stream", "step"])
@pytest.mark.parametrize("vocabulary", [20, 600])
def test_sampled_tokens_have_the_softmax_distribution(by, vocabulary):
    draws = 200_000
    torch.manual_seed(0)
    logits = torch.randn(vocabulary)
    counter, other = torch.arange(draws), torch.full((draws,), 7)
    uniforms = counter_uniform(11, *((counter, other) if by == "stream" else (other, counter)))
    tokens = torch.cat([sample(logits.expand(len(u), -1), 1.0, uniforms=u) for u in uniforms.split(20_000)])
    counts = torch.bincount(tokens, minlength=vocabulary)
    # The 99.9% quantiles of chi-square with 19 and with 599 degrees of freedom.
    assert chi_square(counts, logits.softmax(-1) * draws) < {20: 43.8, 600: 710.0}[vocabulary]


def test_uniform_numbers_are_uniform_and_neighbours_independent():
    # 99 and 99 degrees of freedom: 148.2 is the 99.9% quantile.
    streams, steps = torch.meshgrid(torch.arange(400), torch.arange(250), indexing="ij")
    both = counter_uniform(0, streams.flatten(), steps.flatten())
    assert both.shape == (100_000, 2) and both.dtype == torch.float64
    # the two of a token; and of the next token
    pairs = [(both[:, 0], both[:, 1]), (both[:-1, 1], both[1:, 0])]
    for uniforms in both.T:
        assert uniforms.min() >= 0 and uniforms.max() < 1 and len(uniforms.unique()) == 100_000
        assert chi_square(torch.histc(uniforms, 100, 0, 1), torch.full((100,), 1000.0)) < 148.2
        pairs += [(uniforms[:-1], uniforms[1:]), (uniforms[:-250], uniforms[250:])]  # next step, next stream
    for a, b in pairs:
        cell = (a * 10).long() * 10 + (b * 10).long()
        assert chi_square(torch.bincount(cell, minlength=100), torch.full((100,), len(a) / 100)) < 148.2


def test_counter_hash_is_splitmix64():
    # First output of the published SplitMix64 for seed 1234567: its finaliser on seed + golden gamma.
    from model.sampling import _mix, _signed

    state = torch.tensor([_signed(1234567 + 0x9E3779B97F4A7C15)])
    assert _mix(state).item() % 2**64 == 6457827717110365317


def their_scores(logits, temperature, top_k, top_p):
    """What transformers' generate leaves of the logits: its warpers, in its order."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList(warpers)(None, logits)


LOGITS = {
    "drawn": torch.randn(8, 300, generator=torch.Generator().manual_seed(1)) * 3,
    "all equal": torch.zeros(1, 10),
    "ties": torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0, 3.0, -1.0]]),
    "one certain": torch.tensor([[0.0, 200.0, 0.0]]),
    "a forbidden one": torch.tensor([[0.0, 1.0, -torch.inf, 0.5]]),
    "bf16 made": torch.randn(4, 300, generator=torch.Generator().manual_seed(2)).bfloat16().float(),
}


@pytest.mark.parametrize("name", LOGITS)
def test_the_tokens_left_out_are_those_of_transformers(name):
    for settings in itertools.product((1.0, 0.3, 1.7), (0, 1, 2, 5, 10_000), (1.0, 0.95, 0.5, 1e-6)):
        temperature, *rest = settings
        ours = restricted(LOGITS[name] / temperature, *rest)
        assert torch.equal(ours, their_scores(LOGITS[name], *settings)), settings


@pytest.mark.slow
@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 0, 0.9), (1.3, 40, 0.4), (1.0, 7, 1.0), (1.0, 0, 1e-6)]
)
def test_kept_tokens_are_drawn_with_the_probabilities_of_transformers(temperature, top_k, top_p):
    logits = LOGITS["drawn"][:1]
    expected = their_scores(logits, temperature, top_k, top_p).softmax(-1)[0].double()
    # Evenly over the unit square: frequencies are probabilities, up to the grid's step.
    grid = torch.cartesian_prod(*[(torch.arange(600, dtype=torch.float64) + 0.5) / 600] * 2)
    tokens = torch.cat(
        [sample(logits.expand(len(u), -1), temperature, top_k, top_p, u) for u in grid.split(10_000)]
    )
    frequencies = torch.bincount(tokens, minlength=300).double() / len(grid)
    torch.testing.assert_close(frequencies, expected, atol=1 / 600, rtol=0)
    assert not frequencies[expected == 0].any()


def test_a_token_that_is_drawn_has_probability_also_at_the_ends():
    last = 1 - 2**-53  # the largest uniform number
    probabilities = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.5, 0.5, 0.0]]).repeat(2, 300)[:, :1000]
    lowest, highest = (
        at_quantiles(probabilities, torch.full((4, 2), u, dtype=torch.float64)) for u in (0.0, last)
    )
    assert lowest.tolist() == [2, 1, 2, 1] and highest.tolist() == [998, 998, 998, 998]


def test_a_place_is_drawn_in_a_block_as_by_hand():
    probabilities = torch.zeros(1, 600)
    probabilities[0, [10, 20, 300, 599]] = torch.tensor([0.1, 0.2, 0.3, 0.4])  # blocks of 256: 0.3, 0.3, 0.4
    for place, block, token in (
        (0.0, 0.0, 10),
        (0.32, 0.29, 10),
        (0.34, 0.29, 20),
        (0.9, 0.31, 300),
        (0.1, 0.61, 599),
    ):
        uniforms = torch.tensor([[place, block]], dtype=torch.float64)
        assert at_quantiles(probabilities, uniforms).tolist() == [token]
