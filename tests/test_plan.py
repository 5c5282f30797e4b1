"""The planner's memory: of a run that has values, by hand, and in words."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.attention import Segments
from model.config import ModelConfig
from spin.config import Config, Data, Run, Train
from spin.engine.distributed import pretended_ranks, sharded_model
from spin.engine.optimizer import RMSprop
from spin.packing import Item, pack, response_logps
from spin.plan import Memory, Plan, _architecture
from tests.helpers import ROOT, run_script, small_config

pytestmark = pytest.mark.slow
WIDE = small_config(
    vocab_size=4096, hidden_size=512, intermediate_size=1536, num_attention_heads=8, head_dim=64
)
COUNT = 2 * 4096 * 512 + 512 + 3 * (512 * (2 * 512 + 2 * 128) + 3 * 512 * 1536 + 2 * 512)


def two_steps(mode, checkpointing, second_moment) -> list[dict[str, int]]:
    """The memory of two training steps with two micro-batches each, with or without values."""
    item, peaks = Item([5] * 9, ([6] * 12,)), []
    with pretended_ranks(1) as ranks, mode:
        model = sharded_model(small_config(), ranks, torch.bfloat16, checkpointing)
        optimizer = RMSprop(model.parameters(), lr=1e-3, second_moment=second_moment)
        for _ in range(2):
            with Memory() as memory:
                memory.name("parameters", model.parameters())
                for _ in range(2):
                    packed = pack([item, item])
                    # which the plain twin computes without a mask
                    packed.segments = Segments.causal([20, 20])
                    loss = response_logps(model, packed, 8).sum()
                    memory.name_rest("activations")
                    loss.backward()
                memory.name("gradients", [weight.grad for weight in model.parameters()])
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            peaks.append(memory.peak())
    return peaks


@pytest.mark.parametrize("second_moment", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_without_values_the_memory_is_that_of_a_run_with_values(checkpointing, second_moment):
    without, real = (
        two_steps(mode, checkpointing, second_moment)[1] for mode in (FakeTensorMode(), nullcontext())
    )
    assert without == real and real["activations"] > 0


def plan(world_size=8, shard_size=0, **changes):
    part = Train(**dict(dtype="bfloat16", logit_chunk=256) | changes)
    config = Config(train=part, data=Data(max_length=256, max_prompt_length=128))
    return config, pretended_ranks(world_size, shard_size)


@pytest.mark.parametrize("world_size, shard_size, shards", [(1, 0, 1), (8, 0, 8), (64, 0, 64), (64, 8, 8)])
@pytest.mark.parametrize("second_moment, size", [("float32", 4), ("bfloat16", 2)])
def test_parameters_gradients_and_moments_are_shared_by_the_shards(
    world_size, shard_size, shards, second_moment, size
):
    config, group = plan(world_size, shard_size, second_moment=second_moment)
    with group as ranks:
        memory = Plan(config, WIDE, ranks).train(1024)
    assert memory["parameters"] == memory["gradients"] == 4 * COUNT / shards
    assert memory["optimizer"] == size * COUNT / shards


def test_full_checkpointing_keeps_a_blocks_input_and_less_than_the_others():
    activations = {}
    for checkpointing in ("none", "selective", "full"):
        for layers in (2, 5):
            config, group = plan(activation_checkpointing=checkpointing)
            with group as ranks:
                made = Plan(config, replace(WIDE, num_hidden_layers=layers), ranks)
                activations[checkpointing, layers] = made.train(2048)["activations"]
    of_a_block = {kind: (activations[kind, 5] - activations[kind, 2]) / 3 for kind, _ in activations}
    assert of_a_block["full"] == 2048 * 512 * 2  # its input in bf16
    # q, attention, k and v, what is added to the stream, gate and up
    products = 2 * 512 + 2 * 128 + 512 + 2 * 1536
    assert of_a_block["selective"] >= 2048 * products * 2 + of_a_block["full"]
    # Both norms' inputs and results, q, k, v and attention; gate, up and their product.
    kept = 2048 * 2 * (4 * 512 + 2 * 512 + 2 * 128 + 3 * 1536)
    assert kept <= of_a_block["none"] < 1.1 * kept


def test_unsharded_gradients_take_four_bytes_a_parameter():
    totals = []
    for unsharded in (False, True):
        config, group = plan(64, unsharded_gradients=unsharded)
        with group as ranks:
            totals.append(sum(Plan(config, WIDE, ranks).train(1024).values()))
    assert 3.5 * COUNT < totals[1] - totals[0] < 5 * COUNT


def test_the_largest_budget_fits_and_a_larger_one_does_not():
    config, group = plan()
    with group as ranks:
        made = Plan(config, WIDE, ranks)
        free = sum(made.train(8192).values())
        assert made.largest_budget(free) in (8192, 7168)
        assert sum(made.train(9216).values()) > free
        assert made.largest_budget(1e6) == 0


def planned(*arguments, fails=False):
    return run_script("spin/plan.py", *arguments, fails=fails)


@pytest.fixture
def small_recipe(tmp_path):
    path = tmp_path / "base/model/config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(WIDE.to_dict("bfloat16")))
    text = f'[run]\ndir = "{tmp_path}"\n[data]\nnum_prompts = 5000\n[train]\nreplay = 0\n'
    (tmp_path / "r.toml").write_text(text)
    return str(tmp_path / "r.toml")


def test_the_plan_says_what_fits_and_what_does_not(small_recipe):
    output = run_script(
        "spin/plan.py", "--config", small_recipe, "--gpus", "4", "--memory", "1", "--reserve", "0.7"
    )
    for stage in ("generate", "score", "train", "export"):
        assert f"\n{stage} " in output
    assert "0.01e9 parameters, 5000 pairs" in output and "DOES NOT FIT" in output
    output = planned("--config", small_recipe, "--gpus", "4", "--gpu", "H200")
    assert "train.token_budget = 8192: fits" in output and "4 x 139 GiB" in output


def test_an_iteration_replays_those_before_it_and_is_scored_as_its_reference_needs(small_recipe):
    def scored(*changes):
        output = planned("--config", small_recipe, "--gpus", "4", "--train.replay=9", *changes)
        flops, pairs = re.search(r"score .* = 8192; (\S+) FLOPs, .* for (\d+) pairs", output).groups()
        return float(flops), int(pairs)

    once, pairs = scored()
    assert pairs == 5000
    assert scored("--iter", "2", "--train.reference=mixture") == (pytest.approx(6 * once, rel=0.01), 15000)
    assert scored("--iter", "2", "--train.replay_share=equal", "--train.reference=none") == (0, 5000)


@pytest.mark.parametrize(
    "recipe, parameters", [("tinyllama-1.1b", 1_100_048_384), ("qwen2.5-1.5b", 1_543_714_304)]
)
def test_the_recipes_for_24_gb_fit(recipe, parameters):
    output = planned(
        "--config", f"configs/{recipe}.toml", "--gpu", "RTX 4090", "--pairs", "7000", "--run.dir=none"
    )
    assert f"{parameters / 1e9:.2f}e9 parameters" in output
    assert "on each GPU; " in output and ": fits\n" in output and "NOT FIT" not in output


def test_bad_arguments_are_refused(small_recipe, tmp_path):
    (tmp_path / "no.toml").write_text(f'[run]\ndir = "{tmp_path}/no"\n[data]\nnum_prompts = 5000\n')
    assert "did you mean" in run_script(
        "spin/plan.py", "--config", small_recipe, "--train.token_buget=3", fails=True
    )
    assert "--architecture takes a config.json" in run_script(
        "spin/plan.py", "--config", str(tmp_path / "no.toml"), fails=True
    )
    output = run_script(
        "spin/plan.py", "--config", small_recipe, "--gpus", "6", "--run.shard_size=4", fails=True
    )
    assert "run.shard_size = 4 does not divide the number of ranks, 6" in output


def test_a_recipe_that_takes_all_pairs_needs_their_number(small_recipe):
    output = planned("--config", small_recipe, "--data.num_prompts=0", fails=True)
    assert "give their number with --pairs" in output


def test_an_architecture_is_a_name_a_file_a_directory_or_the_recipes(tmp_path):
    settings = Config(run=Run(dir=str(tmp_path)))  # not what an earlier run has left
    zephyr, llama = Path("configs/zephyr-7b.toml"), Path("llama-2-70b")
    found = _architecture(None, settings, zephyr)
    assert (found.model_type, found.num_hidden_layers, found.sliding_window) == ("mistral", 32, 4096)
    found = _architecture(llama, settings, zephyr)
    assert (found.num_hidden_layers, found.head_dim, found.sliding_window) == (80, 128, None)
    directory = ROOT / "miniature/seed0/base"
    assert _architecture(directory, settings, zephyr) == ModelConfig.from_pretrained(directory)
    assert _architecture(directory / "config.json", settings, zephyr) == ModelConfig.from_pretrained(
        directory
    )
