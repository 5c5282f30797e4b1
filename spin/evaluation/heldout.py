"""Exact match and log-likelihood on a held-out file of one's own: prompts with right answers."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from model.tokenizer import Tokenizer
from spin.config import Data, Evaluate
from spin.data import data_files, digest, encode_prompts, load_examples, real_only, tokenize
from spin.evaluation.engine import Engine
from spin.evaluation.statistics import mean_and_stderr
from spin.packing import flops, micro_batches, pack, response_logps

SLICE = 1024  # documents that are answered before their rows are given


class Heldout:
    """Every prompt is answered greedily and by sampling, and the right answer scored.

    A row has doc, prompt, text (greedy), sampled, prediction, target, exact_match, exact_match_sampled and
    logp (of the right answer, nats). Raises ValueError or OSError for a file that can't be read, or for a
    pattern that has not one group.
    """

    name = "heldout"

    def __init__(self, settings: Evaluate, data: Data, template: str):
        self.settings, self.data, self.template = settings, data, template
        self.dropped: Counter = Counter()
        pattern = settings.answer_pattern
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(
                f"evaluate.answer_pattern = {pattern!r} is not a regular expression ({error})"
            ) from None
        if pattern and groups != 1:
            raise ValueError(
                f"evaluate.answer_pattern = {pattern!r} must have one group, the answer; it has {groups}"
            )
        examples = real_only(load_examples(settings.heldout, data, self.dropped))
        self.examples = examples[: settings.limit or None]

    @staticmethod
    def missing(settings: Evaluate) -> str:
        """What is not there; empty if all is."""
        if not settings.heldout:
            return "evaluate.heldout is not set: prompts with right answers, a path like data.path"
        try:
            data_files(settings.heldout)
        except FileNotFoundError as error:
            return f"evaluate.heldout: {error}"
        return ""

    def __len__(self) -> int:
        return len(self.examples)

    def origin(self) -> dict:
        return {
            "documents": digest(self.examples),
            "number of documents": len(self),
            "template": self.template,
            "lengths": [self.data.max_length, self.data.max_prompt_length],
            **{
                key: getattr(self.settings, key)
                for key in ("answer_pattern", "max_new_tokens", "temperature", "seed")
            },
        }

    def check(self, tokenizer: Tokenizer, max_length: int) -> None:
        """Its lengths are the recipe's."""

    def cost(self, doc: int) -> float:
        return len(self.examples[doc].question) / 3.5 + 8 * self.settings.max_new_tokens

    def answers(self, engine: Engine, docs: Sequence[int]) -> Iterator[dict]:
        for start in range(0, len(docs), SLICE):
            yield from self._answers(engine, docs[start : start + SLICE])

    def _answers(self, engine: Engine, docs: Sequence[int]) -> Iterator[dict]:
        settings, template, examples = self.settings, self.template, [self.examples[doc] for doc in docs]
        prompts = encode_prompts(examples, engine.tokenizer, template, self.data, Counter())

        def texts(temperature: float) -> list[str]:
            result = [""] * len(docs)
            stream = engine.generate(
                prompts,
                max_new_tokens=settings.max_new_tokens,
                temperature=temperature,
                seed=settings.seed,
                streams=docs,
            )
            for response in stream:
                result[response.index] = engine.tokenizer.decode_continuation(response.ids)
                engine.tick(self.cost(docs[response.index]) / 2)
            return result

        greedy, sampled, logps, cut = texts(0.0), texts(settings.temperature), *self._logps(engine, examples)
        for place, doc in enumerate(docs):
            target = extract(examples[place].real, settings.answer_pattern)
            prediction = extract(greedy[place], settings.answer_pattern)
            yield {
                "doc": doc,
                "prompt": examples[place].question,
                "text": greedy[place],
                "sampled": sampled[place],
                "prediction": prediction,
                "target": target,
                "exact_match": int(prediction == target),
                "exact_match_sampled": int(extract(sampled[place], settings.answer_pattern) == target),
                "logp": logps[place],
                "prompt_cut": len(engine.tokenizer.encode_prompt(examples[place].prompt, template))
                > len(prompts[place]),
                "answer_cut": cut[place],
            }

    @torch.inference_mode()
    def _logps(self, engine: Engine, examples: Sequence) -> tuple[list[float], list[bool]]:
        """log p(right answer | prompt) of each example, in nats, and whether the answer was cut."""
        settings, eos = self.settings, engine.tokenizer.eos_id
        items = tokenize(examples, engine.tokenizer, self.template, self.data, Counter())
        lengths = [item.packed_length for item in items]
        (plan,) = micro_batches(
            lengths, [flops(engine.model.config, item) for item in items], 1, settings.token_budget
        )
        logps = torch.zeros(len(items))
        for places in plan:
            packed = pack([items[i] for i in places]).to(engine.ranks.device)
            logps[places] = response_logps(engine.model, packed, settings.logit_chunk).cpu()
        return logps.tolist(), [item.responses[0][-1] != eos for item in items]

    def summary(self, rows: Sequence[dict]) -> dict:
        """Also counts documents dropped, prompts cut for sampling and right answers cut for scoring."""
        result: dict = {}
        for name in ("exact_match", "exact_match_sampled", "logp"):
            result[name], result[f"{name}_stderr"] = mean_and_stderr([row[name] for row in rows])
        cut = {f"{what}s_cut": sum(row[f"{what}_cut"] for row in rows) for what in ("prompt", "answer")}
        return (
            result
            | {"documents": len(rows), "few_shot": 0, "harness": "own", "dropped": self.dropped.total()}
            | cut
        )


def extract(text: str, pattern: str) -> str | None:
    """The answer in a text: the last match's group, or the whole text where there is no pattern."""
    if not pattern:
        return text.strip()
    found = re.findall(pattern, text)
    return found[-1].strip() if found else None
