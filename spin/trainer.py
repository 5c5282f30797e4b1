"""The training loop, for self-play and for SFT."""

import math
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from model.attention import to_device
from model.mistral import Mistral
from spin.config import Optimization, Train
from spin.engine.batches import MicroBatch, flops, item_batches
from spin.engine.checkpoint import Checkpoints
from spin.engine.distributed import Ranks, fsdp
from spin.engine.metrics import Log, peak_flops
from spin.engine.optimizer import clip_gradient, make_optimizer, update
from spin.engine.schedule import Schedule, held_out_items
from spin.engine.signals import Stopped, stop_requests
from spin.loss import sft_step, spin_step
from spin.packing import Item, Packed, response_logps, response_places

# Before the first update policy and opponent differ only by rounding: in bf16, by a few tenths of a nat per
# response of 200 tokens. Wrong weights or pairs give a far larger difference.
FIRST_STEP_TOLERANCE = 0.02  # mean |log p_θ − log p_θt|, nats per token

HELD_OUT = ("loss", "accuracy", "margin")  # metrics of held-out pairs; SFT has the loss only


def train(
    part: Optimization,
    model: Mistral,
    items: Sequence[Item],
    reference: Tensor | None,
    directory: Path,
    ranks: Ranks,
    opponent: Tensor | None = None,
) -> None:
    """Train a sharded model in place, resuming from the last complete checkpoint in `directory`.

    Args:
        items: with `reference`, C responses each, the real one first; without, one each, for SFT
        reference: (len(items), C) log p of these responses by the reference, fp32
        directory: where checkpoints/ and metrics.jsonl are written
        opponent: the same by the model that training starts from, to check the first step; None: no check

    Saves a checkpoint after the last step. A resumed run gives the results of an uninterrupted one; with a
    different number of ranks or token_budget, up to rounding.

    Raises RuntimeError before the optimizer's step if loss or gradient is not finite, or if policy and
    opponent differ at the first step; OSError if a checkpoint can't be written; Stopped after SIGTERM, SIGINT
    or SIGHUP, once a checkpoint is written.
    """
    held_out = held_out_items(part, len(items))
    used = sorted(set(range(len(items))) - set(held_out))
    schedule = Schedule(part, len(used))
    objective = Objective(part, model, items, reference, ranks, opponent)
    optimizer = make_optimizer(part, model.parameters())
    checkpoints = Checkpoints(directory / "checkpoints", part.keep_checkpoints, model, optimizer, ranks)
    start = checkpoints.restore()
    if start > schedule.stop:
        past = f"trained to step {start} already, past epochs = {part.epochs:g}"
        raise ValueError(f"{directory}: {past}; remove its checkpoints/ to train again")
    steps = ([used[i] for i in schedule.batch(step)] for step in range(start, schedule.stop))
    with (
        Log(directory, start, part) if ranks.first else nullcontext() as log,
        ranks.progress(schedule.stop, "train", "step", start) as bar,
        closing(checkpoints),
        closing(objective.batches(steps)) as batches,
        stop_requests() as requests,
    ):
        for step in range(start, schedule.stop):
            began = time.perf_counter()
            batch, shares, seen = objective.run_step(batches)
            norm = float(clip_gradient(model, part.max_grad_norm))
            *totals, stopping = ranks.sum([*shares.values(), bool(requests) or checkpoints.failed])
            means = dict(zip(shares, totals))
            objective.check(step, batch, means, norm, seen)
            update(optimizer, schedule.lr(step), step)

            done, last = step + 1, step + 1 == schedule.stop
            metrics = {"step": done, "epoch": done / schedule.steps_per_epoch}
            metrics |= means | {"grad_norm": norm, "lr": schedule.lr(step)}
            metrics |= objective.speed(batch, time.perf_counter() - began)
            if held_out and (done % part.heldout_every == 0 or last):
                metrics |= objective.evaluate(held_out)
            if log:
                log.write(metrics, bar)
            bar.update()
            if done % part.checkpoint_every == 0 or last or stopping:
                checkpoints.save(done)
            if stopping:
                checkpoints.wait()
                raise Stopped(f"stopped after step {done} of {schedule.stop}; run the same command to resume")
        checkpoints.wait()


class Objective:
    """Loss and metrics of micro-batches: SPIN with the reference's log-probs, SFT without. See `train`."""

    def __init__(
        self,
        part: Optimization,
        model: Mistral,
        items: Sequence[Item],
        reference: Tensor | None,
        ranks: Ranks,
        opponent: Tensor | None = None,
    ):
        self.part, self.model, self.items, self.ranks = part, model, items, ranks
        self.reference, self.opponent = reference, opponent
        if reference is not None:
            self.same, self.lengths = response_places(items)

    def batches(self, steps: Iterable[Sequence[int]]) -> Generator[tuple[MicroBatch, Packed]]:
        """Yield this rank's micro-batches of the steps, packed and on the device."""
        return item_batches(steps, self.items, self.model.config, self.part.token_budget, self.ranks)

    def __call__(self, batch: MicroBatch, packed: Packed) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Log-probs of a micro-batch (C,), its share of the step's loss, and its shares of the metrics."""
        logps = response_logps(self.model, packed, self.part.logit_chunk)
        if self.reference is None:
            return logps, *sft_step(logps, self.response_tokens(batch.step))
        return logps, *self.spin_step(logps, batch.items, len(batch.step))

    def spin_step(self, logps: Tensor, chosen: list[int], prompts: int) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(self.part, Train) and self.reference is not None
        tensors = (self.reference[chosen], self.same[chosen], self.lengths[chosen])
        reference, same, lengths = (to_device(tensor, logps.device) for tensor in tensors)
        return spin_step(logps, reference, same, lengths, prompts, self.part)

    def run_step(self, batches) -> tuple[Sequence[int], dict[str, float], list]:
        """Run this rank's micro-batches of one step, accumulating gradients if they are enabled.

        Returns the step's items, this rank's shares of the metrics, and log-probs with their items.
        """
        shares, seen = [], []
        for batch, packed in batches:
            logps, loss, metrics = self(batch, packed)
            if torch.is_grad_enabled():
                backward(self.part, self.model, loss, self.ranks, batch.last)
            shares.append(torch.stack([*metrics.values()]).detach().double())
            seen.append((batch.items, logps.detach()))
            if batch.last:
                break
        return batch.step, dict(zip(metrics, torch.stack(shares).sum(0).tolist())), seen

    def check(self, step: int, chosen: Sequence[int], means: dict, norm: float, seen: list) -> None:
        """Raise RuntimeError if loss or gradient is not finite, or policy and opponent differ at step 0.

        `seen`: log-probs of this rank's micro-batches, with their items.
        """
        if not (math.isfinite(norm) and math.isfinite(means["loss"])):
            rows = (row for items, logps in seen for row in zip(items, logps.view(max(1, len(items)), -1)))
            bad = self.ranks.gather([i for i, row in rows if not row.isfinite().all()])
            bad = sorted(i for of_rank in bad for i in of_rank)
            which = "log-probs that are not finite" if bad else "this step"
            raise RuntimeError(
                f"step {step + 1}: loss {means['loss']}, gradient norm {norm}: not finite, so no step is "
                f"taken. {self._names(bad or chosen)}: {which}. A lower lr or beta may help; the last "
                "checkpoint is intact"
            )
        if step or self.opponent is None:
            return
        differences = [(logps.cpu() - self.opponent[i].flatten()).abs().sum() for i, logps in seen]
        drift = self.ranks.sum([float(sum(differences))])[0] / self.response_tokens(chosen)
        if drift > FIRST_STEP_TOLERANCE:
            _, expected = self.spin_step(self.opponent[chosen].flatten(), list(chosen), len(chosen))
            raise RuntimeError(
                f"step 1: policy and opponent differ by {drift:.4f} nats per token and the loss is "
                f"{means['loss']:.4f}, not {expected['loss']:.4f}: they must be the same model. "
                "Were opponent_logps made from other weights, pairs or settings?"
            )

    @torch.no_grad()
    def evaluate(self, chosen: Sequence[int]) -> dict[str, float]:
        """Loss, and of pairs accuracy and margin, of items that are not trained on."""
        with closing(self.batches([chosen])) as batches:
            _, shares, _ = self.run_step(batches)
        fsdp(self.model).reshard()  # FSDP keeps the root gathered; the optimizer needs shards
        means = dict(zip(shares, self.ranks.sum([*shares.values()])))
        return {f"heldout_{name}": means[name] for name in HELD_OUT if name in means}

    def speed(self, chosen: Sequence[int], seconds: float) -> dict[str, float]:
        """Throughput of a step over all ranks, and the peak memory of the rank that takes most.

        On a known GPU also the useful FLOPs as a share of its peak.
        """
        items, unit = [self.items[i] for i in chosen], "examples" if self.reference is None else "pairs"
        result = {
            "tokens_per_second": sum(item.packed_length for item in items) / seconds,
            f"{unit}_per_second": len(items) / seconds,
            "memory_gb": max(self.ranks.gather(self.ranks.peak_memory())) / 1e9,
        }
        if peak := peak_flops(self.ranks.device):
            useful = 3 * sum(flops(self.model.config, item) for item in items)  # forward and backward
            result["share_of_peak"] = useful / seconds / (peak * self.ranks.world_size)
        return result

    def response_tokens(self, chosen: Sequence[int]) -> int:
        return sum(len(response) for i in chosen for response in self.items[i].responses)

    def _names(self, chosen: Sequence[int], most: int = 8) -> str:
        names = [self.items[i].where or f"example {i}" for i in chosen]
        return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def backward(part: Optimization, model: Mistral, loss: Tensor, ranks: Ranks, last: bool) -> None:
    """Accumulate a micro-batch's gradient; `last`: it is the step's last one."""
    if part.unsharded_gradients:
        fsdp(model).set_requires_gradient_sync(last)
    (loss * ranks.world_size).backward()  # FSDP averages over the ranks; the loss is a share of the sum
