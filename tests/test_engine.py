"""A step's loss and every gradient are the naive way's: transformers, one sequence at a time, two models,
fp32.

On any token budget, chunk, checkpointing setting and number of ranks, for every loss, with two generated
responses a prompt. The ranks are processes of gloo.
"""

import json
import os
import random
from functools import cache
from pathlib import Path

import pytest
import torch

import spin.trainer
from model.weights import save_model
from spin.config import Train
from spin.engine.distributed import ranks, sharded_model
from spin.engine.optimizer import RMSprop
from spin.engine.schedule import Schedule
from spin.loss import LOSSES
from spin.packing import Item
from spin.reference import reference_logps, score
from spin.trainer import train
from tests.helpers import free_port, naive_logps, naive_loss, random_ids, reference, small_model

BASE = dict(
    batch_size=5,
    epochs=2,
    lr=1e-3,
    beta=0.7,
    dtype="float32",
    token_budget=60,
    logit_chunk=7,
    max_grad_norm=1e9,
)
CASES = {
    "logistic": {},
    "a pair in each micro-batch, and one longer than the budget": {"token_budget": 25, "loss": "hinge"},
    "all in one micro-batch, a row of logits at a time": {
        "token_budget": 10_000,
        "logit_chunk": 1,
        "loss": "exponential",
    },
    "all logits at once": {"logit_chunk": 10_000, "loss": "correlation"},
    "selective checkpointing": {"activation_checkpointing": "selective"},
    "full checkpointing": {"activation_checkpointing": "full", "loss": "hinge"},
    "one reduction a step": {"unsharded_gradients": True, "token_budget": 25},
    "clipped": {"max_grad_norm": 0.5},
    **{
        f"{loss}, another reference": {"loss": loss, "reference": "base", "mu": 1.7}
        for loss in ("ipo", "per-token", "sppo", "gsil", "space")
    },
    "t-spin, no reference": {"loss": "t-spin", "reference": "none", "mu": 0.4, "token_budget": 25},
}
WORLDS = {"1 rank": (1, 0), "2 ranks": (2, 0), "4 ranks": (4, 0), "2 x 2 ranks (HSDP)": (4, 2)}
SHARD_SIZES = {1: (0,), 2: (0,), 4: (0, 2)}  # by number of ranks: the same processes run both meshes


def pairs() -> list[Item]:
    """Eight prompts, two generated responses each: a step has five, the next three, fewer than ranks."""
    rng = random.Random(0)

    def draw(length):
        return random_ids(rng, length)

    items = [
        Item(draw(rng.randint(1, 9)), tuple(draw(rng.randint(1, 9)) for _ in range(3))) for _ in range(7)
    ]
    return [*items, Item(draw(20), (draw(10), draw(12), draw(3)))]


class Recording(RMSprop):
    """RMSprop that keeps the gradients it is given."""

    def step(self, closure=None) -> None:
        gradients = [weight.grad.full_tensor() for group in self.param_groups for weight in group["params"]]
        self.seen = [*getattr(self, "seen", []), gradients]
        super().step()


def run_cases(directory: Path, cases: dict, shard_size: int = 0) -> None:
    """As one of the ranks: train each case, leave its losses and gradients in a file."""
    items = pairs()
    with ranks(shard_size) as group:
        for name, changes in cases.items():
            part = Train(**BASE | changes)
            model = sharded_model(directory / "opponent", group, torch.float32, part.activation_checkpointing)
            opponent = score(model, items, part.token_budget, part.logit_chunk, group)
            reference = opponent
            if part.reference != "opponent":
                base = sharded_model(directory / "base", group, torch.float32)
                base = score(base, items, part.token_budget, part.logit_chunk, group)
                reference = reference_logps(part, None, base, items)
            made = []
            spin.trainer.make_optimizer = lambda part, parameters: (
                made.append(Recording(parameters, part.lr)) or made[0]
            )
            run = directory / f"shards of {shard_size}" / name.replace(" ", "-")
            train(part, model, items, reference, run, group, opponent)
            if group.first:
                log = [json.loads(line) for line in open(run / "metrics.jsonl")]
                torch.save(
                    ([(row["loss"], row["grad_norm"]) for row in log], made[0].seen), run / "result.pt"
                )


def as_rank(rank: int, world_size: int, ports: list[int], directory: Path) -> None:
    torch.set_num_threads(1)
    for shard_size, port in zip(SHARD_SIZES[world_size], ports):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run_cases(directory, CASES, shard_size)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """By number of ranks, the directory in which so many processes have left their results."""

    @cache
    def launch(world_size: int) -> Path:
        directory = tmp_path_factory.mktemp("engine")
        for seed, name in enumerate(("opponent", "base")):
            save_model(small_model(seed), directory / name, torch.float32)
        ports = [free_port() for _ in SHARD_SIZES[world_size]]
        torch.multiprocessing.spawn(as_rank, (world_size, ports, directory), nprocs=world_size)
        return directory

    return launch


@pytest.fixture(params=["1 rank", *(pytest.param(name, marks=pytest.mark.slow) for name in list(WORLDS)[1:])])
def results(request, launched) -> Path:
    world_size, shard_size = WORLDS[request.param]
    return launched(world_size) / f"shards of {shard_size}"


@pytest.fixture(scope="module")
def naive():
    """[(loss, norm, gradients) of each step] of a case, by two models of transformers and torch's RMSprop."""
    items, found = pairs(), {}
    opponent, base = ([naive_logps(frozen(seed), item) for item in items] for seed in (0, 1))
    zeros = [[torch.tensor(0.0)] * 3] * len(items)

    def run(part: Train) -> list:
        reference_of = {"opponent": opponent, "base": base, "none": zeros}[part.reference]
        policy, schedule, result = reference(small_model()), Schedule(part, len(items)), []
        optimizer = torch.optim.RMSprop(policy.parameters(), lr=part.lr, alpha=0.99, eps=1e-8)
        names = [name for name, _ in small_model().named_parameters()]
        for step in range(schedule.stop):
            batch = schedule.batch(step)
            losses = [
                naive_loss(part, items[i], naive_logps(policy, items[i]), reference_of[i]) for i in batch
            ]
            total = torch.stack(losses).mean()
            optimizer.zero_grad()
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), part.max_grad_norm).item()
            gradients = dict(policy.named_parameters())
            result.append((total.item(), norm, [gradients[name].grad.clone() for name in names]))
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(step)
            optimizer.step()
        return result

    def of(case: str) -> list:
        part = Train(**BASE | CASES[case])
        key = (part.loss, part.max_grad_norm, part.reference)
        found[key] = found.get(key) or run(part)
        return found[key]

    return of


def frozen(seed: int):
    return reference(small_model(seed)).requires_grad_(False)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_naive_ways(results, naive, case):
    logged, gradients = torch.load(results / case.replace(" ", "-") / "result.pt")
    wanted = naive(case)
    assert len(logged) == len(gradients) == len(wanted) == 4
    for (loss, norm), ours, (expected, expected_norm, theirs) in zip(logged, gradients, wanted):
        assert loss == pytest.approx(expected, rel=1e-4) and norm == pytest.approx(expected_norm, rel=1e-4)
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm()


def test_every_loss_is_among_the_cases():
    assert {Train(**case).loss for case in CASES.values()} == set(LOSSES)
