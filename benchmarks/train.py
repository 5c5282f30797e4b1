"""The training engine next to the official pipeline re-made with transformers: the same pairs, weights and
steps.

    python -m benchmarks.train [--data pairs.jsonl] [--dtype float32] [--pairs 32] [--repeats 3]

Three loads: GSM8K's pairs on a model of 60M parameters with Mistral's vocabulary; pairs of UltraChat-like
lengths (prompt 10 to 512 tokens, real 50 to 512, generated 1 to 256, uniform, a fixed seed) on the same; and
GSM8K's lengths on a model of 60M parameters whose vocabulary is small against the rest, so that the gain is
not the logits' alone. Without --data, GSM8K's lengths are drawn to be like its.

The reference does what the official code does: batches of 8 pairs in the data's order, prompt + real and
prompt + generated concatenated into 16 rows and padded to the longest; policy forward and backward, reference
model forward, every step; log-softmax of the whole logits in fp32; RMSprop. In bf16 it has fp32 master
weights next to the bf16 ones, as DeepSpeed has. Ours is `spin.trainer.train` as it is, and its score stage,
which is counted once for two epochs, as in the paper's recipe. Losses of the steps are compared first. Each
side has a process of its own.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.model import CONFIG, matmul_rate, memory_status
from model.config import ModelConfig
from model.mistral import Mistral
from model.weights import save_model
from spin.config import Train
from spin.engine.batches import flops
from spin.engine.distributed import ranks, sharded_model
from spin.engine.schedule import Schedule
from spin.packing import Item
from spin.reference import score
from spin.trainer import train

SMALL_VOCABULARY = ModelConfig(
    vocab_size=2048,
    hidden_size=640,
    intermediate_size=2240,
    num_hidden_layers=11,
    num_attention_heads=10,
    num_key_value_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
)
SEVEN_B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    sliding_window=4096,
)
MICRO_BATCH = 8  # pairs, as in the official recipe
EPOCHS = 2  # over which the score stage is spread


def part(dtype: str, pairs: int, steps: int, **changes) -> Train:
    """The settings of both sides: `steps` steps of `pairs` pairs, each step with the same ones."""
    values = dict(
        batch_size=pairs, epochs=steps, lr=1e-4, warmup=0.0, dtype=dtype, logit_chunk=512, token_budget=4096
    )
    return Train(**values | dict(checkpoint_every=10**6) | changes)


class Ours:
    """spin.trainer.train on one rank."""

    def __init__(self, config: ModelConfig, dtype: str, group, weights: Path):
        self.dtype, self.group, self.weights = dtype, group, weights

    def run(self, items: list[Item], steps: int) -> dict:
        """Losses and seconds of each step, and seconds of the score stage."""
        settings = part(self.dtype, len(items), steps)
        model = sharded_model(self.weights, self.group, getattr(torch, self.dtype))
        began = time.perf_counter()
        opponent = score(model, items, settings.token_budget, settings.logit_chunk, self.group)
        scored = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as run:
            train(settings, model, items, opponent, Path(run), self.group)
            log = [json.loads(line) for line in open(Path(run) / "metrics.jsonl")]
        tokens = sum(item.packed_length for item in items)
        self.group.release_memory()
        return {
            "loss": [row["loss"] for row in log],
            "score": scored,
            "step": [tokens / row["tokens_per_second"] for row in log],
        }


class Official:
    """The official pipeline: a padded concatenated batch, two models, whole logits."""

    def __init__(self, config: ModelConfig, dtype: str, group, weights: Path):
        from transformers import AutoModelForCausalLM

        self.dtype, self.weights = getattr(torch, dtype), weights
        self.load = lambda: AutoModelForCausalLM.from_pretrained(
            weights, dtype=self.dtype, attn_implementation="sdpa"
        )
        self.opponent = self.load().eval()

    def run(self, items: list[Item], steps: int) -> dict:
        settings = part("", len(items), steps)
        self.policy = self.load().train()
        masters = list(self.policy.parameters())
        if self.dtype != torch.float32:
            masters = [weight.detach().float() for weight in masters]
        optimizer = torch.optim.RMSprop(masters, lr=settings.lr, alpha=0.99, eps=1e-8)
        order = [items[i] for i in Schedule(settings, len(items)).batch(0)]
        losses, seconds = [], []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * (1 - step / steps)
            began = time.perf_counter()
            losses.append(0.0)
            for at in range(0, len(order), MICRO_BATCH):
                batch = order[at : at + MICRO_BATCH]
                loss = self.loss(batch, settings.beta) * len(batch) / len(order)
                loss.backward()
                losses[-1] += float(loss.detach())
            for master, weight in zip(masters, self.policy.parameters()):
                if master is not weight:
                    master.grad = weight.grad.float()
            torch.nn.utils.clip_grad_norm_(masters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if self.dtype != torch.float32:
                with torch.no_grad():
                    for master, weight in zip(masters, self.policy.parameters()):
                        weight.copy_(master)
                self.policy.zero_grad()
            seconds.append(time.perf_counter() - began)
        return {"loss": losses, "score": 0.0, "step": seconds}

    def loss(self, batch: list[Item], beta: float) -> torch.Tensor:
        policy = self.logps(self.policy, batch)
        with torch.no_grad():
            opponent = self.logps(self.opponent, batch)
        ratio = policy - opponent
        return -F.logsigmoid(beta * (ratio[: len(batch)] - ratio[len(batch) :])).mean()

    def logps(self, model, batch: list[Item]) -> torch.Tensor:
        rows = [(item.prompt, item.responses[kind]) for kind in (0, 1) for item in batch]
        longest = max(len(prompt) + len(response) for prompt, response in rows)

        def padded(values, fill):
            return values + [fill] * (longest - len(values))

        ids = torch.tensor([padded(prompt + response, 0) for prompt, response in rows])
        mask = torch.tensor([padded([1] * len(prompt + response), 0) for prompt, response in rows])
        labels = torch.tensor([padded([-100] * len(prompt) + response, -100) for prompt, response in rows])[
            :, 1:
        ]
        logits = model(ids, attention_mask=mask, use_cache=False).logits.float()[:, :-1]
        known = labels != -100
        chosen = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[:, :, None]).squeeze(2)
        return (chosen * known).sum(-1)


def loads(path: str | None, count: int) -> dict[str, tuple[ModelConfig, list[Item]]]:
    """{name: (architecture, pairs)}"""
    rng = random.Random(0)

    def ids(length, vocabulary):
        return [rng.randrange(3, vocabulary) for _ in range(length)]

    def drawn(vocabulary, p, r, g):
        return Item(ids(p, vocabulary), (ids(r, vocabulary), ids(g, vocabulary)))

    if path:
        import mistral_common

        from model.tokenizer import Tokenizer
        from spin.config import Data
        from spin.data import load_examples, tokenize

        tokenizer = Tokenizer(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")
        data = Data(max_length=1024)
        gsm8k = tokenize(
            load_examples(path, data, Counter(), pairs=True), tokenizer, "zephyr", data, Counter()
        )
        gsm8k = rng.sample(gsm8k, count)
    # log-normal, with the means and deviations that the pairs have under Mistral's tokenizer and the chat
    # template
    else:

        def length(mean, sigma):
            return max(10, round(rng.lognormvariate(mean, sigma)))

        gsm8k = [drawn(32000, length(4.4, 0.4), length(4.8, 0.45), length(4.6, 0.5)) for _ in range(count)]
    long = [
        drawn(32000, rng.randint(10, 512), rng.randint(50, 512), rng.randint(1, 256)) for _ in range(count)
    ]
    small = [
        Item(*(ids(len(gsm8k[i].prompt), 2048), tuple(ids(len(r), 2048) for r in gsm8k[i].responses)))
        for i in range(count)
    ]
    return {
        "GSM8K": (CONFIG, gsm8k),
        "UltraChat-like": (CONFIG, long),
        "small vocabulary": (SMALL_VOCABULARY, small),
    }


class Process:
    """One side in a process of its own, as its users would have it."""

    def __init__(self, kind: str, config: ModelConfig, dtype: str, weights: Path):
        self.pool = multiprocessing.get_context("spawn").Pool(1, _begin, (kind, config, dtype, weights))

    def run(self, items: list[Item], steps: int) -> dict:
        return self.pool.apply(_run, (items, steps))

    def end(self) -> float:
        """GB that its memory grew to: weights, gradients, optimizer, activations."""
        grown = self.pool.apply(_memory)
        self.pool.terminate()
        return grown


def _begin(kind: str, config: ModelConfig, dtype: str, weights: Path) -> None:
    global side, before
    import transformers  # noqa: F401  so that its code is not counted

    group = ranks().__enter__()
    before = memory_status("VmRSS")
    side = {"ours": Ours, "official": Official}[kind](config, dtype, group, weights)


def _run(items: list[Item], steps: int) -> dict:
    return side.run(items, steps)


def _memory() -> float:
    return memory_status("VmHWM") - before


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--data", help="pairs.jsonl of GSM8K; without it, lengths are drawn to be like its"
    )
    arguments.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments.add_argument("--pairs", type=int, default=32, help="of a step")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument(
        "--load", action="append", help="GSM8K, UltraChat-like or 'small vocabulary'; default: all"
    )
    options = arguments.parse_args()
    result = {
        "name": "train",
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "pairs": options.pairs,
    }
    rate = matmul_rate(getattr(torch, options.dtype))
    result["matmul GFLOP/s"] = round(rate / 1e9)
    for name, (config, items) in loads(options.data, options.pairs).items():
        if options.load and name not in options.load:
            continue
        with tempfile.TemporaryDirectory() as directory:
            result[name] = measure(config, items, options.dtype, options.repeats, rate, Path(directory))
        figures = result[name]
        print(
            f"{name}: {figures['ratio']} times ({figures['ours pairs/s']} against "
            f"{figures['official pairs/s']} pairs/s; {figures['share of matmul rate']:.0%} of the matmul "
            f"rate), peak memory {figures['peak_memory_gb']} GB, "
            f"losses {figures['agreed']}",
            flush=True,
        )
    result["ratio"] = min(figures["ratio"] for figures in result.values() if isinstance(figures, dict))
    print(json.dumps(result))


def measure(
    config: ModelConfig, items: list[Item], dtype: str, repeats: int, rate: float, directory: Path
) -> dict:
    """Compare the losses of three steps, then time both sides in turn."""
    weights = directory / "weights"
    save_model(Mistral(config).init_weights(0), weights, torch.float32)
    sides = {name: Process(name, config, dtype, weights) for name in ("ours", "official")}
    first = {name: side.run(items, 3) for name, side in sides.items()}
    apart = max(abs(a - b) for a, b in zip(first["ours"]["loss"], first["official"]["loss"]))
    # Of losses around 0.5. In bf16 a response's log-probability is rounded by a tenth of a nat and more.
    if apart > {"float32": 1e-4, "bfloat16": 3e-2}[dtype]:
        raise SystemExit(f"the two sides computed different losses: {first}")
    seconds: dict[str, list[float]] = {"ours": [], "official": []}
    for _ in range(repeats):
        for name, side in sides.items():
            # two steps warm up: until then memory is being taken for the first time
            taken = side.run(items, 3)
            seconds[name].append(taken["step"][2] + taken["score"] / EPOCHS)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    memory = {name: round(side.end(), 2) for name, side in sides.items()}
    needed = sum(flops(config, item) for item in items) * (3 + 1 / EPOCHS)
    return {
        "ratio": round(medians["official"] / medians["ours"], 2),
        "ours pairs/s": round(len(items) / medians["ours"], 2),
        "official pairs/s": round(len(items) / medians["official"], 2),
        "share of matmul rate": round(needed / medians["ours"] / rate, 2),
        "parameters": sum(p.numel() for p in Mistral(config).parameters()),
        "tokens of a pair": round(sum(item.packed_length for item in items) / len(items)),
        "agreed": [round(value, 4) for value in first["ours"]["loss"]] + [float(f"{apart:.1e}")],
        "rounds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "peak_memory_gb": memory,
    }


if __name__ == "__main__":
    main()
