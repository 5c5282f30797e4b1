"""Log-probabilities of the responses in a packed stream."""

import torch
from torch import Tensor

from model.mistral import Mistral
from spin.packing import Packed


def response_logps(model: Mistral, packed: Packed, chunk: int = 256) -> Tensor:
    """log p(response | prompt) of every response (C,), fp32, in nats, summed over its tokens, end-of-sequence
    included.

    Differentiable, and summed in a fixed order. `chunk` rows of logits exist at a time. A stream without
    responses gives an empty tensor that is still connected to every parameter, so that its backward pass
    takes part in the collectives.
    """
    token_logps = model(
        packed.tokens, packed.positions, packed.segments, at=packed.at, targets=packed.targets, chunk=chunk
    )  # (R,)
    if not len(packed.lengths):
        return token_logps
    # Without unsafe, the lengths are read back and checked, which stalls a GPU.
    return torch.segment_reduce(token_logps, "sum", lengths=packed.lengths, unsafe=True)
