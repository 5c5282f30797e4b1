"""Keys and values of the tokens read so far, one region per slot."""

import torch
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Per layer, keys and values of `slots` sequences of up to `length` tokens: (slots, length, K, D).

    A slot holds one sequence, token i at place i. Writing over a slot from place 0 starts a new sequence there;
    what lies beyond a sequence's last token is left over and never read. Example, two slots:

        write(0, k, v, slots=[0, 0, 1], positions=[0, 1, 0])   # prefill: two tokens into slot 0, one into slot 1
        write(0, k, v, slots=[0, 1],    positions=[2, 1])      # decode: one more token for each
    """

    def __init__(self, config: ModelConfig, slots: int, length: int, dtype: torch.dtype, device="cpu"):
        shape = (config.num_hidden_layers, slots, length, config.num_key_value_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = length
        self.longest = length  # of the sequences being decoded, kept by whoever decodes: attention looks no further

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Put k, v (T, K, D) at (slots[t], positions[t])."""
        self.k[layer][slots, positions] = k
        self.v[layer][slots, positions] = v

    def read(self, layer: int, slots: int) -> tuple[Tensor, Tensor]:
        """Views (slots, length, K, D) of the first `slots` slots."""
        return self.k[layer][:slots], self.v[layer][:slots]

    def move(self, source: int, target: int) -> None:
        """Copy one slot's sequence over another's."""
        self.k[:, target] = self.k[:, source]
        self.v[:, target] = self.v[:, source]
