"""The sdpa backend over a packed stream: groups of segments padded for scaled_dot_product_attention.

T packed tokens, H query heads, K key/value heads, D head size; n segments per group, q_len queries and k_len
keys each. Runs on any device and in any dtype; the other backends are tested against it.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# A group's padded area may be SLACK times its useful area plus SMALL, and LARGEST elements (of the mask).
SLACK, SMALL, LARGEST = 1.25, 1 << 16, 1 << 23


def attend_padded(q: Tensor, k: Tensor, v: Tensor, groups: list, order: Tensor | None) -> Tensor:
    """`attend`, in the groups and with the order of `pad_segments`."""

    def select(x: Tensor, rows: Tensor | None) -> Tensor:
        return x if rows is None else x.index_select(0, rows)

    outputs = []
    for q_rows, k_rows, (n, q_len, k_len), mask in groups:
        out = F.scaled_dot_product_attention(
            select(q, q_rows).unflatten(0, (n, q_len)).transpose(1, 2),  # (n, H, q_len, D)
            select(k, k_rows).unflatten(0, (n, k_len)).transpose(1, 2),  # (n, K, k_len, D)
            select(v, k_rows).unflatten(0, (n, k_len)).transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        outputs.append(out.transpose(1, 2).reshape(n * q_len, *q.shape[1:]))  # (n · q_len, H, D)
    return outputs[0] if order is None else torch.cat(outputs).index_select(0, order)  # (T, H, D)


def pad_segments(
    q_offsets: list[int], k_offsets: list[int], key_index: Tensor | None, window: int | None, device
) -> tuple[list[tuple], Tensor | None]:
    """Batch segments (described as in `Segments`) by similar length, padded at the right.

    Returns groups (q_rows (n · q_len,), k_rows (n · k_len,), (n, q_len, k_len), mask (n, 1, q_len, k_len) or
    None for causal), and the index (T,) that restores stream order in their concatenated outputs. For
    sequences of one length, which are one group as they lie, the indices are None.
    """
    q_lens = [b - a for a, b in pairwise(q_offsets)]
    k_lens = [b - a for a, b in pairwise(k_offsets)]
    if key_index is None:
        if len(set(q_lens)) == 1 and (window is None or window >= q_lens[0]):
            return [(None, None, (len(q_lens), q_lens[0], q_lens[0]), None)], None
        key_index = torch.arange(k_offsets[-1])
    key_index = key_index.cpu()
    groups, order, rows = [], torch.empty(q_offsets[-1], dtype=torch.int64), 0
    for members in _similar(q_lens, k_lens):
        n, q_len, k_len = len(members), max(q_lens[i] for i in members), max(k_lens[i] for i in members)
        columns = ([values[i] for i in members] for values in (q_offsets, q_lens, k_offsets, k_lens))
        q_start, q_size, k_start, k_size = (torch.tensor(column)[:, None] for column in columns)  # (n, 1)
        q_at, k_at = torch.arange(q_len), torch.arange(k_len)
        real = q_at < q_size  # (n, q_len)
        q_rows = torch.where(real, q_start + q_at, q_start)  # padding repeats the first row
        k_rows = key_index[torch.where(k_at < k_size, k_start + k_at, k_start)]  # (n, k_len)
        order[q_rows[real]] = (rows + torch.arange(n)[:, None] * q_len + q_at)[real]
        rows += n * q_len

        mask = None  # right for square segments: a real row never sees the padding at its right
        square = q_lens[members[0]] == k_lens[members[0]]
        if not square or (window is not None and window < k_len):
            query = (q_at + (k_size - q_size))[:, :, None]  # (n, q_len, 1): each query's place among its keys
            mask = k_at <= query
            if window is not None:
                mask &= k_at > query - window
            mask |= ~real[:, :, None]  # a padding row must see something, or softmax yields NaN
            mask = mask[:, None].to(device)  # (n, 1, q_len, k_len)
        groups.append((q_rows.flatten().to(device), k_rows.flatten().to(device), (n, q_len, k_len), mask))
    return groups, order.to(device)


def _similar(q_lens: list[int], k_lens: list[int]) -> list[list[int]]:
    """Indices of the segments, grouped by similar length; square segments, which need no mask, are apart."""
    square = [q == k for q, k in zip(q_lens, k_lens)]
    nonempty = [i for i, length in enumerate(q_lens) if length]
    groups: list[list[int]] = []
    for i in reversed(sorted(nonempty, key=lambda i: (square[i], k_lens[i], q_lens[i]))):
        if groups and square[i] == square[groups[-1][0]]:
            group = [*groups[-1], i]
            padded = len(group) * max(q_lens[j] for j in group) * max(k_lens[j] for j in group)
            useful = sum(q_lens[j] * k_lens[j] for j in group)
            if padded <= SLACK * useful + SMALL and padded <= LARGEST:
                groups[-1] = group
                continue
        groups.append([i])
    return groups
