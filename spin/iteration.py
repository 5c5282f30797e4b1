"""One iteration, from the opponent's responses to the evaluated model.

runs/<recipe>/iter<N>/
    inputs.json, config.toml        what the results depend on; all settings, as a recipe
    generated/                      stage generate: pairs of real and generated responses
    opponent_logps.safetensors      stage score: log p_θt of both responses of every pair
    checkpoints/, metrics.jsonl     stage train
    model/                          stage export: a Hugging Face checkpoint; epoch<E>/ has the others
    evaluation/                     stage evaluate
    stages.jsonl                    seconds of generate, score and train

A stage's result is complete or absent, and a stage whose result exists is skipped. Iteration -1 is the base
model, trained by SFT on data.path into runs/<recipe>/base/, for recipes that have no model.base.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from model.mistral import Mistral
from spin.config import Config
from spin.data import digest, real_only, tokenize
from spin.engine.checkpoint import export, exports
from spin.engine.distributed import Ranks, sharded_model
from spin.engine.files import write_whole
from spin.engine.metrics import timed
from spin.engine.prepare import Prepared, claim_directory, earlier_pairs
from spin.engine.recipe import recorded
from spin.engine.stages import check_record
from spin.opponent import generate_pairs, read_pairs, score
from spin.packing import Item
from spin.report.card import model_card
from spin.trainer import train

log = logging.getLogger("spin")


def run_iteration(prepared: Prepared, ranks: Ranks, last_stage: str = "export") -> None:
    """Run the stages that have no result yet, up to `last_stage` ("generate" or "export")."""
    n, config, part, directory = prepared.n, prepared.config, prepared.part, prepared.directory
    replayed = earlier_pairs(prepared)
    inputs = ranks.from_first(lambda: claim_directory(prepared, replayed))
    models = exports(part)
    missing = ranks.from_first(lambda: [name for name in models if not (directory / name).is_dir()])
    if last_stage == "export" and not missing:
        log.info("%s: finished, nothing to do", directory)
        return

    examples, tokenizer = prepared.examples, prepared.tokenizer
    if prepared.generates:
        record = recorded(config, ("generate",)) | {key: inputs[key] for key in ("opponent", "data")}
        with timed(directory, "generate", ranks.first):
            generate_pairs(config, n, examples, tokenizer, record, directory / "generated", ranks)
        ranks.release_memory()  # of the sampler's model, before the policy is loaded
        examples = read_pairs(directory / "generated", record, config.data)
    if last_stage == "generate":
        return

    examples, counts = [*replayed, *examples], prepared.dropped.copy()
    if not prepared.spin:
        examples = real_only(examples)
    items = tokenize(examples, tokenizer, part.template, config.data, counts)
    truncated = "".join(f", {count} {what}" for what, count in counts.items() if count)
    summary = f"{len(items)} examples, {len(replayed)} of them replayed{truncated}"
    log.info("%s: %s", directory, summary)
    compute, checkpointing = getattr(torch, part.dtype), part.activation_checkpointing
    attention, source = config.model.attention, prepared.source
    policy = sharded_model(source, ranks, compute, checkpointing, part.seed, attention, part.compile)
    logps = opponent_logps(prepared, policy, items, digest(examples), ranks) if prepared.spin else None
    about, dtype = (prepared.architecture, directory, inputs, summary), config.model.save_dtype
    for name in missing:
        until = replace(part, epochs=models[name], schedule_epochs=part.schedule_epochs or part.epochs)
        with timed(directory, "train", ranks.first):
            train(until, policy, items, logps, directory, ranks)
        card = ranks.from_first(lambda: model_card(config, n, *about))
        export(policy, directory / name, prepared.tokenizer_path, getattr(torch, dtype), card, ranks)
        log.info("%s: exported", directory / name)
    del policy
    ranks.release_memory()


def opponent_logps(
    prepared: Prepared, policy: Mistral, items: list[Item], digest_of_pairs: str, ranks: Ranks
) -> torch.Tensor:
    """log p_θt of the real and the generated response of every pair (N, 2), computed once and saved.

    `policy` must not have been trained: until the first step it has the opponent's weights.
    """
    file = prepared.directory / "opponent_logps.safetensors"
    if not ranks.from_first(file.is_file):
        part = prepared.config.train
        with timed(prepared.directory, "score", ranks.first):
            result = score(policy, items, part.token_budget, part.logit_chunk, ranks)
        if not result.isfinite().all():
            raise ValueError(f"{prepared.source}: log-probs are not finite; are the weights damaged?")
        if ranks.first:
            columns = {"real": result[:, 0].contiguous(), "generated": result[:, 1].contiguous()}
            write_whole(file, save(columns, metadata={"pairs": digest_of_pairs}))
        ranks.barrier()
    try:
        with safe_open(file, framework="pt") as stored:
            check_record(file, stored.metadata(), {"pairs": digest_of_pairs})
            return torch.stack([stored.get_tensor("real"), stored.get_tensor("generated")], dim=1)
    except SafetensorError as error:
        raise ValueError(f"{file}: not readable ({error}); remove it to compute it again") from None


def evaluate_model(config: Config, n: int, ranks: Ranks) -> None:
    """Stage evaluate of an iteration's models, -1 for the base, on the recipe's tasks."""
    if config.evaluates:
        from spin.evaluation.runner import evaluate

        directory = config.iteration_dir(n) if n >= 0 else Path(config.run.dir) / "base"
        evaluate(config, config.model_dir(n), directory / "evaluation", ranks)
        for model in sorted(directory.glob("epoch*/model")):
            evaluate(config, model, model.with_name("evaluation"), ranks)
