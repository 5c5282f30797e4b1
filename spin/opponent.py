"""The opponent's responses to the prompts, and its log-probs of the pairs."""

import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.mistral import Mistral
from model.sampler import fitting_slots, generate_stream
from model.tokenizer import Tokenizer
from model.weights import load_model
from spin.config import Config, Data
from spin.data import Example, digest, encode_prompts, load_generated
from spin.engine.distributed import Ranks, fsdp
from spin.engine.files import read_json, to_json, to_jsonl, whole_directory
from spin.engine.stages import Rows, check_claim, claim
from spin.packing import Item, pack, packed_batches, planned, response_logps

PAIRS_PER_SHARD = 5000
SAMPLES_SHOWN = 3
log = logging.getLogger("spin")


def generate_pairs(
    config: Config,
    iteration: int,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    record: dict,
    directory: Path,
    ranks: Ranks,
) -> None:
    """Answer every prompt with the opponent; write pairs to `directory` as JSONL shards with meta.json.

    Responses are saved as they finish (`Rows`), so a killed run resumes on any number of ranks. `record` says
    what they depend on. meta.json has counts, mean lengths and a digest of the pairs.
    """
    settings, folder = config.generate, directory.with_name(directory.name + ".rows")
    if ranks.from_first(directory.is_dir):
        ranks.from_first(lambda: shutil.rmtree(folder, ignore_errors=True))  # of a run killed between the two
        log.info("%s: finished, nothing to do", directory)
        return
    counts: Counter = Counter()
    prompts = encode_prompts(examples, tokenizer, settings.template, config.data, counts)
    rows = Rows(folder, record | _shapes(config, ranks), ranks)
    missing = sorted(set(range(len(prompts))) - rows.done, key=lambda i: (-len(prompts[i]), i))
    if settings.fixed_slots:  # a prompt's slot does not depend on its rank: equally many per slot for each
        mine = [i for i in missing if i // settings.slots % ranks.world_size == ranks.rank]
    else:  # by length, so that every rank has about as much to do
        mine = missing[ranks.rank :: ranks.world_size]
    began, tokens = time.perf_counter(), 0.0

    def answered() -> Iterator[dict]:
        nonlocal tokens
        with ranks.progress(len(prompts), "generate", "prompt", len(rows.done)) as bar:
            for row in _responses(config, iteration, prompts, mine, tokenizer, ranks):
                yield row
                tokens += row["tokens"]
                speed = tokens * ranks.world_size / (time.perf_counter() - began)  # as the first rank's
                bar.set_postfix({"tokens/s": f"{speed:.0f}"}, refresh=False)
                bar.update(min(ranks.world_size, len(prompts) - bar.n))

    rows.append(answered() if mine else ())
    (total,), seconds = ranks.sum([tokens]), time.perf_counter() - began
    log.info("generated %d responses: %d tokens, %.0f tokens/s", len(missing), total, total / seconds)
    lengths = [len(prompt) for prompt in prompts]
    ranks.from_first(lambda: _assemble(directory, examples, rows, lengths, counts, record))
    ranks.from_first(lambda: shutil.rmtree(folder))


def _responses(
    config: Config, n: int, prompts: list[list[int]], mine: list[int], tokenizer: Tokenizer, ranks: Ranks
) -> Iterator[dict]:
    """A row for each of the prompts `mine`, as they end."""
    settings, source = config.generate, config.model_dir(n - 1)
    model = load_model(source, getattr(torch, settings.dtype), ranks.device, config.model.attention)
    # The same on all ranks and after an interruption, since shapes affect rounding.
    slot_length = max(map(len, prompts)) + settings.max_new_tokens
    slots = settings.slots or fitting_slots(model, slot_length, ranks.free_memory())
    log.info("generate: up to %d sequences of %d tokens in a batch on each rank", slots, slot_length)
    responses = generate_stream(
        model,
        [prompts[i] for i in mine],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.seed * 1_000_003 + n,  # each iteration samples differently
        eos_id=tokenizer.eos_ids,
        streams=mine,
        slots=slots,
        slot_length=slot_length,
        fixed_slots=settings.fixed_slots,
        vocab_limit=tokenizer.vocab_size,
    )
    # With another template than in training, responses may start with a space that real ones lack; the
    # policy would learn that difference.
    strip = str.lstrip if settings.template != config.train.template else str
    for index, ids, _ in responses:
        text = strip(tokenizer.decode_continuation(ids))
        yield {
            "doc": mine[index],
            "response": text,
            "tokens": len(ids),
            "ended": ids[-1] in tokenizer.eos_ids,
        }


def _shapes(config: Config, ranks: Ranks) -> dict:
    """What rounding depends on with fixed slots: it must not change when generation resumes."""
    if not config.generate.fixed_slots:
        return {}
    on_gpu = ranks.device.type == "cuda"
    hardware = {"GPU": torch.cuda.get_device_name()} if on_gpu else {"threads": torch.get_num_threads()}
    return {"generate.slots": config.generate.slots} | hardware


def _assemble(
    directory: Path,
    examples: Sequence[Example],
    rows: Rows,
    lengths: list[int],
    counts: Counter,
    record: dict,
) -> None:
    """Write the shards in the order of the prompts, and log a summary."""
    responses = rows.complete(len(examples))
    pairs = [replace(example, generated=row["response"]) for example, row in zip(examples, responses)]
    meta = {
        "pairs": len(pairs),
        "mean tokens of prompts": sum(lengths) / len(pairs),
        "mean tokens of responses": sum(row["tokens"] for row in responses) / len(pairs),
        "prompts cut at the left": counts["prompts cut at the left"],
        "empty responses": sum(not row["response"] for row in responses),
        "responses cut at max_new_tokens": sum(not row["ended"] for row in responses),
        "digest": digest(pairs),
    }
    with whole_directory(directory) as new:
        claim(new, record)
        shards = [pairs[i : i + PAIRS_PER_SHARD] for i in range(0, len(pairs), PAIRS_PER_SHARD)]
        for i, shard in enumerate(shards):
            file = new / f"part-{i:05d}-of-{len(shards):05d}.jsonl"
            file.write_text(to_jsonl(pair.to_pair() for pair in shard), encoding="utf-8")
        (new / "meta.json").write_text(to_json(meta), encoding="utf-8")
    described = (f"{key} {value:.6g}" for key, value in meta.items() if key != "digest")
    log.info("%s: %s", directory, ", ".join(described))
    for pair in pairs[:SAMPLES_SHOWN]:
        texts = (pair.question, pair.real, pair.generated)
        log.info("  prompt: %.300s\n  real: %.300s\n  generated: %.300s\n", *texts)


def read_pairs(directory: Path, record: dict, data: Data) -> list[Example]:
    """The pairs that `generate_pairs` left. Raises ValueError if they have another record or were edited."""
    if not check_claim(directory, record):
        raise FileNotFoundError(f"{directory}: no pairs; run that iteration first, or set train.replay = 0")
    pairs = load_generated(directory, data)
    if digest(pairs) != read_json(directory / "meta.json").get("digest"):
        raise ValueError(
            f"{directory}: the pairs were edited; remove it to generate again, or train on pairs of your own "
            "with data.pairs"
        )
    return pairs


def score(model: Mistral, items: Sequence[Item], token_budget: int, logit_chunk: int, ranks: Ranks) -> Tensor:
    """log p of every response of every item (N, C), fp32, on every rank; all items have C responses.

    `model` is sharded like the policy, so that both compute the same. Ranks share the items by cost.
    """
    result = torch.zeros(len(items), len(items[0].responses))
    size = 64 * ranks.world_size
    groups = [range(start, min(start + size, len(items))) for start in range(0, len(items), size)]
    plan = planned(groups, items, model.config, token_budget, ranks.rank, ranks.world_size)
    batches = packed_batches(plan, lambda chosen: pack([items[i] for i in chosen]), ranks.device)
    bar = ranks.progress(len(items), "score", "pair")
    with torch.no_grad(), bar, closing(batches):
        for batch, packed in batches:
            logps = response_logps(model, packed, logit_chunk).cpu()
            if batch.items:
                result[batch.items] = logps.view(len(batch.items), -1)
            bar.update(len(batch.step) if batch.last else 0)
    fsdp(model).reshard()  # FSDP leaves the root's parameters gathered; an optimizer must see shards
    return ranks.sum_tensor(result)
