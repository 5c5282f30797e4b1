"""Keys and values of the tokens read so far, one region per slot."""

import os
from pathlib import Path

import torch
from torch import Tensor

from model.attention import Decoding
from model.config import ModelConfig


class KVCache:
    """Per layer, keys and values of `slots` sequences of up to `length` tokens: (slots, length, K, D).

    A slot holds one sequence, token i at place i. Writing over a slot from place 0 starts a new sequence
    there; what lies beyond a sequence's last token is left over and never read. Example, two slots:

        write(0, k, v, slots=[0, 0, 1], positions=[0, 1, 0])  # prefill: 2 tokens in slot 0, 1 in slot 1
        write(0, k, v, slots=[0, 1],    positions=[2, 1])     # decode: one more token for each
    """

    def __init__(self, config: ModelConfig, slots: int, length: int, dtype: torch.dtype, device="cpu"):
        shape = (config.num_hidden_layers, slots, length, config.num_key_value_heads, config.head_dim)
        # Zeros: masked places count nothing only if they hold numbers.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = length
        # of the sequences being decoded, kept by whoever decodes: attention looks no further
        self.longest = length

    @staticmethod
    def bytes_per_slot(config: ModelConfig, length: int, dtype: torch.dtype) -> int:
        """Memory of one slot of `length` tokens."""
        return (
            2
            * config.num_hidden_layers
            * length
            * config.num_key_value_heads
            * config.head_dim
            * dtype.itemsize
        )

    def decoding(self, positions: Tensor) -> Decoding:
        """What the step reads in which slot n's new token is at positions[n]."""
        return Decoding.at(positions, self.longest, self.length)

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Put k, v (T, K, D) at (slots[t], positions[t])."""
        self.k[layer][slots, positions] = k
        self.v[layer][slots, positions] = v

    def read(self, layer: int, slots: int) -> tuple[Tensor, Tensor]:
        """Views (slots, length, K, D) of the first `slots` slots."""
        return self.k[layer][:slots], self.v[layer][:slots]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot's sequence over another's."""
        self.k[:, target, :length] = self.k[:, source, :length]
        self.v[:, target, :length] = self.v[:, source, :length]


class Prefix:
    """Keys and values of a text that several streams go on from, computed once.

    The first forward pass that is given an empty one fills it with its own stream's; for later ones, the
    stream's `Segments.key_index` counts its P rows first: key row P + t is the stream's row t.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def before(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (P + T, K, D) of the prefix and the stream, of k, v (T, K, D)."""
        if layer == len(self._layers):
            self._layers.append((k, v))
            return k, v
        keys, values = self._layers[layer]
        return torch.cat((keys, k)), torch.cat((values, v))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU (what torch holds in reserve included), or of the machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # Linux counts in what its file cache would give back
        return next(int(line.split()[1]) * 1024 for line in meminfo.open() if line.startswith("MemAvailable"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
