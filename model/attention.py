"""The attention seam: one function over a packed stream, one over the cache.

T packed tokens, S segments, H query heads, K key/value heads (H a multiple of K), D head size, N slots.
"""

from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Segments:
    """Which rows of a packed stream attend to which.

    Query segment i is rows `q_offsets[i]:q_offsets[i+1]` of the stream. Its keys are the stream's rows
    `key_index[k_offsets[i]:k_offsets[i+1]]`, of which the segment's own rows are the last: attention is causal,
    aligned at the bottom right. Example, a prompt of 3 tokens shared by continuations of 2 and 1 tokens:

        stream      x0 x1 x2 y0 y1 z0          q_offsets  0 5 6
        key_index    0  1  2  3  4 | 0 1 2 5   k_offsets  0 5 9

    so z0 sees x0 x1 x2 z0 and never y. The offsets are what variable-length FlashAttention takes.
    """

    q_offsets: list[int]  # S + 1
    k_offsets: list[int]  # S + 1
    key_index: Tensor  # (k_offsets[-1],) int64
    _groups: dict = field(default_factory=dict, repr=False)  # padded layouts of the plain twin, by window

    @classmethod
    def causal(cls, lengths: list[int], device="cpu") -> "Segments":
        """Independent sequences of the given lengths, one after the other."""
        offsets = [0, *accumulate(lengths)]
        return cls(offsets, offsets, torch.arange(offsets[-1], device=device))

    def groups(self, window: int | None):
        """Segments batched by similar length for the plain twin, computed once per stream and not per layer."""
        if window not in self._groups:
            self._groups[window] = _padded_groups(self, window)
        return self._groups[window]


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None = None) -> Tensor:
    """Causal attention within each segment of a packed stream.

    Args:
        q: (T, H, D)    k, v: (T, K, D)    one dtype and device
        window: a query sees itself and the `window` - 1 keys before it; None means all before it.

    Returns: (T, H, D)
    """
    groups, stream_order = segments.groups(window)
    outputs = []
    for q_rows, k_rows, shape, mask in groups:
        n, q_len, k_len = shape
        out = F.scaled_dot_product_attention(
            q[q_rows].view(n, q_len, *q.shape[1:]).transpose(1, 2),  # (n, H, q_len, D)
            k[k_rows].view(n, k_len, *k.shape[1:]).transpose(1, 2),  # (n, K, k_len, D)
            v[k_rows].view(n, k_len, *v.shape[1:]).transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        outputs.append(out.transpose(1, 2).reshape(n * q_len, *q.shape[1:]))
    return torch.cat(outputs)[stream_order]


def attend_cached(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
    """One new token per slot against the slot's cache, the new token's key and value included.

    Args:
        q: (N, H, D)    k, v: (N, L, K, D)
        positions: (N,) position of the new token; keys at 0..position are valid, the rest is ignored.

    Returns: (N, H, D)
    """
    n, heads, size = q.shape
    length, kv_heads = k.shape[1:3]
    at = torch.arange(length, device=q.device)
    mask = at <= positions[:, None]  # (N, L)
    if window is not None:
        mask &= at > positions[:, None] - window
    # The query heads that share a key head are rows of one small matrix: no copy of the cache per head.
    out = F.scaled_dot_product_attention(
        q.view(n, kv_heads, heads // kv_heads, size),
        k.transpose(1, 2),  # (N, K, L, D)
        v.transpose(1, 2),
        attn_mask=mask[:, None, None, :].expand(n, 1, heads // kv_heads, length),
    )
    return out.reshape(n, heads, size)


# How far padding may stretch a group beyond its useful area: a fraction, and a constant below which a call's
# overhead costs more than the padding does; and the largest mask, in elements.
_SLACK, _SMALL, _LARGEST = 1.25, 1 << 16, 1 << 23


def _padded_groups(segments: Segments, window: int | None):
    """Lay segments of similar length side by side, padded at the right, for scaled_dot_product_attention.

    Returns the groups, each (q_rows, k_rows, (n, q_len, k_len), mask or None for plain causal), and the index that
    brings the groups' concatenated outputs back to stream order.
    """
    device = segments.key_index.device
    key_index = segments.key_index.cpu()
    q_offsets, k_offsets = segments.q_offsets, segments.k_offsets
    q_lens = [b - a for a, b in zip(q_offsets, q_offsets[1:])]
    k_lens = [b - a for a, b in zip(k_offsets, k_offsets[1:])]
    # Square segments need no mask (a real row never sees the padding at its right), so they keep to themselves.
    order = sorted(
        (i for i, length in enumerate(q_lens) if length), key=lambda i: (q_lens[i] == k_lens[i], k_lens[i], q_lens[i])
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
            torch.tensor([values[j] for j in group])[:, None] for values in (q_offsets, q_lens, k_offsets, k_lens)
        )
        q_rows = torch.where(q_at < q_size, q_start + q_at, q_start)  # (n, q_len); padding repeats the first row
        k_rows = key_index[torch.where(k_at < k_size, k_start + k_at, k_start)]  # (n, k_len)
        real = q_at < q_size
        output_row[q_rows[real]] = (row + torch.arange(n)[:, None] * q_len + q_at)[real]
        row += n * q_len

        square = q_lens[group[0]] == k_lens[group[0]]
        if square and (window is None or window >= k_len):
            mask = None
        else:
            query = (q_at + (k_size - q_size))[:, :, None]  # position of each query among its keys (n, q_len, 1)
            mask = k_at <= query
            if window is not None:
                mask &= k_at > query - window
            mask |= ~real[:, :, None]  # a padding row must see something, or softmax yields NaN
            mask = mask[:, None].to(device)  # (n, 1, q_len, k_len)
        groups.append((q_rows.flatten().to(device), k_rows.flatten().to(device), (n, q_len, k_len), mask))
    return groups, output_row.to(device)
