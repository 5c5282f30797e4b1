"""The architecture, from a Hugging Face config.json; fields that the model would not compute are refused."""

import json
import logging
import math
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

log = logging.getLogger("model.config")
_OFF: tuple = (None, False, "", [], {})  # False also stands for 0
# Fields that change the computation. They must be absent or off.
_REFUSED = """
    attention_bias attention_out_bias mlp_bias qkv_bias use_qkv_bias use_bias qk_norm use_qk_norm
    qk_layernorm attention_dropout hidden_dropout resid_pdrop attention_multiplier query_pre_attn_scalar
    attn_scale attn_temperature_tuning attn_logit_softcapping final_logit_softcapping clip_qkv scale_emb
    scale_depth dim_model_base rope_interleave rope_interleaved no_rope_layers no_rope_layer_interval
    sliding_window_pattern attention_chunk_size use_bidirectional_attention alibi parallel_attn
    use_parallel_residual kv_lora_rank num_local_experts num_experts n_routed_experts quantization_config
    compression_config
""".split()
# Factors that must be absent or 1.
_FACTORS = "partial_rotary_factor embedding_multiplier residual_multiplier logits_scaling logit_scale".split()
# Not logged as unknown: fields that are checked below, and common ones that no forward pass uses.
_QUIET = """
    hidden_act rope_parameters rope_scaling layer_types max_window_layers use_sliding_window tokenizer_class
    architectures dtype torch_dtype use_cache transformers_version pad_token_id pretraining_tp _name_or_path
    is_llama_config
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
        for name in (*_REQUIRED, "num_key_value_heads", "head_dim", "sliding_window"):
            value, limit = getattr(self, name), 4096 if name == "num_hidden_layers" else 2**31
            if value is not None and not 0 < value < limit:
                raise ValueError(f"{name} = {value} is not between 1 and {limit - 1}")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} is not a positive number")
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
        known = {field.name: field.type for field in fields(cls)}
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
            for name, value in kept.items():
                _check_type(name, value, known[name])
            kept.setdefault("num_key_value_heads", kept["num_attention_heads"])
            kept.setdefault("head_dim", kept["hidden_size"] // max(1, kept["num_attention_heads"]))
            config = cls(**kept)
            _check_windows(values, config.sliding_window, config.num_hidden_layers)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        unknown = sorted(name for name in values.keys() - known - {*_QUIET, *_FACTORS} if values[name])
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
    except (ValueError, RecursionError) as error:
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
    for field in _FACTORS:
        _require(values, field, (None, 1), "1.0")
    for field in _REFUSED:
        _require(values, field, _OFF, "a model without it")
    unscaled = {"type": "default", "rope_type": "default", "partial_rotary_factor": 1.0, "rope_theta": None}
    given = [field for field in ("rope_scaling", "rope_parameters") if values.get(field)]
    for field in given:  # transformers 4 writes the former, 5 the latter
        rope = values[field]
        plain = isinstance(rope, dict) and {**rope, "rope_theta": None}.items() <= unscaled.items()
        allowed = [rope] if len(given) == 1 and (plain or _is_llama3(rope)) else []
        _require(values, field, allowed, "rotary embeddings without scaling or as Llama 3.1's, given once")
    missing = [field for field in _REQUIRED if values.get(field) is None]
    if missing:
        raise ValueError(f"no {', '.join(missing)}; is this a language model's config.json?")


def _is_llama3(rope) -> bool:
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) != "llama3":
        return False
    numbers = [rope.get(name) for name in _LLAMA3]
    known = rope.keys() <= {*_LLAMA3, "rope_type", "type", "rope_theta"}
    return known and all(isinstance(number, (int, float)) and 0 < number < 2**31 for number in numbers)


def _check_windows(values: dict, window: int | None, layers: int) -> None:
    """Raise ValueError for other fields that contradict `sliding_window`, which is one for all layers."""
    kind, only = "full_attention" if window is None else "sliding_attention", f"sliding_window = {window}"
    _require(values, "layer_types", (*_OFF, [kind] * layers), f"{kind!r} for all layers with {only}")
    _require(values, "use_sliding_window", (None, window is not None), f"{window is not None} with {only}")
    if window is not None:  # layers before this one would have none
        _require(values, "max_window_layers", _OFF, f"0 with {only}")


@cache  # a file's fields are logged once, however often it is read
def _log_unknown(where: str, names: str) -> None:
    log.info("%s: unknown fields, ignored: %s", where, names)


def _check_type(name: str, value, wanted) -> None:
    """Raise ValueError unless `value` is of the type `wanted`; an int may stand for a float."""
    if wanted is float and type(value) is int and abs(value) < 2**63:
        return
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{name} = {value!r} is not {getattr(wanted, '__name__', wanted)}")
