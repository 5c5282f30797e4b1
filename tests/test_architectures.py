"""Published configurations give transformers' model; fields that would be computed wrongly are refused."""

import json

import pytest
import torch

from model.attention import Segments
from model.config import ModelConfig
from model.mistral import Mistral
from tests.helpers import LLAMA3 as SCALING
from tests.helpers import small_config, small_model

# config.json as the Hub has it, and the number of parameters as the model's page states it.
COMMON = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "transformers_version": "4.34.0.dev0",
    "torch_dtype": "bfloat16",
}
MISTRAL = COMMON | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "vocab_size": 32000,
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
}
SMOLLM2 = LLAMA | {
    "bos_token_id": 1,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
LLAMA3 = LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2_LARGER = QWEN2 | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
}
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
}
PUBLISHED = {
    "Mistral-7B-v0.1": (MISTRAL, 7_241_732_096),
    "Mistral-7B-Instruct-v0.2": (
        MISTRAL | {"rope_theta": 1e6, "sliding_window": None, "attention_dropout": 0.0},
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        MISTRAL | {"rope_theta": 1e6, "sliding_window": None, "vocab_size": 32768},
        7_248_023_552,
    ),
    "zephyr-7b-beta": (MISTRAL | {"_name_or_path": "x", "pad_token_id": 2}, 7_241_732_096),
    "Llama-2-7b": (LLAMA, 6_738_415_616),
    "Llama-2-13b": (
        LLAMA
        | {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
        },
        13_015_864_320,
    ),
    "Llama-2-70b": (
        LLAMA
        | {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_hidden_layers": 80,
            "num_key_value_heads": 8,
        },
        68_976_648_192,
    ),
    "TinyLlama-1.1B": (
        LLAMA
        | {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
        },
        1_100_048_384,
    ),
    "SmolLM2-135M": (SMOLLM2, 134_515_008),
    "Llama-3.2-1B": (LLAMA3, 1_235_814_400),
    "Qwen2.5-0.5B": (QWEN2, 494_032_768),
    "Qwen2.5-1.5B": (QWEN2_LARGER, 1_543_714_304),
    "Qwen3-0.6B": (QWEN3, 596_049_920),
    "tied, explicit head_dim": (
        MISTRAL | {"hidden_size": 64, "head_dim": 24, "tie_word_embeddings": True, "num_hidden_layers": 2},
        None,
    ),
}


def reference_class(config: dict):
    import transformers

    name = config["model_type"].capitalize()
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_gives_transformers_parameters(name):
    values, count = PUBLISHED[name]
    config_class, model_class = reference_class(values)
    with torch.device("meta"):
        ours = Mistral(ModelConfig.from_dict(values))
        theirs = model_class(config_class(**values))

    def shapes(model):
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    assert shapes(ours) == shapes(theirs)
    if count:
        assert sum(parameter.numel() for parameter in ours.parameters()) == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_exported_means_the_same_to_transformers(name):
    values, _ = PUBLISHED[name]
    config_class, _ = reference_class(values)
    exported = ModelConfig.from_dict(values).to_dict("bfloat16")
    ours, theirs = config_class(**exported), config_class(**values)
    for field in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "hidden_act",
        "max_position_embeddings",
        "model_type",
        "architectures",
    ):
        if field != "architectures" or "architectures" in values:
            # Qwen2's configuration has no head_dim until config.json has one.
            assert getattr(ours, field) == getattr(theirs, field, getattr(ours, field)), field
    assert getattr(ours, "sliding_window", None) == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize("model_type", ["mistral", "llama", "qwen2", "qwen3"])
def test_fields_that_are_left_out_have_transformers_defaults(model_type):
    sizes = dict(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=8
    )
    if model_type.startswith("qwen"):
        sizes["num_key_value_heads"] = 8  # their default, 32, divides no 8 heads
    ours = ModelConfig.from_dict(sizes | {"model_type": model_type})
    theirs = reference_class({"model_type": model_type})[0](**sizes)
    for field in (
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "initializer_range",
    ):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.head_dim == (128 if model_type == "qwen3" else 8)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize(
    "changes",
    [
        dict(sliding_window=17),
        dict(model_type="llama", rope_scaling=SCALING),
        dict(model_type="qwen2", qkv_bias=True),
        dict(model_type="qwen3", qk_norm=True),
    ],
)
def test_config_is_read_as_transformers_writes_it(changes, tmp_path):
    ours = small_config(rope_theta=5e5, **changes)
    model_type = ours.model_type
    config_class, _ = reference_class({"model_type": model_type})
    config_class(**ours.to_dict("float32")).save_pretrained(tmp_path)
    assert ModelConfig.from_pretrained(tmp_path) == ours


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "mixtral"),
        ("model_type", "gemma2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        ("rope_scaling", {"rope_type": "llama3", **SCALING, "attention_factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("quantization_config", {"bits": 4}),
        ("num_local_experts", 8),
        ("num_experts", 8),
        ("layer_types", ["full_attention", "full_attention", "sliding_attention"]),
        ("layer_types", ["sliding_attention"] * 3),
        ("layer_types", ["full_attention"] * 2),
        ("layer_types", ["linear_attention"] * 3),
        ("use_sliding_window", True),
        ("qk_norm", True),
        ("num_key_value_heads", 3),
        ("head_dim", 5),
    ],
)
def test_an_architecture_that_would_be_computed_wrongly_is_refused_by_field(field, value):
    with pytest.raises(ValueError, match=f"config.json: .*{field}"):
        ModelConfig.from_dict(small_config().to_dict("float32") | {field: value})


FULL, SLIDING = {"layer_types": ["full_attention"] * 3}, {"layer_types": ["sliding_attention"] * 3}


@pytest.mark.parametrize(
    "window, more",
    [
        (None, FULL),
        (None, {"use_sliding_window": False, "max_window_layers": 28}),
        (5, SLIDING),
        (5, {"use_sliding_window": True, "max_window_layers": 0}),
    ],
)
def test_windows_stated_in_other_fields_are_read_if_they_agree_and_transformers_computes_the_same(
    window, more
):
    import transformers

    model = small_model(sliding_window=window)
    values = model.config.to_dict("float32") | more
    assert ModelConfig.from_dict(values) == model.config
    values.pop("architectures")
    config = transformers.MistralConfig(**values)
    config._attn_implementation = "eager"
    theirs = transformers.MistralForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict())
    ids = torch.arange(3, 23)
    with torch.no_grad():
        ours = model(ids, torch.arange(20), Segments.causal([20]))
        torch.testing.assert_close(ours, theirs(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [FULL, {"layer_types": ["a"]}])
def test_fields_that_contradict_the_window_are_refused(more):
    values = small_config(sliding_window=5).to_dict("float32") | more
    with pytest.raises(ValueError, match=f"config.json: {next(iter(more))} = .* with sliding_window = 5"):
        ModelConfig.from_dict(values)


def test_llama_has_no_window_whatever_its_other_fields_say():
    values = small_config(model_type="llama").to_dict("float32") | {"sliding_window": 4096}
    assert ModelConfig.from_dict(values | FULL | {"max_window_layers": 2}).sliding_window is None
    with pytest.raises(ValueError, match="config.json: layer_types"):
        ModelConfig.from_dict(values | SLIDING)


def test_qwen_with_windows_in_some_layers_is_refused():
    values = small_config(model_type="qwen2", qkv_bias=True).to_dict("float32")
    assert (
        ModelConfig.from_dict(values | {"sliding_window": 4096, "max_window_layers": 2}).sliding_window
        is None
    )
    with pytest.raises(ValueError, match="config.json: use_sliding_window"):
        ModelConfig.from_dict(values | {"use_sliding_window": True})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_no_unknown_field(name, caplog):
    with caplog.at_level("INFO"):
        ModelConfig.from_dict(PUBLISHED[name][0], f"published: {name}")
    assert not caplog.records


def test_unknown_fields_are_logged_once_by_name(tmp_path, caplog):
    more = {
        "a_field_of_next_year": 1,
        "unsloth_version": "2024.9",
        "off": None,
        "empty": [],
        "hidden_act": "silu",
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(small_config().to_dict("float32") | more))
    with caplog.at_level("INFO"):
        assert (
            ModelConfig.from_pretrained(tmp_path) == ModelConfig.from_pretrained(tmp_path) == small_config()
        )
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("model.config", "INFO", f"{file}: unknown fields, ignored: a_field_of_next_year, unsloth_version")
    ]


def test_fields_that_are_off_are_ignored():
    values = small_config().to_dict("float32")
    more = {
        "qk_norm": False,
        "num_experts": 0,
        "layer_types": None,
        "rope_scaling": None,
        "tokenizer_class": "LlamaTokenizerFast",
        "pretraining_tp": 2,
        "partial_rotary_factor": 1.0,
    }
    assert ModelConfig.from_dict(values | more) == small_config()
    unscaled = {
        "rope_scaling": {"type": "default", "rope_type": "default"},
        "eos_token_id": [2, 7],
        "bos_token_id": None,
    }
    assert ModelConfig.from_dict(values | unscaled) == small_config(eos_token_id=[2, 7], bos_token_id=None)


def test_files_that_are_no_configuration_are_refused_by_name(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="config.json: no such file.*tokenizer.json.*safetensors"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ValueError, match="config.json: not JSON .*utf-8"):
        ModelConfig.from_pretrained(tmp_path)
    for text, message in (
        ("{", "not JSON"),
        ("1" * 5000, "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no model_type"),
        ('{"model_type": null}', "no model_type"),
        (json.dumps({"model_type": "llama"}), "no vocab_size"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json: {message}"):
            ModelConfig.from_pretrained(tmp_path)
