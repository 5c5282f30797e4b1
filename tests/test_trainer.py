"""The training loop against transformers, one sequence at a time, two models, torch's RMSprop."""

import json
import math
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import spin.trainer
from model.weights import save_model
from spin.config import SFT, Train
from spin.engine.distributed import Ranks, ranks, sharded_model
from spin.engine.prepare import prepare_all
from spin.engine.recipe import Recipe
from spin.engine.schedule import Schedule
from spin.packing import Item, pack, response_logps
from spin.reference import score
from spin.trainer import train
from tests.helpers import PART, ROOT, metrics, naive_logps, naive_loss, pairs, reference, small_model

COMPILER = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.fixture(scope="module")
def group():
    with ranks() as group:
        yield group


def assert_same_weights(model, other, rtol):
    theirs = other if isinstance(other, dict) else dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        ours = parameter.full_tensor()
        assert (ours - theirs[name]).norm() <= rtol * theirs[name].norm(), name


def assert_accuracy(logged, margins):
    """The share of positive margins, where one within rounding of 0 may have either sign."""
    least, most = (sum(margin > limit for margin in margins) / len(margins) for limit in (1e-3, -1e-3))
    assert least - 1e-6 <= logged <= most + 1e-6


def test_six_steps_of_self_play_equal_the_naive_way(tmp_path, group):
    """The metrics and the weights; tests/test_engine.py has every loss and gradient."""
    items = pairs(10)
    save_model(small_model(), tmp_path / "opponent", torch.float32)
    part = Train(**PART)
    model = sharded_model(tmp_path / "opponent", group, torch.float32)
    opponent = score(model, items, part.token_budget, part.logit_chunk, group)
    train(part, model, items, opponent, tmp_path / "run", group)

    policy, frozen = reference(small_model()), reference(small_model())
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=part.lr, alpha=0.99, eps=1e-8)
    schedule = Schedule(part, len(items))
    assert schedule.stop == 6
    for step, logged in enumerate(metrics(tmp_path / "run")):
        batch = [items[i] for i in schedule.batch(step)]
        losses, margins, rewards = [], [], []
        for item in batch:
            real, generated = naive_logps(policy, item)
            with torch.no_grad():
                real_0, generated_0 = naive_logps(frozen, item)
            margins.append(((real - real_0) - (generated - generated_0)).item())
            rewards.append([part.beta * (real - real_0).item(), part.beta * (generated - generated_0).item()])
            losses.append(
                -torch.nn.functional.logsigmoid(part.beta * (real - real_0 - generated + generated_0))
            )
        total = torch.stack(losses).mean()
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), part.max_grad_norm)
        for parameters in optimizer.param_groups:
            parameters["lr"] = schedule.lr(step)
        optimizer.step()
        assert logged["loss"] == pytest.approx(total.item(), rel=1e-4, abs=1e-5)
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert logged["margin"] == pytest.approx(sum(margins) / len(batch), rel=1e-3, abs=1e-4)
        assert_accuracy(logged["accuracy"], margins)
        means = [sum(values) / len(batch) for values in zip(*rewards)]
        assert [logged["reward_real"], logged["reward_generated"]] == pytest.approx(means, rel=1e-3, abs=1e-4)
    assert_same_weights(model, policy, 1e-4)


def test_sft_steps_equal_the_naive_token_mean(tmp_path, group):
    items = pairs(6, responses=1)
    save_model(small_model(), tmp_path / "init", torch.float32)
    part = SFT(**{k: v for k, v in PART.items() if k != "beta"})
    model = sharded_model(tmp_path / "init", group, torch.float32)
    train(part, model, items, None, tmp_path / "run", group)

    policy, schedule = reference(small_model()), Schedule(part, len(items))
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    for step, logged in enumerate(metrics(tmp_path / "run")):
        batch = [items[i] for i in schedule.batch(step)]
        logps = torch.stack([naive_logps(policy, item)[0] for item in batch])
        total = -logps.sum() / sum(len(item.responses[0]) for item in batch)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), part.max_grad_norm)
        for parameters in optimizer.param_groups:
            parameters["lr"] = schedule.lr(step)
        optimizer.step()
        assert logged["loss"] == pytest.approx(total.item(), rel=1e-4)
        assert "margin" not in logged
    assert_same_weights(model, policy, 1e-4)


def test_scores_are_transformers_sums(tmp_path, group):
    items = pairs(9)
    save_model(small_model(tie_word_embeddings=True), tmp_path / "m", torch.float32)
    ours = score(sharded_model(tmp_path / "m", group, torch.float32), items, 50, 3, group)
    other = reference(small_model(tie_word_embeddings=True))
    theirs = torch.tensor([[logp.item() for logp in naive_logps(other, item)] for item in items])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_real_and_generated_give_exactly_no_gradient(tmp_path, group, dtype):
    items = [Item(item.prompt, (item.responses[0],) * 2) for item in pairs(4)]
    save_model(small_model(), tmp_path / "m", torch.float32)
    model = sharded_model(tmp_path / "m", group, getattr(torch, dtype))
    part = Train(**PART | {"dtype": dtype})
    opponent = score(model, items, part.token_budget, part.logit_chunk, group)
    train(part, model, items, opponent, tmp_path / "run", group)
    assert all(step["loss"] == pytest.approx(math.log(2), abs=1e-7) for step in metrics(tmp_path / "run"))
    assert all(step["grad_norm"] == 0.0 for step in metrics(tmp_path / "run"))


def ten_steps(tmp_path, group, name, **changes):
    """Losses, and how far the weights moved, as one vector."""
    items = pairs(40)
    if not (tmp_path / "m").is_dir():
        save_model(small_model(), tmp_path / "m", torch.float32)
    part = Train(**PART | dict(epochs=1, lr=2e-4, warmup=0.0) | changes)
    model = sharded_model(tmp_path / "m", group, getattr(torch, part.dtype))
    before = torch.cat([weight.full_tensor().flatten().clone() for weight in model.parameters()])
    train(part, model, items, score(model, items, 60, 5, group), tmp_path / name, group)
    after = torch.cat([weight.full_tensor().flatten() for weight in model.parameters()])
    return torch.tensor([step["loss"] for step in metrics(tmp_path / name)]), after - before


def test_ten_steps_in_bf16_stay_near_those_in_fp32(tmp_path, group):
    losses, moved = ten_steps(tmp_path, group, "fp32")
    losses_16, moved_16 = ten_steps(tmp_path, group, "bf16", dtype="bfloat16")
    assert len(losses) == 10 and losses.std() > 0.02
    assert (losses_16 - losses).abs().max() < 0.1
    assert torch.nn.functional.cosine_similarity(moved_16, moved, dim=0) > 0.9


def test_ten_steps_with_a_bf16_second_moment_follow_those_with_fp32(tmp_path, group):
    losses, moved = ten_steps(tmp_path, group, "fp32")
    losses_16, moved_16 = ten_steps(tmp_path, group, "moment", second_moment="bfloat16")
    assert (losses_16 - losses).abs().max() < 0.01
    assert (moved_16 - moved).norm() < 0.02 * moved.norm()


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs g++ and Python.h on a CPU")
def test_compiled_blocks_give_the_same_gradients_without_compiling_for_each_pack(tmp_path, group):
    save_model(small_model(num_hidden_layers=1), tmp_path / "m", torch.float32)
    torch._dynamo.reset()
    # The user's cache may have graphs that were compiled for other vector units.
    fresh = torch._inductor.config.patch(force_disable_caches=True)
    with torch._dynamo.config.patch(error_on_recompile=True), fresh:
        plain, compiled = (
            sharded_model(tmp_path / "m", group, torch.float32, compile=compile) for compile in (False, True)
        )
        for checkpointing in ("none", "full"):
            for count in (3, 5, 8):
                gradients = []
                for model in (plain, compiled):
                    for block in model.model["layers"]:
                        block.checkpointing = checkpointing
                    model.zero_grad()
                    response_logps(model, pack(pairs(count)), 7).sum().backward()
                    gradients.append([weight.grad.full_tensor() for weight in model.parameters()])
                for expected, ours in zip(*gradients):
                    assert (ours - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "changes",
    [{}, {"compile": True}, {"activation_checkpointing": "selective"}, {"second_moment": "bfloat16"}],
)
def test_on_a_gpu_ten_steps_in_bf16_stay_near_those_of_fp32_on_the_cpu_and_go_on(tmp_path, group, changes):
    losses, moved = ten_steps(tmp_path, group, "gpu", dtype="bfloat16", checkpoint_every=3, **changes)
    shutil.rmtree(tmp_path / "gpu/checkpoints/step-000010")
    # from step 9
    again, _ = ten_steps(tmp_path, group, "gpu", dtype="bfloat16", checkpoint_every=3, **changes)
    assert (
        group.device.type == "cuda"
        and torch.equal(losses[:9], again[:9])
        and (losses - again).abs().max() < 0.05
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spin.trainer.peak_flops", lambda device: None)
        mesh = torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards"))
        losses_32, moved_32 = ten_steps(tmp_path, Ranks(0, 1, torch.device("cpu"), mesh), "cpu")
    assert (losses - losses_32).abs().max() < 0.1
    assert torch.nn.functional.cosine_similarity(moved.cpu(), moved_32, dim=0) > 0.9


def test_pairs_kept_aside_are_measured_and_not_trained_on(tmp_path, group):
    items = pairs(13)
    save_model(small_model(), tmp_path / "m", torch.float32)
    part = Train(**PART | dict(heldout_pairs=3, heldout_every=2))
    model = sharded_model(tmp_path / "m", group, torch.float32)
    opponent = score(model, items, part.token_budget, part.logit_chunk, group)
    train(part, model, items, opponent, tmp_path / "run", group)
    log = metrics(tmp_path / "run")
    assert [step["step"] for step in log if "heldout_loss" in step] == [2, 4, 6]

    aside = spin.trainer.held_out_items(part, len(items))
    policy, frozen = reference(small_model()), reference(small_model())
    policy.load_state_dict({name: weight.full_tensor() for name, weight in model.named_parameters()})
    margins = []
    for i in aside:
        (real, generated), (real_0, generated_0) = (naive_logps(m, items[i]) for m in (policy, frozen))
        margins.append((real - real_0 - generated + generated_0).item())
    assert log[-1]["heldout_margin"] == pytest.approx(sum(margins) / 3, rel=1e-4)
    losses = [math.log1p(math.exp(-part.beta * margin)) for margin in margins]
    assert log[-1]["heldout_loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert_accuracy(log[-1]["heldout_accuracy"], margins)

    used = [item for i, item in enumerate(items) if i not in aside]
    other = sharded_model(tmp_path / "m", group, torch.float32)
    kept = torch.tensor([i for i in range(13) if i not in aside])
    train(Train(**PART), other, used, opponent[kept], tmp_path / "other", group)
    assert_same_weights(model, {n: w.full_tensor() for n, w in other.named_parameters()}, 0)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_logger_that_is_asked_for_and_absent_is_an_error_before_anything_runs(
    package, tmp_path, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for section, iterations in (("sft", [-1]), ("train", [0])):
        options = [f"--run.dir={tmp_path}", f"--{section}.{package}=true"]
        with pytest.raises(ValueError, match=f"pip install {package}"):
            prepare_all(Recipe("configs/tiny.toml", options), iterations)


def test_products_of_ever_new_shapes_do_not_fill_the_memory():
    """Streams have ever new lengths, and oneDNN would keep the compiled code of 1,024 products in bf16."""
    program = """
import resource, torch
from spin.engine.distributed import ranks
peaks = []
torch.set_num_threads(1)
with ranks():
    weight = torch.ones(256, 256, dtype=torch.bfloat16)
    for rows in range(100, 500):
        torch.ones(rows, 256, dtype=torch.bfloat16) @ weight
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(peaks[-1] - peaks[150])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40  # MiB; 160 without the limits, where a CPU has such kernels


def test_tensorboard_has_what_the_log_has(tmp_path, group):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    items = pairs(8)
    save_model(small_model(), tmp_path / "m", torch.float32)
    part = Train(**PART | dict(tensorboard=True))
    model = sharded_model(tmp_path / "m", group, torch.float32)
    train(part, model, items, score(model, items, 60, 5, group), tmp_path / "run", group)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for name in ("loss", "margin", "pairs_per_second"):
        logged = [(step["step"], step[name]) for step in metrics(tmp_path / "run")]
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (s, pytest.approx(v, rel=1e-6)) for s, v in logged
        ]


@pytest.mark.slow
def test_an_offline_wandb_run_has_what_the_log_has(tmp_path, group, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind))
    items = pairs(8)
    save_model(small_model(), tmp_path / "m", torch.float32)
    model = sharded_model(tmp_path / "m", group, torch.float32)
    opponent = score(model, items, 60, 5, group)
    train(Train(**PART | dict(wandb=True)), model, items, opponent, tmp_path / "run", group)
    (stored,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    for step in metrics(tmp_path / "run"):
        for name in ("loss", "margin", "grad_norm"):
            assert json.dumps(step[name]).encode() in stored.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{}, {"reference": "base", "loss": "sppo"}, {"reference": "mixture", "loss": "t-spin", "mu": 0.3}],
)
def test_a_first_step_of_another_model_than_the_opponent_stops_the_run(tmp_path, group, changes):
    """The error names the loss that the opponent's log-probs give; log 2 where it is the reference."""
    items, part = pairs(4, responses=3), Train(**PART | changes)
    models = (reference(small_model(seed)).requires_grad_(False) for seed in (0, 1, 2))
    logps = ([naive_logps(model, item) for item in items] for model in models)
    own, opponent, base = (torch.tensor(values) for values in logps)
    used = {"opponent": opponent, "base": base, "mixture": (opponent + base) / 2}[part.reference]
    losses = [naive_loss(part, *of_item) for of_item in zip(items, opponent, used)]
    expected = f"{torch.stack(losses).mean():.4f}"
    assert changes or expected == "0.6931"
    save_model(small_model(), tmp_path / "m", torch.float32)
    model, run = sharded_model(tmp_path / "m", group, torch.float32), (tmp_path / "run", group)
    with pytest.raises(
        RuntimeError, match=f"policy and opponent differ by .* the loss is .*, not {expected}:"
    ):
        train(part, model, items, used, *run, opponent)
    train(part, model, items, used, *run, own)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(tmp_path, group):
    broken = small_model()
    with torch.no_grad():
        broken.model["norm"].weight[3] = float("nan")
    save_model(broken, tmp_path / "m", torch.float32)
    model = sharded_model(tmp_path / "m", group, torch.float32)
    before = model.model["embed_tokens"].weight.full_tensor().clone()
    with pytest.raises(
        RuntimeError,
        match="step 1: loss nan.*not finite.*example 0, example 1.*log-probs that are not finite",
    ):
        train(
            SFT(**{k: v for k, v in PART.items() if k != "beta"}),
            model,
            pairs(4, 1),
            None,
            tmp_path / "r",
            group,
        )
    assert torch.equal(model.model["embed_tokens"].weight.full_tensor(), before)


@pytest.mark.parametrize(
    "epochs, schedule_epochs, warmup", [(2, 0, 0.1), (2, 6, 0.1), (1.5, 0, 0.0), (1, 0, 0.5)]
)
def test_learning_rates_are_transformers_linear_schedule(epochs, schedule_epochs, warmup):
    from transformers import get_linear_schedule_with_warmup

    part = Train(epochs=epochs, schedule_epochs=schedule_epochs, warmup=warmup, lr=3e-4, batch_size=64)
    schedule = Schedule(part, 1000)  # 16 steps an epoch, the last of them of 40
    assert schedule.stop == math.ceil(epochs * 16)
    total = (schedule_epochs or epochs) * 16
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = get_linear_schedule_with_warmup(optimizer, math.ceil(warmup * total), total)
    for step in range(schedule.stop):
        assert schedule.lr(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_a_run_of_one_step_takes_it_at_the_full_rate():
    schedule = Schedule(SFT(epochs=1, batch_size=64, lr=1e-4), 20)
    assert schedule.stop == 1 and schedule.lr(0) == 1e-4


def test_an_epoch_has_every_example_once_in_a_seeded_order():
    schedule = Schedule(Train(batch_size=8), 20)
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in schedule.batch(step)] for e in range(2)]
    assert [len(schedule.batch(step)) for step in range(3)] == [8, 8, 4]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20)) and epochs[0] != epochs[1]
    assert Schedule(Train(batch_size=8, seed=1), 20).batch(0) != schedule.batch(0)


def test_bf16_compute_keeps_fp32_master_weights_that_move(tmp_path, group):
    # Around 0.02 neighbouring bf16 numbers are 1.2e-4 apart; a step of 1e-6 must not be lost.
    save_model(small_model(), tmp_path / "m", torch.float32)
    model = sharded_model(tmp_path / "m", group, torch.bfloat16)
    part = Train(**PART | dict(dtype="bfloat16", lr=1e-6, warmup=0.0))
    items = pairs(8)
    train(part, model, items, score(model, items, 60, 5, group), tmp_path / "run", group)
    start = dict(small_model().named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        if name != "model.embed_tokens.weight":  # only the ids that occur have a gradient
            moved = parameter.full_tensor() != start[name]
            assert moved.float().mean() > 0.9, name
