"""Benchmarks as tasks: choices that are scored, or answers that are generated."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from model.tokenizer import Tokenizer
from spin.engine.files import file_digest
from spin.evaluation.documents import Benchmark, Document
from spin.evaluation.scoring import loglikelihoods, text_hash
from spin.evaluation.statistics import means
from spin.evaluation.task import LoadedModel, Task


def load_benchmark(benchmark: Benchmark, data: Path, limit: int, harness: str) -> Task:
    """A benchmark as a task. Raises FileNotFoundError with the download command, or ValueError."""
    source, few_shot, documents = benchmark.source, benchmark.few_shot, benchmark.documents(data, limit)
    splits = filter(None, {source.split, source.examples if few_shot else ""})
    files = sorted(file for split in splits for file in source.files(data, split))
    digests = {str(file.relative_to(data)): file_digest(file) for file in files}
    return Task(
        benchmark.name,
        documents,
        {"data": digests, "harness": harness, "number of documents": len(documents)},
        partial(_generate if benchmark.max_new_tokens else _score, benchmark, documents),
        partial(_summarise, documents, {"few_shot": few_shot, "harness": harness}),
        benchmark.max_new_tokens,
    )


def _score(
    benchmark: Benchmark, documents: Sequence[Document], model: LoadedModel, docs: Sequence[int]
) -> Iterator[dict]:
    """Each choice is scored by its log-likelihood after the question."""
    requests, about = [], []
    for where, before, question in (documents[doc] for doc in docs):
        contexts = [before + text for text in question.texts]
        pairs = zip(contexts, question.choices)
        encoded = [model.encoder.request(a, " " + b, model.max_length, where) for a, b in pairs]
        requests.append([request for request, _ in encoded])
        texts = text_hash([*contexts, *question.choices])
        about.append({"hash": texts, "truncated": any(cut for _, cut in encoded)})
    budget, chunk = model.settings.token_budget, model.settings.logit_chunk
    for place, scores in loglikelihoods(model.model, requests, budget, chunk):
        where, _, question = documents[docs[place]]
        if not all(map(math.isfinite, scores)):
            raise ValueError(f"{where}: scores that are not finite; are the weights damaged?")
        yield {"doc": docs[place]} | about[place] | benchmark.measure(question, scores)


def _generate(
    benchmark: Benchmark, documents: Sequence[Document], model: LoadedModel, docs: Sequence[int]
) -> Iterator[dict]:
    """An answer is generated greedily, up to a stop string."""
    tokenizer, limit = model.tokenizer, benchmark.max_new_tokens
    eos = [text for text, id in tokenizer.special.items() if id == tokenizer.eos_id]
    stops = [*benchmark.stops, *eos]  # also where it is spelled out
    asked = [documents[doc].context + documents[doc].question.texts[0] for doc in docs]
    prompts, most = [model.encoder.encode(text) for text in asked], model.max_length - limit
    ends = StopStrings(tokenizer, stops)
    for response in model.generate([ids[-most:] for ids in prompts], max_new_tokens=limit, stop=ends):
        place, text = response.index, tokenizer.decode(response.ids)
        for stop in stops:
            text = text.split(stop)[0]
        about = {"hash": text_hash([asked[place]]), "truncated": len(prompts[place]) > most}
        yield {"doc": docs[place]} | about | benchmark.measure(documents[docs[place]].question, text)


def _summarise(documents: Sequence[Document], about: dict, rows: Sequence[dict]) -> dict:
    empty = sum(not choice for document in documents for choice in document.question.choices)
    about = {"documents": len(rows)} | about | {"truncated": sum(row["truncated"] for row in rows)}
    return means(rows) | about | ({"empty_choices": empty} if "scores" in rows[0] else {})


class StopStrings:
    """Called with each token of a response: returns whether the response now contains one of the strings."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]):
        self.tokenizer, self.strings = tokenizer, strings
        self.reach = max(len(string.encode()) for string in strings)  # a token has at least one byte
        self.tails: dict[int, deque[int]] = {}  # newest tokens of each response
        special = tokenizer.special.items()  # these decode to nothing
        self.ends = {id for text, id in special if any(string in text for string in strings)}

    def __call__(self, index: int, token: int) -> bool:
        tail = self.tails.setdefault(index, deque(maxlen=self.reach))
        tail.append(token)
        if token in self.ends:
            return True
        text = self.tokenizer.decode_continuation(tail)
        return any(string in text for string in self.strings)
