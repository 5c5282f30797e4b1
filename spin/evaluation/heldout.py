"""Exact match and log-likelihood on a held-out file of one's own: prompts with right answers."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

from spin.config import Data, Evaluate
from spin.data import Example, digest, encode_prompts, load_examples, tokenize
from spin.evaluation.scoring import Request, loglikelihoods
from spin.evaluation.statistics import means
from spin.evaluation.task import LoadedModel, Task

SETTINGS = ("answer_pattern", "max_new_tokens", "temperature", "seed")  # that results depend on


def load_heldout(settings: Evaluate, data: Data, template: str) -> Task:
    """The held-out task. Raises FileNotFoundError, or ValueError for a bad file or pattern."""
    if not settings.heldout:
        raise FileNotFoundError("evaluate.heldout is not set: prompts with right answers, as data.path")
    _check_pattern(settings.answer_pattern)
    counts: Counter = Counter()
    examples = load_examples(settings.heldout, data, counts)[: settings.limit or None]
    dropped = sum(count for what, count in counts.items() if "dropped" in what)
    record = {"documents": digest(examples), "number of documents": len(examples), "template": template}
    record |= {"lengths": [data.max_length, data.max_prompt_length]}
    record |= {key: getattr(settings, key) for key in SETTINGS}
    answer = partial(_answer, examples, data, template)
    return Task("heldout", examples, record, answer, partial(_summarise, dropped))


def _check_pattern(pattern: str) -> None:
    """Raise ValueError unless the pattern is empty or has one group."""
    try:
        groups = re.compile(pattern).groups if pattern else 1
    except re.error as error:
        raise ValueError(f"evaluate.answer_pattern = {pattern!r}: {error}") from None
    if groups != 1:
        raise ValueError(f"evaluate.answer_pattern = {pattern!r} must have one group, not {groups}")


def _answer(
    examples: Sequence[Example], data: Data, template: str, model: LoadedModel, docs: Sequence[int]
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
        return texts

    greedy, sampled = generate(0.0), generate(settings.temperature)
    answers = [item.responses[0] for item in items]
    requests = [[Request(item.prompt + answer, len(answer))] for item, answer in zip(items, answers)]
    logps = dict(loglikelihoods(model.model, requests, settings.token_budget, settings.logit_chunk))
    for i, (doc, example) in enumerate(zip(docs, examples)):
        texts = (greedy[i], sampled[i], example.real)
        prediction, other, target = (extract(text, settings.answer_pattern) for text in texts)
        row = {"doc": doc, "prompt": example.question, "text": greedy[i], "sampled": sampled[i]}
        row |= {"prediction": prediction, "target": target, "exact_match": int(prediction == target)}
        row |= {"exact_match_sampled": int(other == target), "logp": logps[i][0]}
        prompt_cut = len(tokenizer.encode_prompt(example.prompt, template)) > len(prompts[i])
        answer_cut = answers[i][-1] != tokenizer.eos_id
        yield row | {"prompt_cut": prompt_cut, "answer_cut": answer_cut}


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
