"""Checkpoint directories: exact round trips, what transformers makes of them, and refusals."""

import json

import pytest
import torch
from conftest import random_ids, small_model
from safetensors.torch import load_file, save_file

from model.attention import Segments
from model.weights import INDEX, Checkpoint, fingerprint, load_model, save_model, write_checkpoint


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
@pytest.mark.parametrize("shape", [dict(), dict(tie_word_embeddings=True), dict(sliding_window=6, head_dim=16)])
def test_transformers_loads_the_directory_and_gives_the_same_logits(tmp_path, max_shard_bytes, shape):
    import random

    from transformers import AutoModelForCausalLM

    model, path = saved(tmp_path, max_shard_bytes=max_shard_bytes, **shape)
    other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor(random_ids(random.Random(0), 25))
    with torch.no_grad():
        ours = model(ids, torch.arange(25), Segments.causal([25]))
        torch.testing.assert_close(ours, other(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_what_transformers_writes_loads_with_the_same_logits(tmp_path):
    from conftest import reference

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


NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop(NORM), f"lacks {NORM}"),
        (lambda t: t.update({"lm_head.bias": torch.zeros(97)}), "has unknown lm_head.bias"),
        (lambda t: t.update({HEAD: torch.zeros(97, 31)}), r"lm_head.weight has shape \[97, 31\].*\[97, 32\]"),
        (lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)}), f"{NORM} is I8"),
    ],
)
def test_tensors_that_do_not_fit_the_architecture_are_refused_by_name(tmp_path, edit, message):
    _, path = saved(tmp_path)
    change(path, edit)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_damaged_and_absent_files_are_refused_by_name(tmp_path):
    _, path = saved(tmp_path, max_shard_bytes=20_000)
    shard = sorted(path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"{shard.name}: not a complete safetensors file"):
        Checkpoint(path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        Checkpoint(path)
    shard.write_bytes(content)
    index = json.loads((path / INDEX).read_text())
    moved = next(name for name, file in index["weight_map"].items() if file == shard.name)
    index["weight_map"][moved] = sorted(path.glob("*.safetensors"))[0].name
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{INDEX}: does not agree with the shards about {moved}"):
        Checkpoint(path)


def test_pickled_weights_are_never_opened(tmp_path):
    _, path = saved(tmp_path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="never opened"):
        load_model(path)


def test_fingerprint_follows_weights_and_architecture(tmp_path):
    model, path = saved(tmp_path)
    first = fingerprint(path)
    save_model(model, tmp_path / "again", torch.float32)
    assert fingerprint(tmp_path / "again") == first
    change(tmp_path / "again", lambda t: t[NORM].add_(1e-3))
    assert fingerprint(tmp_path / "again") != first
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert fingerprint(path) != first
