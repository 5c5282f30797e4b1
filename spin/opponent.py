"""The opponent's two jobs: its responses to the prompts, and the log-probabilities it gives to a pair."""

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from model.mistral import Mistral
from model.sampler import fitting_slots, generate_stream
from model.tokenizer import Tokenizer
from model.weights import load_model
from spin.config import Config, Data, Generate
from spin.data import Example, digest, encode_prompts, load_generated
from spin.engine.distributed import Ranks, fsdp
from spin.engine.files import commit, cut_unfinished_line, read_json, to_json, write_whole
from spin.packing import Item, flops, micro_batches, pack, prefetched, response_logps

PAIRS_PER_SHARD = 5000
SAMPLES_SHOWN = 3
log = logging.getLogger("spin")


def generate_pairs(
    config: Config, iteration: int, examples: Sequence[Example], opponent: str, directory: Path, ranks: Ranks
) -> None:
    """Answer every prompt with the opponent and leave `directory` with pairs as JSONL shards and meta.json.

    Responses are written as they come to `directory`.partial, a file for each rank, so that a killed run goes
    on at the prompts that have none, on any number of ranks; the shards are made of them once all are there.
    meta.json has counts, mean lengths, the settings, `opponent` (its fingerprint) and a digest of the pairs.
    Logs a summary.
    """
    settings, source = config.generate, config.model_dir(iteration - 1)
    partial = directory.with_name(directory.name + ".partial")
    tokenizer = Tokenizer(source)
    counts: Counter = Counter()
    prompts = encode_prompts(examples, tokenizer, settings.template, config.data, counts)

    def repair() -> set[int]:
        partial.mkdir(parents=True, exist_ok=True)
        if settings.fixed_slots:
            on_cpu = ranks.device.type == "cpu"
            here = (
                {"threads": torch.get_num_threads()}
                if on_cpu
                else {"GPU": torch.cuda.get_device_name(ranks.device)}
            )
            _same_shapes(partial, {"generate.slots": settings.slots} | here)
        for file in partial.glob("rank*.jsonl"):
            cut_unfinished_line(file)
        return {row["prompt"] for row in _rows(partial)}

    done = ranks.from_first(repair)
    missing = sorted((i for i in range(len(prompts)) if i not in done), key=lambda i: -len(prompts[i]))
    if (
        settings.fixed_slots
    ):  # a prompt has one slot, on any rank: deal so that a rank's slots have equally many
        mine = [i for i in missing if i // settings.slots % ranks.world_size == ranks.rank]
    else:  # by length: every rank has about as much to do
        mine = missing[ranks.rank :: ranks.world_size]
    model = load_model(source, getattr(torch, settings.dtype), ranks.device, config.model.attention)
    # The same for all ranks and after an interruption: shapes move roundings.
    slot_length = max(map(len, prompts)) + settings.max_new_tokens
    slots = settings.slots or fitting_slots(model, slot_length, ranks.free_memory())
    log.info("generate: up to %d sequences of %d tokens side by side on each rank", slots, slot_length)
    responses = generate_stream(
        model,
        [prompts[i] for i in mine],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=_mixed_seed(settings.seed, iteration),
        eos_id=tokenizer.eos_id,
        streams=mine,
        slots=slots,
        slot_length=slot_length,
        fixed_slots=settings.fixed_slots,
        vocab_limit=tokenizer.vocab_size,
    )
    # Asked under another template than it trains with, an opponent may begin with a blank that no real
    # response has, and the policy would learn to see that.
    strip = str.lstrip if settings.template != config.train.template else str
    bar = ranks.progress(len(prompts), "generate", "prompt", len(done))
    tokens, began = 0, time.perf_counter()
    with open(partial / f"rank{ranks.rank}.jsonl", "a", encoding="utf-8", buffering=1) as file:
        for response in responses:
            row = {
                "prompt": mine[response.index],
                "response": strip(tokenizer.decode_continuation(response.ids)),
                "tokens": len(response.ids),
                "ended": response.ids[-1] == tokenizer.eos_id,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            tokens += len(response.ids)
            # the first rank's pace stands for all
            speed = tokens * ranks.world_size / (time.perf_counter() - began)
            bar.set_postfix({"tokens/s": f"{speed:.0f}"}, refresh=False)
            bar.update(min(ranks.world_size, len(prompts) - bar.n))
    bar.close()
    busy = time.perf_counter() - began
    slowest, (total, work) = max(ranks.gather(busy)), ranks.sum([tokens, busy])
    idle = 1 - work / (slowest * ranks.world_size)
    waiting = f"; on average a rank waited {idle:.1%} of that for the slowest" if ranks.world_size > 1 else ""
    log.info(
        "generated %d responses now: %d tokens in %.1f s, %.0f tokens/s%s",
        len(missing),
        total,
        slowest,
        total / slowest,
        waiting,
    )
    about = {"opponent": opponent, "settings": generation_settings(config)}
    lengths = [len(prompt) for prompt in prompts]
    ranks.from_first(lambda: _assemble(partial, directory, examples, lengths, counts, about))


def _assemble(
    partial: Path,
    directory: Path,
    examples: Sequence[Example],
    lengths: Sequence[int],
    counts: Counter,
    about: dict,
) -> None:
    """Check that every prompt has its response, write the shards in the order of the prompts, and log a
    summary.
    """
    # a survivor of a killed job may write twice
    by_prompt = {row["prompt"]: row for row in reversed(_rows(partial))}
    if sorted(by_prompt) != list(range(len(examples))):
        raise ValueError(
            f"{partial}: lacks {len(examples) - len(by_prompt)} prompts; run the same command again"
        )
    rows = [by_prompt[i] for i in range(len(examples))]
    pairs = [replace(example, generated=row["response"]) for example, row in zip(examples, rows)]
    meta = {
        "pairs": len(rows),
        "mean_prompt_tokens": sum(lengths) / len(rows),
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
        "prompts cut at the left": counts["prompts cut at the left"],
        "empty responses": sum(not row["response"] for row in rows),
        "responses cut at max_new_tokens": sum(not row["ended"] for row in rows),
        **about,
        "digest": digest(pairs),
    }
    shards = [pairs[i : i + PAIRS_PER_SHARD] for i in range(0, len(pairs), PAIRS_PER_SHARD)]
    final = directory.with_name(directory.name + ".final")
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    for i, shard in enumerate(shards):
        lines = "".join(json.dumps(pair.to_pair(), ensure_ascii=False) + "\n" for pair in shard)
        (final / f"part-{i:05d}-of-{len(shards):05d}.jsonl").write_text(lines, encoding="utf-8")
    (final / "meta.json").write_text(to_json(meta))
    commit(final, directory)
    shutil.rmtree(partial)
    log.info("%s: %s", directory, summary(meta))
    for pair in pairs[:SAMPLES_SHOWN]:
        log.info(
            "  prompt: %.300s\n  real: %.300s\n  generated: %.300s\n",
            pair.question,
            pair.real,
            pair.generated,
        )


def verified_pairs(
    directory: Path, data: Data, examples: Sequence[Example] | None = None, about: dict | None = None
) -> list[Example]:
    """The pairs in `directory`: as many as meta.json says, unchanged since, and one for each of `examples` in
    turn.

    `about` has what meta.json must say of the opponent and the settings. Raises ValueError, naming what is
    not so.
    """
    remedy = f"remove {directory} to generate anew, or train on pairs of your own with data.pairs"
    meta_file = directory / "meta.json"
    if not meta_file.is_file():
        raise ValueError(f"{meta_file}: missing, so nothing says how these pairs were made; {remedy}")
    try:
        meta, pairs = read_json(meta_file), load_generated(directory, data)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    for key, wanted in (about or {}).items():
        if key not in meta:
            raise ValueError(f"{meta_file}: does not say which {key} (an older version's?); {remedy}")
        if meta[key] != wanted:
            raise ValueError(
                f"{meta_file}: made with another {key} ({meta[key]}) than this run's ({wanted}); {remedy}"
            )
    for pair, example in zip(pairs, examples or ()):
        if (pair.prompt, pair.real) != (example.prompt, example.real):
            raise ValueError(f"{pair.where}: not the prompt and the response of {example.where}; {remedy}")
    expected = meta.get("pairs") if examples is None else len(examples)
    if len(pairs) != expected:
        raise ValueError(f"{directory}: {len(pairs)} pairs for {expected} prompts; {remedy}")
    if digest(pairs) != meta.get("digest"):
        raise ValueError(f"{directory}: changed since it was made; {remedy}")
    return pairs


def generation_settings(config: Config) -> dict:
    """The settings that generated text depends on."""
    return {f.name: getattr(config.generate, f.name) for f in fields(Generate) if not f.metadata.get("free")}


def summary(meta: dict) -> str:
    """meta.json in a line."""
    return (
        f"{meta['pairs']} pairs, on average {meta['mean_prompt_tokens']:.0f} tokens of prompt and "
        f"{meta['mean_tokens']:.0f} of response; {meta['empty responses']} responses empty, "
        f"{meta['responses cut at max_new_tokens']} cut at max_new_tokens, "
        f"{meta['prompts cut at the left']} prompts cut at the left"
    )


def _same_shapes(partial: Path, now: dict) -> None:
    """Record at the first start what the roundings of fixed slots depend on; refuse to go on under something
    else.
    """
    file = partial / "shapes.json"
    if not file.is_file():
        write_whole(file, to_json(now))
    for name, begun in read_json(file).items():
        if name in now and now[name] != begun:
            hint = (
                "set OMP_NUM_THREADS, which torchrun sets to 1 where it is not set"
                if name == "threads"
                else "put it back"
            )
            raise ValueError(
                f"{partial}: with fixed slots, begun with {name} = {begun}, now {now[name]}; {hint}"
            )


def _rows(partial: Path) -> list[dict]:
    """The responses that are there. Raises ValueError with file and line for one that can't be read."""
    rows = []
    for file in sorted(partial.glob("rank*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{file}:{number}: not JSON ({error}); delete the line to have it answered anew"
                ) from None
    return rows


def _mixed_seed(seed: int, iteration: int) -> int:
    """A seed of its own for each iteration, or a prompt would meet the same random numbers every time."""
    return seed * 1_000_003 + iteration


def score(model: Mistral, items: Sequence[Item], token_budget: int, logit_chunk: int, ranks: Ranks) -> Tensor:
    """log p of every response of every item (N, C), fp32, on every rank; all items have the same number of
    responses.

    `model` is sharded like the policy, so that the two compute alike; ranks share the items by cost.
    """
    result = torch.zeros(len(items), len(items[0].responses))
    group = 64 * ranks.world_size

    def packs():
        """Places in `items` of each of this rank's micro-batches, and its stream."""
        for start in range(0, len(items), group):
            part = items[start : start + group]
            lengths, costs = (
                [item.packed_length for item in part],
                [flops(model.config, item) for item in part],
            )
            for chosen in micro_batches(lengths, costs, ranks.world_size, token_budget)[ranks.rank]:
                places = [start + i for i in chosen]
                yield places, pack([items[i] for i in places]).to(ranks.device)

    with (
        torch.no_grad(),
        ranks.progress(len(items), "score", "pair") as bar,
        closing(prefetched(packs())) as coming,
    ):
        for places, packed in coming:
            logps = response_logps(model, packed, logit_chunk).cpu()
            if places:
                result[places] = logps.view(len(places), -1)
            bar.update(min(len(places) * ranks.world_size, len(items) - bar.n))
        bar.update(len(items) - bar.n)
    # FSDP leaves the root's parameters gathered after a forward pass; an optimizer must see shards
    fsdp(model).reshard()
    return ranks.sum_tensor(result)
