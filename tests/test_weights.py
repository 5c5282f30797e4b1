"""Checkpoint directories: exact round trips, what transformers makes of them, and refusals."""

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.attention import Segments
from model.config import ModelConfig
from model.mistral import Mistral
from model.weights import INDEX, Checkpoint, fingerprint, load_model, save_model, write_checkpoint
from tests.helpers import ROOT, environment, random_ids, reference, small_config, small_model


def saved(tmp_path, dtype=torch.float32, max_shard_bytes=10**9, **shape):
    model = small_model(**shape)
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    write_checkpoint(tmp_path / "m", model.config, shapes, parameters.__getitem__, dtype, max_shard_bytes)
    return model, tmp_path / "m"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact_in_one_file_and_in_shards(tmp_path, tied, max_shard_bytes, dtype):
    model, path = saved(tmp_path, dtype, max_shard_bytes, tie_word_embeddings=tied)
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    if max_shard_bytes == 10**9:
        assert shards == ["model.safetensors"]
    else:
        assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        assert all(file.stat().st_size < 25_000 for file in path.glob("*.safetensors"))
    loaded = load_model(path, dtype)
    expected = {name: parameter.to(dtype) for name, parameter in model.named_parameters()}
    assert dict(loaded.named_parameters()).keys() == expected.keys()
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == dtype and torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize(
    "shape",
    [dict(), dict(tie_word_embeddings=True), dict(sliding_window=6, head_dim=16), dict(model_type="llama")],
)
def test_transformers_loads_the_directory_and_gives_the_same_logits(tmp_path, max_shard_bytes, shape):
    from transformers import AutoModelForCausalLM

    model, path = saved(tmp_path, max_shard_bytes=max_shard_bytes, **shape)
    other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert type(other).__name__ == ("LlamaForCausalLM" if "model_type" in shape else "MistralForCausalLM")
    assert (other.generation_config.bos_token_id, other.generation_config.eos_token_id) == (1, 2)
    ids = torch.tensor(random_ids(random.Random(0), 25))
    with torch.no_grad():
        ours = model(ids, torch.arange(25), Segments.causal([25]))
        torch.testing.assert_close(ours, other(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_what_transformers_writes_loads_with_the_same_logits(tmp_path):
    model = small_model(num_key_value_heads=1)
    reference(model).save_pretrained(tmp_path / "hf")
    ids = torch.arange(3, 20)
    with torch.no_grad():
        ours = load_model(tmp_path / "hf", torch.float32)(ids, torch.arange(17), Segments.causal([17]))
        torch.testing.assert_close(ours, model(ids, torch.arange(17), Segments.causal([17])))


def change(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def test_a_file_is_laid_out_as_safetensors_own_writer_would(tmp_path):
    model, path = saved(tmp_path, torch.bfloat16)
    content = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0 and content[8] == ord("{")  # tensors are aligned
    with safe_open(path / "model.safetensors", framework="pt") as ours:
        assert ours.metadata() == {"format": "pt"}
    state = {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}
    save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert len(content) - 8 - length == sum(tensor.nbytes for tensor in state.values())
    ours, theirs = load_file(path / "model.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_any_float_dtype_is_read_as_torch_casts_it(tmp_path, source, target):
    model, path = saved(tmp_path, source)
    for name, parameter in load_model(path, target).named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name].to(source).to(target)), name


def test_every_parameter_is_filled_exactly_once(tmp_path):
    _, path = saved(tmp_path)
    with torch.device("meta"):
        model = Mistral(small_config())
    model.to_empty(device="cpu")
    filled = []

    def shard(parameter):
        filled.append(parameter)
        parameter.data.fill_(float("nan"))
        return parameter, slice(None)

    Checkpoint(path).fill(model, shard)
    parameters = list(model.parameters())
    assert len(filled) == len(parameters) and {id(p) for p in filled} == {id(p) for p in parameters}
    assert not any(p.isnan().any() for p in parameters)


def test_rows_are_those_of_the_whole_tensor(tmp_path):
    model, path = saved(tmp_path)
    checkpoint = Checkpoint(path)
    for name in (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "lm_head.weight",
    ):
        whole = dict(model.named_parameters())[name]
        for start in range(16):
            for stop in (start, start + 1, start + 5, 16, len(whole)):
                assert torch.equal(checkpoint.read(name, slice(start, stop)), whole[start:stop]), (
                    name,
                    start,
                    stop,
                )


RANKS = """
import sys, torch
from pathlib import Path
from model.weights import load_model
from spin.engine.distributed import ranks, sharded_model, whole
path = Path(sys.argv[1])
with ranks() as group:
    model = sharded_model(path, group, torch.float32, attention="sdpa")
    expected = load_model(path, torch.float32)
    assert model.attention == "sdpa"
    shards = [parameter.to_local().shape[0] for parameter in model.parameters()]
    both = zip(model.named_parameters(), expected.named_parameters(), strict=True)
    for (name, parameter), (same, other) in both:
        assert name == same and torch.equal(whole(parameter), other), name
    Path(sys.argv[2], f"rank{group.rank}").write_text(str(sum(shards)))
"""


@pytest.mark.slow
def test_three_ranks_hold_uneven_shards_of_the_very_tensors(tmp_path):
    model, path = saved(tmp_path)  # 97, 32 and 16 rows, none a multiple of 3
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run(
        [*launch, str(script), str(path), str(tmp_path)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=environment() | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    rows = [int((tmp_path / f"rank{rank}").read_text(encoding="utf-8")) for rank in range(3)]
    assert sum(rows) == sum(len(parameter) for parameter in model.parameters()) and rows[0] > rows[2]


def test_the_attention_backend_that_is_asked_for_reaches_the_model(tmp_path):
    _, path = saved(tmp_path)
    assert load_model(path).attention == "auto"
    assert load_model(path, attention="sdpa").attention == "sdpa"
    with pytest.raises(ValueError, match="'torch-flash' cannot be used"):
        load_model(path, attention="torch-flash")
    model = Mistral(small_config(), attention="torch-flash")
    with pytest.raises(ValueError, match="'torch-flash' cannot be used"):
        model(torch.tensor([3]), torch.tensor([0]), Segments.causal([1]))


def test_a_tokenizers_files_and_the_sources_generation_config_travel_along(tmp_path, letters):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(letters.file.read_bytes())
    for name in (
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "pytorch_model.bin",
    ):
        (source / name).write_text(name)
    save_model(small_model(), tmp_path / "m", torch.float32, tokenizer=source)
    assert (tmp_path / "m/tokenizer.model").read_bytes() == letters.file.read_bytes()
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "m" / name).read_text(encoding="utf-8") == name
    assert not (tmp_path / "m/pytorch_model.bin").exists()


# Refusals.


def test_odd_headers_are_refused_in_words(tmp_path):
    _, path = saved(tmp_path)
    change(path, lambda t: t.update({"a\nb": torch.zeros(2)}))
    with pytest.raises(ValueError, match="has unknown a\nb"):
        load_model(path)
    file = path / "model.safetensors"
    for header in (b"[" * 5000, b'{"a": {"data_offsets": ["x", 9e99]}}', b'{"a": 1}'):
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match="model.safetensors: not a complete safetensors file"):
            Checkpoint(path)


NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop(NORM), f"lacks {NORM}"),
        (
            lambda t: t.update({"lm_head.bias": torch.zeros(97)}),
            "model.safetensors: has unknown lm_head.bias",
        ),
        (
            lambda t: t.update({HEAD: torch.zeros(97, 31)}),
            r"model.safetensors: lm_head.weight has shape \[97, 31\].*\[97, 32\]",
        ),
        (lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)}), f"model.safetensors: {NORM} is I8"),
        (
            lambda t: t.update({NORM: torch.zeros(32, dtype=torch.float64)}),
            f"model.safetensors: {NORM} is F64",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_architecture_are_refused_by_name(tmp_path, edit, message):
    _, path = saved(tmp_path)
    change(path, edit)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_rotary_frequencies_that_old_files_of_llama_keep_are_no_parameters(tmp_path):
    model, path = saved(tmp_path)
    change(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert torch.equal(load_model(path, torch.float32).lm_head.weight, model.lm_head.weight)


def test_a_tied_matrix_may_be_stored_twice(tmp_path):
    _, path = saved(tmp_path, tie_word_embeddings=True)
    change(path, lambda t: t.update({HEAD: t["model.embed_tokens.weight"].clone()}))
    load_model(path)
    change(path, lambda t: t.update({HEAD: torch.tensor(1.0)}))
    with pytest.raises(ValueError, match=rf"{HEAD} has shape \[\]"):
        load_model(path)


def test_damaged_and_absent_files_are_refused_by_name(tmp_path):
    _, path = saved(tmp_path, max_shard_bytes=20_000)
    shard = sorted(path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    for damaged in (
        b"",
        content[:-100],
        content[:4],
        content[:200],
        b"\xff" * 8 + content[8:],
        content[:8] + b"}" + content[9:],
    ):
        shard.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=f"{shard.name}: not a complete safetensors file.*download it again"
        ):
            Checkpoint(path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"No such file.*{shard.name}"):
        Checkpoint(path)


def test_a_file_that_cannot_be_opened_is_not_called_absent(tmp_path, monkeypatch):
    _, path = saved(tmp_path)

    def refuse(file, *_):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match="Permission denied: .*model.safetensors"):
        Checkpoint(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("{}", "not an index of safetensors files: no weight_map"),
        ('{"weight_map": []}', "not an index"),
        ('{"weight_map": {}}', "not an index"),
        ('{"weight_map": {"lm_head.weight": 1}}', "points to 1, not to a .safetensors file"),
        (
            '{"weight_map": {"lm_head.weight": "../m/model.safetensors"}}',
            r"points to \.\./m/model.safetensors",
        ),
        ('{"weight_map": {"lm_head.weight": "pytorch_model.bin"}}', "points to pytorch_model.bin"),
    ],
)
def test_an_index_that_points_nowhere_is_refused(tmp_path, text, message):
    _, path = saved(tmp_path)
    (path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX}: next to model.safetensors"):
        Checkpoint(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{INDEX}: {message}"):
        Checkpoint(path)


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "consolidated.00.pth",
    ],
)
def test_shards_without_an_index_and_pickled_weights_are_never_opened(tmp_path, name):
    _, path = saved(tmp_path)
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(b"not even a pickle")
    with pytest.raises(FileNotFoundError, match="model.safetensors: no such file, nor .*index.*conversion"):
        load_model(path)


def test_fingerprint_follows_weights_architecture_and_tokenizer(tmp_path):
    model, path = saved(tmp_path)
    first = fingerprint(path)
    save_model(model, tmp_path / "again", torch.float32)
    assert fingerprint(tmp_path / "again") == first
    change(tmp_path / "again", lambda t: t[NORM].add_(1e-3))
    assert fingerprint(tmp_path / "again") != first
    (path / "tokenizer.model").write_bytes(b"pieces")
    second = fingerprint(path)
    (path / "tokenizer.model").write_bytes(b"Pieces")
    assert len({first, second, fingerprint(path)}) == 3
    (path / "tokenizer.model").unlink()
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert fingerprint(path) != first


def test_fingerprint_of_a_directory_never_changes(tmp_path):
    """A run records it: a later version must give the same."""
    _, path = saved(tmp_path, rope_theta=5e5)
    (path / "tokenizer.model").write_bytes(b"pieces")
    architecture = (
        b'{"head_dim": 8, "hidden_size": 32, "initializer_range": 0.2, "intermediate_size": 64, '
        b'"max_position_embeddings": 128, "num_attention_heads": 4, "num_hidden_layers": 3, '
        b'"num_key_value_heads": 2, "rope_theta": 500000.0, "vocab_size": 97}'
    )
    files = [(path / name).read_bytes() for name in ("model.safetensors", "tokenizer.model")]
    digests = b"".join(hashlib.sha256(content).digest() for content in files)
    assert fingerprint(path) == hashlib.sha256(architecture + digests).hexdigest()


def test_a_new_field_of_the_architecture_changes_a_fingerprint_only_off_its_default(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Wider(ModelConfig):
        new_field: float = 0.0

    _, path = saved(tmp_path)
    before = fingerprint(path)
    monkeypatch.setattr("model.weights.ModelConfig", Wider)
    assert Wider.from_pretrained(path).new_field == 0.0 and fingerprint(path) == before
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"new_field": 1.0}))
    assert fingerprint(path) != before
