"""The attention seam: one function over a packed stream, one over the cache, and the kernels behind them.

T packed tokens, S segments, H query heads, K key/value heads (H a multiple of K), D head size, N slots, L
slot length.

Three backends give the same numbers within rounding: the flash-attn package; FlashAttention-2 as torch ships
it; and scaled_dot_product_attention over segments padded into groups, the plain twin that runs anywhere and
in any dtype.
"""

import importlib.util
import logging
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("flash-attn", "torch-flash", "sdpa")
log = logging.getLogger("model.attention")


@lru_cache
def choose_backend(wanted: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """The first backend that can be had here, or the wanted one; says in the log which, once.

    Args:
        wanted: one of BACKENDS, or "auto"
        device_type: "cuda" or "cpu"

    Raises ValueError for an unknown backend, or for a wanted one that cannot be had, with the reason.
    """
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"attention backend {wanted!r} is not one of auto, {', '.join(BACKENDS)}")
    for backend in BACKENDS if wanted == "auto" else [wanted]:
        reason = _unavailable(backend, device_type, dtype, head_dim)
        if not reason:
            log.info("attention: %s (%s, %s, head size %d)", backend, device_type, dtype, head_dim)
            return backend
    raise ValueError(f"attention backend {wanted!r} cannot be used: {reason}; choose another, or auto")


def _unavailable(backend: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
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
    if backend == "flash-attn":
        if not importlib.util.find_spec("flash_attn"):
            return "the package flash-attn is not installed"
        try:
            from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache  # noqa: F401
        except ImportError as error:
            reason = f"the installed package does not load ({error}); compile it against this torch"
            log.warning("attention: no flash-attn: %s", reason)  # who installed it expects it to be used
            return reason
        return ""
    return (
        ""
        if torch.backends.cuda.is_flash_attention_available()
        else "this build of torch has no FlashAttention"
    )


def attention_ops() -> list:
    """The operators that `attend` ends in, whichever backend: what selective checkpointing does not compute
    twice.
    """
    aten = torch.ops.aten
    ops = [
        aten._flash_attention_forward.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
    # there once flash-attn is imported
    package = getattr(torch.ops.flash_attn, "_flash_attn_varlen_forward", None)
    return [*ops, package.default] if package is not None else ops


@dataclass
class Segments:
    """Which rows of a packed stream attend to which.

    Query segment i is rows `q_offsets[i]:q_offsets[i+1]` of the stream. Its keys are the stream's rows
    `key_index[k_offsets[i]:k_offsets[i+1]]`, of which the segment's own rows are the last: attention is
    causal, aligned at the bottom right. Example, a prompt of 3 tokens shared by continuations of 2 and 1
    tokens:

        stream      x0 x1 x2 y0 y1 z0          q_offsets  0 5 6
        key_index    0  1  2  3  4 | 0 1 2 5   k_offsets  0 5 9

    so z0 sees x0 x1 x2 z0 and never y. The offsets are what variable-length FlashAttention takes.
    """

    q_offsets: list[int]  # S + 1
    k_offsets: list[int]  # S + 1
    key_index: Tensor | None  # (k_offsets[-1],) int64; None where keys are the stream itself
    device: torch.device | str = "cpu"
    # what a backend needs, made once and not in every layer
    _made: dict = field(default_factory=dict, repr=False)

    @classmethod
    def causal(cls, lengths: list[int], device="cpu") -> "Segments":
        """Independent sequences of the given lengths, one after the other."""
        offsets = [0, *accumulate(lengths)]
        return cls(offsets, offsets, None, device)

    def to(self, device) -> "Segments":
        """The same on another device; on a GPU with its offsets, so that the model's first layer need not
        copy them.
        """
        index = self.key_index if self.key_index is None else moved(self.key_index, device)
        result = Segments(self.q_offsets, self.k_offsets, index, device)
        if torch.device(device).type == "cuda":
            result.offsets()
        return result

    def groups(self, window: int | None):
        """Segments batched by similar length, for the plain twin."""
        if window not in self._made:
            self._made[window] = _padded_groups(self, window)
        return self._made[window]

    def offsets(self) -> tuple[Tensor, Tensor, int, int]:
        """Query and key offsets (S + 1,) int32, and the longest segment of each, for the FlashAttention
        kernels.
        """
        if "offsets" not in self._made:
            q, k = (
                moved(torch.tensor(o, dtype=torch.int32), self.device)
                for o in (self.q_offsets, self.k_offsets)
            )
            longest = (max(b - a for a, b in pairwise(o)) for o in (self.q_offsets, self.k_offsets))
            self._made["offsets"] = (q, k, *longest)
        return self._made["offsets"]


def moved(tensor: Tensor, device) -> Tensor:
    """A CPU tensor on a device; to a GPU from pinned memory, so that nobody waits for the copy."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def attend(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None = None, backend: str = "sdpa"
) -> Tensor:
    """Causal attention within each segment of a packed stream.

    Args:
        q: (T, H, D)    k, v: (T, K, D)    one dtype and device
        window: a query sees itself and the `window` - 1 keys before it; None means all before it.

    Returns: (T, H, D)
    """
    if backend == "sdpa":
        return _attend_padded(q, k, v, segments, window)
    if segments.key_index is not None:
        k, v = k.index_select(0, segments.key_index), v.index_select(0, segments.key_index)
    q_offsets, k_offsets, longest_q, longest_k = segments.offsets()
    if window is not None and window >= longest_k:
        window = None  # without one the kernels do less
    left = -1 if window is None else window - 1  # the kernels count the keys before the query
    if backend == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q, k, v, q_offsets, k_offsets, longest_q, longest_k, causal=True, window_size=(left, 0)
        )
    # What torch.nn.attention.varlen.varlen_attn calls, and differentiable as it is; varlen_attn's own
    # arguments differ between torch 2.11 and 2.13.
    return torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        q_offsets,
        k_offsets,
        longest_q,
        longest_k,
        0.0,
        window is None,
        False,
        window_size_left=left,
        window_size_right=0,
    )[0]


@dataclass
class Decoding:
    """How much of each slot's cache one decoding step reads: of slot n its first lengths[n] places, longest
    at most.
    """

    lengths: Tensor  # (N,) int32
    longest: int
    q_offsets: Tensor  # (N + 1,) int32: one query a slot
    k_offsets: Tensor  # (N + 1,) int32: where each slot begins
    _made: dict = field(default_factory=dict, repr=False)

    @classmethod
    def at(cls, positions: Tensor, longest: int, slot_length: int) -> "Decoding":
        """The step in which slot n's token at place positions[n] is new, and is seen."""
        slots = torch.arange(len(positions) + 1, dtype=torch.int32, device=positions.device)
        return cls((positions + 1).int(), longest, slots, slots * slot_length)

    def mask(self, window: int | None) -> Tensor:
        """Which places are seen (N, 1, 1, longest), for the plain twin."""
        if window not in self._made:
            at = torch.arange(self.longest, device=self.lengths.device)
            seen = at < self.lengths[:, None]
            if window is not None:
                seen &= at >= self.lengths[:, None] - window
            self._made[window] = seen[:, None, None, :]
        return self._made[window]


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, step: Decoding, window: int | None = None, backend: str = "sdpa"
) -> Tensor:
    """One new token per slot against the slot's cache, the new token's key and value included.

    Args:
        q: (N, H, D)    k, v: (N, L, K, D)
        window: as in `attend`

    Returns: (N, H, D)
    """
    n, heads, size = q.shape
    slot, kv_heads = k.shape[1:3]
    if window is not None and window >= slot:
        # only without one do the kernels read a key head once for all its query heads, and split long slots
        window = None
    left = -1 if window is None else window - 1
    if backend == "flash-attn":
        from flash_attn import flash_attn_with_kvcache

        out = flash_attn_with_kvcache(
            q[:, None],
            k,
            v,
            cache_seqlens=step.lengths,
            causal=True,
            window_size=(left, -1 if window is None else 0),
        )
        return out[:, 0]
    if backend == "torch-flash":
        return torch.ops.aten._flash_attention_forward(
            q,
            k.flatten(0, 1),
            v.flatten(0, 1),
            step.q_offsets,
            step.k_offsets,
            1,
            slot,
            0.0,
            False,
            False,
            window_size_left=left,
            window_size_right=-1 if window is None else 0,
            seqused_k=step.lengths,
        )[0]
    k, v = k[:, : step.longest], v[:, : step.longest]
    # The query heads that share a key head are rows of one small matrix: no copy of the cache per head.
    out = F.scaled_dot_product_attention(
        q.view(n, kv_heads, heads // kv_heads, size),
        k.transpose(1, 2),  # (N, K, longest, D)
        v.transpose(1, 2),
        attn_mask=step.mask(window).expand(n, 1, heads // kv_heads, step.longest),
    )
    return out.reshape(n, heads, size)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None) -> Tensor:
    """The plain twin: each group of segments is one batch of scaled_dot_product_attention."""
    groups, stream_order = segments.groups(window)
    outputs = []
    for q_rows, k_rows, (n, q_len, k_len), mask in groups:

        def rows(x, index):
            return x if index is None else x.index_select(0, index)

        out = F.scaled_dot_product_attention(
            rows(q, q_rows).unflatten(0, (n, q_len)).transpose(1, 2),  # (n, H, q_len, D)
            rows(k, k_rows).unflatten(0, (n, k_len)).transpose(1, 2),  # (n, K, k_len, D)
            rows(v, k_rows).unflatten(0, (n, k_len)).transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        outputs.append(out.transpose(1, 2).reshape(n * q_len, *q.shape[1:]))
    return outputs[0] if stream_order is None else torch.cat(outputs).index_select(0, stream_order)


# How far padding may stretch a group beyond its useful area: a fraction, and a constant below which a call's
# overhead costs more than the padding does; and the largest mask, in elements.
_SLACK, _SMALL, _LARGEST = 1.25, 1 << 16, 1 << 23


def _padded_groups(segments: Segments, window: int | None):
    """Lay segments of similar length side by side, padded at the right, for scaled_dot_product_attention.

    Returns the groups, each (q_rows, k_rows, (n, q_len, k_len), mask or None for plain causal), and the index
    that brings the groups' concatenated outputs back to stream order. Where the stream is one group as it
    lies (sequences of one length), the indices are None.
    """
    device = segments.device
    q_offsets, k_offsets = segments.q_offsets, segments.k_offsets
    q_lens = [b - a for a, b in pairwise(q_offsets)]
    k_lens = [b - a for a, b in pairwise(k_offsets)]
    key_index = segments.key_index
    if key_index is None:
        if len(set(q_lens)) == 1 and (window is None or window >= q_lens[0]):
            return [(None, None, (len(q_lens), q_lens[0], q_lens[0]), None)], None
        key_index = torch.arange(k_offsets[-1])
    key_index = key_index.cpu()
    # Square segments need no mask (a real row never sees the padding at its right), so they keep to
    # themselves.
    order = sorted(
        (i for i, length in enumerate(q_lens) if length),
        key=lambda i: (q_lens[i] == k_lens[i], k_lens[i], q_lens[i]),
    )
    members: list[list[int]] = []
    for i in reversed(order):
        if members:
            group = [*members[-1], i]
            padded = len(group) * max(q_lens[j] for j in group) * max(k_lens[j] for j in group)
            useful = sum(q_lens[j] * k_lens[j] for j in group)
            alike = (q_lens[i] == k_lens[i]) == (q_lens[group[0]] == k_lens[group[0]])
            if alike and padded <= _SLACK * useful + _SMALL and padded <= _LARGEST:
                members[-1] = group
                continue
        members.append([i])

    groups, output_row, row = [], torch.empty(q_offsets[-1], dtype=torch.int64), 0
    for group in members:
        n, q_len, k_len = len(group), max(q_lens[j] for j in group), max(k_lens[j] for j in group)
        q_at, k_at = torch.arange(q_len), torch.arange(k_len)
        q_start, q_size, k_start, k_size = (
            torch.tensor([values[j] for j in group])[:, None]
            for values in (q_offsets, q_lens, k_offsets, k_lens)
        )
        # (n, q_len); padding repeats the first row
        q_rows = torch.where(q_at < q_size, q_start + q_at, q_start)
        k_rows = key_index[torch.where(k_at < k_size, k_start + k_at, k_start)]  # (n, k_len)
        real = q_at < q_size
        output_row[q_rows[real]] = (row + torch.arange(n)[:, None] * q_len + q_at)[real]
        row += n * q_len

        square = q_lens[group[0]] == k_lens[group[0]]
        if square and (window is None or window >= k_len):
            mask = None
        else:
            # position of each query among its keys (n, q_len, 1)
            query = (q_at + (k_size - q_size))[:, :, None]
            mask = k_at <= query
            if window is not None:
                mask &= k_at > query - window
            mask |= ~real[:, :, None]  # a padding row must see something, or softmax yields NaN
            mask = mask[:, None].to(device)  # (n, 1, q_len, k_len)
        groups.append((q_rows.flatten().to(device), k_rows.flatten().to(device), (n, q_len, k_len), mask))
    return groups, output_row.to(device)
