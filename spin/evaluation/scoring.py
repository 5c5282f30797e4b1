"""Log-likelihoods of continuations, for what is asked with choices: texts in, nats out.

A document's requests are a context with each of its continuations. What several requests begin with is read
once: in a micro-batch they are laid out as a tree, and what all documents begin with (the examples of an MMLU
subject) is read before the first of them, its keys and values kept.
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
from model.kv_cache import Prefix
from model.mistral import Mistral
from model.tokenizer import Tokenizer
from spin.packing import Packed, prefetched

# Texts that lines might be told apart by: blanks at their ends, empty ones, bytes, what normalisers like to
# change.
_PROBE = "a\n  b \n\n c\n\n\n\tdé\u00a0ﬁ \n1.5\nAnswer: x\n"
# A shared beginning of fewer tokens is not worth a pass of its own.
SHORTEST_PREFIX = 32


class Request(NamedTuple):
    """A context with one continuation."""

    ids: list[int]
    continuation: int  # how many of the ids, the last ones, are the continuation's


class Encoder:
    """Texts as the harness encodes them; lines that come again, such as few-shot examples, are encoded once.

    `bos`: put a BOS in front, as harness 0.4.13 does with a tokenizer that has one, and 0.4.0 does not.
    """

    def __init__(self, tokenizer: Tokenizer, bos: bool):
        self.tokenizer = tokenizer
        self.start = [tokenizer.bos_id] if bos and tokenizer.bos_id >= 0 else []
        self._rest = lru_cache(1 << 16)(lambda line: tuple(tokenizer.encode_continuation(line)))
        self._by_line = tokenizer.encode(_PROBE) == self._lines(_PROBE) and tokenizer.lone_newlines

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
        """The two as ids, and whether they were cut at the left to the `most` that the model reads.

        Blanks at the context's end go to the continuation; where the two are encoded together, the
        continuation is what goes beyond the length of the context's own encoding. Raises ValueError for a
        continuation without a token, or with more than `most`.
        """
        blank = len(context) - len(context.rstrip())
        if blank:
            context, continuation = context[:-blank], context[-blank:] + continuation
        if context:
            ids = self.encode(context + continuation)
            count = len(ids) - len(self.encode(context))
        else:
            own = self.tokenizer.encode(continuation)
            start = self.tokenizer.bos_id if self.tokenizer.bos_id >= 0 else self.tokenizer.eos_id
            ids, count = [start, *own], len(own)
        if not 0 < count <= most:
            raise ValueError(
                f"{where}: a choice of {count} tokens, where 1 to {most} can be scored: {continuation!r:.200}"
            )
        return Request(ids[-(most + 1) :], count), len(ids) > most + 1


def text_hash(texts: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that stand for what a document was asked with."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@torch.inference_mode()
def loglikelihoods(
    model: Mistral, documents: Sequence[Sequence[Request]], token_budget: int, logit_chunk: int
) -> Iterator[tuple[int, list[float]]]:
    """For each document, in an order of its own, its index and log p(continuation | context) of its requests,
    in nats.

    Log-softmax is taken in fp32, whatever the model computes in. A micro-batch has at most `token_budget`
    tokens, or one document.
    """
    device = next(model.parameters()).device
    inputs = [[request.ids[:-1] for request in document] for document in documents]
    order = sorted(range(len(documents)), key=lambda i: min(inputs[i]))
    shared = _shared(documents, inputs) if len(documents) > 1 else 0
    prefix = None
    if shared >= SHORTEST_PREFIX:
        prefix = Prefix()
        ids = torch.tensor(inputs[0][0][:shared], device=device)
        none = torch.zeros(0, dtype=torch.int64, device=device)
        model(
            ids,
            torch.arange(shared, device=device),
            Segments.causal([shared], device),
            at=none,
            targets=none,
            prefix=prefix,
        )
    else:
        shared = 0
    packs = (
        (
            members,
            pack_tree([r for i in members for r in documents[i]], inputs[members[0]][0][:shared]).to(device),
        )
        for members in _micro_batches(order, inputs, shared, token_budget)
    )
    with closing(prefetched(packs)) as coming:
        for members, packed in coming:
            logps = model(
                packed.tokens,
                packed.positions,
                packed.segments,
                at=packed.at,
                targets=packed.targets,
                chunk=logit_chunk,
                prefix=prefix,
            )
            sums = [part.sum().item() for part in logps.cpu().split(packed.lengths.tolist())]
            for i in members:
                scores, sums = sums[: len(documents[i])], sums[len(documents[i]) :]
                yield i, scores


def pack_tree(requests: Sequence[Request], prefix: list[int] | None = None) -> Packed:
    """Requests as one stream, in which what two of them begin with stands once; a prefix of all stands before
    it.

    Sorted, each request shares the most with the one before it. What it has beyond that is a segment of the
    stream, whose keys are the rows of the request's whole text. Rows of the prefix count as keys alone.
    `lengths` are the requests' own, in the order given.
    """
    prefix = prefix or []
    order = sorted(range(len(requests)), key=lambda i: requests[i].ids[:-1])
    before, rows = prefix, torch.arange(len(prefix))
    tokens: list[int] = []
    positions: list[int] = []
    q_offsets, k_offsets, keys = [0], [0], []
    at: list[Tensor] = [torch.empty(0)] * len(requests)
    for i in order:
        ids, count = requests[i].ids[:-1], requests[i].continuation
        known = common_length(before, ids)
        end = len(prefix) + len(tokens)
        rows = torch.cat((rows[:known], torch.arange(end, end + len(ids) - known)))
        if known < len(ids):
            tokens += ids[known:]
            positions += range(known, len(ids))
            keys.append(rows)
            q_offsets.append(len(tokens))
            k_offsets.append(k_offsets[-1] + len(ids))
        at[i] = rows[len(ids) - count :] - len(prefix)
        before = ids
    targets = [torch.tensor(request.ids[-request.continuation :]) for request in requests]
    lengths = torch.tensor([request.continuation for request in requests])
    segments = Segments(q_offsets, k_offsets, torch.cat(keys))
    return Packed(
        torch.tensor(tokens), torch.tensor(positions), segments, torch.cat(at), torch.cat(targets), lengths
    )


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first members two lists share."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare fast
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _shared(documents: Sequence[Sequence[Request]], inputs: list[list[list[int]]]) -> int:
    """How many first tokens all requests share, of those from which nothing is predicted."""
    every = [ids for document in inputs for ids in document]
    predicting = min(
        len(request.ids) - request.continuation - 1 for document in documents for request in document
    )
    return min(common_length(min(every), max(every)), predicting)


def _micro_batches(
    order: Sequence[int], inputs: list[list[list[int]]], shared: int, token_budget: int
) -> Iterator[list[int]]:
    """Documents in the given order, as many at a time as the budget holds, at least one."""
    batch: list[int] = []
    room = token_budget
    for i in order:
        texts = sorted(inputs[i])
        size = len(texts[0]) - shared + sum(len(b) - common_length(a, b) for a, b in zip(texts, texts[1:]))
        if batch and size > room:
            yield batch
            batch, room = [], token_budget
        batch.append(i)
        room -= size
    if batch:
        yield batch
