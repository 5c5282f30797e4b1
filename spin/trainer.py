"""The training loop, for self-play and for SFT."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.mistral import Mistral
from spin import checkpoint
from spin.config import Optimization, Train
from spin.distributed import Ranks
from spin.files import write_whole
from spin.logps import response_logps
from spin.loss import initial_loss, margins, spin_loss
from spin.packing import Item, cost, micro_batches, pack

# At the first step policy and opponent are one model, so their log-probabilities differ by rounding alone. In bf16, in
# other company, a response of 200 tokens is rounded by some tenths of a nat; other weights or pairs differ far more.
FIRST_STEP_TOLERANCE = 0.02  # mean |log p_θ − log p_θt|, nats a token


class Schedule:
    """Steps, their examples and their learning rates: fixed functions of the settings, on any number of ranks."""

    def __init__(self, part: Optimization, examples: int):
        self.part, self.examples = part, examples
        self.steps_per_epoch = math.ceil(examples / part.batch_size)  # the last step of an epoch may be smaller
        self.stop = _ceil(part.epochs * self.steps_per_epoch)
        self.total = _ceil((part.schedule_epochs or part.epochs) * self.steps_per_epoch)
        self.warmup = min(_ceil(part.warmup * self.total), self.total - 1)  # a run of one step takes it

    def lr(self, step: int) -> float:
        """Learning rate of step 0, 1, …: linear warm-up from 0, then linear decay to 0, as transformers has it."""
        if step < self.warmup:
            return self.part.lr * step / self.warmup
        return self.part.lr * max(0.0, (self.total - step) / max(1, self.total - self.warmup))

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of a step: slices of the epoch's seeded permutation."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.part.seed * 1_000_003 + epoch)
        order = torch.randperm(self.examples, generator=generator)
        return order[place * self.part.batch_size :][: self.part.batch_size].tolist()


def _ceil(steps: float) -> int:
    return math.ceil(steps - 1e-9)  # 1.1 · 50 is a little more than 55 in floating point


def train(
    part: Optimization,
    model: Mistral,
    items: Sequence[Item],
    opponent: Tensor | None,
    directory: Path,
    ranks: Ranks,
) -> None:
    """Train a sharded model in place, from the last checkpoint in `directory` if there is one.

    Args:
        items: with `opponent`, pairs (real first, generated second); without, one response each, for SFT
        opponent: (len(items), 2) log p_θt of the real and the generated response, fp32
        directory: where checkpoints/ and metrics.jsonl are

    Leaves a checkpoint of the last step. A run that was stopped goes on to the numbers that it would have had, if ranks
    and token budget are the same; with others, up to rounding. Raises RuntimeError, before the optimizer's step, for a
    gradient that is not finite, and for a first step at which policy and opponent are not one model.
    """
    schedule = Schedule(part, len(items))
    optimizer = make_optimizer(part, model)
    saved = directory / "checkpoints"
    start = ranks.from_first(lambda: checkpoint.latest_step(saved))
    if start:
        checkpoint.load(saved, start, model, optimizer)
    log = Log(directory / "metrics.jsonl", start) if ranks.first else None
    lengths = [item.packed_length for item in items]
    costs = [cost(item) for item in items]

    bar = ranks.progress(schedule.stop, "train", "step", start)
    for step in range(start, schedule.stop):
        began = time.perf_counter()
        batch = schedule.batch(step)
        plan = micro_batches(
            [lengths[i] for i in batch], [costs[i] for i in batch], ranks.world_size, part.token_budget
        )
        response_tokens = sum(len(response) for i in batch for response in items[i].responses)
        sums = torch.zeros(8, dtype=torch.float64)
        for places in plan[ranks.rank]:
            chosen = [batch[place] for place in places]
            packed = pack([items[i] for i in chosen]).to(ranks.device)
            logps = response_logps(model, packed, part.logit_chunk)  # (C,)
            if opponent is None:
                loss = -logps.sum() / response_tokens
                stats = [loss]
            else:
                loss, stats = spin_step(part, logps, opponent[chosen].to(ranks.device), len(batch))
            (loss * ranks.world_size).backward()  # FSDP averages gradients over the ranks; the batch's mean is wanted
            sums[: len(stats)] += torch.stack(stats).detach().double().cpu()
        sums = ranks.sum(sums.tolist())
        norm = clip_gradient(model, part.max_grad_norm)
        if not math.isfinite(norm) or not math.isfinite(sums[0]):
            raise RuntimeError(
                f"step {step + 1}: loss {sums[0]}, gradient norm {norm}: not finite, so no step is taken. Examples of "
                f"this step: {batch}. A lower lr or beta may help; the last checkpoint is intact"
            )
        drift = sums[7] * len(batch) / response_tokens
        if step == 0 and drift > FIRST_STEP_TOLERANCE:
            raise RuntimeError(
                f"step 1: policy and opponent differ by {drift:.4f} nats a token and the loss is {sums[0]:.4f}, not "
                f"{initial_loss(part.loss):.4f}, while they must be one model; were opponent_logps made from other "
                "weights, pairs or settings?"
            )
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        if log:
            metrics = {"step": done, "epoch": done / schedule.steps_per_epoch, "loss": sums[0]}
            if opponent is not None:
                names = ("accuracy", "margin", "reward_real", "reward_generated", "logps_real", "logps_generated")
                metrics |= dict(zip(names, sums[1:7], strict=True))
            seconds = time.perf_counter() - began
            speed = sum(lengths[i] for i in batch) / seconds
            metrics |= {"grad_norm": norm, "lr": schedule.lr(step), "tokens_per_second": speed}
            log.write(metrics)
            shown = {key: f"{metrics[key]:.3f}" for key in ("loss", "accuracy") if key in metrics}
            bar.set_postfix(shown | {"tokens/s": f"{speed:.0f}"}, refresh=False)
        bar.update()
        if done % part.checkpoint_every == 0 or done == schedule.stop:
            checkpoint.save(saved, done, model, optimizer, ranks)
    bar.close()


def spin_step(part: Train, logps: Tensor, opponent: Tensor, pairs: int) -> tuple[Tensor, list[Tensor]]:
    """Loss of a micro-batch as its share of a step of `pairs` pairs, and the shares of the metrics, loss first.

    logps: (2 B,) real and generated by turns; opponent: (B, 2)
    """
    real, generated = logps.view(-1, 2).unbind(-1)  # (B,)
    opponent_real, opponent_generated = opponent.unbind(-1)
    loss = spin_loss(real, generated, opponent_real, opponent_generated, part.beta, part.loss).sum() / pairs
    with torch.no_grad():
        margin = margins(real, generated, opponent_real, opponent_generated)
        metrics = (
            (margin > 0).float(),  # accuracy: the policy tells the two apart better than the opponent
            margin,
            part.beta * (real - opponent_real),
            part.beta * (generated - opponent_generated),
            real,
            generated,
            (real - opponent_real).abs() + (generated - opponent_generated).abs(),
        )
        return loss, [loss, *(metric.sum() / pairs for metric in metrics)]


def make_optimizer(part: Optimization, model: Mistral) -> torch.optim.Optimizer:
    """RMSProp as the paper has it (alpha 0.99, eps 1e-8, no momentum), or AdamW; no weight decay."""
    parameters = list(model.parameters())
    if part.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=part.lr, alpha=0.99, eps=1e-8, foreach=True)
    return torch.optim.AdamW(parameters, lr=part.lr, weight_decay=0.0, foreach=True)


def clip_gradient(model: Mistral, limit: float) -> float:
    """Scale the gradient down to norm `limit` if it is longer; returns its norm before, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return float(norm.full_tensor())


class Log:
    """metrics.jsonl: one object a step. Steps after `start`, which a killed run had logged, are taken off."""

    def __init__(self, path: Path, start: int):
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        whole = (line for line in lines if line.endswith("\n"))
        write_whole(path, "".join(line for line in whole if json.loads(line)["step"] <= start))
        self._file = open(path, "a", buffering=1)  # a line is written as a whole

    def write(self, metrics: dict) -> None:
        self._file.write(json.dumps(metrics) + "\n")
