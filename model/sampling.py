"""One token from logits: temperature, top-k, top-p, and random numbers that are a function of counters.

N rows, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # vocabulary entries per block, see `at_quantiles`
LOWEST_TEMPERATURE = 1e-6  # below it, logits divided by the temperature may overflow fp32
_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's increment


def sample(logits: Tensor, temperature: float, top_k=0, top_p=1.0, uniforms: Tensor | None = None) -> Tensor:
    """One token per row, (N, V) fp32 → (N,) int64: argmax, or drawn with uniforms (N, 2) fp64 in [0, 1)."""
    if temperature == 0:
        return logits.max(-1).indices  # the first of equal ones, like argmax, but faster
    assert uniforms is not None
    scores = logits if temperature == 1 else logits / temperature
    return at_quantiles(restricted(scores, top_k, top_p).softmax(-1), uniforms)


def at_quantiles(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row, (N, V) → (N,) int64: uniforms[:, 1] draws a block, uniforms[:, 0] a place in it.

    A sum over the whole vocabulary would move, by its rounding, the limits of thousands of improbable tokens:
    23 of 512 texts differed in another batch.
    """
    n, vocabulary = probabilities.shape
    if vocabulary % BLOCK:
        probabilities = F.pad(probabilities, (0, -vocabulary % BLOCK))
    blocks = probabilities.view(n, -1, BLOCK)  # (N, V / BLOCK, BLOCK)
    block = _quantile(blocks.sum(-1), uniforms[:, 1])
    return block * BLOCK + _quantile(blocks[torch.arange(n, device=block.device), block], uniforms[:, 0])


def _quantile(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first place (N,) at which a row's cumulated weights (N, M) exceed the share `uniforms` (N,)."""
    ends = weights.cumsum(-1, dtype=torch.float64)
    target = uniforms.clamp(max=1 - 2**-52)[:, None] * ends[:, -1:]  # below the last end after rounding
    return torch.searchsorted(ends, target, right=True).squeeze(-1)


def restricted(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores (N, V) with -inf for the tokens that top-k, and after it top-p, exclude.

    Like transformers' warpers: ties with the k-th best stay, and the most probable token always stays; the
    nucleus is counted from the least probable token up, in fp32.
    """
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort(dim=-1)
        out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        out[:, -1] = False
        scores = scores.masked_fill(out.scatter(-1, order, out), -torch.inf)
    return scores


def counter_uniform(seed: int, streams: Tensor, steps: Tensor) -> Tensor:
    """Two uniform numbers in [0, 1), a function of (seed, stream, step): int64 (N,), (N,) → (N, 2) fp64.

    Each argument is folded in with the 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    """
    state = torch.full_like(streams, _signed(seed * _GAMMA))
    for counter in (streams, steps):
        state = _mix(state) + (counter + 1) * _signed(_GAMMA)
    first = _mix(state)
    both = torch.stack((first, _mix(first + _signed(_GAMMA))), dim=-1)
    return _shift(both, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (>> keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the low 64 bits of x."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x
