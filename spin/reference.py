"""The log-probs that a loss compares the policy's with: of the opponent, of the base model, or a mixture."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model.mistral import Mistral
from spin.config import Train
from spin.engine.batches import item_batches
from spin.engine.distributed import Ranks, fsdp
from spin.engine.files import write_whole
from spin.engine.metrics import timed
from spin.engine.prepare import Prepared
from spin.engine.stages import check_record, reuse_logps
from spin.packing import Item, response_logps


def logps_of(
    name: str,
    inputs: dict,
    load: Callable[[], Mistral],
    prepared: Prepared,
    items: Sequence[Item],
    ranks: Ranks,
) -> Tensor:
    """log p of every response (N, C) by a model, the "opponent" or the "base", computed once and saved.

    Log-probs that run.fork has of the same model and tokens are taken over.
    """
    part, file = prepared.config.train, prepared.directory / f"{name}_logps.safetensors"
    tokens = json.dumps([[item.prompt, *item.responses] for item in items])
    record = {
        "pairs": hashlib.sha256(tokens.encode()).hexdigest(),
        "model": inputs[name],
        "dtype": part.dtype,
    }
    if prepared.config.run.fork:
        other = Path(prepared.config.run.fork, prepared.directory.name, file.name)
        ranks.from_first(lambda: reuse_logps(other, file, record))
    if not ranks.from_first(file.is_file):
        with timed(prepared.directory, "score", ranks.first):
            result = score(load(), items, part.token_budget, part.logit_chunk, ranks)
        if not result.isfinite().all():
            raise ValueError(f"{name}: log-probs are not finite; are the weights damaged?")
        if ranks.first:
            write_whole(file, save({"logps": result}, metadata={"record": json.dumps(record)}))
        ranks.barrier()
    try:
        with safe_open(file, framework="pt") as stored:
            check_record(file, json.loads(stored.metadata()["record"]), record)
            return stored.get_tensor("logps")
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file}: not readable ({error}); remove it to compute it again") from None


def reference_logps(
    part: Train, opponent: Tensor | None, base: Tensor | None, items: Sequence[Item]
) -> Tensor:
    """log p_ref of every response (N, C), by train.reference; in iteration 0 the opponent is the base."""
    if part.reference == "none":
        return torch.zeros(len(items), len(items[0].responses))
    if opponent is not None and base is not None:  # a geometric mixture, not normalized (arXiv 2404.04291)
        return part.alpha * opponent + (1 - part.alpha) * base
    result = opponent if base is None else base
    assert result is not None
    return result


def score(model: Mistral, items: Sequence[Item], token_budget: int, logit_chunk: int, ranks: Ranks) -> Tensor:
    """log p of every response of every item (N, C), fp32, on every rank; all items have C responses.

    `model` is sharded like the policy, so that both compute the same. Ranks share the items by cost.
    """
    result = torch.zeros(len(items), len(items[0].responses))
    size = 64 * ranks.world_size
    groups = [range(start, min(start + size, len(items))) for start in range(0, len(items), size)]
    batches = item_batches(groups, items, model.config, token_budget, ranks)
    bar = ranks.progress(len(items), "score", "pair")
    with torch.no_grad(), bar, closing(batches):
        for batch, packed in batches:
            logps = response_logps(model, packed, logit_chunk).cpu()
            if batch.items:
                result[batch.items] = logps.view(len(batch.items), -1)
            bar.update(len(batch.step) if batch.last else 0)
    fsdp(model).reshard()  # FSDP leaves the root's parameters gathered; an optimizer must see shards
    return ranks.sum_tensor(result)
