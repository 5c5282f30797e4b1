"""The architecture: read from a Hugging Face config.json or Mistral's params.json, or refused with the field
named.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

# Fields of config.json that change nothing in the forward pass. One that is neither here, nor a field of
# ModelConfig, nor checked in `from_dict`, is refused unless it is off (null, false, 0, empty): this model
# might not do what it asks.
IGNORED = set(
    """
    architectures auto_map dtype torch_dtype transformers_version use_cache _name_or_path
    _attn_implementation _attn_implementation_autoset attn_implementation _flash_attn_2_enabled
    _commit_hash pad_token_id unk_token_id sep_token_id decoder_start_token_id is_decoder
    is_encoder_decoder return_dict output_attentions output_hidden_states return_dict_in_generate
    output_scores id2label label2id problem_type finetuning_task task_specific_params torchscript
    use_bfloat16 tf_legacy_loss chunk_size_feed_forward remove_invalid_values pretraining_tp
    max_sequence_length max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences forced_bos_token_id
    forced_eos_token_id bad_words_ids unsloth_version unsloth_fixed base_model_name_or_path
""".split()
)  # pretraining_tp only splits matrix products into summands
# What transformers takes for a field that config.json leaves out.
_DEFAULTS: dict[str, dict] = {
    "mistral": {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
}
# Hugging Face's names of Mistral's own fields.
_PARAMS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
    "tied_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Mistral-style decoder; the fields are those of Hugging Face's config.json."""

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
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd; rotary embeddings need pairs")

    @classmethod
    def from_dict(cls, values: dict, where: str = "config.json") -> "ModelConfig":
        """Read the dictionary of a Hugging Face config.json (transformers 4 or 5).

        A field that is left out has transformers' default for the model_type; without a model_type, this
        class's. Raises ValueError, naming `where` and the field, for a missing size, a value of the wrong
        type, and whatever this model would not compute exactly.
        """

        def refuse(field: str, only: str):
            raise ValueError(f"{where}: {field} = {values[field]!r} is not supported, only {only}")

        model_type = values.get("model_type", "mistral")
        if model_type not in list(_DEFAULTS):
            refuse("model_type", "'mistral' and 'llama'")
        if values.get("hidden_act", "silu") != "silu":
            refuse("hidden_act", "'silu'")
        rope: dict = {}  # transformers 5 keeps theta in here
        for field in ("rope_parameters", "rope_scaling"):
            if values.get(field):
                unscaled = {"type": "default", "rope_type": "default", "partial_rotary_factor": 1.0}
                if (
                    rope
                    or not isinstance(values[field], dict)
                    or not (
                        {**values[field], "rope_theta": None}.items()
                        <= {**unscaled, "rope_theta": None}.items()
                    )
                ):
                    refuse(field, "rotary embeddings without scaling, given once")
                rope = values[field]
        if values.get("partial_rotary_factor") not in (None, 1.0):
            refuse("partial_rotary_factor", "1.0")
        if "Llama" not in str(values.get("tokenizer_class") or "Llama"):
            refuse("tokenizer_class", "LlamaTokenizer: a sentencepiece model")
        known = {field.name for field in fields(cls)}
        checked = {
            "hidden_act",
            "rope_parameters",
            "rope_scaling",
            "partial_rotary_factor",
            "tokenizer_class",
        }
        for field in sorted(values.keys() - known - checked - IGNORED):
            if values[field]:
                refuse(field, "a model without it (IGNORED in model/config.py lists what changes nothing)")

        missing = [field for field in _SIZES if values.get(field) is None]
        if missing:
            raise ValueError(
                f"{where}: no {', '.join(missing)}; is this the config.json of a language model?"
            )
        kept = dict(_DEFAULTS[model_type]) if "model_type" in values else {}
        null = {"sliding_window", "bos_token_id"}  # where it says something; elsewhere it is a field left out
        kept |= {key: values[key] for key in known & values.keys() if values[key] is not None or key in null}
        if "rope_theta" in rope:
            kept["rope_theta"] = rope["rope_theta"]
        if model_type == "llama":
            kept.pop("sliding_window", None)  # Llama has none, whatever the file says
        for declared in fields(cls):
            _check_type(where, declared, kept)
        kept.setdefault("num_key_value_heads", kept["num_attention_heads"])
        if "head_dim" not in kept:
            kept["head_dim"] = kept["hidden_size"] // max(1, kept["num_attention_heads"])
        try:
            return cls(**kept)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @classmethod
    def from_params(cls, values: dict, where: str = "params.json") -> "ModelConfig":
        """Read the dictionary of Mistral's own params.json; as `from_dict` raises."""
        for field, value in values.items():
            if field not in _PARAMS and value and (field, value) != ("model_type", "transformer"):
                raise ValueError(
                    f"{where}: {field} = {value!r} is not supported, only a dense decoder without it"
                )
        required = {*_SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps"}
        missing = [field for field, name in _PARAMS.items() if name in required and values.get(field) is None]
        if missing:
            raise ValueError(
                f"{where}: no {', '.join(missing)}; is this the params.json of a language model?"
            )
        named = {_PARAMS[field]: value for field, value in values.items() if field in _PARAMS}
        if named.get("rope_theta") is None:  # as mistral-inference has it
            named["rope_theta"] = 1e6 if named.get("sliding_window") is None else 1e4
        return cls.from_dict(named, where)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ModelConfig":
        """Read `path`/config.json, or params.json. Raises FileNotFoundError or ValueError with the file
        named.
        """
        for name, read in (("config.json", cls.from_dict), ("params.json", cls.from_params)):
            file = Path(path) / name
            if file.is_file():
                values = read_object(file)
                if name == "config.json" and "model_type" not in values:
                    raise ValueError(f"{file}: no model_type; is this the config.json of a language model?")
                return read(values, str(file))
        raise FileNotFoundError(
            f"{Path(path) / 'config.json'}: no such file; a model is a directory with config.json and "
            "*.safetensors, or Mistral's params.json and consolidated.safetensors"
        )

    def to_dict(self, dtype: str) -> dict:
        """The config.json of an exported checkpoint whose tensors are of `dtype` ("bfloat16", "float32")."""
        result = {
            "architectures": [
                {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}[self.model_type]
            ],
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


def _check_type(where: str, field, values: dict) -> None:
    """Raise ValueError unless values[field.name], if there, is of the field's type; an int may stand for a
    float.
    """
    if field.name not in values:
        return
    value = values[field.name]
    if field.type is float and type(value) is int and abs(value) < 2**63:
        return
    if not isinstance(value, field.type) or (isinstance(value, bool) and field.type is not bool):
        raise ValueError(
            f"{where}: {field.name} = {value!r} is not {getattr(field.type, '__name__', field.type)}"
        )
