"""Load and validate what an iteration needs, once and before any work."""

import os
import shutil
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from model.attention import choose_backend
from model.config import ModelConfig
from model.mistral import Mistral
from model.tokenizer import Tokenizer
from model.weights import Checkpoint, fingerprint
from spin.config import Config, Optimization
from spin.data import Example, choose, digest, encode_prompts, load_examples
from spin.engine.checkpoint import bytes_to_write, check_room
from spin.engine.distributed import this_device
from spin.engine.files import file_digest, write_whole
from spin.engine.metrics import check_loggers
from spin.engine.recipe import Recipe, flat, recorded, to_toml
from spin.engine.schedule import Schedule, held_out_items
from spin.engine.stages import check_claim, claim
from spin.opponent import read_pairs


@dataclass(frozen=True)
class Prepared:
    """A validated iteration: its settings, model, tokenizer and data."""

    n: int  # -1: the base
    recipe: Recipe
    source: Path | ModelConfig  # initial weights: a model directory, or an architecture for random ones
    architecture: ModelConfig
    tokenizer: Tokenizer
    examples: list[Example]  # prompts with real responses; with data.pairs, pairs
    counts: Counter  # examples dropped by data.empty = "drop", by cause; prompts that repeat an earlier one

    @property
    def config(self) -> Config:
        return self.recipe.at(self.n)

    @property
    def directory(self) -> Path:
        return self.config.model_dir(self.n).parent

    @property
    def tokenizer_path(self) -> Path:
        if self.n >= 0:
            return self.config.model_dir(self.n - 1)
        return Path(self.config.sft.tokenizer or self.config.sft.init)

    @property
    def part(self) -> Optimization:
        return self.config.train if self.n >= 0 else self.config.sft

    @property
    def spin(self) -> bool:
        """Whether it trains on pairs, not on real responses alone."""
        return self.n >= 0 and self.config.train.objective == "spin"

    @property
    def generates(self) -> bool:
        """Whether the opponent writes responses."""
        return self.spin and not self.config.data.pairs

    @property
    def scores(self) -> tuple[str, ...]:
        """Models whose log-probs the reference is made of; in iteration 0 the base is the opponent."""
        name = self.config.train.reference
        names = {"none": (), "mixture": ("base", "opponent")}.get(name, (name,)) if self.spin else ()
        return names if self.n > 0 else ("opponent",) * bool(names)


def prepare_all(recipe: Recipe, iterations: list[int]) -> list[Prepared]:
    """Prepare the iterations in order, after the base if iteration 0 has to train it.

    Raises what `prepare` does, or OSError if the disk has no room for their checkpoints and models.
    """
    config = recipe.at(0)
    trained = [-1] if 0 in iterations and not config.model.base else []
    prepared: list[Prepared] = []
    for n in [*trained, *iterations]:
        prepared.append(prepare(recipe, n, prepared[-1] if prepared else None))
    needed = sum(bytes_to_write(p.directory, p.architecture, config.model, p.part) for p in prepared)
    check_room(Path(config.run.dir), needed)
    return prepared


def prepare(recipe: Recipe, n: int, before: Prepared | None = None) -> Prepared:
    """Load and validate iteration n, -1 for the base; `before` is prepared to run first, in the same command.

    Raises ValueError or OSError for errors that would otherwise appear later: in data, settings, models, and
    packages.
    """
    config = recipe.at(n)
    part, opponent = config.train if n >= 0 else config.sft, config.model_dir(n - 1)
    tokenizer: Tokenizer
    source: Path | ModelConfig
    if n < 0:
        source, architecture, tokenizer = base_source(config)
    elif opponent.is_dir():
        source, (architecture, tokenizer) = opponent, open_model(opponent)
    elif before is not None and before.n == n - 1:
        source, architecture, tokenizer = opponent, before.architecture, before.tokenizer
    else:
        remedy = f"run --iter {n - 1} first" if n else "model.base is the SFT model to start from"
        raise FileNotFoundError(f"{opponent}: no such directory; {remedy}")

    parts = [part] if n < 0 else [part, config.generate, *[config.evaluate] * config.evaluates]
    for used in parts:
        dtype = getattr(torch, used.dtype)
        choose_backend(config.model.attention, this_device().type, dtype, architecture.head_dim)
    counts: Counter = Counter()
    if before is None or before.config.data != config.data or (before.n < 0 and config.data.pairs):
        examples = own_examples(config, n, counts)
    else:
        counts = before.counts
        examples = choose(before.examples, config.data) if before.n < 0 else before.examples
    if any(getattr(used, "template", "") == "model" for used in parts):
        # The template may be missing or refuse some roles: try the first example of each sequence of roles.
        kinds = {tuple(turn["role"] for turn in example.prompt): example for example in reversed(examples)}
        encode_prompts(kinds.values(), tokenizer, "model", config.data, Counter())

    p = Prepared(n, recipe, source, architecture, tokenizer, examples, counts)
    check_claim(p.directory, settings(p), flat(Config()))
    Schedule(part, len(examples) - len(held_out_items(part, len(examples))))
    check_loggers(part)
    if part.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise ValueError(
            "compile = true needs a C++ compiler, and there is none; install g++, or set it to false"
        )
    if n >= 0 and config.evaluates:
        from spin.evaluation.runner import load_tasks

        load_tasks(config)
    return p


def base_source(config: Config) -> tuple[Path | ModelConfig, ModelConfig, Tokenizer]:
    """Source of the initial weights (see `Prepared`), architecture and tokenizer of the base, by [sft]."""
    part = config.sft
    if config.model.base:
        raise ValueError(f"model.base = {config.model.base!r} is set, so there is no base model to train")
    if bool(part.init) == bool(part.architecture):
        raise ValueError(
            f"{config.base}: there is no base model; set model.base to a Hugging Face directory, or, to "
            "train one here, either sft.init (weights to start from) or sft.architecture (random weights)"
        )
    if part.init:
        tokenizer = Tokenizer(part.tokenizer) if part.tokenizer else None
        return Path(part.init), *open_model(Path(part.init), tokenizer)
    if not part.tokenizer:
        raise ValueError("sft.architecture needs sft.tokenizer, a tokenizer.model or tokenizer.json")
    unknown = sorted(part.architecture.keys() - {field.name for field in fields(ModelConfig)})
    if unknown:
        raise ValueError(f"sft.architecture: {unknown[0]} is not a field of ModelConfig (model/config.py)")
    tokenizer = Tokenizer(part.tokenizer)
    bos = tokenizer.bos_id if tokenizer.bos_id >= 0 else None
    ids = {"bos_token_id": bos, "eos_token_id": tokenizer.eos_id}
    given = {"vocab_size": tokenizer.vocab_size} | ids | part.architecture
    architecture = ModelConfig.from_dict(given, "sft.architecture")
    return architecture, architecture, tokenizer


def open_model(path: Path, tokenizer: Tokenizer | None = None) -> tuple[ModelConfig, Tokenizer]:
    """Architecture and tokenizer of a model directory; `tokenizer` replaces its own.

    Raises ValueError or OSError if weights or tokenizer do not match the architecture.
    """
    architecture = ModelConfig.from_pretrained(path)
    tokenizer = tokenizer or Tokenizer(path)
    with torch.device("meta"):
        Checkpoint(path).check(Mistral(architecture))
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's vocab_size, "
            f"{architecture.vocab_size}"
        )
    return architecture, tokenizer


def settings(p: Prepared) -> dict:
    """The settings that an iteration's results depend on."""
    if p.n < 0:
        lengths = ("data.max_length", "data.max_prompt_length")
        return recorded(p.config, ("model", "sft")) | {name: flat(p.config)[name] for name in lengths}
    return recorded(p.config, ("model", "data", "train") + ("generate",) * p.generates)


def claim_directory(p: Prepared, replayed: list[list[Example]]) -> dict:
    """Record settings and inputs, or raise ValueError if the directory has others. Returns the inputs."""
    model = fingerprint(p.source) if isinstance(p.source, Path) else "random weights"
    inputs = {"init" if p.n < 0 else "opponent": model, "data": digest(p.examples)}
    if p.n < 0:
        inputs["tokenizer"] = file_digest(p.tokenizer.file)
    else:
        inputs["replayed"] = digest([example for pairs in replayed for example in pairs])
    if p.spin and p.n > 0 and p.config.train.loss == "t-spin":
        inputs["base's responses"] = digest(generated_pairs(p.config, 0))
    if "base" in p.scores:
        inputs["base"] = fingerprint(p.config.base)
    claim(p.directory, settings(p) | inputs, flat(Config()))
    if not (p.directory / "config.toml").is_file():
        write_whole(p.directory / "config.toml", to_toml(p.config))
    return inputs


def earlier_pairs(p: Prepared) -> list[list[Example]]:
    """The pairs of each of the train.replay iterations before this one: generated, or given by data.pairs.

    Given pairs are not replayed where this iteration is given the same ones.
    """
    result: list[list[Example]] = []
    for k in range(max(0, p.n - p.config.train.replay), p.n):
        config = p.recipe.at(k)
        if config.train.objective == "spin" and not config.data.pairs:
            result.append(generated_pairs(config, k))
        elif not config.data.pairs or config.data.pairs != p.config.data.pairs:
            result.append(own_examples(config, k, Counter()))
    samples = p.config.generate.samples if p.generates else 1
    if p.spin and any(len(example.generated) != samples for pairs in result for example in pairs):
        raise ValueError("replayed iterations have another generate.samples; set train.replay = 0")
    return result


def generated_pairs(config: Config, n: int) -> list[Example]:
    """The pairs that iteration n generated."""
    return read_pairs(config.iteration_dir(n) / "generated", {})


def own_examples(config: Config, n: int, counts: Counter) -> list[Example]:
    """An iteration's prompts with real responses; with data.pairs its pairs; of the base, all of data.path.

    `counts`: as of `load_examples`.
    """
    pairs = n >= 0 and bool(config.data.pairs)
    path = config.data.pairs if pairs else config.data.path
    if not path:
        raise ValueError("neither data.path nor data.pairs is set: there is nothing to train on")
    examples = load_examples(path, config.data, counts, pairs)
    return examples if pairs or n < 0 else choose(examples, config.data)
