"""The architecture, from a Hugging Face config.json; what the model would not compute is refused by field."""

import json
import logging
import math
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

log = logging.getLogger("model.config")
# Fields that change the computation. They must be absent or off: null, false, 0, empty.
_REFUSED = """
    attention_bias attention_out_bias mlp_bias qkv_bias use_qkv_bias use_bias qk_norm use_qk_norm qk_layernorm
    attention_dropout hidden_dropout resid_pdrop attention_multiplier query_pre_attn_scalar attn_scale
    attn_temperature_tuning attn_logit_softcapping final_logit_softcapping clip_qkv scale_emb scale_depth
    dim_model_base rope_interleave no_rope_layers no_rope_layer_interval layer_types max_window_layers
    use_sliding_window sliding_window_pattern attention_chunk_size use_bidirectional_attention alibi
    parallel_attn use_parallel_residual kv_lora_rank num_local_experts num_experts n_routed_experts
    quantization_config compression_config
""".split()
# The same of factors, which must be absent or 1.
_FACTORS = "partial_rotary_factor embedding_multiplier residual_multiplier logits_scaling logit_scale".split()
# Not logged as unknown: what `_check_supported` reads, and what most files have and no forward pass uses.
_QUIET = """
    hidden_act rope_parameters rope_scaling tokenizer_class architectures dtype torch_dtype use_cache
    transformers_version pad_token_id pretraining_tp _name_or_path
""".split()
# What transformers takes for a field that config.json leaves out.
_DEFAULTS: dict[str, dict] = {
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "llama": {"max_position_embeddings": 2048},
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Mistral-style decoder; the fields are those of Hugging Face's config.json.

    A new field has a default under which nothing changes: `fingerprint` omits fields equal to their default.
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
    initializer_range: float = 0.02  # standard deviation of freshly drawn weights
    bos_token_id: int | None = 1
    eos_token_id: int | list = 2
    model_type: str = "mistral"  # or llama, which is the same without a window: what an export calls itself

    def __post_init__(self):
        for name in (*_SIZES, "num_key_value_heads", "head_dim", "sliding_window"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 2**31:
                raise ValueError(f"{name} = {value} is no size")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} is not a positive number")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(f"num_attention_heads = {heads}: no multiple of num_key_value_heads = {groups}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd; rotary embeddings need pairs")

    @classmethod
    def from_dict(cls, values: dict, where: str = "config.json") -> "ModelConfig":
        """Read the dictionary of a Hugging Face config.json (transformers 4 or 5).

        A field that is left out has transformers' default for the model_type; without a model_type, this
        class's. Raises ValueError, naming `where` and the field, for a missing size, a value of the wrong
        type, and a field that changes the computation. Logs the names of unknown fields, once.
        """
        _check_supported(values, where)
        missing = [field for field in _SIZES if values.get(field) is None]
        if missing:
            raise ValueError(f"{where}: no {', '.join(missing)}; is this a language model's config.json?")
        known = {field.name for field in fields(cls)}
        unknown = sorted(field for field in values.keys() - known - {*_QUIET, *_FACTORS} if values[field])
        if unknown:
            _log_unknown(where, ", ".join(unknown))

        kept = {"rms_norm_eps": 1e-6} | _DEFAULTS[values["model_type"]] if "model_type" in values else {}
        null = {"sliding_window", "bos_token_id"}  # where it says something; elsewhere it is a field left out
        kept |= {key: values[key] for key in known & values.keys() if values[key] is not None or key in null}
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if "rope_theta" in rope:
            kept["rope_theta"] = rope["rope_theta"]
        if kept.get("model_type") == "llama":
            kept.pop("sliding_window", None)  # Llama has none, whatever the file says
        for field in fields(cls):
            if field.name in kept:
                _check_type(where, field, kept[field.name])
        kept.setdefault("num_key_value_heads", kept["num_attention_heads"])
        kept.setdefault("head_dim", kept["hidden_size"] // max(1, kept["num_attention_heads"]))
        try:
            return cls(**kept)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ModelConfig":
        """Read `path`/config.json. Raises FileNotFoundError or ValueError with the file named."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file; a model is a directory as Hugging Face lays it out: config.json, "
                "tokenizer.model, and model.safetensors or its shards with their index"
            )
        values = read_object(file)
        if "model_type" not in values:
            raise ValueError(f"{file}: no model_type; is this a language model's config.json?")
        return cls.from_dict(values, str(file))

    def to_dict(self, dtype: str) -> dict:
        """The config.json of an exported checkpoint whose tensors are of `dtype` ("bfloat16", "float32")."""
        result = {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "torch_dtype": dtype,
            "use_cache": True,
        }
        if self.model_type == "llama":
            del result["sliding_window"]
        return result


def read_object(file: Path) -> dict:
    """The JSON object in a file. Raises ValueError, naming the file, if there is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: not a JSON object")
    return values


def _check_supported(values: dict, where: str) -> None:
    """Raise ValueError, naming the field, for what the model would not compute exactly."""

    def require(met: bool, field: str, only: str) -> None:
        if not met:
            raise ValueError(f"{where}: {field} = {values[field]!r} is not supported, only {only}")

    require(values.get("model_type", "mistral") in list(_DEFAULTS), "model_type", "'mistral' and 'llama'")
    require(values.get("hidden_act") in (None, "silu"), "hidden_act", "'silu'")
    for field in _FACTORS:
        require(values.get(field) in (None, 1), field, "1.0")
    for field in _REFUSED:
        require(not values.get(field), field, "a model without it")
    tokenizer = str(values.get("tokenizer_class") or "Llama")
    require("Llama" in tokenizer, "tokenizer_class", "LlamaTokenizer: a sentencepiece model")
    unscaled = {"type": "default", "rope_type": "default", "partial_rotary_factor": 1.0, "rope_theta": None}
    given = [field for field in ("rope_scaling", "rope_parameters") if values.get(field)]
    for field in given:  # transformers 4 has the former, 5 the latter
        rope = values[field]
        plain = isinstance(rope, dict) and {**rope, "rope_theta": None}.items() <= unscaled.items()
        require(plain and len(given) == 1, field, "rotary embeddings without scaling, given once")


@cache  # the log has a file's fields once, however often the file is read
def _log_unknown(where: str, names: str) -> None:
    log.info("%s: unknown fields, ignored: %s", where, names)


def _check_type(where: str, field, value) -> None:
    """Raise ValueError unless `value` is of the field's type; an int may stand for a float."""
    if field.type is float and type(value) is int and abs(value) < 2**63:
        return
    if not isinstance(value, field.type) or (isinstance(value, bool) and field.type is not bool):
        wanted = getattr(field.type, "__name__", field.type)
        raise ValueError(f"{where}: {field.name} = {value!r} is not {wanted}")
