"""A benchmark's documents, put to the model: choices scored, or answers generated."""

import math
from collections import deque
from collections.abc import Iterator, Sequence

from model.tokenizer import Tokenizer
from spin.evaluation.engine import Engine
from spin.evaluation.scoring import Request, loglikelihoods, text_hash
from spin.evaluation.tasks import GSM8K, Documents, MultipleChoice, summarise

SLICE = 1024  # documents whose ids are in memory at a time


class Benchmark:
    """One of spin/evaluation/tasks.py."""

    def __init__(self, documents: Documents):
        self.documents, self.task, self.name = documents, documents.task, documents.task.name

    def __len__(self) -> int:
        return len(self.documents)

    def origin(self) -> dict:
        documents = self.documents
        return {"data": documents.digest, "harness": documents.harness, "number of documents": len(documents)}

    def check(self, tokenizer: Tokenizer, max_length: int) -> None:
        if not isinstance(self.task, MultipleChoice):
            if max_length <= self.task.max_new_tokens:
                raise ValueError(
                    f"{self.name}: the model reads {max_length} tokens: no room for an answer; leave it out"
                )
            return
        for where, question in zip(self.documents.where, self.documents.questions):
            for choice in question.choices:  # a token has at least a byte; the blank in front may be one more
                if len(choice.encode()) >= max_length - 1 and len(tokenizer.encode(choice)) >= max_length - 1:
                    raise ValueError(
                        f"{where}: a choice longer than the model reads, {max_length} tokens "
                        f"(max_position_embeddings); leave {self.name} out"
                    )

    def cost(self, doc: int) -> float:
        question, before = self.documents.questions[doc], len(self.documents.examples[doc])
        if not isinstance(self.task, MultipleChoice):
            return (before + len(question[0])) / 3.5 + 4 * self.task.max_new_tokens
        shared = self.task.first or not self.documents.few_shot
        return ((0 if shared else before) + len(question.texts[0]) + sum(map(len, question.choices))) / 3.5

    def answers(self, engine: Engine, docs: Sequence[int]) -> Iterator[dict]:
        task = self.task
        for some in (docs[start : start + SLICE] for start in range(0, len(docs), SLICE)):
            if isinstance(task, MultipleChoice):
                yield from self._scored(task, engine, some)
            else:
                yield from self._generated(task, engine, some)

    def _scored(self, task: MultipleChoice, engine: Engine, docs: Sequence[int]) -> Iterator[dict]:
        settings, harness = engine.settings, self.documents.harness
        requests: list[list[Request]] = []
        about: list[dict] = []
        for doc in docs:
            question, before = self.documents.questions[doc], self.documents.examples[doc]
            contexts = [before + text for text in question.texts]
            pairs = [
                engine.encoder.request(context, " " + choice, engine.max_length, self.documents.where[doc])
                for context, choice in zip(contexts, question.choices)
            ]
            requests.append([request for request, _ in pairs])
            asked = text_hash([*contexts, *question.choices])
            about.append({"doc": doc, "hash": asked, "truncated": any(cut for _, cut in pairs)})
        for place, scores in loglikelihoods(
            engine.model, requests, settings.token_budget, settings.logit_chunk
        ):
            doc = docs[place]
            if not all(map(math.isfinite, scores)):
                raise ValueError(
                    f"{self.documents.where[doc]}: scores that are not finite; are the weights damaged?"
                )
            yield about[place] | task.measured(self.documents.questions[doc], scores, harness)
            engine.tick(self.cost(doc))

    def _generated(self, task: GSM8K, engine: Engine, docs: Sequence[int]) -> Iterator[dict]:
        harness, most = self.documents.harness, engine.max_length - task.max_new_tokens
        asked = [self.documents.examples[doc] + self.documents.questions[doc][0] for doc in docs]
        prompts = [engine.encoder.encode(text) for text in asked]
        stops = task.stops(harness)
        stream = engine.generate(
            [prompt[-most:] for prompt in prompts],
            max_new_tokens=task.max_new_tokens,
            stop=StopStrings(engine.tokenizer, stops),
        )
        for response in stream:
            doc = docs[response.index]
            text = engine.tokenizer.decode(response.ids)
            for stop in [*stops, "</s>"]:
                text = text.split(stop)[0]
            about = {
                "doc": doc,
                "hash": text_hash([asked[response.index]]),
                "truncated": len(prompts[response.index]) > most,
            }
            yield about | task.measured(self.documents.questions[doc][1], text, harness)
            engine.tick(self.cost(doc))

    def summary(self, rows: Sequence[dict]) -> dict:
        result: dict = summarise(self.task, rows)
        result |= {"documents": len(rows), "few_shot": self.documents.few_shot}
        result |= {"harness": self.documents.harness, "truncated": sum(row["truncated"] for row in rows)}
        if isinstance(self.task, MultipleChoice):
            result["empty_choices"] = sum(
                not choice for q in self.documents.questions for choice in q.choices
            )
        return result


class StopStrings:
    """Whether a response has come to one of some strings, told each of its tokens in turn."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]):
        self.tokenizer, self.strings = tokenizer, strings
        self.reach = max(len(string.encode()) for string in strings)  # a token has at least a byte
        self.tails: dict[int, deque[int]] = {}
        # whether a string may be complete with this token: few are, so few are looked at
        self.may_end: dict[int, bool] = {}

    def __call__(self, index: int, token: int) -> bool:
        if index not in self.tails:
            self.tails[index] = deque(maxlen=self.reach)
        self.tails[index].append(token)
        if token not in self.may_end:
            text = self.tokenizer.decode_continuation([token])
            self.may_end[token] = any(
                last in text for last in ("\ufffd", *(string[-1] for string in self.strings))
            )
        if not self.may_end[token]:
            return False
        text = self.tokenizer.decode_continuation(self.tails[index])
        return any(string in text for string in self.strings)
