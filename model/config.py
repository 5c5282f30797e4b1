"""The architecture: read from a Hugging Face config.json, or refused with the field named."""

import json
from dataclasses import dataclass, fields
from pathlib import Path


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
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self):
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

        Fields that change nothing in the forward pass are ignored. Raises ValueError, naming `where` and the
        field, for a missing size and for whatever this model would not compute exactly.
        """

        def refuse(field: str, only: str):
            raise ValueError(f"{where}: {field} = {values[field]!r} is not supported, only {only}")

        if values.get("model_type", "mistral") not in ("mistral", "llama"):
            refuse("model_type", "'mistral' and 'llama'")
        if values.get("hidden_act", "silu") != "silu":
            refuse("hidden_act", "'silu'")
        for field in ("attention_bias", "mlp_bias", "quantization_config", "rope_scaling"):
            if values.get(field):
                refuse(field, "a model without it")
        if values.get("pretraining_tp", 1) != 1:
            refuse("pretraining_tp", "1")
        rope = values.get("rope_parameters") or {}  # transformers 5 keeps theta in here
        if rope.get("rope_type", "default") != "default":
            refuse("rope_parameters", "rope_type 'default'")

        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [field for field in sizes if field not in values]
        if missing:
            raise ValueError(f"{where}: no {', '.join(missing)}; is this the config.json of a language model?")
        known = {field.name for field in fields(cls)}
        kept = {key: value for key, value in values.items() if key in known and value is not None}
        kept.setdefault("num_key_value_heads", kept["num_attention_heads"])
        kept.setdefault("head_dim", kept["hidden_size"] // kept["num_attention_heads"])
        if "rope_theta" in rope:
            kept["rope_theta"] = rope["rope_theta"]
        if values.get("model_type") == "llama":
            kept.pop("sliding_window", None)  # Llama has none, whatever the file says
        return cls(**kept)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ModelConfig":
        """Read `path`/config.json. Raises FileNotFoundError or ValueError with the file named."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; a model is a directory with config.json and *.safetensors")
        try:
            values = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not JSON ({error})") from None
        return cls.from_dict(values, where=str(file))

    def to_dict(self, dtype: str) -> dict:
        """The config.json of an exported checkpoint whose tensors are of `dtype` ("bfloat16", "float32")."""
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "torch_dtype": dtype,
            "use_cache": True,
        }
