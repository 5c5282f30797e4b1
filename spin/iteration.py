"""The stages of one iteration, and where each leaves its result.

runs/<recipe>/iter<N>/
    config.toml, inputs.json        settings; fingerprints of the opponent and the data
    generated/                      stage generate: pairs, the opponent's responses beside the real ones
    opponent_logps.safetensors      stage score: log p_θt of both, for every pair trained on
    checkpoints/, metrics.jsonl     stage train
    model/                          stage export: a Hugging Face checkpoint
    evaluation/                     stage evaluate

A stage's result appears at once or not at all, and a stage whose result is there is skipped.
"""

import logging
import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from model.attention import choose_backend
from model.config import ModelConfig
from model.mistral import Mistral
from model.tokenizer import Tokenizer
from model.weights import Checkpoint, fingerprint
from spin.config import Config, Optimization, Recipe, differences, read_toml, to_toml
from spin.data import Example, choose, digest, load_examples, real_only, tokenize
from spin.engine import checkpoint
from spin.engine.distributed import Ranks, sharded_model, this_device
from spin.engine.files import commit_bytes, file_digest, only_process, read_json, to_json, write_whole
from spin.engine.metrics import check_tensorboard
from spin.engine.optimizer import state_bytes
from spin.opponent import generate_pairs, generation_settings, score, verified_pairs
from spin.packing import Item
from spin.report.card import model_card
from spin.trainer import train

log = logging.getLogger("spin")


def check(recipe: Recipe, iterations: list[int]) -> None:
    """Raise ValueError or OSError for whatever would stop the iterations later on: paths, forms,
    vocabularies.
    """
    read, needed, architecture = set(), 0, None
    if recipe.at(0).sft.tensorboard or any(recipe.at(n).train.tensorboard for n in iterations):
        check_tensorboard()
    for n in iterations:
        config = recipe.at(n)
        if (config.data, config.evaluate) not in read:
            read.add((config.data, config.evaluate))
            load_own_examples(config, Counter())
            if config.evaluates:
                from spin.evaluation.runner import load_tasks

                load_tasks(config)
        directory, opponent = config.iteration_dir(n), config.model_dir(n - 1)
        _same_settings(directory, config, _sections(config))
        if _generates(config) and (directory / "generated").is_dir() and not (directory / "model").is_dir():
            verified_pairs(directory / "generated", config.data)
        if opponent.is_dir():
            architecture = ModelConfig.from_pretrained(opponent)
            used = (config.train, config.generate, *([config.evaluate] if config.evaluates else []))
            check_model(opponent, config, used)
        elif n == 0 and not config.model.base:
            source, _, _ = base_source(config)
            architecture = source if isinstance(source, ModelConfig) else ModelConfig.from_pretrained(source)
            needed += _room(config.base.parent, config, config.sft, architecture)
        elif n == 0:
            raise FileNotFoundError(
                f"{opponent}: no such directory; model.base is the SFT model to start from"
            )
        elif architecture is None or n - 1 not in iterations:
            raise FileNotFoundError(
                f"{opponent}: no such directory; iteration {n} needs it: run --iter {n - 1} first"
            )
        if not (directory / "model").is_dir():
            needed += _room(directory, config, config.train, architecture)
    checkpoint.check_room(Path(recipe.at(0).run.dir), needed)


def run_base(config: Config, ranks: Ranks) -> None:
    """Train the base model by SFT on data.path, into <run.dir>/base/model."""
    directory = Path(config.run.dir) / "base"
    if config.model.base:
        raise ValueError(
            f"model.base = {config.model.base!r} is given, so there is no base model to train here"
        )
    source, tokenizer_path, vocabulary = base_source(config)
    counts: Counter = Counter()
    examples = real_only(load_examples(config.data.path, config.data, counts))
    inputs = {
        "data": digest(examples),
        "init": fingerprint(source) if isinstance(source, Path) else "random weights",
        "tokenizer": file_digest(vocabulary.file),
        "lengths": [config.data.max_length, config.data.max_prompt_length],
    }
    ranks.from_first(lambda: _same_origin(directory, config, ("model", "sft"), inputs))
    if ranks.from_first((directory / "model").is_dir):
        log.info("%s: finished, nothing to do", directory)
        return
    part = config.sft
    architecture = source if isinstance(source, ModelConfig) else ModelConfig.from_pretrained(source)
    ranks.from_first(lambda: checkpoint.check_room(directory, _room(directory, config, part, architecture)))
    items = tokenize(examples, vocabulary, part.template, config.data, counts)
    log.info("SFT on %d examples%s", len(items), _summary(counts))
    dtype = getattr(torch, part.dtype)
    model = sharded_model(
        source, ranks, dtype, part.activation_checkpointing, part.seed, config.model.attention, part.compile
    )
    train(part, model, items, None, directory, ranks)
    about = f"{len(items)} examples{_summary(counts)}"
    _export(config, -1, model, tokenizer_path, inputs, about, directory, ranks)
    log.info("%s: the base model", directory / "model")


def base_source(config: Config) -> tuple[Path | ModelConfig, Path, Tokenizer]:
    """What [sft] starts from: a model directory or an architecture; its tokenizer's path; the tokenizer."""
    part = config.sft
    if bool(part.init) == bool(part.architecture):
        raise ValueError(
            f"{config.base}: there is no base model; set model.base to a Hugging Face directory, or, to "
            "train one here, either sft.init (weights to start from) or sft.architecture (random weights)"
        )
    if part.architecture and not part.tokenizer:
        raise ValueError("sft.architecture needs sft.tokenizer, a sentencepiece model")
    unknown = sorted(part.architecture.keys() - {field.name for field in fields(ModelConfig)})
    if unknown:
        raise ValueError(f"sft.architecture: {unknown[0]} is not a field of ModelConfig (model/config.py)")
    tokenizer_path = Path(part.tokenizer or part.init)
    tokenizer = Tokenizer(tokenizer_path)
    if part.init:
        check_model(Path(part.init), config, (part,), tokenizer)
        return Path(part.init), tokenizer_path, tokenizer
    ids = {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    architecture = ModelConfig.from_dict(ids | part.architecture, "sft.architecture")
    _check_attention(config, architecture, (part,))
    return architecture, tokenizer_path, tokenizer


def run_iteration(recipe: Recipe, n: int, ranks: Ranks, last_stage: str = "evaluate") -> None:
    """Run iteration n, or what is missing of it, up to `last_stage` ("generate" or "evaluate")."""
    config = recipe.at(n)
    directory = config.iteration_dir(n)
    self_play = config.train.objective == "spin"
    generating = _generates(config)
    if last_stage == "generate" and not generating:
        raise ValueError("nothing is generated where data.pairs is given or train.objective is sft")

    counts: Counter = Counter()
    source = config.model_dir(n - 1)
    own = load_own_examples(config, counts)
    replayed = [earlier_pairs(config, recipe.at(k), k) for k in range(max(0, n - config.train.replay), n)]
    inputs = ranks.from_first(
        lambda: {
            "opponent": fingerprint(source),
            "data": digest(own),
            "replayed": [digest(old) for old in replayed],
        }
    )
    ranks.from_first(lambda: _same_origin(directory, config, _sections(config), inputs))
    made = {"opponent": inputs["opponent"], "settings": generation_settings(config)}
    done = "generated" if last_stage == "generate" else "model"
    if ranks.from_first((directory / done).is_dir):
        if last_stage == "generate":
            ranks.from_first(lambda: verified_pairs(directory / "generated", config.data, own, made) and None)
        if last_stage == "generate" or not evaluate_model(config, n, ranks):
            log.info("%s: finished, nothing to do", directory)
        return

    ranks.release_memory()  # of an iteration before this one
    tokenizer = Tokenizer(source)
    if generating:
        if not ranks.from_first((directory / "generated").is_dir):
            generate_pairs(config, n, own, inputs["opponent"], directory / "generated", ranks)
            ranks.release_memory()  # the sampler's replica makes room for the policy
        # of a late kill
        ranks.from_first(lambda: shutil.rmtree(directory / "generated.partial", ignore_errors=True))
        own = verified_pairs(directory / "generated", config.data, own, made)
    if last_stage == "generate":
        return

    examples = [example for old in replayed for example in old] + own
    if not self_play:
        examples = real_only(examples)
    items = tokenize(examples, tokenizer, config.train.template, config.data, counts)
    about = f"{len(items)} examples, {len(items) - len(own)} of them replayed{_summary(counts)}"
    log.info("iteration %d: %s", n, about)
    part = config.train
    dtype, recomputed = getattr(torch, part.dtype), part.activation_checkpointing
    model = sharded_model(
        source, ranks, dtype, recomputed, attention=config.model.attention, compile=part.compile
    )
    logps = opponent_logps(config, model, items, digest(examples), directory, ranks) if self_play else None
    train(config.train, model, items, logps, directory, ranks)
    _export(config, n, model, source, inputs, about, directory, ranks)
    log.info("%s: exported", directory / "model")
    del model
    ranks.release_memory()
    evaluate_model(config, n, ranks)


def _export(
    config: Config,
    n: int,
    model: Mistral,
    tokenizer: Path,
    inputs: dict,
    about: str,
    directory: Path,
    ranks: Ranks,
) -> None:
    """Stage export: the last checkpoint's weights, the tokenizer's files and a card, in `directory`/model."""
    card = ranks.from_first(lambda: model_card(config, n, model.config, directory, inputs, about))
    checkpoint.export(
        model, directory / "model", tokenizer, getattr(torch, config.model.save_dtype), card, ranks
    )


def opponent_logps(
    config: Config, model: Mistral, items: list[Item], pairs: str, directory: Path, ranks: Ranks
) -> torch.Tensor:
    """log p_θt of the real and the generated response of every pair (N, 2), made once and kept.

    `model` still has the opponent's weights: policy and opponent are one until the first step. `pairs` is a
    digest of the texts; what was kept for others is refused.
    """
    file = directory / "opponent_logps.safetensors"
    if not ranks.from_first(file.is_file):
        result = score(model, items, config.train.token_budget, config.train.logit_chunk, ranks)
        if not result.isfinite().all():
            raise ValueError(
                f"{directory}: the opponent's log-probabilities are not finite; are its weights damaged?"
            )
        if ranks.first:
            columns = {"real": result[:, 0].contiguous(), "generated": result[:, 1].contiguous()}
            commit_bytes(file, save(columns, metadata={"pairs": pairs}))
        ranks.barrier()
    with safe_open(file, framework="pt") as stored:
        if stored.metadata()["pairs"] != pairs:
            raise ValueError(f"{file}: made for other pairs than those in generated/; {_remedy(directory)}")
        return torch.stack([stored.get_tensor("real"), stored.get_tensor("generated")], dim=1)


def evaluate_model(config: Config, n: int, ranks: Ranks) -> bool:
    """Stage evaluate for iteration n, -1 for the base: the recipe's tasks. Returns whether there was
    something to do.
    """
    directory = config.iteration_dir(n) if n >= 0 else Path(config.run.dir) / "base"
    if not config.evaluates:
        return False
    from spin.evaluation.runner import evaluate

    return evaluate(config, config.model_dir(n), directory / "evaluation", ranks)[1]


def load_own_examples(config: Config, counts: Counter) -> list[Example]:
    """This iteration's prompts and real responses, num_prompts of them; with data.pairs, all of those."""
    path = config.data.pairs or config.data.path
    if not path:
        raise ValueError("neither data.path nor data.pairs is set: there is nothing to train on")
    examples = load_examples(path, config.data, counts, need_generated=bool(config.data.pairs))
    return examples if config.data.pairs else choose(examples, config.data)


def earlier_pairs(now: Config, config: Config, n: int) -> list[Example]:
    """The pairs that iteration n, of settings `config`, made or was given, for replay in a later one of
    settings `now`.

    Given pairs are not replayed where the later iteration was given the same ones.
    """
    if config.data.pairs and config.data.pairs == now.data.pairs:
        return []
    if config.data.pairs or config.train.objective == "sft":
        return load_own_examples(config, Counter())
    directory = config.iteration_dir(n) / "generated"
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; train.replay needs iteration {n}'s pairs")
    return verified_pairs(directory, config.data)


def working_on(config: Config, ranks: Ranks):
    """A context in which no other process works in the run's directory."""
    return only_process(Path(config.run.dir), hold=ranks.first)


def _generates(config: Config) -> bool:
    """Whether the opponent is to write responses."""
    return config.train.objective == "spin" and not config.data.pairs


def _sections(config: Config) -> tuple[str, ...]:
    """Whose settings an iteration depends on."""
    return ("model", "data", "train") + ("generate",) * _generates(config)


def _same_origin(directory: Path, config: Config, sections: tuple[str, ...], inputs: dict) -> None:
    """Record settings and inputs at the first run; later, refuse other ones, naming what differs."""
    _same_settings(directory, config, sections)
    file = directory / "inputs.json"
    if file.is_file():
        recorded = read_json(file)
        changed = [name for name in inputs if recorded.get(name) != inputs[name]]
        if changed:
            raise ValueError(f"{directory}: begun with another {' and '.join(changed)}; {_remedy(directory)}")
    else:
        write_whole(directory / "config.toml", to_toml(config))
        write_whole(file, to_json(inputs))


def _same_settings(directory: Path, config: Config, sections: tuple[str, ...]) -> None:
    file = directory / "config.toml"
    records = ("config.toml", "inputs.json")
    results = [path for path in directory.glob("*") if not path.name.startswith((*records, ".lock"))]
    missing = [name for name in records if results and not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory / missing[0]}: missing, so nothing says how {results[0].name} was "
            f"made; {_remedy(directory)}"
        )
    changed = differences(read_toml(file), config, sections) if file.is_file() else []
    if changed:
        raise ValueError(
            f"{directory}: begun with other settings: {', '.join(changed)}; {_remedy(directory)}"
        )


def _remedy(directory: Path) -> str:
    return f"put it back as it was, choose another --run.dir, or remove {directory} to start it anew"


def check_model(path: Path, config: Config, used: tuple, tokenizer: Tokenizer | None = None) -> None:
    """Raise ValueError or OSError unless architecture, weights and tokenizer go together, and attention can
    be had.

    `used` are the parts of `config` that will compute with it; its own tokenizer is taken where none is
    given.
    """
    tokenizer = tokenizer or Tokenizer(path)
    architecture = ModelConfig.from_pretrained(path)
    with torch.device("meta"):
        Checkpoint(path).check(Mistral(architecture))
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model a vocab_size of "
            f"{architecture.vocab_size}"
        )
    _check_attention(config, architecture, used)


def _room(directory: Path, config: Config, part: Optimization, architecture: ModelConfig) -> int:
    """Bytes that training and export will write."""
    with torch.device("meta"):
        count = sum(weight.numel() for weight in Mistral(architecture).parameters())
    checkpoints = checkpoint.room_needed(
        directory / "checkpoints", count * (4 + state_bytes(part)), part.keep_checkpoints
    )
    return checkpoints + count * getattr(torch, config.model.save_dtype).itemsize


def _check_attention(config: Config, architecture: ModelConfig, used: tuple) -> None:
    """Raise ValueError if model.attention cannot be had in the dtype of a part that will be used."""
    for part in used:
        choose_backend(
            config.model.attention, this_device().type, getattr(torch, part.dtype), architecture.head_dim
        )


def _summary(counts: Counter) -> str:
    shown = [f"{count} {what}" for what, count in counts.items() if count]
    return f" ({', '.join(shown)})" if shown else ""
