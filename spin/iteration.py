"""One iteration, from the opponent's responses to the evaluated model.

runs/<recipe>/iter<N>/
    inputs.json, config.toml        what the results depend on; all settings, as a recipe
    generated/                      stage generate: pairs of real and generated responses
    opponent_logps.safetensors      stage score: log p_θt of both responses of every pair
    checkpoints/, metrics.jsonl     stage train
    model/                          stage export: a Hugging Face checkpoint
    evaluation/                     stage evaluate

A stage's result is complete or absent, and a stage whose result exists is skipped. Iteration -1 is the base
model, trained by SFT on data.path into runs/<recipe>/base/, for recipes that have no model.base.
"""

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from model.mistral import Mistral
from spin.config import Config
from spin.data import digest, real_only, tokenize
from spin.engine.checkpoint import export
from spin.engine.distributed import Ranks, sharded_model
from spin.engine.files import commit_bytes, only_process
from spin.engine.prepare import Prepared, claim_directory, earlier_pairs
from spin.engine.recipe import recorded
from spin.engine.stages import check_record
from spin.opponent import generate_pairs, read_pairs, score
from spin.packing import Item
from spin.report.card import model_card
from spin.trainer import train

log = logging.getLogger("spin")


def run_iteration(p: Prepared, ranks: Ranks, last_stage: str = "export") -> None:
    """Run the stages that have no result yet, up to `last_stage` ("generate" or "export")."""
    config, part, directory = p.config, p.part, p.directory
    replayed = earlier_pairs(p)
    inputs = ranks.from_first(lambda: claim_directory(p, replayed))
    if last_stage == "export" and ranks.from_first((directory / "model").is_dir):
        log.info("%s: finished, nothing to do", directory)
        return

    own = p.examples
    if p.generates:
        pairs = directory / "generated"
        made_from = recorded(config, ("generate",)) | {key: inputs[key] for key in ("opponent", "data")}
        if not ranks.from_first(pairs.is_dir):
            generate_pairs(config, p.n, own, p.tokenizer, made_from, pairs, ranks)
            ranks.release_memory()  # the sampler's replica makes room for the policy
        elif last_stage == "generate":
            log.info("%s: finished, nothing to do", pairs)
        own = read_pairs(pairs, made_from, config.data)
    if last_stage == "generate":
        return

    examples, counts = [*replayed, *own], p.dropped.copy()
    if not p.spin:
        examples = real_only(examples)
    items = tokenize(examples, p.tokenizer, part.template, config.data, counts)
    cut = "".join(f", {count} {what}" for what, count in counts.items() if count)
    about = f"{len(items)} examples, {len(replayed)} of them replayed{cut}"
    log.info("%s: %s", directory, about)
    dtype, recomputed = getattr(torch, part.dtype), part.activation_checkpointing
    backend = config.model.attention
    model = sharded_model(p.source, ranks, dtype, recomputed, part.seed, backend, part.compile)
    logps = opponent_logps(p, model, items, digest(examples), ranks) if p.spin else None
    train(part, model, items, logps, directory, ranks)

    card = ranks.from_first(lambda: model_card(config, p.n, p.architecture, directory, inputs, about))
    save_dtype = getattr(torch, config.model.save_dtype)
    export(model, directory / "model", p.tokenizer_path, save_dtype, card, ranks)
    log.info("%s: exported", directory / "model")
    del model
    ranks.release_memory()


def opponent_logps(p: Prepared, model: Mistral, items: list[Item], pairs: str, ranks: Ranks) -> torch.Tensor:
    """log p_θt of the real and the generated response of every pair (N, 2), computed once and kept.

    `model` still has the opponent's weights: policy and opponent are the same until the first step. `pairs`
    is a digest of the texts.
    """
    file = p.directory / "opponent_logps.safetensors"
    if not ranks.from_first(file.is_file):
        part = p.config.train
        result = score(model, items, part.token_budget, part.logit_chunk, ranks)
        if not result.isfinite().all():
            raise ValueError(f"{p.source}: log-probs that are not finite; are the weights damaged?")
        if ranks.first:
            columns = {"real": result[:, 0].contiguous(), "generated": result[:, 1].contiguous()}
            commit_bytes(file, save(columns, metadata={"pairs": pairs}))
        ranks.barrier()
    try:
        with safe_open(file, framework="pt") as stored:
            check_record(file, stored.metadata(), {"pairs": pairs})
            return torch.stack([stored.get_tensor("real"), stored.get_tensor("generated")], dim=1)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged ({error}); remove it to score again") from None


def evaluate_model(config: Config, n: int, ranks: Ranks) -> bool:
    """Stage evaluate of a model, -1 for the base. Returns whether there was something to do."""
    if not config.evaluates:
        return False
    from spin.evaluation.runner import evaluate

    directory = config.iteration_dir(n) if n >= 0 else Path(config.run.dir) / "base"
    return evaluate(config, config.model_dir(n), directory / "evaluation", ranks)[1]


def working_on(config: Config, ranks: Ranks):
    """A context in which no other process works in the run's directory."""
    return only_process(Path(config.run.dir), hold=ranks.first)
