"""The opponent's responses to the prompts."""

import logging
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from model.sampler import fitting_slots, generate_stream
from model.tokenizer import Tokenizer
from model.weights import load_model
from spin.config import Config
from spin.data import Example, digest, encode_prompts, load_generated
from spin.engine.distributed import Ranks
from spin.engine.files import read_json, to_json, to_jsonl, whole_directory
from spin.engine.recipe import flat
from spin.engine.stages import RECORD, Rows, check_claim, claim, reuse

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
    before: Sequence[Example] = (),
) -> None:
    """Answer every prompt with the opponent; write pairs to `directory` as JSONL shards with meta.json.

    Responses are saved as they finish (`Rows`), so a killed run resumes on any number of ranks. `record` says
    what they depend on; responses of run.fork with the same record are taken over. `before`, the same
    examples with the previous opponent's responses, gives those that generate.share leaves out. meta.json has
    counts, mean lengths and a digest of the pairs.
    """
    settings, folder = config.generate, directory.with_name(directory.name + ".rows")
    if config.run.fork:
        other = Path(config.run.fork, directory.parent.name, directory.name)
        ranks.from_first(lambda: reuse(other, directory, record))
    if ranks.from_first(directory.is_dir):
        ranks.from_first(lambda: shutil.rmtree(folder, ignore_errors=True))  # of a run killed between the two
        log.info("%s: finished, nothing to do", directory)
        return
    counts: Counter = Counter()
    encoded = encode_prompts(examples, tokenizer, settings.template, config.data, counts)
    prompts = [prompt for prompt in encoded for _ in range(settings.samples)]
    rows = Rows(folder, record | _shapes(config, ranks), ranks)
    taken = _taken(config, iteration, examples, before) - rows.done
    old = [text for example in before for text in example.generated]
    # No response that was just made has 0 tokens.
    rows.append({"doc": i, "response": old[i], "tokens": 0, "ended": True} for i in taken if ranks.first)
    rows.done |= taken
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
    lengths = [len(prompt) for prompt in encoded]
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
        ended = ids[-1] in tokenizer.eos_ids
        yield {"doc": mine[index], "response": text, "tokens": len(ids), "ended": ended}


def _taken(config: Config, n: int, examples: Sequence[Example], before: Sequence[Example]) -> set[int]:
    """The responses to take from `before`: all but the next generate.share of a seeded order of prompts."""
    settings, count = config.generate, len(before)
    same = [(e.prompt, e.real, settings.samples) for e in examples]
    if before and [(e.prompt, e.real, len(e.generated)) for e in before] != same:
        raise ValueError("generate.share < 1 needs the prompts and generate.samples of the iteration before")
    size = math.ceil(settings.share * count - 1e-9)
    order = random.Random(settings.seed).sample(range(count), count)
    fresh = {order[((n - 1) * size + i) % count] for i in range(size)}
    return {i for i in range(count * settings.samples) if i // settings.samples not in fresh}


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
    samples = record["generate.samples"]
    responses = rows.complete(samples * len(examples))
    texts = [row["response"] for row in responses]
    groups = [tuple(texts[i : i + samples]) for i in range(0, len(texts), samples)]
    pairs = [replace(example, generated=group) for example, group in zip(examples, groups)]
    fresh = sum(row["tokens"] > 0 for row in responses)
    meta = {
        "pairs": len(responses),
        "mean tokens of prompts": sum(lengths) / len(lengths),
        "mean tokens of responses": sum(row["tokens"] for row in responses) / max(1, fresh),
        "prompts cut at the left": counts["prompts cut at the left"],
        "empty responses": sum(not row["response"] for row in responses),
        "responses cut at max_new_tokens": sum(not row["ended"] for row in responses),
        "digest": digest(pairs),
    }
    if fresh < len(responses):
        meta["kept from the iteration before"] = len(responses) - fresh
    with whole_directory(directory) as new:
        claim(new, record)
        shards = [pairs[i : i + PAIRS_PER_SHARD] for i in range(0, len(pairs), PAIRS_PER_SHARD)]
        for i, shard in enumerate(shards):
            file = new / f"part-{i:05d}-of-{len(shards):05d}.jsonl"
            lines = to_jsonl(row for pair in shard for row in pair.to_pairs())
            file.write_text(lines, encoding="utf-8")
        (new / "meta.json").write_text(to_json(meta), encoding="utf-8")
    described = (f"{key} {value:.6g}" for key, value in meta.items() if key != "digest")
    log.info("%s: %s", directory, ", ".join(described))
    for pair in pairs[:SAMPLES_SHOWN]:
        shown = (pair.question, pair.real, pair.generated[0])
        log.info("  prompt: %.300s\n  real: %.300s\n  generated: %.300s\n", *shown)


def read_pairs(directory: Path, record: dict) -> list[Example]:
    """The pairs that `generate_pairs` left. Raises ValueError if they have another record or were edited."""
    if not check_claim(directory, record, flat(Config())):
        raise FileNotFoundError(
            f"{directory}: no pairs; generate them first, or do without: train.replay = 0, generate.share = 1"
        )
    pairs = load_generated(directory, read_json(directory / RECORD).get("generate.samples", 1))
    if digest(pairs) != read_json(directory / "meta.json").get("digest"):
        raise ValueError(
            f"{directory}: the pairs were edited; remove it to generate again, or train on pairs of your own "
            "with data.pairs"
        )
    return pairs
