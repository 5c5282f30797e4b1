"""Exact match and log-likelihood on a held-out file of one's own: prompts with right answers."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from model.mistral import Mistral
from model.sampler import generate_stream
from model.tokenizer import Tokenizer
from model.weights import fingerprint, load_model
from spin.config import Config
from spin.data import Example, digest, encode_prompts, load_examples, real_only, tokenize
from spin.distributed import Ranks
from spin.files import read_json, to_json, whole_directory
from spin.logps import response_logps
from spin.packing import flops, micro_batches, pack


def load_heldout(config: Config, counts: Counter) -> list[Example]:
    """The documents; dropped ones are counted.

    Raises ValueError or OSError for a file that can't be read, or for a pattern that has not one group.
    """
    pattern = config.evaluate.answer_pattern
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"evaluate.answer_pattern = {pattern!r} is not a regular expression ({error})") from None
    if pattern and groups != 1:
        raise ValueError(f"evaluate.answer_pattern = {pattern!r} must have one group, the answer; it has {groups}")
    examples = real_only(load_examples(config.evaluate.heldout, config.data, counts))
    return examples[: config.evaluate.limit or None]


def evaluate_heldout(config: Config, model_dir: Path, directory: Path, ranks: Ranks) -> dict:
    """Answer every document greedily and by sampling, score the right answer, and leave `directory`.

    heldout.jsonl has one object per document: doc, text (greedy), sampled, prediction, target, exact_match,
    exact_match_sampled, logp (of the right answer, nats). summary.json has means and standard errors, and how many
    documents were dropped, prompts cut for sampling and right answers cut for scoring. A finished evaluation of the
    same model under the same settings is kept; of another one, refused. Returns the summary.
    """
    settings, dropped, counts = config.evaluate, Counter(), Counter()
    examples = load_heldout(config, dropped)
    keys = ("limit", "answer_pattern", "max_new_tokens", "temperature", "seed", "dtype")
    origin = {
        "model": ranks.from_first(lambda: fingerprint(model_dir)),
        "documents": digest(examples),
        "template": config.train.template,
        "lengths": [config.data.max_length, config.data.max_prompt_length],
        **{key: getattr(settings, key) for key in keys},
    }
    summary_file = directory / "summary.json"
    if ranks.from_first(summary_file.is_file):
        summary = read_json(summary_file)
        changed = [key for key in origin if summary["origin"].get(key) != origin[key]]
        if changed:
            raise ValueError(f"{directory}: made with another {', '.join(changed)}; remove it to evaluate again")
        return summary
    if ranks.from_first(directory.exists):
        raise ValueError(f"{directory}: exists and is no evaluation; choose another directory, or remove it")

    tokenizer = Tokenizer(model_dir)
    mine = range(len(examples))[ranks.rank :: ranks.world_size]
    model = load_model(model_dir, getattr(torch, settings.dtype), ranks.device, config.model.attention)
    prompts = encode_prompts([examples[i] for i in mine], tokenizer, config.train.template, config.data, counts)
    bar = ranks.progress(2 * len(mine), f"evaluate {directory.parent.name}", "answer")

    def answers(temperature: float) -> list[str]:
        texts = [""] * len(mine)
        stream = generate_stream(
            model,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=temperature,
            seed=settings.seed,
            eos_id=tokenizer.eos_id,
            streams=mine,
            slots=settings.slots,
            memory=ranks.free_memory(),
            vocab_limit=tokenizer.vocab_size,
        )
        for response in stream:
            texts[response.index] = tokenizer.decode_continuation(response.ids)
            bar.update()
        return texts

    greedy, sampled = answers(0.0), answers(settings.temperature)
    bar.close()
    scored: Counter = Counter()
    logps = answer_logps(config, model, tokenizer, [examples[i] for i in mine], scored)
    rows = []
    for place, i in enumerate(mine):
        target = extract(examples[i].real, settings.answer_pattern)
        prediction = extract(greedy[place], settings.answer_pattern)
        rows.append(
            {
                "doc": i,
                "prompt": examples[i].question,
                "text": greedy[place],
                "sampled": sampled[place],
                "prediction": prediction,
                "target": target,
                "exact_match": int(prediction == target),
                "exact_match_sampled": int(extract(sampled[place], settings.answer_pattern) == target),
                "logp": logps[place],
            }
        )
    rows = sorted((row for part in ranks.gather(rows) for row in part), key=lambda row: row["doc"])
    metrics: dict[str, float] = {}
    for name in ("exact_match", "exact_match_sampled", "logp"):
        metrics[name], metrics[f"{name}_stderr"] = mean_and_stderr([row[name] for row in rows])
    prompts_cut, answers_cut = ranks.sum([counts["prompts cut at the left"], scored["responses cut"]])
    cut = {"dropped": dropped.total(), "prompts_cut": int(prompts_cut), "answers_cut": int(answers_cut)}
    task = {**metrics, "documents": len(rows), "few_shot": 0, "harness": "own", **cut}
    summary = {"origin": origin, "tasks": {"heldout": task}}
    if ranks.first:
        with whole_directory(directory) as partial:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (partial / "heldout.jsonl").write_text(lines, encoding="utf-8")
            (partial / "summary.json").write_text(to_json(summary))
    ranks.barrier()
    return summary


@torch.inference_mode()
def answer_logps(
    config: Config, model: Mistral, tokenizer: Tokenizer, examples: Sequence[Example], counts: Counter
) -> list[float]:
    """log p(right answer | prompt) of each example, in nats, on one replica."""
    items = tokenize(examples, tokenizer, config.train.template, config.data, counts)
    lengths = [item.packed_length for item in items]
    (plan,) = micro_batches(lengths, [flops(model.config, item) for item in items], 1, config.train.token_budget)
    logps = torch.zeros(len(items))
    for places in plan:
        packed = pack([items[i] for i in places]).to(next(model.parameters()).device)
        logps[places] = response_logps(model, packed, config.train.logit_chunk).cpu()
    return logps.tolist()


def extract(text: str, pattern: str) -> str | None:
    """The answer in a text: the last match's group, or the whole text where there is no pattern."""
    if not pattern:
        return text.strip()
    found = re.findall(pattern, text)
    return found[-1].strip() if found else None


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the standard error from the sample's standard deviation (n - 1), as lm-evaluation-harness has it."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, float("nan")
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
