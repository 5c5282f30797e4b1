"""Prompts with their responses, packed into one stream of tokens; the log-probs of the responses.

The prompt stands once, its responses after it: [x][y][y']. Every response sees the prompt and itself
(arXiv 2410.20305 calls this prefix sharing). SFT packs one response; multiple-choice questions pack choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from model.attention import Segments, to_device
from model.mistral import Mistral


@dataclass(frozen=True)
class Item:
    """Ids of a prompt and of its responses, none empty. A response ends with EOS unless it was cut."""

    prompt: list[int]
    responses: tuple[list[int], ...]
    where: str = ""  # "file:line", for error messages

    @property
    def packed_length(self) -> int:
        """Tokens of this item in a stream: a response's last token is predicted and predicts nothing."""
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses)


@dataclass
class Packed:
    """A stream of T tokens in which the R tokens of C responses are predicted. All tensors are int64."""

    tokens: Tensor  # (T,)
    positions: Tensor  # (T,) a response's positions follow its prompt's
    segments: Segments
    at: Tensor  # (R,) rows that predict
    targets: Tensor  # (R,) the ids to predict
    lengths: Tensor  # (C,) tokens of each response; they sum to R

    def to(self, device) -> "Packed":
        tensors = (self.tokens, self.positions, self.at, self.targets, self.lengths)
        tokens, positions, at, targets, lengths = (to_device(tensor, device) for tensor in tensors)
        return Packed(tokens, positions, self.segments.to(device), at, targets, lengths)


def pack(items: Sequence[Item]) -> Packed:
    """Lay items one after the other. No items give a stream of one token in which nothing is predicted."""
    tokens: list[int] = []
    positions: list[int] = []
    key_index: list[int] = []  # rows of the stream that the segments attend to
    q_lengths: list[int] = []
    k_lengths: list[int] = []
    at: list[int] = []
    for item in items:
        start, prompt = len(tokens), len(item.prompt)
        tokens += item.prompt
        positions += range(prompt)
        for i, response in enumerate(item.responses):
            first, length = len(tokens), len(response) - 1
            tokens += response[:-1]
            positions += range(prompt, prompt + length)
            at += [start + prompt - 1, *range(first, first + length)]
            # The first response shares its prompt's segment; a later one of a single token has none.
            if i == 0 or length:
                q_lengths.append(prompt + length if i == 0 else length)
                k_lengths.append(prompt + length)
                key_index += [*range(start, start + prompt), *range(first, first + length)]
    responses = [response for item in items for response in item.responses]
    if not items:
        tokens, positions, q_lengths, k_lengths, key_index = [0], [0], [1], [1], [0]
    q_offsets, k_offsets = ([0, *accumulate(lengths)] for lengths in (q_lengths, k_lengths))
    return Packed(
        torch.tensor(tokens),
        torch.tensor(positions),
        Segments(q_offsets, k_offsets, torch.tensor(key_index)),
        torch.tensor(at, dtype=torch.int64),
        torch.tensor([token for response in responses for token in response], dtype=torch.int64),
        torch.tensor([len(response) for response in responses], dtype=torch.int64),
    )


def response_logps(model: Mistral, packed: Packed, chunk: int = 256) -> Tensor:
    """log p(response | prompt) of every response (C,), fp32, in nats, summed over its tokens with EOS.

    Differentiable, and summed in a fixed order. `chunk` rows of logits exist at a time. A stream without
    responses gives an empty tensor that still depends on every parameter, so that its backward pass takes
    part in the collectives.
    """
    p = packed
    token_logps = model(p.tokens, p.positions, p.segments, at=p.at, targets=p.targets, chunk=chunk)  # (R,)
    if not len(p.lengths):
        return token_logps
    # Without unsafe, the lengths are read back and checked, which stalls a GPU.
    return torch.segment_reduce(token_logps, "sum", lengths=p.lengths, unsafe=True)


def response_places(items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """Of items with C responses each: the first response with the same tokens, and lengths; (B, C) int64."""
    same = [[item.responses.index(response) for response in item.responses] for item in items]
    lengths = [[len(response) for response in item.responses] for item in items]
    return torch.tensor(same), torch.tensor(lengths)
