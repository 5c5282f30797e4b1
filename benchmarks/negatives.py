"""A training step on prompts with several generated responses, packed with the prompt once, next to the same
responses as separate pairs.

    python -m benchmarks.negatives [--dtype float32] [--prompts 8] [--repeats 3] [--load GSM8K]

For K = 1, 2 and 4: prompts with K responses, and K times as many pairs that repeat the prompt and the real
response. Lengths and micro-batches are those of benchmarks/train.py; responses after the first have the
lengths of other prompts' ones. The model has 17M parameters and a small vocabulary: as in large models, the
logits are a small part of the arithmetic.

The loss and every gradient of the two sides are compared first. The loss is the mean over the prompts of the
mean over their K pairs, so both are the same mean. The log-probs of the reference are random numbers around
the policy's, so that no two pairs have the same gradient. A step is forward, backward, clipping and RMSProp
with a learning rate of 0. At K = 1 the two sides are the same: how far their ratio is from 1 is the
measurement's noise. CPU time, of all threads, is given too: other processes disturb it less.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.model import memory_status
from benchmarks.train import SMALL_VOCABULARY, loads, part
from model.mistral import Mistral
from model.weights import save_model
from spin.engine.batches import flops
from spin.engine.distributed import Ranks, ranks, sharded_model, whole
from spin.engine.optimizer import clip_gradient, make_optimizer, update
from spin.packing import Item
from spin.reference import score
from spin.trainer import Objective

CONFIG = replace(SMALL_VOCABULARY, num_hidden_layers=3)
NEGATIVES = (1, 2, 4)


def in_vocabulary(item: Item) -> Item:
    prompt, *responses = ([i % CONFIG.vocab_size for i in ids] for ids in (item.prompt, *item.responses))
    return Item(prompt, tuple(responses))


def prompts_with(drawn: list[Item], prompts: int, negatives: int) -> list[Item]:
    """The first prompts, each with its own generated response and those of `negatives` - 1 later items."""
    return [
        Item(
            item.prompt,
            (item.responses[0], *(drawn[i + k * prompts].responses[1] for k in range(negatives))),
        )
        for i, item in enumerate(drawn[:prompts])
    ]


def separated(items: list[Item], logps: Tensor) -> tuple[list[Item], Tensor]:
    """A pair for each generated response, and its log-probs (B K, 2) of `logps` (B, 1 + K)."""
    pairs = [Item(i.prompt, (i.responses[0], response)) for i in items for response in i.responses[1:]]
    generated = logps[:, 1:]
    return pairs, torch.stack([logps[:, :1].expand_as(generated), generated], -1).flatten(0, 1)


class Side:
    """Steps on the same items, with the same weights each time."""

    def __init__(self, model: Mistral, items: list[Item], reference: Tensor, dtype: str, group: Ranks):
        self.part, self.model, self.items = part(dtype, len(items), 1), model, items
        self.objective = Objective(self.part, model, items, reference, group)

    def gradients(self) -> float:
        """Leave the gradients of a step in the model; returns its loss."""
        with closing(self.objective.batches([range(len(self.items))])) as batches:
            return self.objective.run_step(batches)[1]["loss"]

    def step(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Seconds and CPU seconds of a step, and GB that the process grew to."""
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        began, cpu = time.perf_counter(), time.process_time()
        self.gradients()
        clip_gradient(self.model, self.part.max_grad_norm)
        update(optimizer, 0.0, 0)
        seconds = {"time": time.perf_counter() - began, "CPU time": time.process_time() - cpu}
        return seconds | {"memory": memory_status("VmHWM")}

    def cost(self, of: Callable[[Item], int]) -> int:
        return sum(of(item) for item in self.items)


def check(sides: dict[str, Side], model: Mistral, dtype: str) -> tuple[float, float, float]:
    """Losses of both sides, and the largest difference of a gradient, relative to that tensor's largest."""
    losses, gradients = [], []
    for side in sides.values():
        model.zero_grad()
        losses.append(side.gradients())
        gradients.append([whole(weight.grad).clone() for weight in model.parameters()])
    model.zero_grad()
    apart = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*gradients))
    # In bf16 a response's log-prob is rounded by a tenth of a nat and more.
    loss, gradient = {"float32": (1e-5, 1e-3), "bfloat16": (3e-2, 1e-1)}[dtype]
    if not (abs(losses[0] - losses[1]) < loss and apart < gradient):
        raise SystemExit(f"losses {losses}, gradients up to {apart:.1e} apart: not the same step")
    return losses[0], losses[1], apart


def measure(
    model: Mistral, items: list[Item], reference: Tensor, dtype: str, repeats: int, group: Ranks
) -> dict:
    """Compare the two sides, then time them in turn."""
    sides = {
        "packed": Side(model, items, reference, dtype, group),
        "separate": Side(model, *separated(items, reference), dtype, group),
    }
    packed_loss, separate_loss, apart = check(sides, model, dtype)
    optimizer = make_optimizer(sides["packed"].part, model.parameters())
    sides["packed"].step(optimizer)  # its first step makes its state
    taken = [{name: side.step(optimizer) for name, side in sides.items()} for _ in range(repeats)]
    tokens = {name: side.cost(lambda item: item.packed_length) for name, side in sides.items()}
    needed = {name: side.cost(lambda item: flops(CONFIG, item)) for name, side in sides.items()}

    def ratio(what: str) -> float:
        return round(statistics.median(each["separate"][what] / each["packed"][what] for each in taken), 2)

    return {
        "ratio": ratio("time"),
        "ratio of CPU time": ratio("CPU time"),
        "ratio of tokens": round(tokens["separate"] / tokens["packed"], 2),
        "ratio of FLOPs": round(needed["separate"] / needed["packed"], 2),
        "tokens": tokens,
        "seconds": {name: [round(each[name]["time"], 2) for each in taken] for name in sides},
        "agreed": [round(packed_loss, 6), round(separate_loss, 6), float(f"{apart:.1e}")],
        "peak_memory_gb": {name: round(max(each[name]["memory"] for each in taken), 2) for name in sides},
    }


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments.add_argument("--prompts", type=int, default=8, help="of a step")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument(
        "--load", action="append", help="as in benchmarks/train.py; default: the first two"
    )
    options = arguments.parse_args()
    result = {"name": "negatives", "dtype": options.dtype, "threads": torch.get_num_threads()}
    result |= {"prompts": options.prompts}
    with ranks() as group, tempfile.TemporaryDirectory() as weights:
        save_model(Mistral(CONFIG).init_weights(0), Path(weights, "model"), torch.float32)
        model = sharded_model(Path(weights, "model"), group, getattr(torch, options.dtype))
        drawn_loads = loads(None, max(NEGATIVES) * options.prompts)
        for name in options.load or ("GSM8K", "UltraChat-like"):
            drawn = [in_vocabulary(item) for item in drawn_loads[name][1]]
            items = prompts_with(drawn, options.prompts, max(NEGATIVES))
            settings = part(options.dtype, len(items), 1)
            logps = score(model, items, settings.token_budget, settings.logit_chunk, group)
            reference = logps + torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
            for k in NEGATIVES:
                several = prompts_with(drawn, options.prompts, k)
                figures = measure(
                    model, several, reference[:, : 1 + k], options.dtype, options.repeats, group
                )
                result[f"{name}, K = {k}"] = figures
                print(f"{name}, K = {k}: {figures}", flush=True)
    result["ratio"] = min(v["ratio"] for key, v in result.items() if key.endswith(f"K = {max(NEGATIVES)}"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
