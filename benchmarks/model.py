"""The packed transformer next to transformers' padded batches: forward, and a training step's forward and
backward.

    python -m benchmarks.model [--dtype float32] [--data FILE] [--texts 32] [--repeats 3]

About 60M parameters, Mistral's shape and vocabulary size, random weights, the same on both sides. The texts
have GSM8K's lengths (question and answer), once as they are and once all of one length. The reference is
MistralForCausalLM with SDPA on batches of 16 in file order, padded to the longest, labels masked where
padded. Both sides give the mean log-probability of the same tokens; it is compared first, and every gradient
with it. Peak memory is of a process of its own for each side.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import time
from pathlib import Path

import torch

from model.attention import Segments
from model.config import ModelConfig
from model.mistral import Mistral

CONFIG = ModelConfig(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1792,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
)
BATCH = 16


def lengths_like_gsm8k(path: str | None, count: int, seed: int = 0) -> list[int]:
    """Tokens of question and answer: of the file's first `count` lines if given, else drawn from what they
    were there.

    The drawn ones are log-normal with the mean (192) and the standard deviation (71) that GSM8K's training
    set has under Mistral's tokenizer, and within its extremes.
    """
    if path:
        import mistral_common

        from model.tokenizer import Tokenizer

        tokenizer = Tokenizer(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")
        rows = [json.loads(line) for line in open(path, encoding="utf-8")][:count]
        return [len(tokenizer.encode(row["question"] + "\n" + row["answer"])) for row in rows]
    rng = random.Random(seed)
    return [min(553, max(67, round(rng.lognormvariate(5.194, 0.356)))) for _ in range(count)]


class Ours:
    """Packed streams of as many tokens as the reference's batch has useful ones."""

    def __init__(self, dtype: torch.dtype):
        self.model = Mistral(CONFIG).init_weights(0).to(dtype)

    def loss(self, batch: list[list[int]]) -> torch.Tensor:
        lengths = [len(tokens) for tokens in batch]
        tokens = torch.tensor([token for tokens in batch for token in tokens])
        positions = torch.cat([torch.arange(n) for n in lengths])
        last = torch.tensor(lengths).cumsum(0) - 1
        at = torch.ones(len(tokens), dtype=torch.bool).index_fill_(0, last, False).nonzero().squeeze(-1)
        logps = self.model(tokens, positions, Segments.causal(lengths), at=at, targets=tokens[at + 1])
        return -logps.mean()


class Transformers:
    """What a user would write: AutoModelForCausalLM's class, padding at the right, attention mask, labels."""

    def __init__(self, dtype: torch.dtype):
        from transformers import MistralConfig, MistralForCausalLM

        values = CONFIG.to_dict("float32")
        config = MistralConfig(**{key: value for key, value in values.items() if key != "architectures"})
        config._attn_implementation = "sdpa"
        self.model = MistralForCausalLM(config)
        self.model.load_state_dict(Mistral(CONFIG).init_weights(0).state_dict())
        self.model.to(dtype)

    def loss(self, batch: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, batch))
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in batch])
        mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in batch])
        return self.model(
            ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False
        ).loss


def run(side, batches, backward: bool) -> float:
    """Seconds for all batches."""
    began = time.perf_counter()
    for batch in batches:
        if backward:
            side.loss(batch).backward()
            side.model.zero_grad()
        else:
            with torch.no_grad():
                side.loss(batch)
    return time.perf_counter() - began


def compare(ours: Ours, theirs: Transformers, batch) -> dict[str, float]:
    """Largest differences: of the loss, and of a gradient relative to its norm."""
    a, b = ours.loss(batch), theirs.loss(batch)
    a.backward()
    b.backward()
    gradients = dict(theirs.model.named_parameters())
    worst = max(
        float((p.grad.float() - gradients[n].grad.float()).norm() / gradients[n].grad.float().norm())
        for n, p in ours.model.named_parameters()
    )
    ours.model.zero_grad()
    theirs.model.zero_grad()
    return {"loss": abs(float(a.detach()) - float(b.detach())), "gradient": worst}


def matmul_rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """FLOP/s of a large matrix product, the best of a few: the ceiling."""
    device = torch.device(device)
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    # of a GPU a second in all: the rate that it sustains
    seconds, times = [], 20 if device.type == "cuda" else 1
    for _ in range(40 if device.type == "cuda" else 7):
        began = time.perf_counter()
        for _ in range(times):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / times)
    return 2 * n**3 / (statistics.median(seconds[20:]) if device.type == "cuda" else min(seconds))


def floor(backward: bool) -> int:
    """FLOPs that a token needs: two for each weight of a matrix, four more backward (attention itself adds
    1%).
    """
    embedding = CONFIG.vocab_size * CONFIG.hidden_size
    weights = sum(p.numel() for p in Mistral(CONFIG).parameters() if p.dim() > 1) - embedding
    return (6 if backward else 2) * weights


def peak_memory(kind: str, dtype: torch.dtype, batches) -> float:
    """GB of memory that a process takes to train on the batches: weights, gradients, activations."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_memory, (kind, dtype, batches))


def _measure_memory(kind: str, dtype: torch.dtype, batches) -> float:
    import transformers  # noqa: F401  so that code is not counted

    before = memory_status("VmRSS")
    run({"ours": Ours, "transformers": Transformers}[kind](dtype), batches, backward=True)
    return memory_status("VmHWM") - before


def memory_status(field: str) -> float:
    """VmRSS (now) or VmHWM (at most, so far) of this process, in GB."""
    lines = dict(
        line.split(":") for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    )
    return int(lines[field].split()[0]) / 1e6


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments.add_argument("--data", help="GSM8K's train.jsonl; without it, lengths are drawn to be like its")
    arguments.add_argument("--texts", type=int, default=32)
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    dtype = getattr(torch, options.dtype)

    rng = random.Random(1)
    lengths = lengths_like_gsm8k(options.data, options.texts)
    mean = round(sum(lengths) / len(lengths))
    loads = {}
    for name, values in (("ragged", lengths), ("equal", [mean] * len(lengths))):
        texts = [[rng.randrange(3, CONFIG.vocab_size) for _ in range(n)] for n in values]
        loads[name] = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]

    ours, theirs = Ours(dtype), Transformers(dtype)
    result = {"name": "model", "dtype": options.dtype, "threads": torch.get_num_threads()}
    result["parameters"] = sum(p.numel() for p in ours.model.parameters())
    result["agreed"] = compare(ours, theirs, loads["ragged"][0])
    limits = {"float32": (1e-5, 1e-3), "bfloat16": (1e-2, 5e-2)}[options.dtype]
    if result["agreed"]["loss"] > limits[0] or result["agreed"]["gradient"] > limits[1]:
        raise SystemExit(f"the two sides computed different things: {result['agreed']}")

    rate = matmul_rate(dtype)
    result["matmul GFLOP/s"] = round(rate / 1e9)
    for load, batches in loads.items():
        tokens = sum(len(text) for batch in batches for text in batch)
        padded = sum(len(batch) * max(map(len, batch)) for batch in batches)
        for backward in (False, True):
            seconds = {"ours": [], "transformers": []}
            for repeat in range(-2, options.repeats):
                for name, side in (("ours", ours), ("transformers", theirs)):
                    taken = run(side, batches, backward)
                    if repeat >= 0:  # two rounds warm up
                        seconds[name].append(taken)
            a, b = (statistics.median(values) for values in seconds.values())
            what = f"{load} {'forward+backward' if backward else 'forward'}"
            share = tokens / a * floor(backward) / rate
            result[what] = {
                "ratio": round(b / a, 2),
                "ours tokens/s": round(tokens / a),
                "transformers tokens/s": round(tokens / b),
                "share of matmul rate": round(share, 2),
            }
            print(
                f"{what}: {b / a:.2f}x ({tokens / a:.0f} against {tokens / b:.0f} tokens/s; {share:.0%} of "
                f"the matmul rate; {tokens / padded:.0%} of the padded tokens are useful)"
            )
    memory = {kind: round(peak_memory(kind, dtype, loads["ragged"]), 2) for kind in ("ours", "transformers")}
    print(f"peak memory of training steps: {memory} GB")
    result["ratio"] = result["ragged forward+backward"]["ratio"]
    result["peak_memory_gb"] = memory
    print(json.dumps(result))


if __name__ == "__main__":
    main()
