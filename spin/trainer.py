"""The training loop, for self-play and for SFT."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from model.attention import moved
from model.mistral import Mistral
from spin.config import Optimization, Train
from spin.engine.checkpoint import Checkpoints
from spin.engine.distributed import Ranks, fsdp, whole
from spin.engine.metrics import Log, peak_flops
from spin.engine.optimizer import make_optimizer
from spin.loss import METRICS, initial_loss, spin_step
from spin.packing import Item, Packed, flops, identical_pairs, micro_batches, pack, prefetched, response_logps

# At the first step policy and opponent are one model, so their log-probabilities differ by rounding alone. In
# bf16, in other company, a response of 200 tokens is rounded by some tenths of a nat; other weights or pairs
# differ far more.
FIRST_STEP_TOLERANCE = 0.02  # mean |log p_θ − log p_θt|, nats a token

HELD_OUT = ("loss", "accuracy", "margin")  # measured on examples kept aside; for SFT the first


class Schedule:
    """Steps, their examples and their learning rates: fixed functions of the settings, on any number of
    ranks.
    """

    def __init__(self, part: Optimization, examples: int):
        self.part, self.examples = part, examples
        # the last step of an epoch may be smaller
        self.steps_per_epoch = math.ceil(examples / part.batch_size)
        self.stop = _ceil(part.epochs * self.steps_per_epoch)
        self.total = _ceil((part.schedule_epochs or part.epochs) * self.steps_per_epoch)
        self.warmup = min(_ceil(part.warmup * self.total), self.total - 1)  # a run of one step takes it

    def lr(self, step: int) -> float:
        """Learning rate of step 0, 1, …: linear warm-up from 0, then linear decay to 0, as transformers has
        it.
        """
        if step < self.warmup:
            return self.part.lr * step / self.warmup
        return self.part.lr * max(0.0, (self.total - step) / max(1, self.total - self.warmup))

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of a step: slices of the epoch's seeded permutation."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _permutation(self.examples, self.part.seed * 1_000_003 + epoch)
        return order[place * self.part.batch_size :][: self.part.batch_size].tolist()


@lru_cache(1)
def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


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
    """Train a sharded model in place, from the last whole checkpoint in `directory` if there is one.

    Args:
        items: with `opponent`, pairs (real first, generated second); without, one response each, for SFT
        opponent: (len(items), 2) log p_θt of the real and the generated response, fp32
        directory: where checkpoints/ and metrics.jsonl are

    Leaves a checkpoint of the last step. A run that was stopped goes on to the numbers that it would have
    had, if ranks and token budget are the same; with others, up to rounding. Raises RuntimeError, before the
    optimizer's step, for a loss or gradient that is not finite, and for a first step at which policy and
    opponent are not one model; OSError for a checkpoint that cannot be written; Stopped after SIGTERM or
    Ctrl-C, once a checkpoint is there.
    """
    examples = Examples(part, model, items, opponent, ranks)
    schedule = Schedule(part, len(examples.used))
    optimizer = make_optimizer(part, model.parameters())
    checkpoints = Checkpoints(directory / "checkpoints", part.keep_checkpoints, model, optimizer, ranks)
    start = checkpoints.restore()
    steps = [[examples.used[i] for i in schedule.batch(step)] for step in range(start, schedule.stop)]
    with (
        Log(directory, start, part.tensorboard) if ranks.first else nullcontext() as log,
        ranks.progress(schedule.stop, "train", "step", start) as bar,
        closing(
            prefetched(examples.load(chosen) for batch in steps for chosen in examples.share(batch))
        ) as packs,
        asked_to_stop() as stop,
    ):
        for step, batch in enumerate(steps, start):
            began = time.perf_counter()
            sums = torch.zeros(len(METRICS), dtype=torch.float64, device=ranks.device)
            seen = []
            mine = examples.share(batch)
            for k, chosen in enumerate(mine, 1):
                logps, loss, stats = examples.forward(batch, *next(packs))
                backward(part, model, loss, ranks, last=k == len(mine))
                sums[: len(stats)] += torch.stack(stats).detach().double()
                seen.append((chosen, logps.detach()))
            norm = float(clip_gradient(model, part.max_grad_norm))
            *totals, stopping = ranks.sum([*sums.tolist(), bool(stop) or checkpoints.failed])
            means = dict(zip(METRICS, totals))
            if not math.isfinite(norm) or not math.isfinite(means["loss"]):
                bad = ranks.gather([i for chosen, logps in seen for i in not_finite(chosen, logps)])
                bad = sorted(i for of_rank in bad for i in of_rank)
                raise RuntimeError(
                    f"step {step + 1}: loss {means['loss']}, gradient norm {norm}: not finite, so no step "
                    f"is taken. {_named(bad or batch, items)}: "
                    f"{'log-probabilities that are not finite' if bad else 'this step'}. "
                    "A lower lr or beta may help; the last checkpoint is intact"
                )
            if step == 0 and opponent is not None:
                assert isinstance(part, Train)
                _check_first_step(part, means, examples.response_tokens(batch) / len(batch))
            for group in optimizer.param_groups:
                group |= {"lr": schedule.lr(step), "step": step}
            optimizer.step()
            optimizer.zero_grad()

            done = step + 1
            metrics = {"step": done, "epoch": done / schedule.steps_per_epoch, "loss": means["loss"]}
            if opponent is not None:
                metrics |= {name: means[name] for name in METRICS[1:-1]}
            metrics |= {"grad_norm": norm, "lr": schedule.lr(step)} | examples.speed(
                batch, time.perf_counter() - began
            )
            if examples.aside and (done % part.heldout_every == 0 or done == schedule.stop):
                metrics |= examples.held_out()
            if log:
                log.write(metrics)
                shown = {key: f"{metrics[key]:.3f}" for key in ("loss", "accuracy") if key in metrics}
                bar.set_postfix(shown | {"tokens/s": f"{metrics['tokens_per_second']:.0f}"}, refresh=False)
            bar.update()
            if done % part.checkpoint_every == 0 or done == schedule.stop or stopping:
                checkpoints.save(done)
            if stopping:
                checkpoints.wait()
                raise Stopped(
                    f"stopped after step {done} of {schedule.stop}; the same command goes on from there"
                )
    checkpoints.wait()


class Examples:
    """What is trained on and what is kept aside, split over the ranks, on its way to the device and through
    the model.
    """

    def __init__(
        self, part: Optimization, model: Mistral, items: Sequence[Item], opponent: Tensor | None, ranks: Ranks
    ):
        self.part, self.model, self.items, self.opponent, self.ranks = part, model, items, opponent, ranks
        self.aside = kept_aside(part, len(items))
        self.used = sorted(set(range(len(items))) - set(self.aside))
        self.lengths = [item.packed_length for item in items]
        self.flops = [flops(model.config, item) for item in items]

    def share(self, batch: Sequence[int]) -> list[list[int]]:
        """This rank's micro-batches of a step's examples, as indices."""
        lengths, costs = ([values[i] for i in batch] for values in (self.lengths, self.flops))
        split = micro_batches(lengths, costs, self.ranks.world_size, self.part.token_budget)
        return [[batch[place] for place in places] for places in split[self.ranks.rank]]

    def load(self, chosen: list[int]) -> tuple[Packed, Tensor | None, Tensor | None]:
        """A micro-batch on the device, with the opponent's log-probabilities (B, 2) and `identical_pairs`."""
        items, device = [self.items[i] for i in chosen], self.ranks.device
        if self.opponent is None:
            return pack(items).to(device), None, None
        identical = identical_pairs(items)
        return pack(items).to(device), moved(self.opponent[chosen], device), moved(identical, device)

    def forward(
        self, batch: Sequence[int], packed: Packed, opponent: Tensor | None, identical: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Log-probabilities of a micro-batch (C,), and its share of a step's loss and metrics."""
        logps = response_logps(self.model, packed, self.part.logit_chunk)
        if opponent is None:
            loss = -logps.sum() / self.response_tokens(batch)
            return logps, loss, [loss]
        assert isinstance(self.part, Train) and identical is not None
        return logps, *spin_step(logps, opponent, identical, len(batch), self.part.beta, self.part.loss)

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Loss, and of pairs accuracy and margin, of the examples kept aside."""
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=self.ranks.device)
        for chosen in self.share(self.aside):
            stats = self.forward(self.aside, *self.load(chosen))[-1]
            sums[: len(stats)] += torch.stack(stats).double()
        fsdp(self.model).reshard()  # FSDP leaves the root's parameters gathered; an optimizer must see shards
        means = dict(zip(METRICS, self.ranks.sum(sums.tolist())))
        return {
            f"heldout_{name}": means[name]
            for name in (HELD_OUT if self.opponent is not None else HELD_OUT[:1])
        }

    def response_tokens(self, batch: Sequence[int]) -> int:
        return sum(len(response) for i in batch for response in self.items[i].responses)

    def speed(self, batch: Sequence[int], seconds: float) -> dict[str, float]:
        """Of a step over all ranks; memory of the rank that takes most. On a GPU, useful FLOPs as a share of
        its peak.
        """
        name = "examples_per_second" if self.opponent is None else "pairs_per_second"
        result = {
            "tokens_per_second": sum(self.lengths[i] for i in batch) / seconds,
            name: len(batch) / seconds,
        }
        result["memory_gb"] = self.ranks.max([self.ranks.peak_memory() / 1e9])[0]
        if peak := peak_flops(self.ranks.device):
            useful = 3 * sum(self.flops[i] for i in batch)  # the backward pass takes twice the forward's
            result["share_of_peak"] = useful / seconds / (peak * self.ranks.world_size)
        return result


def kept_aside(part: Optimization, examples: int) -> list[int]:
    """Indices of the examples that are not trained on, drawn by the seed."""
    if not part.heldout_pairs:
        return []
    if part.heldout_pairs >= examples:
        raise ValueError(
            f"heldout_pairs = {part.heldout_pairs} leaves nothing to train on, of {examples} examples"
        )
    generator = torch.Generator().manual_seed(part.seed)
    return sorted(torch.randperm(examples, generator=generator)[: part.heldout_pairs].tolist())


class Stopped(Exception):
    """Training was asked to stop, and has left a checkpoint."""


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """Yields a list that is empty until the process receives SIGTERM or SIGINT, which do not end it
    meanwhile, however many: torchrun hands on each that it gets. One that is ignored (a script's background
    job ignores SIGINT) stays so.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def not_finite(chosen: list[int], logps: Tensor) -> list[int]:
    """Those of the chosen examples that have a log-probability which is not finite. logps: (C,), by turns"""
    finite = logps.view(len(chosen), -1).isfinite().all(-1) if chosen else logps
    return [i for i, good in zip(chosen, finite.tolist()) if not good]


def _named(indices: list[int], items: Sequence[Item], most: int = 8) -> str:
    names = [items[i].where or f"example {i}" for i in indices]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_first_step(part: Train, means: dict[str, float], response_tokens: float) -> None:
    """Raise RuntimeError if policy and opponent differ. `response_tokens`: mean of a pair."""
    drift = means["drift"] / response_tokens
    if drift > FIRST_STEP_TOLERANCE:
        raise RuntimeError(
            f"step 1: policy and opponent differ by {drift:.4f} nats a token and the loss is "
            f"{means['loss']:.4f}, not {initial_loss(part.loss):.4f}, while they must be one model; were "
            "opponent_logps made from other weights, pairs or settings?"
        )


def backward(part: Optimization, model: Mistral, loss: Tensor, ranks: Ranks, last: bool) -> None:
    """Add a micro-batch's gradient to what the ones before it gave. `last`: of the step."""
    if part.unsharded_gradients:
        fsdp(model).set_requires_gradient_sync(last)
    (loss * ranks.world_size).backward()  # FSDP averages gradients over the ranks; the batch's mean is wanted


def clip_gradient(model: Mistral, limit: float) -> Tensor:
    """Scale the gradient down to norm `limit` if it is longer; returns its norm before, over all ranks."""
    return whole(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
