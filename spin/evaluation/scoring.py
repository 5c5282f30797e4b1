"""Log-likelihoods of continuations: texts in, nats out.

A document's requests are its context with each continuation. A micro-batch is packed as a prefix tree: what
its requests begin with in common, such as few-shot examples, is read once.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import Segments
from model.mistral import Mistral
from model.tokenizer import Tokenizer
from spin.engine.batches import MicroBatch, packed_batches
from spin.packing import Packed

# What could make lines encode otherwise alone than together: blanks, empty lines, bytes, normalisation.
_PROBE = "a\n  b \n\n c\n\n\n\tdé\u00a0ﬁ \n1.5\nAnswer: x\n"


class Request(NamedTuple):
    """A context with one continuation."""

    ids: list[int]
    continuation: int  # number of ids, the last ones, that are the continuation's


class Encoder:
    """Encodes texts as the harness does. Repeated lines, such as few-shot examples, are encoded once.

    `bos`: prepend BOS, as harness 0.4.13 does where the tokenizer adds one, and 0.4.0 never does.
    """

    def __init__(self, tokenizer: Tokenizer, bos: bool):
        self.tokenizer = tokenizer
        self.start = [tokenizer.bos_id] if bos and tokenizer.bos_id >= 0 else []
        self._rest = lru_cache(1 << 16)(lambda line: tuple(tokenizer.encode_continuation(line)))
        self._by_line = tokenizer.lone_newlines and tokenizer.encode(_PROBE) == self._lines(_PROBE)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with BOS."""
        return self.start + (self._lines(text) if self._by_line else self.tokenizer.encode(text))

    def _lines(self, text: str) -> list[int]:
        first, *rest = re.findall(r"[^\n]*\n|[^\n]+", text) or [""]
        ids = self.tokenizer.encode(first)
        for line in rest:
            ids += self._rest(line)
        return ids

    def request(self, context: str, continuation: str, most: int, where: str) -> tuple[Request, bool]:
        """The request's ids, and whether they were cut at the left to the `most` that the model reads.

        Blanks at the context's end are moved to the continuation. Its ids are those of both texts together
        after as many as the context alone has. Raises ValueError unless it has 1 to `most` tokens.
        """
        blank = len(context) - len(context.rstrip())
        if blank:
            context, continuation = context[:-blank], context[-blank:] + continuation
        before = self.encode(context)
        own = self.encode(context + continuation)[len(before) :]
        ids, count = before + own, len(own)
        if not 0 < count <= most:
            raise ValueError(
                f"{where}: {count} tokens in the choice {continuation!r:.99}; 1 to {most} can be scored"
            )
        return Request(ids[-(most + 1) :], count), len(ids) > most + 1


def text_hash(texts: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that identify the texts of a document."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@torch.inference_mode()
def loglikelihoods(
    model: Mistral, documents: Sequence[Sequence[Request]], token_budget: int, logit_chunk: int
) -> Iterator[tuple[int, list[float]]]:
    """Each document's number and log p(continuation | context) of its requests, in nats; in any order.

    Log-softmax is in fp32. A micro-batch has at most `token_budget` tokens, or one document.
    """
    device = next(model.parameters()).device
    inputs = [sorted(request.ids[:-1] for request in document) for document in documents]

    def pack_documents(members: list[int]) -> Packed:
        return pack_tree([request for i in members for request in documents[i]])

    with closing(packed_batches(_micro_batches(inputs, token_budget), pack_documents, device)) as batches:
        for batch, p in batches:
            predicted = {"at": p.at, "targets": p.targets, "chunk": logit_chunk}
            logps = model(p.tokens, p.positions, p.segments, **predicted)  # (R,)
            sums = iter([part.sum().item() for part in logps.cpu().split(p.lengths.tolist())])
            for i in batch.items:
                yield i, [next(sums) for _ in documents[i]]


def pack_tree(requests: Sequence[Request]) -> Packed:
    """Requests as one stream in which shared beginnings occur once.

    Sorted, each request shares the most with its predecessor. Its other tokens are a segment, whose keys are
    the rows of its whole text. `lengths` are the continuations', in the given order.
    """
    before: list[int] = []
    rows = torch.arange(0)
    tokens: list[int] = []
    positions: list[int] = []
    q_offsets, k_offsets, keys = [0], [0], []
    at: list[Tensor] = [torch.empty(0)] * len(requests)
    for i in sorted(range(len(requests)), key=lambda i: requests[i].ids[:-1]):
        ids, count = requests[i].ids[:-1], requests[i].continuation
        known = common_length(before, ids)
        end = len(tokens)
        rows = torch.cat((rows[:known], torch.arange(end, end + len(ids) - known)))
        if known < len(ids):
            tokens += ids[known:]
            positions += range(known, len(ids))
            keys.append(rows)
            q_offsets.append(len(tokens))
            k_offsets.append(k_offsets[-1] + len(ids))
        at[i] = rows[len(ids) - count :]
        before = ids
    targets = [torch.tensor(request.ids[-request.continuation :]) for request in requests]
    lengths = torch.tensor([request.continuation for request in requests])
    segments = Segments(q_offsets, k_offsets, torch.cat(keys))
    stream = (torch.tensor(tokens), torch.tensor(positions), segments)
    return Packed(*stream, torch.cat(at), torch.cat(targets), lengths)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two lists."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _micro_batches(inputs: list[list[list[int]]], token_budget: int) -> Iterator[MicroBatch]:
    """Documents in the order of their texts, as many at a time as the budget allows, at least one."""
    batch: list[int] = []
    before: list[int] = []
    room = token_budget
    for i in sorted(range(len(inputs)), key=lambda i: inputs[i][0]):
        texts = [before, *inputs[i]]
        size = sum(len(b) - common_length(a, b) for a, b in zip(texts, texts[1:]))
        if batch and size > room:
            yield MicroBatch(batch)
            batch, room, size = [], token_budget, size + common_length(before, inputs[i][0])
        batch.append(i)
        before = inputs[i][-1]
        room -= size
    if batch:
        yield MicroBatch(batch)
