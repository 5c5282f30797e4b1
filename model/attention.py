"""The attention seam: `attend` over a packed stream, `attend_cached` over the KV cache.

T packed tokens, S segments, H query heads, K key/value heads, D head size, N slots, L slot length.

Three backends agree within rounding: the flash-attn package; FlashAttention-2 as torch ships it; and
scaled_dot_product_attention (sdpa), for `attend` over padded segments (model/padded.py).
"""

import importlib.util
import logging
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from model.padded import attend_padded, pad_segments

BACKENDS = ("flash-attn", "torch-flash", "sdpa")  # in order of preference
_ATEN = """
    _flash_attention_forward _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
    _scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu
""".split()
log = logging.getLogger("model.attention")


@dataclass
class Segments:
    """Which rows of a packed stream attend to which.

    Query segment i is rows `q_offsets[i]:q_offsets[i+1]`. Its keys are rows
    `key_index[k_offsets[i]:k_offsets[i+1]]`, its own rows last: attention is causal, aligned at the bottom
    right. Example, a prompt of 3 tokens shared by continuations of 2 and 1 tokens:

        stream      x0 x1 x2 y0 y1 z0          q_offsets  0 5 6
        key_index    0  1  2  3  4 | 0 1 2 5   k_offsets  0 5 9

    so z0 sees x0 x1 x2 z0 and never y. The offsets are what variable-length FlashAttention takes.
    """

    q_offsets: list[int]  # S + 1
    k_offsets: list[int]  # S + 1
    key_index: Tensor | None  # (k_offsets[-1],) int64; None where keys are the stream itself
    device: torch.device | str = "cpu"
    _made: dict = field(default_factory=dict, repr=False)  # for the backends, once for all layers

    @classmethod
    def causal(cls, lengths: list[int], device="cpu") -> "Segments":
        """Independent sequences of the given lengths, one after the other."""
        offsets = [0, *accumulate(lengths)]
        return cls(offsets, offsets, None, device)

    def to(self, device) -> "Segments":
        """The same on another device."""
        index = None if self.key_index is None else to_device(self.key_index, device)
        result = Segments(self.q_offsets, self.k_offsets, index, device)
        if torch.device(device).type == "cuda":
            result.offsets()  # copied now, so that the model's first layer need not
        return result

    def groups(self, window: int | None):
        """Segments batched by similar length, for `attend_padded`."""
        if window not in self._made:
            segments = (self.q_offsets, self.k_offsets, self.key_index)
            self._made[window] = pad_segments(*segments, window, self.device)
        return self._made[window]

    def offsets(self) -> tuple[Tensor, Tensor, int, int]:
        """Query and key offsets (S + 1,) int32, and the longest segment of each, for FlashAttention."""
        if "offsets" not in self._made:
            both = (self.q_offsets, self.k_offsets)
            tensors = (to_device(torch.tensor(o, dtype=torch.int32), self.device) for o in both)
            longest = (max(b - a for a, b in pairwise(o)) for o in both)
            self._made["offsets"] = (*tensors, *longest)
        return self._made["offsets"]


def attend(q, k, v, segments: Segments, window: int | None = None, backend: str = "sdpa") -> Tensor:
    """Causal attention within each segment of a packed stream: q (T, H, D), k and v (T, K, D) → (T, H, D).

    A query sees itself and the `window` - 1 keys before it; without a window, all before it.
    """
    if backend == "sdpa":
        return attend_padded(q, k, v, *segments.groups(window))
    if segments.key_index is not None:
        k, v = k.index_select(0, segments.key_index), v.index_select(0, segments.key_index)
    q_offsets, k_offsets, longest_q, longest_k = segments.offsets()
    if window is not None and window >= longest_k:
        window = None  # the kernels do less work without one
    left = -1 if window is None else window - 1  # the kernels count the keys before the query
    arguments = (q, k, v, q_offsets, k_offsets, longest_q, longest_k)
    if backend == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(*arguments, causal=True, window_size=(left, 0))
    # What torch.nn.attention.varlen.varlen_attn calls; its own signature differs between torch versions.
    flash = torch.ops.aten._flash_attention_forward
    return flash(*arguments, 0.0, window is None, False, window_size_left=left, window_size_right=0)[0]


class Decoding:
    """One decoding step: slot n's new token is at place positions[n], and attends to the places up to it.

    No sequence is longer than `longest`; a slot has `slot_length` places.
    """

    def __init__(self, positions: Tensor, longest: int, slot_length: int):
        slots = torch.arange(len(positions) + 1, dtype=torch.int32, device=positions.device)
        self.lengths, self.longest = (positions + 1).int(), longest  # (N,) int32
        self.q_offsets, self.k_offsets = slots, slots * slot_length  # (N + 1,) int32
        self._masks: dict[int | None, Tensor] = {}  # made once for all layers

    def mask(self, window: int | None) -> Tensor:
        """Which places are seen (N, 1, 1, longest), for the sdpa backend."""
        if window not in self._masks:
            at = torch.arange(self.longest, device=self.lengths.device)
            seen = at < self.lengths[:, None]
            if window is not None:
                seen &= at >= self.lengths[:, None] - window
            self._masks[window] = seen[:, None, None, :]
        return self._masks[window]


def attend_cached(q, k, v, step: Decoding, window: int | None = None, backend: str = "sdpa") -> Tensor:
    """Attention of one new token per slot to the slot's cache: q (N, H, D), k and v (N, L, K, D) → (N, H, D).

    The cache already holds the new tokens' keys and values. `window` is as for `attend`.
    """
    n, heads, size = q.shape
    length, kv_heads = k.shape[1:3]
    if window is not None and window >= length:
        window = None  # only without one do the kernels read a key head once for all its query heads
    left, right = (-1, -1) if window is None else (window - 1, 0)
    if backend == "flash-attn":
        from flash_attn import flash_attn_with_kvcache

        seen = {"cache_seqlens": step.lengths, "window_size": (left, right)}
        return flash_attn_with_kvcache(q[:, None], k, v, causal=True, **seen)[:, 0]
    if backend == "torch-flash":
        arguments = (q, k.flatten(0, 1), v.flatten(0, 1), step.q_offsets, step.k_offsets, 1, length)
        seen = {"seqused_k": step.lengths, "window_size_left": left, "window_size_right": right}
        return torch.ops.aten._flash_attention_forward(*arguments, 0.0, False, False, **seen)[0]
    shared = heads // kv_heads  # the query heads of a key head are rows of one matrix: no copy of the cache
    out = F.scaled_dot_product_attention(
        q.view(n, kv_heads, shared, size),
        k[:, : step.longest].transpose(1, 2),  # (N, K, longest, D)
        v[:, : step.longest].transpose(1, 2),
        attn_mask=step.mask(window).expand(n, 1, shared, step.longest),
    )
    return out.reshape(n, heads, size)


def to_device(tensor: Tensor, device) -> Tensor:
    """A CPU tensor on a device; to a GPU from pinned memory, so that the host need not wait for the copy."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@lru_cache
def choose_backend(wanted: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """The backend `wanted`, or for "auto" the first available one of BACKENDS. Logs the choice, once.

    Raises ValueError for an unknown backend, and with the reason for a requested one that is unavailable.
    """
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"attention backend {wanted!r} is not one of auto, {', '.join(BACKENDS)}")
    for backend in BACKENDS if wanted == "auto" else [wanted]:
        reason = unavailable(backend, device_type, dtype, head_dim)
        if not reason:
            log.info("attention: %s (%s, %s, head size %d)", backend, device_type, dtype, head_dim)
            return backend
    raise ValueError(f"attention backend {wanted!r} cannot be used: {reason}; choose another, or auto")


def unavailable(backend: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """Why a backend cannot be used; empty if it can."""
    if backend == "sdpa":
        return ""
    if device_type != "cuda":
        return f"it needs a CUDA device, not {device_type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"it takes head sizes up to 256 in steps of 8, not {head_dim}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or later"
    if backend == "torch-flash":
        built = torch.backends.cuda.is_flash_attention_available()
        return "" if built else "this build of torch has no FlashAttention"
    if not importlib.util.find_spec("flash_attn"):
        return "the package flash-attn is not installed"
    try:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache  # noqa: F401
    except ImportError as error:
        reason = f"the installed package does not load ({error}); compile it against this torch"
        log.warning("attention: no flash-attn: %s", reason)  # whoever installed it expects it to be used
        return reason
    return ""


def attention_ops() -> list:
    """The operators in which attention ends, of all backends. Selective checkpointing keeps their results."""
    ops = [getattr(torch.ops.aten, name).default for name in _ATEN]
    package = getattr(torch.ops.flash_attn, "_flash_attn_varlen_forward", None)  # once flash-attn is imported
    return ops if package is None else [*ops, package.default]
