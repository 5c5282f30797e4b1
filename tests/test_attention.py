"""The attention backends: sdpa (the twin) against softmax written out, FlashAttention's kernels against sdpa.

Without a GPU the kernels can't run, but their arguments can be checked: they are replaced by functions that
compute what the kernels' documentation says (offsets, alignment at the bottom right, windows, cache lengths).
"""

import random
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

from model.attention import BACKENDS, Decoding, Segments, attend, attend_cached, choose_backend, unavailable
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.mistral import Mistral, fp32_logits
from model.sampler import generate
from spin.packing import Item, pack, response_logps
from tests.helpers import random_ids, small_model

GPU = "cuda"
# Relative root mean square error against the fp32 twin. A product of two numbers rounded to n bits of
# mantissa is off by about 2^-n, and FlashAttention rounds the probabilities too; sums average that out.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}  # three roundings

PAIRS = [Item([1] * 5, ([1] * 4, [1] * 7)), Item([1] * 9, ([1], [1] * 2)), Item([1] * 2, ([1] * 30,))]
STREAMS = {
    "shared prompts": lambda: pack(PAIRS).segments,
    "responses of one token": lambda: pack([Item([1] * 3, ([1], [1])), Item([1], ([1], [1, 1]))]).segments,
    "single tokens": lambda: Segments.causal([1, 1, 1]),
    "one length": lambda: Segments.causal([16] * 5),
    "ragged": lambda: Segments.causal([1, 40, 3, 129, 64]),
    "long": lambda: Segments.causal([4096, 1, 300]),
    "long pair": lambda: pack([Item([1] * 2000, ([1] * 1500, [1] * 2048))]).segments,
}


def stream(segments: Segments, heads=4, kv_heads=2, size=16, dtype=torch.float32, seed=0):
    """Random q, k, v that want gradients, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randn(segments.q_offsets[-1], n, size, generator=generator).to(dtype)

    return [draw(n).requires_grad_() for n in (heads, kv_heads, kv_heads)], draw(heads)


def forward_and_gradients(inputs, grad, segments, window, backend):
    out = attend(*inputs, segments, window, backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def error(ours, expected) -> float:
    return float((ours - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_twin_is_masked_softmax_over_shared_prompts(window, kv_heads):
    (q, k, v), _ = stream(pack(PAIRS).segments, kv_heads=kv_heads)
    # Who sees whom, written out: own sequence (prompt and one response), no later position, inside the
    # window.
    sequences, start = [], 0
    for item in PAIRS:
        prompt = list(range(start, start + len(item.prompt)))
        start += len(item.prompt)
        for response in item.responses:
            sequences.append(prompt + list(range(start, start + len(response) - 1)))
            start += len(response) - 1
    expected = torch.full(q.shape, float("nan"))
    for sequence in sequences:
        for place, row in enumerate(sequence):
            seen = sequence[max(0, place + 1 - window) if window else 0 : place + 1]
            for head in range(4):
                shared = head * kv_heads // 4
                weights = (k[seen, shared] @ q[row, head] / 16**0.5).softmax(0)
                expected[row, head] = (weights @ v[seen, shared]).detach()
    segments = pack(PAIRS).segments
    assert error(attend(q, k, v, segments, window), expected) < TOLERANCE[torch.float32]
    assert len(segments.groups(window)[0]) < sum(len(item.responses) for item in PAIRS)  # some were batched


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("name", STREAMS)
def test_the_twin_in_bf16_is_the_twin_in_fp32_within_rounding(name, window):
    segments = STREAMS[name]()
    inputs, grad = stream(segments, heads=2, kv_heads=1, dtype=torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = forward_and_gradients(exact, grad.float(), segments, window, "sdpa")
    for ours, wanted in zip(forward_and_gradients(inputs, grad, segments, window, "sdpa"), expected):
        assert error(ours, wanted) < TOLERANCE[torch.bfloat16] or wanted.norm() < 1e-5


@pytest.mark.parametrize("window", [None, 3])
def test_attention_over_the_cache_is_the_last_row_of_causal_attention(window):
    torch.manual_seed(0)
    lengths = [1, 6, 9]
    k, v, q = torch.randn(3, 12, 2, 8), torch.randn(3, 12, 2, 8), torch.randn(3, 4, 8)
    ours = attend_cached(q, k, v, Decoding(torch.tensor(lengths) - 1, max(lengths), 12), window)
    for row, n in enumerate(lengths):
        full_q = torch.randn(n, 4, 8)
        full_q[-1] = q[row]
        theirs = attend(full_q, k[row, :n], v[row, :n], Segments.causal([n]), window)[-1]
        torch.testing.assert_close(ours[row], theirs, atol=1e-5, rtol=1e-5)


# The kernels' documentation as code: flash_attn_interface.py of flash-attn 2, and torch.nn.attention.varlen.


def documented(q, k, v, window) -> torch.Tensor:
    """(Sq, H, D), (Sk, K, D): query i sees keys i + Sk - Sq - left to i + Sk - Sq + right, inclusive; -1 is
    no limit.
    """
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    distance = torch.arange(len(k)) - (torch.arange(len(q))[:, None] + len(k) - len(q))
    left, right = window
    hidden = (distance < -left if left >= 0 else False) | (
        distance > right if right >= 0 else distance > len(k)
    )
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def documented_varlen(q, k, v, q_offsets, k_offsets, longest_q, longest_k, causal, window_size, lengths=None):
    for offsets in (q_offsets, k_offsets):  # what mha_varlen_fwd demands of its arguments
        assert offsets.dtype == torch.int32 and offsets.is_contiguous() and len(offsets) == len(q_offsets)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.shape[1] % k.shape[1] == 0
    window = (window_size[0], 0) if causal else window_size
    parts = []
    for i, ((a, b), (c, d)) in enumerate(zip(zip(q_offsets, q_offsets[1:]), zip(k_offsets, k_offsets[1:]))):
        assert b - a <= longest_q and d - c <= longest_k
        end = d if lengths is None else c + lengths[i]
        parts.append(documented(q[a:b], k[c:end], v[c:end], window))
    return torch.cat(parts)


WINDOWS = []  # left and right, as the kernels were asked for them


def documented_kvcache(q, k_cache, v_cache, cache_seqlens, causal, window_size):
    assert cache_seqlens.dtype == torch.int32
    WINDOWS.append(window_size)
    window = (window_size[0], 0) if causal else window_size
    rows = zip(q, k_cache, v_cache, cache_seqlens)
    return torch.stack([documented(q, k[:n], v[:n], window) for q, k, v, n in rows])


@pytest.fixture
def documented_kernels(monkeypatch):
    """flash_attn as a module, and the CPU implementation that torch's op does not have."""
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = documented_varlen
    module.flash_attn_with_kvcache = documented_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)

    def compute(q, k, v, q_offsets, k_offsets, max_q, max_k, causal, left, right, lengths=None):
        return documented_varlen(q, k, v, q_offsets, k_offsets, max_q, max_k, causal, (left, right), lengths)

    def forward(
        q,
        k,
        v,
        q_offsets,
        k_offsets,
        max_q,
        max_k,
        dropout,
        causal,
        debug,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
        seqused_k=None,
        **unused,
    ):
        WINDOWS.append((window_size_left, window_size_right))
        assert dropout == 0.0 and scale is None and not any(value is not None for value in unused.values())
        out = compute(
            q,
            k,
            v,
            q_offsets,
            k_offsets,
            max_q,
            max_k,
            causal,
            window_size_left,
            window_size_right,
            seqused_k,
        )
        state = torch.zeros(2, dtype=torch.int64)
        return out, torch.zeros(q.shape[1], len(q)), state, state, state

    def backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        q_offsets,
        k_offsets,
        max_q,
        max_k,
        dropout,
        causal,
        rng,
        unused,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
    ):
        def gradients():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            again = compute(
                *inputs, q_offsets, k_offsets, max_q, max_k, causal, window_size_left, window_size_right
            )
            return torch.autograd.grad(again, inputs, grad)

        with ThreadPoolExecutor(1) as other:  # in this thread autograd is off: its own call brought us here
            return other.submit(gradients).result()

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("backend", ["flash-attn", "torch-flash"])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("name", [name for name in STREAMS if "long" not in name])
def test_what_is_asked_of_the_kernels_is_what_the_twin_computes(documented_kernels, backend, name, window):
    segments = STREAMS[name]()
    inputs, grad = stream(segments)
    expected = forward_and_gradients(inputs, grad, segments, window, "sdpa")
    for ours, wanted in zip(forward_and_gradients(inputs, grad, segments, window, backend), expected):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["flash-attn", "torch-flash"])
def test_a_window_that_hides_nothing_is_not_asked_for(documented_kernels, backend):
    """With any window, FlashAttention reads a key head once for each of its query heads."""
    q, k, v = torch.randn(3, 4, 8), torch.randn(3, 12, 2, 8), torch.randn(3, 12, 2, 8)
    attend_cached(q, k, v, Decoding(torch.tensor([1, 5, 11]), 12, slot_length=12), 12, backend)
    assert WINDOWS[-1] == (-1, -1)


@pytest.mark.parametrize("backend", ["flash-attn", "torch-flash"])
@pytest.mark.parametrize("window", [None, 3])
def test_what_is_asked_of_the_kernels_while_decoding_is_what_the_twin_computes(
    documented_kernels, backend, window
):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 8), torch.randn(3, 12, 2, 8), torch.randn(3, 12, 2, 8)
    for lengths, longest in (([1, 12, 7], 12), ([1, 4, 7], 7)):  # whole slots, and their beginnings
        step = Decoding(torch.tensor(lengths) - 1, longest, slot_length=12)
        ours, expected = (attend_cached(q, k, v, step, window, name) for name in (backend, "sdpa"))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        assert WINDOWS[-1] == (-1 if window is None else window - 1, -1 if window is None else 0)


@pytest.mark.parametrize("backend", ["flash-attn", "torch-flash"])
def test_a_model_gives_the_same_through_what_is_asked_of_the_kernels(
    documented_kernels, backend, monkeypatch
):
    asked = []
    model = small_model(sliding_window=6)
    rng = random.Random(0)
    prompts = [random_ids(rng, n) for n in (3, 11, 1, 7)]
    expected = generate(model, prompts, max_new_tokens=12, slots=2)
    model.attention = backend
    monkeypatch.setattr("model.mistral.choose_backend", lambda wanted, *_: asked.append(wanted) or wanted)
    assert generate(model, prompts, max_new_tokens=12, slots=2) == expected
    assert set(asked) == {backend}


def test_the_7b_shape_passes_forward_backward_and_decoding_without_memory(monkeypatch):
    # On the meta device: shapes and arguments bind to the op; what the kernel itself demands is not checked
    # there.
    monkeypatch.setattr("model.mistral.choose_backend", lambda *_: "torch-flash")
    config = ModelConfig(32000, 4096, 14336, 2, 32, 8, 128, sliding_window=4096)
    with torch.device("meta"):
        model = Mistral(config).bfloat16()
    packed = pack([Item([1] * 300, ([1] * 200, [1] * 250))] * 8).to("meta")
    logps = response_logps(model, packed, chunk=2048)
    assert logps.shape == (16,) and logps.dtype == torch.float32
    logps.sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
    cache = KVCache(config, 16, 512, torch.bfloat16, "meta")
    one = torch.zeros(8, dtype=torch.int64, device="meta")
    with torch.no_grad():
        assert model(one, one, cache=cache, slots=one).shape == (8, 32000)


def test_on_a_cpu_the_twin_is_chosen_and_the_log_says_so(caplog):
    choose_backend.cache_clear()
    caplog.set_level("INFO")
    for _ in range(2):
        assert choose_backend("auto", "cpu", torch.bfloat16, 128) == "sdpa"
    assert [record.message for record in caplog.records] == [
        "attention: sdpa (cpu, torch.bfloat16, head size 128)"
    ]


@pytest.mark.parametrize(
    "backend, device, dtype, size, message",
    [
        (
            "torch-flash",
            "cpu",
            torch.bfloat16,
            128,
            "'torch-flash' cannot be used: it needs a CUDA device, not cpu",
        ),
        (
            "flash-attn",
            "cuda",
            torch.float32,
            128,
            "'flash-attn' cannot be used: it computes in bfloat16 or float16",
        ),
        ("torch-flash", "cuda", torch.bfloat16, 12, "up to 256 in steps of 8, not 12"),
        ("flash", "cpu", torch.bfloat16, 128, "'flash' is not one of auto, flash-attn, torch-flash, sdpa"),
    ],
)
def test_requesting_an_unavailable_backend_is_an_error(backend, device, dtype, size, message):
    with pytest.raises(ValueError, match=message):
        choose_backend(backend, device, dtype, size)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """As far as the choice can see, a GPU of compute capability 9.0 and no flash-attn."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    choose_backend.cache_clear()
    yield monkeypatch
    choose_backend.cache_clear()


def test_on_a_gpu_the_first_available_backend_is_chosen(pretended_gpu):
    assert choose_backend("auto", "cuda", torch.bfloat16, 128) == "torch-flash"
    assert choose_backend("auto", "cuda", torch.float32, 128) == "sdpa"
    assert choose_backend("auto", "cuda", torch.bfloat16, 512) == "sdpa"
    with pytest.raises(ValueError, match="the package flash-attn is not installed"):
        choose_backend("flash-attn", "cuda", torch.bfloat16, 128)
    pretended_gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match="compute capability 8.0"):
        choose_backend("torch-flash", "cuda", torch.bfloat16, 128)


def test_a_flash_attn_that_does_not_load_is_skipped_with_a_warning_and_an_error_if_requested(
    pretended_gpu, caplog
):
    pretended_gpu.setattr("importlib.util.find_spec", lambda name: object())
    pretended_gpu.setitem(sys.modules, "flash_attn", None)  # importing it raises ImportError
    assert choose_backend("auto", "cuda", torch.bfloat16, 128) == "torch-flash"
    assert "no flash-attn: the installed package does not load" in caplog.text
    with pytest.raises(ValueError, match="does not load .*; compile it against this torch"):
        choose_backend("flash-attn", "cuda", torch.bfloat16, 128)


def available(backend, dtype, size) -> None:
    reason = unavailable(backend, GPU, dtype, size)
    if reason:
        pytest.skip(f"{backend}: {reason}")


@cache  # the backends' tests ask for the same
def exact(name, window, heads, kv_heads, size, dtype):
    """Of a stream whose values `dtype` holds, in fp32 on the CPU."""
    inputs, grad = stream(STREAMS[name](), heads, kv_heads, size, dtype)
    inputs = [x.detach().float().requires_grad_() for x in inputs]
    return forward_and_gradients(inputs, grad.float(), STREAMS[name](), window, "sdpa")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads, size", [(4, 4, 64), (8, 2, 128), (8, 1, 128)])
def test_on_a_gpu_every_backend_is_the_fp32_twin_within_rounding(heads, kv_heads, size, dtype, backend):
    available(backend, dtype, size)
    for name in STREAMS:
        for window in (None, 100):
            inputs, grad = stream(STREAMS[name](), heads, kv_heads, size, dtype)
            there = [x.detach().to(GPU).requires_grad_() for x in inputs]
            got = forward_and_gradients(there, grad.to(GPU), STREAMS[name]().to(GPU), window, backend)
            for ours, wanted in zip(got, exact(name, window, heads, kv_heads, size, dtype)):
                assert error(ours.cpu(), wanted) < TOLERANCE[dtype] or wanted.norm() < 1e-4, (name, window)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu_decoding_is_the_fp32_twin_within_rounding(backend):
    available(backend, torch.bfloat16, 128)

    def draw(*shape):
        return torch.randn(*shape, 128, dtype=torch.bfloat16)

    positions = torch.tensor([1, 700, 64, 65, 333]) - 1
    here, there = (Decoding(positions.to(device), 700, slot_length=900) for device in ("cpu", GPU))
    for heads, kv_heads in ((4, 4), (8, 2), (8, 1)):
        for window in (None, 100):
            torch.manual_seed(0)
            q, k, v = draw(5, heads), draw(5, 900, kv_heads), draw(5, 900, kv_heads)
            expected = attend_cached(q.float(), k.float(), v.float(), here, window)
            ours = attend_cached(q.to(GPU), k.to(GPU), v.to(GPU), there, window, backend)
            assert error(ours.cpu(), expected) < TOLERANCE[torch.bfloat16], (heads, kv_heads, window)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_model_in_bf16_is_the_same_model_in_fp32_on_the_cpu_within_rounding():
    rng = random.Random(0)
    items = [Item(random_ids(rng, 9), (random_ids(rng, 30), random_ids(rng, 17))) for _ in range(4)]
    # its attention is far from uniform: without it, 0.07 off
    model = small_model(hidden_size=256, head_dim=64)
    expected = response_logps(model, pack(items)).detach()
    assert choose_backend("auto", GPU, torch.bfloat16, 64) != "sdpa"
    ours = response_logps(model.to(GPU, torch.bfloat16), pack(items).to(GPU)).detach().cpu()
    assert error(ours, expected) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_logits_of_bf16_are_not_rounded_to_bf16():
    x, weight = (torch.randn(n, 256, device=GPU, dtype=torch.bfloat16) for n in (64, 4096))
    with torch.no_grad():
        logits = fp32_logits(x, weight)
    expected = x.double() @ weight.double().T
    assert logits.dtype == torch.float32 and error(logits, expected) < 1e-5
