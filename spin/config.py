"""Every setting, its default and its unit.

A recipe is a TOML file that states only what differs from the defaults. `[[iteration]]` tables hold what
changes from one iteration to the next, by the settings' full names; the last one also serves the iterations
after it:

    [[iteration]]                       # iteration 0
    train.lr = 5e-7
    [[iteration]]                       # iteration 1
    train.lr = 1e-7

Later wins: default, recipe, iteration, command line (`--train.lr=1e-7`).
"""

import difflib
import json
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

from model.attention import BACKENDS
from model.mistral import RECOMPUTED
from model.sampling import LOWEST_TEMPERATURE
from model.tokenizer import TEMPLATES
from spin.loss import LOSSES


def _free(default):
    """A setting that a run may go on with changed: it moves no result, or names a file whose content is
    recorded.
    """
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class Run:
    dir: str = "runs/tiny"  # where everything of this run is left
    # ranks that share one copy of the parameters, each group with its own (HSDP); 0: all of them
    shard_size: int = _free(0)


@dataclass(frozen=True)
class Model:
    # the SFT model that iteration 0 starts from; empty: <run.dir>/base/model, made by `train.py --sft`
    base: str = _free("")
    save_dtype: str = "bfloat16"  # of exported weights; bfloat16 or float32
    # backend: flash-attn, torch-flash or sdpa; auto: the first of these that can be had
    attention: str = _free("auto")


@dataclass(frozen=True)
class Data:
    # prompts with their responses: .jsonl or .parquet, a directory of them, or a pattern (data/*.parquet)
    path: str = _free("")
    prompt_column: str = ""  # column names, where they are not among the known forms (spin/data.py)
    response_column: str = ""
    # pairs (`real`/`generated`) to train on as they are, instead of generating; a path as above
    pairs: str = _free("")
    num_prompts: int = 0  # a seeded sample of this many for self-play; 0: all. SFT reads all
    seed: int = 0
    # put an empty system turn before a conversation that has none, as the official code does
    empty_system: bool = False
    max_length: int = 1024  # tokens of prompt and response
    # tokens that a prompt keeps, its last ones, when the two are longer than max_length
    max_prompt_length: int = 512
    empty: str = "refuse"  # an example with an empty prompt or response: "refuse", or "drop" (and count)


@dataclass(frozen=True)
class Generate:
    template: str = "plain"  # how a prompt is put to the opponent: zephyr, instruction, plain
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    dtype: str = "bfloat16"  # of weights and cache while sampling
    # sequences decoded side by side on each rank; 0: as many as memory holds, at most 512 (CPU: 128)
    slots: int = _free(0)
    # batch-invariant: the text depends on `slots` and the longest prompt, not on what runs beside it
    fixed_slots: bool = False


@dataclass(frozen=True)
class Optimization:
    """What SFT and self-play share."""

    template: str = "plain"  # how prompt and response are put to the model in training
    optimizer: str = "rmsprop"  # rmsprop or adamw (betas 0.9 and 0.999), both without weight decay
    lr: float = 5e-7  # peak learning rate
    batch_size: int = 64  # examples of a step, over all ranks
    epochs: float = 2.0  # when to stop
    schedule_epochs: float = 0.0  # what the schedule is laid out for; 0: as many as `epochs`
    warmup: float = 0.1  # share of the schedule that warms up linearly; linear decay to 0 after it
    max_grad_norm: float = 1.0
    dtype: str = "bfloat16"  # of compute; weights, optimizer and reductions are float32 always
    seed: int = 0  # order of the examples
    # of RMSProp; bfloat16 halves it, rounded at random (spin/engine/optimizer.py)
    second_moment: str = "float32"
    heldout_pairs: int = 0  # examples kept aside, drawn by `seed`, on which loss and margin are measured
    heldout_every: int = _free(50)  # steps between two such measurements; the last step has one too
    token_budget: int = _free(8192)  # packed tokens of one forward and backward pass on each rank
    # rows whose logits exist at one time; a GPU wants some thousands, a CPU's cache fewer
    logit_chunk: int = _free(256)
    # what is computed again in the backward pass: none, selective, full
    activation_checkpointing: str = _free("none")
    compile: bool = _free(False)  # torch.compile what stands before and after attention in each block
    # reduce gradients once a step, not after each micro-batch: 4 bytes a parameter
    unsharded_gradients: bool = _free(False)
    checkpoint_every: int = _free(200)  # steps
    keep_checkpoints: int = _free(2)  # the last so many
    tensorboard: bool = _free(False)  # the metrics as TensorBoard events too, in <iteration>/tensorboard


@dataclass(frozen=True)
class Train(Optimization):
    objective: str = "spin"  # spin; or sft, the control: the same steps on the real responses alone
    loss: str = "logistic"  # logistic, hinge, exponential, correlation
    beta: float = 0.1  # the paper's λ
    replay: int = 1  # how many earlier iterations' pairs are trained on beside this one's


@dataclass(frozen=True)
class SFT(Optimization):
    init: str = _free("")  # a model directory to start from; empty: random weights of `architecture`
    tokenizer: str = _free("")  # tokenizer.model or its directory; empty: that of `init`
    architecture: dict = field(default_factory=dict)  # config.json's fields, without vocab_size, bos and eos
    optimizer: str = "adamw"
    lr: float = 2e-5
    epochs: float = 1.0


@dataclass(frozen=True)
class Evaluate:
    # with commas: heldout, leaderboard, arc_challenge, … (spin/evaluation/tasks.py), mt_bench
    tasks: str = "heldout"
    data: str = _free("data/eval")  # where the benchmarks' data sets are, as `hf download` left them
    # the version of lm-evaluation-harness whose numbers are given; the paper's is 0.4.0
    harness: str = "0.4.13"
    heldout: str = ""  # prompts with right answers, a path like data.path; empty: train.py evaluates nothing
    limit: int = 0  # the first so many documents of each task; 0: all
    # regular expression whose last match's first group is the answer; empty: the whole text
    answer_pattern: str = ""
    max_new_tokens: int = 256
    temperature: float = 1.0  # of the sampled answer; a greedy one is always given too
    seed: int = 1
    dtype: str = "bfloat16"
    slots: int = _free(0)  # as in [generate]
    token_budget: int = _free(8192)  # tokens scored in one forward pass on each rank
    logit_chunk: int = _free(256)  # as in [train]


@dataclass(frozen=True)
class Config:
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    generate: Generate = field(default_factory=Generate)
    train: Train = field(default_factory=Train)
    sft: SFT = field(default_factory=SFT)
    evaluate: Evaluate = field(default_factory=Evaluate)

    @property
    def base(self) -> Path:
        """Directory of the SFT model, given or made here."""
        return Path(self.model.base) if self.model.base else Path(self.run.dir) / "base" / "model"

    @property
    def evaluates(self) -> bool:
        """Whether the recipe names something to evaluate on."""
        return bool(self.evaluate.tasks) and not (
            self.evaluate.tasks == "heldout" and not self.evaluate.heldout
        )

    def iteration_dir(self, iteration: int) -> Path:
        return Path(self.run.dir) / f"iter{iteration}"

    def model_dir(self, iteration: int) -> Path:
        """The exported model of an iteration; -1 is the base."""
        return self.base if iteration < 0 else self.iteration_dir(iteration) / "model"


_SECTIONS = get_type_hints(Config)  # {"run": Run, …}
_FIELDS = {f"{section}.{f.name}": f for section, kind in _SECTIONS.items() for f in fields(kind)}
_CHOICES = {  # by key, in whichever section it stands
    "save_dtype": ("bfloat16", "float32"),
    "attention": ("auto", *BACKENDS),
    "empty": ("refuse", "drop"),
    "template": TEMPLATES,
    "dtype": ("bfloat16", "float32"),
    "optimizer": ("rmsprop", "adamw"),
    "second_moment": ("float32", "bfloat16"),
    "activation_checkpointing": tuple(RECOMPUTED),
    "objective": ("spin", "sft"),
    "loss": tuple(LOSSES),
}
_POSITIVE = {"max_length", "max_new_tokens", "batch_size", "epochs", "max_grad_norm", "token_budget"}
_POSITIVE |= {"logit_chunk", "checkpoint_every", "keep_checkpoints", "heldout_every"}
_NOT_NEGATIVE = {"shard_size", "num_prompts", "temperature", "top_k", "slots", "lr", "schedule_epochs"}
_NOT_NEGATIVE |= {"beta", "replay", "heldout_pairs", "limit"}


class Recipe:
    """A TOML file ("": none) and the command line's overrides; `at(n)` gives the settings of iteration n.

    Raises ValueError naming the file (or "command line"), the key, and the nearest known one.
    """

    def __init__(self, path: str | Path, overrides: Iterable[str] = ()):
        self.path = Path(path)
        if path and not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such recipe; configs/ has some")
        try:
            table = tomllib.loads(self.path.read_text(encoding="utf-8") if path else "")
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: not TOML ({error})") from None
        iterations = table.pop("iteration", [])
        if not isinstance(iterations, list):
            raise ValueError(f"{path}: iterations are written [[iteration]], with two brackets")
        self._common = _flatten(table, str(path))
        self._iterations = [_flatten(t, f"{path}: iteration {i}") for i, t in enumerate(iterations)]
        for name in (name for values in self._iterations for name in values):
            if name.split(".")[0] not in ("data", "generate", "train", "evaluate"):
                raise ValueError(f"{path}: {name} is one for all iterations; move it out of [[iteration]]")
        self._overrides = dict(_parse_override(argument) for argument in overrides)
        for n in range(len(iterations) or 1):
            self.at(n)

    def at(self, iteration: int) -> Config:
        """Settings of one iteration."""
        values = dict(self._common)
        if self._iterations:
            values |= self._iterations[min(iteration, len(self._iterations) - 1)]
        return build(values | self._overrides)


def build(values: dict[str, object]) -> Config:
    """A Config from {"section.key": value}; everything else has its default. Raises ValueError by key."""
    sections: dict[str, dict] = {section: {} for section in _SECTIONS}
    for name, value in values.items():
        section, key = name.split(".", 1)
        sections[section][key] = value
    config = Config(**{section: kind(**sections[section]) for section, kind in _SECTIONS.items()})
    for name, value in flat(config).items():
        key = name.split(".")[1]
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ValueError(f"{name} = {value!r} is not one of {', '.join(_CHOICES[key])}")
        if isinstance(value, (int, float)) and not (math.isfinite(value) and abs(value) < 2**63):
            raise ValueError(f"{name} = {value!r} is not a finite number of 64 bits")
        if (key in _POSITIVE and value <= 0) or (key in _NOT_NEGATIVE and value < 0):
            raise ValueError(f"{name} = {value!r} is out of range")
    if not 0 < config.generate.top_p <= 1:
        raise ValueError(f"generate.top_p = {config.generate.top_p!r} is not in (0, 1]")
    for name, asked in (("generate", config.generate), ("evaluate", config.evaluate)):
        if 0 < asked.temperature < LOWEST_TEMPERATURE:
            raise ValueError(f"{name}.temperature = {asked.temperature!r} is too near 0; 0 is greedy")
    if config.generate.fixed_slots and not config.generate.slots:
        raise ValueError(
            "generate.fixed_slots needs generate.slots: the text is the same for the same number of slots"
        )
    if not 0 < config.data.max_prompt_length < config.data.max_length:
        raise ValueError(
            f"data.max_prompt_length = {config.data.max_prompt_length} leaves no room for a response in "
            f"data.max_length = {config.data.max_length}"
        )
    for name, part in (("train", config.train), ("sft", config.sft)):
        if not 0 <= part.warmup < 1:
            raise ValueError(f"{name}.warmup = {part.warmup!r} is not in [0, 1)")
        if part.second_moment != "float32" and part.optimizer != "rmsprop":
            raise ValueError(
                f"{name}.second_moment = {part.second_moment!r} is for rmsprop, not {part.optimizer}"
            )
        if part.compile and part.activation_checkpointing == "selective":
            raise ValueError(
                f'{name}.compile and {name}.activation_checkpointing = "selective" exclude each other: of '
                "what is fused "
                'no part can be kept. Compiled, "none" keeps about as little by itself'
            )
        if 0 < part.schedule_epochs < part.epochs:
            raise ValueError(
                f"{name}.schedule_epochs = {part.schedule_epochs} ends before {name}.epochs = {part.epochs}"
            )
    return config


def flat(config: Config) -> dict[str, Any]:
    """{"section.key": value} of every setting."""
    return {name: attrgetter(name)(config) for name in _FIELDS}


def differences(old: dict[str, object], new: Config, sections: tuple[str, ...]) -> list[str]:
    """Settings of the given sections that changed and matter, as "train.lr = 1e-07 (was 5e-07)".

    What `old` lacks had its default: the setting came later than the file.
    """
    old = flat(Config()) | old
    free = {name for name, f in _FIELDS.items() if f.metadata.get("free")}
    return [
        f"{name} = {value!r} (was {old[name]!r})"
        for name, value in flat(new).items()
        if name.split(".")[0] in sections and name not in free and old[name] != value
    ]


def to_toml(config: Config) -> str:
    """The resolved settings as a recipe that gives them again."""
    lines = []
    for section in _SECTIONS:
        lines.append(f"[{section}]")
        for key, value in vars(getattr(config, section)).items():
            lines.append(f"{key} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def read_toml(path: Path) -> dict[str, object]:
    """{"section.key": value} of a file that `to_toml` wrote."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return {f"{section}.{key}": value for section, entries in table.items() for key, value in entries.items()}


def _toml_value(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_value(key)} = {_toml_value(v)}" for key, v in value.items()) + "}"
    # A TOML string is JSON's, except that DEL must be escaped.
    text = repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")


def _flatten(table: dict, where: str) -> dict[str, object]:
    """Nested TOML tables to {"section.key": value}, each key known and each value of its field's type."""
    values = {}
    for section, entries in table.items():
        if not isinstance(entries, dict):
            raise ValueError(f"{where}: {section} stands outside of a section; {_nearest(section)}")
        for key, value in entries.items():
            name = f"{section}.{key}"
            values[name] = _typed(name, value, where)
    return values


def _typed(name: str, value, where: str):
    if name not in _FIELDS:
        raise ValueError(f"{where}: unknown setting {name}; {_nearest(name)}")
    wanted = _FIELDS[name].type
    assert isinstance(wanted, type)  # a text only where annotations are postponed
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise ValueError(f"{where}: {name} must be {wanted.__name__}, not {value!r}")
    return value


def _nearest(name: str) -> str:
    by_key = [k for k in _FIELDS if k.split(".")[1] == name.split(".")[-1]]
    close = by_key or difflib.get_close_matches(name, _FIELDS, n=1, cutoff=0.0)
    return f"did you mean {close[0]}?"


def _parse_override(argument: str) -> tuple[str, object]:
    """("train.lr", 1e-7) from "--train.lr=1e-7", read by the field's type."""
    name, equals, text = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or not equals or "." not in name:
        raise ValueError(f"command line: {argument!r} is not of the form --section.key=value")
    if name in _FIELDS and _FIELDS[name].type is str:
        return name, text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return name, _typed(name, value, "command line")
