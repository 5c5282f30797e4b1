"""The opponent's two jobs: its responses to the prompts, and the log-probabilities it gives to a pair."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.mistral import Mistral
from model.sampler import generate_stream
from model.tokenizer import Tokenizer
from model.weights import load_model
from spin.config import Config
from spin.data import Example, encode_prompts
from spin.distributed import Ranks
from spin.files import commit, cut_unfinished_line, to_json
from spin.logps import response_logps
from spin.packing import Item, cost, micro_batches, pack

PAIRS_PER_SHARD = 5000


def generate_pairs(config: Config, iteration: int, examples: Sequence[Example], directory: Path, ranks: Ranks) -> dict:
    """Answer every prompt with the opponent and leave `directory` with pairs as JSONL shards and meta.json.

    Responses are written as they come to `directory`.partial, a file for each rank, so that a killed run goes on at
    the prompts that have none, on any number of ranks; the shards are made of them once all are there. Returns the
    summary that is in meta.json.
    """
    settings, source = config.generate, config.model_dir(iteration - 1)
    partial = directory.with_name(directory.name + ".partial")
    tokenizer = Tokenizer(source)
    counts: Counter = Counter()
    prompts = encode_prompts(examples, tokenizer, settings.template, config.data, counts)

    def repair() -> set[int]:
        partial.mkdir(parents=True, exist_ok=True)
        for file in partial.glob("rank*.jsonl"):
            cut_unfinished_line(file)
        return {row["prompt"] for row in _rows(partial)}

    done = ranks.from_first(repair)
    missing = sorted((i for i in range(len(prompts)) if i not in done), key=lambda i: -len(prompts[i]))
    mine = missing[ranks.rank :: ranks.world_size]  # dealt by length: every rank has about as much to do
    model = load_model(source, getattr(torch, settings.dtype), ranks.device, config.model.attention)
    responses = generate_stream(
        model,
        [prompts[i] for i in mine],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=_mixed_seed(settings.seed, iteration),
        eos_id=tokenizer.eos_id,
        streams=mine,
        slots=settings.slots,
        vocab_limit=tokenizer.vocab_size,
    )
    # Asked under another template than it trains with, an opponent may begin with a blank that no real response has,
    # and the policy would learn to see that.
    strip = str.lstrip if settings.template != config.train.template else str
    bar = ranks.progress(len(prompts), "generate", "prompt", len(done))
    tokens, began = 0, time.perf_counter()
    with open(partial / f"rank{ranks.rank}.jsonl", "a", encoding="utf-8", buffering=1) as file:
        for place, ids in responses:
            row = {
                "prompt": mine[place],
                "response": strip(tokenizer.decode_continuation(ids)),
                "tokens": len(ids),
                "ended": ids[-1] == tokenizer.eos_id,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            tokens += len(ids)
            speed = tokens * ranks.world_size / (time.perf_counter() - began)  # the first rank's pace stands for all
            bar.set_postfix({"tokens/s": f"{speed:.0f}"}, refresh=False)
            bar.update(min(ranks.world_size, len(prompts) - bar.n))
    bar.close()
    ranks.barrier()
    return ranks.from_first(lambda: _assemble(partial, directory, examples, counts))


def _assemble(partial: Path, directory: Path, examples: Sequence[Example], counts: Counter) -> dict:
    """Check that every prompt has its response, and write the shards in the order of the prompts."""
    by_prompt = {row["prompt"]: row for row in reversed(_rows(partial))}  # a survivor of a killed job may write twice
    if sorted(by_prompt) != list(range(len(examples))):
        raise ValueError(f"{partial}: lacks {len(examples) - len(by_prompt)} prompts; run the same command again")
    rows = [by_prompt[i] for i in range(len(examples))]
    counts["empty responses"] = sum(not row["response"] for row in rows)
    counts["responses cut at max_new_tokens"] = sum(not row["ended"] for row in rows)
    meta = {"pairs": len(rows), "mean_tokens": sum(row["tokens"] for row in rows) / len(rows), **counts}
    pairs = [
        Example(example.prompt, example.real, row["response"]).to_pair() for example, row in zip(examples, rows)
    ]
    shards = [pairs[i : i + PAIRS_PER_SHARD] for i in range(0, len(pairs), PAIRS_PER_SHARD)]
    final = directory.with_name(directory.name + ".final")
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    for i, shard in enumerate(shards):
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in shard)
        (final / f"part-{i:05d}-of-{len(shards):05d}.jsonl").write_text(lines, encoding="utf-8")
    (final / "meta.json").write_text(to_json(meta))
    commit(final, directory)
    shutil.rmtree(partial)
    return meta


def _rows(partial: Path) -> list[dict]:
    lines = (line for file in sorted(partial.glob("rank*.jsonl")) for line in open(file, encoding="utf-8"))
    return [json.loads(line) for line in lines]


def _mixed_seed(seed: int, iteration: int) -> int:
    """A seed of its own for each iteration, or a prompt would meet the same random numbers every time."""
    return seed * 1_000_003 + iteration


def score(
    model: Mistral, items: Sequence[Item], token_budget: int, logit_chunk: int, ranks: Ranks
) -> Tensor:
    """log p of every response of every item (N, C), fp32, on every rank; all items have the same number of responses.

    `model` is sharded like the policy, so that the two compute alike; ranks share the items by cost.
    """
    result = torch.zeros(len(items), len(items[0].responses))
    group = 64 * ranks.world_size
    bar = ranks.progress(len(items), "score", "pair")
    with torch.no_grad():
        for start in range(0, len(items), group):
            part = items[start : start + group]
            plan = micro_batches(
                [item.packed_length for item in part], [cost(item) for item in part], ranks.world_size, token_budget
            )
            for places in plan[ranks.rank]:
                packed = pack([part[i] for i in places]).to(ranks.device)
                logps = response_logps(model, packed, logit_chunk).cpu()
                if places:
                    result[[start + i for i in places]] = logps.view(len(places), -1)
            bar.update(len(part))
    bar.close()
    model.reshard()  # FSDP leaves the root's parameters gathered after a forward pass; an optimizer must see shards
    return ranks.sum_tensor(result)
