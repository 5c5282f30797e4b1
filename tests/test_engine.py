"""A step's loss and every gradient are the naive way's: transformers, one sequence at a time, two models,
fp32.

On any token budget, chunk, checkpointing setting and number of ranks, for every loss. The ranks are processes
of gloo.
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
from spin.opponent import score
from spin.packing import Item
from spin.trainer import Schedule, train
from tests.helpers import free_port, naive_logps, random_ids, reference, small_model

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
}
WORLDS = {"1 rank": (1, 0), "2 ranks": (2, 0), "4 ranks": (4, 0), "2 x 2 ranks (HSDP)": (4, 2)}
SHARD_SIZES = {1: (0,), 2: (0,), 4: (0, 2)}  # by number of ranks: the same processes run both meshes
FORMULAS = {
    "logistic": lambda t: -torch.nn.functional.logsigmoid(t),
    "hinge": lambda t: torch.relu(1 - t),
    "exponential": lambda t: torch.exp(-t),
    "correlation": lambda t: 1 - t,
}


def pairs() -> list[Item]:
    """Eight pairs: a step of an epoch has five, the next has three, fewer than there are ranks."""
    rng = random.Random(0)

    def draw(length):
        return random_ids(rng, length)

    return [
        Item(draw(rng.randint(1, 9)), (draw(rng.randint(1, 9)), draw(rng.randint(1, 9)))) for _ in range(7)
    ] + [Item(draw(20), (draw(10), draw(12)))]


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
            made = []
            spin.trainer.make_optimizer = lambda part, parameters: (
                made.append(Recording(parameters, part.lr)) or made[0]
            )
            run = directory / f"shards of {shard_size}" / name.replace(" ", "-")
            train(part, model, items, opponent, run, group)
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
        save_model(small_model(), directory / "opponent", torch.float32)
        ports = [free_port() for _ in SHARD_SIZES[world_size]]
        torch.multiprocessing.spawn(as_rank, (world_size, ports, directory), nprocs=world_size)
        return directory

    return launch


@pytest.fixture(params=["1 rank", *(pytest.param(name, marks=pytest.mark.slow) for name in list(WORLDS)[1:])])
def results(request, launched) -> Path:
    world_size, shard_size = WORLDS[request.param]
    return launched(world_size) / f"shards of {shard_size}"


@pytest.fixture(scope="module")
def naive() -> dict[tuple, list]:
    """{(loss, limit): [(loss, norm, gradients) of each step]} of two models of transformers and torch's
    RMSprop.
    """
    found = {}
    for loss, limit in [*((loss, 1e9) for loss in FORMULAS), ("logistic", 0.5)]:
        part, items, formula = Train(**BASE | {"loss": loss, "max_grad_norm": limit}), pairs(), FORMULAS[loss]
        policy, frozen = reference(small_model()), reference(small_model())
        optimizer = torch.optim.RMSprop(policy.parameters(), lr=part.lr, alpha=0.99, eps=1e-8)
        names = [name for name, _ in small_model().named_parameters()]
        schedule, found[loss, limit] = Schedule(part, len(items)), []
        for step in range(schedule.stop):
            values = []
            for i in schedule.batch(step):
                real, generated = naive_logps(policy, items[i])
                with torch.no_grad():
                    real_0, generated_0 = naive_logps(frozen, items[i])
                values.append(formula(part.beta * ((real - real_0) - (generated - generated_0))))
            total = torch.stack(values).mean()
            optimizer.zero_grad()
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), part.max_grad_norm).item()
            gradients = dict(policy.named_parameters())
            found[loss, limit].append((total.item(), norm, [gradients[name].grad.clone() for name in names]))
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(step)
            optimizer.step()
    return found


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_naive_ways(results, naive, case):
    logged, gradients = torch.load(results / case.replace(" ", "-") / "result.pt")
    wanted = naive[CASES[case].get("loss", "logistic"), CASES[case].get("max_grad_norm", 1e9)]
    assert len(logged) == len(gradients) == len(wanted) == 4
    for (loss, norm), ours, (expected, expected_norm, theirs) in zip(logged, gradients, wanted):
        assert loss == pytest.approx(expected, rel=1e-4) and norm == pytest.approx(expected_norm, rel=1e-4)
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm()
