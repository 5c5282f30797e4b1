"""Keys and values of the tokens read so far, one region per slot; K key/value heads, D head size."""

import os
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig

# By controllers in /proc/self/cgroup: folder, files with limit and usage, and cache that the kernel can drop.
_CGROUP_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


class KVCache:
    """Keys and values of `slots` sequences of up to `length` tokens: (layers, slots, length, K, D).

    A slot holds one sequence, token i at place i. Writing to a slot from place 0 starts a new sequence there;
    places after a sequence's last token are never read. Example, two slots:

        write(0, k, v, slots=[0, 0, 1], positions=[0, 1, 0])  # prefill: 2 tokens in slot 0, 1 in slot 1
        write(0, k, v, slots=[0, 1],    positions=[2, 1])     # decode: one more token for each
    """

    def __init__(self, config: ModelConfig, slots: int, length: int, dtype: torch.dtype, device="cpu"):
        shape = (config.num_hidden_layers, slots, length, config.num_key_value_heads, config.head_dim)
        # Zeros, since attention multiplies masked values by 0: NaN would remain.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = length
        self.longest = length  # of the sequences that decode, set by the sampler: attention reads no further

    @staticmethod
    def bytes_per_slot(config: ModelConfig, length: int, dtype: torch.dtype) -> int:
        """Memory of one slot of `length` tokens."""
        elements = config.num_hidden_layers * length * config.num_key_value_heads * config.head_dim
        return 2 * elements * dtype.itemsize

    def write(self, layer: int, k: Tensor, v: Tensor, slots, positions: Tensor) -> None:
        """Put k, v (T, K, D) at (slots[t], positions[t])."""
        self.k[layer][slots, positions] = k
        self.v[layer][slots, positions] = v


def free_memory(device: torch.device) -> int:
    """Available bytes: of the GPU, torch's unused reserve included; or of the machine and its cgroup."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    available = dict(line.split(":") for line in meminfo.read_text().splitlines())["MemAvailable"]
    return min(int(available.split()[0]) * 1024, cgroup_memory())


def cgroup_memory(root: Path = Path("/")) -> int:
    """Bytes left under the memory limits of this process's cgroup and of its ancestors (versions 1 and 2)."""
    left, table = 2**63, root / "proc/self/cgroup"
    for line in table.read_text().splitlines() if table.is_file() else []:
        _, controllers, group = line.split(":", 2)
        folder, limit, usage, cache = _CGROUP_FILES.get(controllers, ("", "", "", ""))
        parts = Path(group).parts[1:]
        for depth in range(len(parts) + 1 if limit else 0):
            directory = (root / "sys/fs/cgroup" / folder).joinpath(*parts[:depth])
            if (directory / limit).is_file() and (most := (directory / limit).read_text().strip()) != "max":
                stat = dict(row.split() for row in (directory / "memory.stat").read_text().splitlines())
                left = min(left, int(most) - int((directory / usage).read_text()) + int(stat[cache]))
    return max(left, 0)
