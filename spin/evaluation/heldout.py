"""Exact match and log-likelihood on a held-out file of one's own: prompts with right answers."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial

import torch

from spin.config import Data, Evaluate
from spin.data import digest, encode_prompts, load_examples, tokenize
from spin.evaluation.statistics import means
from spin.evaluation.task import CHARACTERS_PER_TOKEN, LoadedModel, Task
from spin.packing import Item, pack, packed_batches, planned, response_logps

SETTINGS = ("answer_pattern", "max_new_tokens", "temperature", "seed")  # that results depend on


def load_heldout(settings: Evaluate, data: Data, template: str) -> Task:
    """The held-out task. Raises FileNotFoundError, or ValueError for a bad file or pattern."""
    if not settings.heldout:
        raise FileNotFoundError("evaluate.heldout is not set: prompts with right answers, as data.path")
    _check_pattern(settings.answer_pattern)
    counts: Counter = Counter()
    examples = load_examples(settings.heldout, data, counts)[: settings.limit or None]
    record = {"documents": digest(examples), "number of documents": len(examples), "template": template}
    record |= {"lengths": [data.max_length, data.max_prompt_length]}
    record |= {key: getattr(settings, key) for key in SETTINGS}
    costs = [len(e.question) / CHARACTERS_PER_TOKEN + 8 * settings.max_new_tokens for e in examples]
    answer = partial(_answer, examples, costs, data, template)
    return Task("heldout", examples, record, costs, answer, partial(_summarise, counts.total()))


def _check_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(
            f"evaluate.answer_pattern = {pattern!r}: not a regular expression ({error})"
        ) from None
    if pattern and groups != 1:
        raise ValueError(f"evaluate.answer_pattern = {pattern!r} must have one group, not {groups}")


def _answer(
    examples, costs, data: Data, template: str, model: LoadedModel, docs: Sequence[int]
) -> Iterator[dict]:
    """Every prompt is answered greedily and by sampling, and the right answer is scored (logp, in nats)."""
    tokenizer, settings = model.tokenizer, model.settings
    examples = [examples[doc] for doc in docs]
    prompts = encode_prompts(examples, tokenizer, template, data, Counter())
    items = tokenize(examples, tokenizer, template, data, Counter())

    def generate(temperature: float) -> list[str]:
        texts = [""] * len(docs)
        sampling = {"temperature": temperature, "seed": settings.seed, "streams": docs}
        for response in model.generate(prompts, max_new_tokens=settings.max_new_tokens, **sampling):
            texts[response.index] = tokenizer.decode_continuation(response.ids)
            model.tick(costs[docs[response.index]] / 2)
        return texts

    greedy, sampled, logps = generate(0.0), generate(settings.temperature), _logps(model, items)
    for i, (doc, example) in enumerate(zip(docs, examples)):
        answers = (greedy[i], sampled[i], example.real)
        prediction, other, target = (extract(text, settings.answer_pattern) for text in answers)
        row = {"doc": doc, "prompt": example.question, "text": greedy[i], "sampled": sampled[i]}
        row |= {"prediction": prediction, "target": target, "exact_match": int(prediction == target)}
        row |= {"exact_match_sampled": int(other == target), "logp": logps[i]}
        prompt_cut = len(tokenizer.encode_prompt(example.prompt, template)) > len(prompts[i])
        answer_cut = items[i].responses[0][-1] != tokenizer.eos_id
        yield row | {"prompt_cut": prompt_cut, "answer_cut": answer_cut}


@torch.inference_mode()
def _logps(model: LoadedModel, items: list[Item]) -> list[float]:
    """log p(right answer | prompt) of each item."""
    logps = torch.zeros(len(items))
    plan = planned([range(len(items))], items, model.model.config, model.settings.token_budget)
    batches = packed_batches(plan, lambda places: pack([items[i] for i in places]), model.ranks.device)
    with closing(batches):
        for batch, packed in batches:
            logps[batch.items] = response_logps(model.model, packed, model.settings.logit_chunk).cpu()
    return logps.tolist()


def _summarise(dropped: int, rows: Sequence[dict]) -> dict:
    about = {"documents": len(rows), "few_shot": 0, "harness": "own", "dropped": dropped}
    cut = {f"{what}s_cut": sum(row[f"{what}_cut"] for row in rows) for what in ("prompt", "answer")}
    return means(rows) | about | cut


def extract(text: str, pattern: str) -> str | None:
    """The answer in a text: the group of the pattern's last match; the whole text if there is no pattern."""
    if not pattern:
        return text.strip()
    found = re.findall(pattern, text)
    return found[-1].strip() if found else None
