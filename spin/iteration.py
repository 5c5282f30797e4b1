"""One iteration, from the opponent's responses to the evaluated model.

runs/<recipe>/iter<N>/
    inputs.json, config.toml        what the results depend on; all settings, as a recipe
    generated/                      stage generate: pairs of real and generated responses
    opponent_logps.safetensors      stage score: log p_θt of all responses
    base_logps.safetensors          log p_θ0, where train.reference needs it
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

from model.mistral import Mistral
from spin.config import Config
from spin.data import Example, tokenize
from spin.engine.checkpoint import export, exports, to_export
from spin.engine.distributed import Ranks, sharded_model
from spin.engine.metrics import timed
from spin.engine.prepare import Prepared, claim_directory, earlier_pairs, generated_pairs
from spin.engine.recipe import recorded
from spin.opponent import generate_pairs, read_pairs
from spin.packing import Item
from spin.reference import logps_of, reference_logps
from spin.report.card import model_card
from spin.trainer import train

log = logging.getLogger("spin")


def run_iteration(prepared: Prepared, ranks: Ranks, last_stage: str = "export") -> None:
    """Run the stages that have no result yet, up to `last_stage` ("generate" or "export")."""
    n, config, part, directory = prepared.n, prepared.config, prepared.part, prepared.directory
    replayed = earlier_pairs(prepared)
    inputs = ranks.from_first(lambda: claim_directory(prepared, replayed))
    missing = ranks.from_first(lambda: to_export(part, directory))
    for name in exports(part):
        if name not in missing and not (directory / name).is_dir():
            log.info("%s: not exported: training has passed it, and its weights are gone", directory / name)
    if last_stage == "export" and not missing:
        log.info("%s: finished, nothing to do", directory)
        return

    examples, tokenizer = prepared.examples, prepared.tokenizer
    if prepared.generates:
        record = recorded(config, ("generate",)) | {key: inputs[key] for key in ("opponent", "data")}
        record["train.template"] = config.train.template
        before = generated_pairs(config, n - 1) if n and config.generate.share < 1 else []
        with timed(directory, "generate", ranks.first):
            generate_pairs(config, n, examples, tokenizer, record, directory / "generated", ranks, before)
        ranks.release_memory()  # of the sampler's model, before the policy is loaded
        examples = read_pairs(directory / "generated", record)
    if last_stage == "generate":
        return

    counts = prepared.counts.copy()
    chosen = training_examples(prepared, [*replayed, examples])
    items = tokenize(chosen, tokenizer, part.template, config.data, counts)
    truncated = "".join(f", {count} {what}" for what, count in counts.items() if count)
    several = f" of {len(replayed) + 1} iterations" * bool(replayed)
    summary = f"{len(items)} examples{several}{truncated}"
    log.info("%s: %s", directory, summary)
    train_policy(prepared, inputs, items, summary, missing, ranks)
    ranks.release_memory()


def train_policy(
    prepared: Prepared, inputs: dict, items: list[Item], summary: str, missing: dict[str, float], ranks: Ranks
) -> None:
    """Stages score, train and export, up to the last of the models that are `missing`."""
    config, part, directory = prepared.config, prepared.part, prepared.directory

    def load(source) -> Mistral:
        compute, checkpointing = getattr(torch, part.dtype), part.activation_checkpointing
        attention = config.model.attention
        return sharded_model(source, ranks, compute, checkpointing, part.seed, attention, part.compile)

    base = opponent = reference = None
    if "base" in prepared.scores:
        base = logps_of("base", inputs, lambda: load(config.base), prepared, items, ranks)
        ranks.release_memory()  # of the base model, before the policy is loaded
    policy = load(prepared.source)
    if "opponent" in prepared.scores:  # until the first step, the policy has the opponent's weights
        opponent = logps_of("opponent", inputs, lambda: policy, prepared, items, ranks)
    if prepared.spin:
        reference = reference_logps(config.train, opponent, base, items)
    about, dtype = (prepared.architecture, directory, inputs, summary), config.model.save_dtype
    for name, epochs in missing.items():
        until = replace(part, epochs=epochs, schedule_epochs=part.schedule_epochs or part.epochs)
        with timed(directory, "train", ranks.first):
            train(until, policy, items, reference, directory, ranks, opponent)
        card = ranks.from_first(lambda: model_card(config, prepared.n, *about))
        export(policy, directory / name, prepared.tokenizer_path, getattr(torch, dtype), card, ranks)
        log.info("%s: exported", directory / name)


def training_examples(prepared: Prepared, iterations: list[list[Example]]) -> list[Example]:
    """The examples of the replayed iterations and of this one, as train.replay_share says."""
    config, count = prepared.config, len(iterations)
    if config.train.replay_share == "equal":  # every prompt once, answered by all opponents in turn
        iterations = [examples[(k + prepared.n) % count :: count] for k, examples in enumerate(iterations)]
    examples = [example for each in iterations for example in each]
    if not prepared.spin:
        return [replace(example, generated=()) for example in examples]
    if config.train.loss == "t-spin":
        of_base = iterations[-1] if prepared.n == 0 else generated_pairs(config, 0)
        answers = {(str(e.prompt), e.real): e.generated[:1] for e in of_base}
        try:
            return [replace(e, generated=e.generated + answers[str(e.prompt), e.real]) for e in examples]
        except KeyError:
            raise ValueError("t-spin: [data] must be that of iteration 0, whose responses it uses") from None
    return examples


def evaluate_model(config: Config, n: int, ranks: Ranks) -> None:
    """Stage evaluate of an iteration's models, -1 for the base, on the recipe's tasks."""
    if config.evaluates:
        from spin.evaluation.runner import evaluate

        directory = config.iteration_dir(n) if n >= 0 else Path(config.run.dir) / "base"
        evaluate(config, config.model_dir(n), directory / "evaluation", ranks)
        for model in sorted(directory.glob("epoch*/model")):
            evaluate(config, model, model.with_name("evaluation"), ranks)
