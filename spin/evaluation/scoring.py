"""Log-likelihoods of continuations: texts in, nats out.

A document's requests are its context with each continuation. Shared beginnings are read once: a micro-batch
is packed as a prefix tree, and what all documents begin with (the examples of an MMLU subject) is read first,
its keys and values kept.
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
from spin.packing import MicroBatch, Packed, packed_batches

# What could make lines encode otherwise alone than together: blanks, empty lines, bytes, normalisation.
_PROBE = "a\n  b \n\n c\n\n\n\tdé\u00a0ﬁ \n1.5\nAnswer: x\n"
SHORTEST_PREFIX = 32  # tokens; a shorter shared beginning is not worth a forward pass of its own


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
        """The request's ids, and whether they were cut at the left to the `most` that the model reads.

        Blanks at the context's end are moved to the continuation. Its ids are those of both texts together
        after as many as the context alone has. Raises ValueError unless it has 1 to `most` tokens.
        """
        blank = len(context) - len(context.rstrip())
        if blank:
            context, continuation = context[:-blank], context[-blank:] + continuation
        if context:
            before = self.encode(context)
            own = self.encode(context + continuation)[len(before) :]
        else:
            own, bos = self.tokenizer.encode(continuation), self.tokenizer.bos_id
            before = [bos if bos >= 0 else self.tokenizer.eos_id]
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
    beginning = _shared_beginning(documents, inputs)
    prefix = _read_prefix(model, beginning, device) if beginning else None

    def pack_documents(members: list[int]) -> Packed:
        return pack_tree([request for i in members for request in documents[i]], beginning)

    plan = _micro_batches(inputs, len(beginning), token_budget)
    with closing(packed_batches(plan, pack_documents, device)) as batches:
        for batch, p in batches:
            predicted = {"at": p.at, "targets": p.targets, "chunk": logit_chunk}
            logps = model(p.tokens, p.positions, p.segments, prefix=prefix, **predicted)  # (R,)
            sums = iter([part.sum().item() for part in logps.cpu().split(p.lengths.tolist())])
            for i in batch.items:
                yield i, [next(sums) for _ in documents[i]]


def pack_tree(requests: Sequence[Request], prefix: Sequence[int] = ()) -> Packed:
    """Requests as one stream in which shared beginnings occur once; all start with `prefix`, read before.

    Sorted, each request shares the most with its predecessor. Its other tokens are a segment, whose keys are
    the rows of its whole text, the prefix included. `lengths` are the continuations', in the given order.
    """
    before, rows = list(prefix), torch.arange(len(prefix))
    tokens: list[int] = []
    positions: list[int] = []
    q_offsets, k_offsets, keys = [0], [0], []
    at: list[Tensor] = [torch.empty(0)] * len(requests)
    for i in sorted(range(len(requests)), key=lambda i: requests[i].ids[:-1]):
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
    stream = (torch.tensor(tokens), torch.tensor(positions), segments)
    return Packed(*stream, torch.cat(at), torch.cat(targets), lengths)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two lists."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare fast
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _shared_beginning(documents: Sequence[Sequence[Request]], inputs: list[list[list[int]]]) -> list[int]:
    """The first tokens of all requests that predict nothing; [] if they are too few, or of one document."""
    first, last = min(texts[0] for texts in inputs), max(texts[-1] for texts in inputs)
    requests = [request for document in documents for request in document]
    predicting = min(len(request.ids) - request.continuation - 1 for request in requests)
    shared = min(common_length(first, last), predicting)
    return first[:shared] if len(documents) > 1 and shared >= SHORTEST_PREFIX else []


def _read_prefix(model: Mistral, ids: list[int], device: torch.device) -> Prefix:
    prefix, nothing = Prefix(), torch.zeros(0, dtype=torch.int64, device=device)
    positions = torch.arange(len(ids), device=device)
    segments = Segments.causal([len(ids)], device)
    model(torch.tensor(ids, device=device), positions, segments, at=nothing, targets=nothing, prefix=prefix)
    return prefix


def _micro_batches(inputs: list[list[list[int]]], shared: int, token_budget: int) -> Iterator[MicroBatch]:
    """Documents in the order of their texts, as many at a time as the budget allows, at least one."""
    batch: list[int] = []
    room = token_budget
    for i in sorted(range(len(inputs)), key=lambda i: inputs[i][0]):
        texts = inputs[i]
        size = len(texts[0]) - shared + sum(len(b) - common_length(a, b) for a, b in zip(texts, texts[1:]))
        if batch and size > room:
            yield MicroBatch(batch)
            batch, room = [], token_budget
        batch.append(i)
        room -= size
    if batch:
        yield MicroBatch(batch)
