"""Recipes: settings (spin/config.py) from TOML and the command line, checked, and written back."""

import difflib
import json
import math
import tomllib
from collections.abc import Iterable
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

from model.attention import BACKENDS
from model.mistral import RECOMPUTED
from model.sampling import LOWEST_TEMPERATURE
from model.tokenizer import TEMPLATES
from spin.config import Config
from spin.engine.files import read_toml
from spin.loss import LOSSES

_SECTIONS = get_type_hints(Config)  # {"run": Run, …}
_FIELDS = {f"{section}.{f.name}": f for section, kind in _SECTIONS.items() for f in fields(kind)}
_CHOICES = {  # by key, in every section
    "save_dtype": ("bfloat16", "float32"),
    "attention": ("auto", *BACKENDS),
    "turns": ("first", "last"),
    "empty": ("refuse", "drop"),
    "template": TEMPLATES,
    "dtype": ("bfloat16", "float32"),
    "optimizer": ("rmsprop", "adamw"),
    "second_moment": ("float32", "bfloat16"),
    "activation_checkpointing": tuple(RECOMPUTED),
    "objective": ("spin", "sft"),
    "loss": tuple(LOSSES),
    "reference": ("opponent", "base", "mixture", "none"),
    "replay_share": ("all", "equal"),
}
_POSITIVE = {"max_length", "max_new_tokens", "batch_size", "epochs", "max_grad_norm", "token_budget"}
_POSITIVE |= {"mu", "samples", "logit_chunk", "checkpoint_every", "keep_checkpoints", "heldout_every"}
_NOT_NEGATIVE = {"shard_size", "num_prompts", "temperature", "top_k", "slots", "lr", "schedule_epochs"}
_SHARES = {"top_p", "share", "alpha"}
_NOT_NEGATIVE |= {"beta", "replay", "heldout_pairs", "limit", "export_every", "continue_to"}


class Recipe:
    """A TOML file ("": none) and the command line's overrides; `at(n)` gives the settings of iteration n.

    Raises ValueError naming the file (or "command line"), the key, and the nearest known one.
    """

    def __init__(self, path: str | Path, overrides: Iterable[str] = ()):
        self.path, self._source = Path(path), str(path) or "command line"
        if path and not self.path.exists():
            raise FileNotFoundError(f"{path}: no such recipe; configs/ has some")
        table = read_toml(self.path) if path else {}
        iterations = table.pop("iteration", [])
        if not isinstance(iterations, list) or not all(isinstance(values, dict) for values in iterations):
            raise ValueError(f"{path}: iterations are tables, written [[iteration]]")
        self._common = _flatten(table, str(path))
        self._iterations = [_flatten(t, f"{path}: iteration {i}") for i, t in enumerate(iterations)]
        for name in (name for values in self._iterations for name in values):
            if name.split(".")[0] not in ("data", "generate", "train", "evaluate"):
                raise ValueError(
                    f"{path}: {name} can't differ between iterations; move it out of [[iteration]]"
                )
        self._overrides = dict(_parse_override(argument) for argument in overrides)
        for n in range(len(iterations) or 1):
            self.at(n)

    def at(self, iteration: int) -> Config:
        """Settings of one iteration; the base, -1, has those of iteration 0."""
        values = dict(self._common)
        if self._iterations:
            values |= self._iterations[max(0, min(iteration, len(self._iterations) - 1))]
        try:
            return build(values | self._overrides)
        except ValueError as error:
            where = f"{self.path}, iteration {max(0, iteration)}" if self._iterations else self._source
            if str(error).split()[0] in self._overrides:
                where = "command line"
            raise ValueError(f"{where}: {error}") from None


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
        if key == "warmup" and not 0 <= value < 1 or key in _SHARES and not 0 < value <= 1:
            raise ValueError(
                f"{name} = {value!r} is out of range, {'[0, 1)' if key == 'warmup' else '(0, 1]'}"
            )
        if key == "temperature" and 0 < value < LOWEST_TEMPERATURE:
            raise ValueError(f"{name} = {value!r} is too small; 0 is greedy")
    _check_combinations(config)
    return config


def _check_combinations(config: Config) -> None:
    """Raise ValueError for settings that exclude or need each other."""
    data = config.data
    if not config.run.dir:
        raise ValueError("run.dir is empty; it names the directory of all results")
    if config.generate.fixed_slots and not config.generate.slots:
        raise ValueError("generate.fixed_slots needs generate.slots, on which the text depends")
    if config.generate.samples > 1 and not config.generate.temperature:
        raise ValueError("generate.samples > 1 needs a temperature: greedy responses are all the same")
    if config.train.loss == "t-spin" and data.pairs:
        raise ValueError("train.loss = t-spin needs the base model's responses, which data.pairs has none of")
    if bool(data.prompt_column) != bool(data.response_column):
        raise ValueError("data.prompt_column and data.response_column go together: set both or none")
    if not 0 < data.max_prompt_length < data.max_length:
        raise ValueError(
            f"data.max_prompt_length = {data.max_prompt_length} leaves no room for a response in "
            f"data.max_length = {data.max_length}"
        )
    for name, part in (("train", config.train), ("sft", config.sft)):
        if part.second_moment != "float32" and part.optimizer != "rmsprop":
            raise ValueError(
                f"{name}.second_moment = {part.second_moment!r} needs {name}.optimizer = rmsprop"
            )
        if part.compile and part.activation_checkpointing == "selective":
            raise ValueError(
                f'{name}.compile and {name}.activation_checkpointing = "selective" exclude each other; '
                'compiled, "none" keeps about as little'
            )
        for key in ("epochs", "continue_to"):
            if getattr(part, key) > (part.schedule_epochs or part.epochs):
                raise ValueError(
                    f"{name}.schedule_epochs = {part.schedule_epochs} ends before {name}.{key} = "
                    f"{getattr(part, key)}: the learning rate would be 0"
                )


def flat(config: Config) -> dict[str, Any]:
    """{"section.key": value} of every setting."""
    return {name: attrgetter(name)(config) for name in _FIELDS}


def recorded(config: Config, sections: tuple[str, ...]) -> dict[str, Any]:
    """{"section.key": value} of the given sections' settings that affect results."""
    names = [name for name, f in _FIELDS.items() if not f.metadata.get("free")]
    return {name: attrgetter(name)(config) for name in names if name.split(".")[0] in sections}


def to_toml(config: Config) -> str:
    """The resolved settings as a recipe."""
    lines = []
    for section in _SECTIONS:
        lines.append(f"[{section}]")
        for key, value in vars(getattr(config, section)).items():
            lines.append(f"{key} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def read_config(path: Path) -> dict[str, object]:
    """{"section.key": value} of a file that `to_toml` wrote."""
    return _flatten(read_toml(path), str(path))


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
            raise ValueError(f"{where}: {section} is outside of a section; {_nearest(section)}")
        for key, value in entries.items():
            values[f"{section}.{key}"] = _typed(f"{section}.{key}", value, where)
    return values


def _typed(name: str, value, where: str):
    if name not in _FIELDS:
        raise ValueError(f"{where}: unknown setting {name}; {_nearest(name)}")
    wanted = _FIELDS[name].type
    assert isinstance(wanted, type)  # a text only where annotations are postponed
    if wanted is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not wanted:
        raise ValueError(f"{where}: {name} must be {wanted.__name__}, not {value!r:.60}")
    return value


def _nearest(name: str) -> str:
    by_key = [known for known in _FIELDS if known.split(".")[1] == name.split(".")[-1]]
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
