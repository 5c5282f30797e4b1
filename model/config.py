"""The architecture, from a Hugging Face config.json; fields that the model would not compute are refused."""

import json
import logging
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

log = logging.getLogger("model.config")
_OFF: tuple = (None, False, "", [], {})  # False also stands for 0
# Fields that change the computation of these families. They must be absent or off.
_REFUSED = """
    attention_bias mlp_bias qk_norm attention_dropout num_local_experts num_experts quantization_config
    compression_config
""".split()
# Not logged as unknown: fields that are checked below, and common ones that no forward pass uses.
_QUIET = """
    hidden_act rope_parameters rope_scaling partial_rotary_factor layer_types max_window_layers
    use_sliding_window tokenizer_class architectures dtype torch_dtype use_cache transformers_version
    pad_token_id pretraining_tp _name_or_path is_llama_config
""".split()
# Of each model_type: transformers' defaults for fields that config.json omits, and what the family adds.
_FAMILIES: dict[str, dict] = {
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "llama": {"max_position_embeddings": 2048},
    "qwen2": {"num_key_value_heads": 32, "bos_token_id": None, "eos_token_id": None, "qkv_bias": True},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "bos_token_id": None,
        "eos_token_id": None,
        "qk_norm": True,
    },
}
_IMPLIED = ("qkv_bias", "qk_norm")  # by the model_type, not by a field of config.json
# Fields of rope_scaling that change the rotary frequencies, as in Llama 3.1.
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder of the Llama family; the fields are those of Hugging Face's config.json.

    A new field needs a default that changes nothing: `fingerprint` omits fields equal to their default.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None = None  # a token sees itself and the sliding_window - 1 before it; None: all
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02  # standard deviation of new weights
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    model_type: str = "mistral"  # the family, which an export names: mistral, llama, qwen2 or qwen3
    rope_scaling: dict | None = None  # of Llama 3.1: the fields of _LLAMA3
    qkv_bias: bool = False  # Qwen2's
    qk_norm: bool = False  # Qwen3's: RMSNorm of each query and key head

    def __post_init__(self):
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(
                f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd; rotary embeddings need pairs")

    @classmethod
    def from_dict(cls, values: dict, where: str = "config.json") -> "ModelConfig":
        """Read the dictionary of a Hugging Face config.json (transformers 4 or 5), from the file `where`.

        Omitted fields have transformers' defaults for the model_type; without a model_type, this class's.
        Raises ValueError, naming file and field. Logs the names of unknown fields, once.
        """
        known = {field.name for field in fields(cls)}
        try:
            _check_supported(values)
            kind = values.get("model_type")
            kept = dict(_FAMILIES[kind], rms_norm_eps=1e-6) if kind else {}
            given = {name: values[name] for name in known if name in values and name not in _IMPLIED}
            nullable = ("sliding_window", "bos_token_id")  # null means none; of the other fields, omitted
            kept |= {name: value for name, value in given.items() if value is not None or name in nullable}
            rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
            kept |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
            kept["rope_scaling"] = {name: rope[name] for name in _LLAMA3 if name in rope} or None
            if kind not in (None, "mistral"):
                kept.pop("sliding_window", None)  # transformers ignores it there, by default
            kept.setdefault("num_key_value_heads", kept["num_attention_heads"])
            kept.setdefault("head_dim", kept["hidden_size"] // kept["num_attention_heads"])
            config = cls(**kept)
            _check_windows(values, config)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        unknown = sorted(name for name in values.keys() - known - {*_QUIET} if values[name])
        if unknown:
            _log_unknown(where, ", ".join(unknown))
        return config

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ModelConfig":
        """Read `path`/config.json. Raises FileNotFoundError or ValueError, naming the file."""
        file = Path(path) / "config.json"
        if not file.is_file():
            files = "config.json, tokenizer.json or tokenizer.model, and safetensors weights"
            raise FileNotFoundError(
                f"{file}: no such file; a model is a directory with Hugging Face's {files}"
            )
        values = read_object(file)
        if values.get("model_type") is None:
            raise ValueError(f"{file}: no model_type; is this a language model's config.json?")
        return cls.from_dict(values, str(file))

    def to_dict(self, dtype: str) -> dict:
        """The config.json of an exported checkpoint whose tensors are of `dtype` ("bfloat16", "float32")."""
        result: dict = {"architectures": [f"{self.model_type.capitalize()}ForCausalLM"]}
        names = (field.name for field in fields(self) if field.name not in _IMPLIED)
        result |= {name: getattr(self, name) for name in names}
        if self.model_type != "mistral":
            del result["sliding_window"]
        if self.rope_scaling:
            result["rope_scaling"] = {"rope_type": "llama3"} | self.rope_scaling
        return result | dict(attention_dropout=0.0, hidden_act="silu", torch_dtype=dtype, use_cache=True)


def read_object(file: Path) -> dict:
    """The JSON object in a file. Raises ValueError, naming the file, if there is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: not a JSON object")
    return values


def _require(values: dict, field: str, allowed, only: str) -> None:
    if values.get(field) not in allowed:
        raise ValueError(f"{field} = {values[field]!r} is not supported, only {only}")


def _check_supported(values: dict) -> None:
    """Raise ValueError, naming the field, for a model that would be computed wrongly."""
    _require(values, "model_type", (None, *_FAMILIES), ", ".join(map(repr, _FAMILIES)))
    _require(values, "hidden_act", (None, "silu"), "'silu'")
    _require(values, "partial_rotary_factor", (None, 1), "1.0")
    for field in _REFUSED:
        _require(values, field, _OFF, "a model without it")
    for field in ("rope_scaling", "rope_parameters"):  # transformers 4 writes the former, 5 the latter
        rope = values.get(field) or {}
        scaling = {name for name in rope if (name, rope[name]) != ("partial_rotary_factor", 1.0)}
        known = {"default": set(), "llama3": {*_LLAMA3}}.get(
            rope.get("rope_type", rope.get("type", "default"))
        )
        if scaling - {"rope_type", "type", "rope_theta"} != known:
            raise ValueError(f"{field} = {rope!r} is not supported, only no scaling, or as in Llama 3.1")
    missing = [field for field in _REQUIRED if values.get(field) is None]
    if missing:
        raise ValueError(f"no {', '.join(missing)}; is this a language model's config.json?")


def _check_windows(values: dict, config: ModelConfig) -> None:
    """Raise ValueError for other fields that contradict `sliding_window`, which is one for all layers."""
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    only = f"with sliding_window = {config.sliding_window}"
    _require(values, "layer_types", (*_OFF, [kind] * config.num_hidden_layers), f"{kind!r} in all {only}")
    if config.sliding_window is None:
        _require(values, "use_sliding_window", _OFF, f"False {only}")


@cache  # a file's fields are logged once, however often it is read
def _log_unknown(where: str, names: str) -> None:
    log.info("%s: unknown fields, ignored: %s", where, names)
