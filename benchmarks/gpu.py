"""Everything that is to be seen on a GPU, part by part: that it is correct there, how fast, and how near to
the chip's limits.

    python -m benchmarks.gpu                        # Mistral-7B's shape with random weights, on one GPU
    python -m benchmarks.gpu --parts train,score    # those whose names begin so
    python -m benchmarks.gpu --shape tiny           # the same code on a CPU, in minutes
    python -m benchmarks.gpu --predict              # no measuring: what the floors of an H200 promise

Each part is a process of its own, ended after --limit seconds, and adds its result to <out>/h200.json
(tiny.json) at once; one that is there is not run again, unless --again is given. At the end, and after every
part, <out>/h200.md has each figure with its floor, its share of the floor, and what is aimed at; a figure
that was not measured is marked "predicted".
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.evaluate import WHOLE
from benchmarks.evaluate import alone as evaluated_alone
from benchmarks.generate import SHAPES as GENERATE_SHAPES
from benchmarks.generate import copy_rate
from benchmarks.harness import write_documents
from benchmarks.model import matmul_rate
from benchmarks.train import SEVEN_B, part
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.mistral import Mistral
from model.sampler import generate
from spin.engine.batches import flops
from spin.engine.checkpoint import Checkpoints
from spin.engine.distributed import Ranks, pretended_ranks, ranks, sharded_model, this_device
from spin.engine.files import read_json, to_json, write_whole
from spin.engine.recipe import build
from spin.evaluation.tasks import BENCHMARKS
from spin.packing import Item
from spin.plan import Plan, filling
from spin.reference import score
from spin.trainer import train

ROOT = Path(__file__).parent.parent
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """What is measured, and how much of it."""

    name: str
    config: ModelConfig
    pairs: int  # of a step
    steps: int
    budgets: tuple[int, ...]
    prompts: int
    reference_prompts: int
    max_new_tokens: int
    slots: tuple[int, ...]
    documents: int  # of each task
    chunk: int


SHAPES = {
    "7b": Shape("7b", SEVEN_B, 64, 4, (8192, 16384, 32768), 1024, 64, 256, (64, 128, 256, 512), 100, 2048),
    "tiny": Shape("tiny", GENERATE_SHAPES["tiny"], 8, 3, (1024, 4096), 32, 16, 16, (4, 16), 2, 256),
}
# What is assumed of an H200 where nothing was measured: the rate of a large bf16 product and of a copy.
ASSUMED = {"matmul": 790e12, "copy": 4.1e12}
AIMS = {"train": 0.60, "score": 0.70, "generate": 0.70, "evaluate": 0.50}
# Tokens of a document of the leaderboard's tasks beyond what is shared, of 40 to 100 of each under Mistral's
# tokenizer; of GSM8K's prompts, and of its answers.
DOCUMENT_TOKENS = {
    "arc_challenge": 1101,
    "truthfulqa_mc2": 66,
    "winogrande": 164,
    "hellaswag": 929,
    "mmlu": 149,
}
GSM8K_TOKENS = (1087, 123)
PROMPT = 178  # tokens of a prompt that is generated from
# What is predicted of what the operators' own floors allow (benchmarks/roofline.py): kernels miss theirs by
# something.
PREDICTED = 0.9
TRANSFORMERS_AIM = 20  # times
SETTINGS: dict[str, dict] = {  # of training
    "full": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
    "none": {"activation_checkpointing": "none"},
    "full compiled": {"activation_checkpointing": "full", "compile": True},
    "none compiled": {"activation_checkpointing": "none", "compile": True},
}
HALF_MOMENT = {"second_moment": "bfloat16"}


def trainings(shape: Shape) -> dict[str, tuple[dict, int]]:
    """What is trained with: settings and token budget by the part's name."""
    first, second, *_ = shape.budgets
    result = {f"train {name} {first}": (settings, first) for name, settings in SETTINGS.items()}
    result |= {f"train full {budget}": (SETTINGS["full"], budget) for budget in shape.budgets[1:]}
    result[f"train selective bf16-moment {second}"] = (SETTINGS["selective"] | HALF_MOMENT, second)
    return result | {"train in 80 GB": (SETTINGS["full"] | HALF_MOMENT, first)}


def ultrachat_like(shape: Shape, count: int) -> list[Item]:
    """Pairs of the paper's lengths: prompt 10 to 512 tokens, real 50 to 512, generated 1 to 256, a fixed
    seed.
    """
    rng = random.Random(0)

    def ids(low, high):
        return [rng.randrange(3, shape.config.vocab_size) for _ in range(rng.randint(low, high))]

    return [Item(ids(10, 512), (ids(50, 512), ids(1, 256))) for _ in range(count)]


def random_model(shape: Shape, group: Ranks, settings: dict) -> Mistral:
    """Sharded as for training, with weights drawn on the device: a CPU would take longer than the
    measurement.
    """

    def draw_weights(self, seed):
        torch.manual_seed(seed)
        for weight in self.parameters():
            values = torch.empty(weight.shape, device=group.device)
            yield weight, values.normal_(0, 0.02) if weight.dim() > 1 else values.fill_(1.0)

    before, Mistral.draw_weights = Mistral.draw_weights, draw_weights
    try:
        return sharded_model(
            shape.config,
            group,
            torch.bfloat16,
            settings.get("activation_checkpointing", "none"),
            compile=settings.get("compile", False),
        )
    finally:
        Mistral.draw_weights = before


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


# The parts. Each returns what is kept under its name.


def ceilings(shape: Shape, options) -> dict:
    device = this_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {
        "device": name,
        "torch": torch.__version__,
        "matmul": matmul_rate(torch.bfloat16, device),
        "copy": copy_rate(device),
    }


def tests(shape: Shape, options) -> dict:
    """All tests that need a GPU: FlashAttention against the fp32 twin, captured steps, a training step,
    log-likelihoods.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "gpu", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    sys.stdout.write(done.stdout[-6000:])
    sys.stdout.write(done.stderr[-2000:])
    last = (done.stdout.splitlines() or [""])[-1]
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    return counts | {"failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)}


def training(name: str, shape: Shape, options) -> dict:
    """Rate and memory of training steps; checkpoints are not written. "in 80 GB": held to what torch may have
    of such a card.
    """
    settings, budget = trainings(shape)[name]
    if "80 GB" in name and this_device().type == "cuda":
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 78 * GIB / whole))
    with ranks() as group, tempfile.TemporaryDirectory() as directory:
        model, items = random_model(shape, group, settings), ultrachat_like(shape, shape.pairs)
        Checkpoints.save = lambda self, step: None
        train_part = part(
            "bfloat16",
            shape.pairs,
            shape.steps,
            lr=1e-6,
            token_budget=budget,
            logit_chunk=shape.chunk,
            **settings,
        )
        opponent = score(model, items, budget, shape.chunk, group)
        reset_peak(group.device)
        train(train_part, model, items, opponent, Path(directory), group)
        log = [json.loads(line) for line in open(Path(directory) / "metrics.jsonl")]
        # the first allocates, compiles
        seconds = statistics.median(shape.pairs / row["pairs_per_second"] for row in log[1:])
        tokens = sum(item.packed_length for item in items)
        useful = 3 * sum(flops(shape.config, item) for item in items)
        # what decides whether it fits
        reserved = torch.cuda.max_memory_reserved() if group.device.type == "cuda" else 0
        return {
            "pairs/s": shape.pairs / seconds,
            "tokens/s": tokens / seconds,
            "useful FLOP/s": useful / seconds,
            "memory_gib": log[-1]["memory_gb"] * 1e9 / GIB,
            "reserved_gib": reserved / GIB,
            "losses": [row["loss"] for row in log],
        }


def scoring(shape: Shape, options) -> dict:
    with ranks() as group:
        model, items = random_model(shape, group, {}), ultrachat_like(shape, 4 * shape.pairs)
        score(model, items[: shape.pairs], shape.budgets[-1], shape.chunk, group)
        reset_peak(group.device)
        began = time.perf_counter()
        # its results are on the CPU when it returns
        score(model, items, shape.budgets[-1], shape.chunk, group)
        seconds = time.perf_counter() - began
        return {
            "pairs/s": len(items) / seconds,
            "useful FLOP/s": sum(flops(shape.config, item) for item in items) / seconds,
            "memory_gib": group.peak_memory() / GIB,
        }


def generating(shape: Shape, options) -> dict:
    """Rates by slots next to the floor, and transformers' generate: benchmarks/generate.py in this shape."""
    device = this_device().type
    command = [
        sys.executable,
        "-m",
        "benchmarks.generate",
        "--shape",
        shape.name,
        "--device",
        device,
        "--dtype",
        "bfloat16",
        "--slots",
        ",".join(map(str, shape.slots)),
        "--prompts",
        str(shape.prompts),
        "--reference-prompts",
        str(shape.reference_prompts),
        "--max-new-tokens",
        str(shape.max_new_tokens),
        "--repeats",
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines() or [""]
    sys.stdout.write(done.stdout)
    if not lines[-1].startswith("{"):
        raise RuntimeError(f"benchmarks.generate ended with {done.returncode}: {lines[-1]}")
    return json.loads(lines[-1])


def company(shape: Shape, options) -> dict:
    """Of sampled responses, how many differ between numbers of slots: bf16 rounds a row otherwise in other
    company.
    """
    device = this_device()
    torch.manual_seed(0)
    with device:
        model = Mistral(shape.config).to(torch.bfloat16).eval()
    rng = random.Random(1)

    def ids(count):
        return [rng.randrange(3, shape.config.vocab_size) for _ in range(count)]

    prompts = [ids(rng.randint(10, 100)) for _ in range(shape.prompts // 4)]
    settings = dict(max_new_tokens=min(64, shape.max_new_tokens), temperature=1.0, seed=1)
    few, many = (
        generate(model, prompts, slots=slots, **settings) for slots in (shape.slots[0], shape.slots[-1])
    )
    length = max(map(len, prompts)) + settings["max_new_tokens"]
    fixed = dict(slots=shape.slots[0], slot_length=length, fixed_slots=True)
    a, b = (
        generate(model, prompts, **settings, **fixed),
        generate(model, prompts[::2], streams=range(0, len(prompts), 2), **settings, **fixed),
    )
    return {
        "responses": len(prompts),
        "differ": sum(x != y for x, y in zip(few, many)),
        "differ with fixed_slots": sum(x != y for x, y in zip(a[::2], b)),
    }


def recipe(shape: Shape, options) -> dict:
    """The default recipe's first iteration on this device, and on the CPU from its pairs: losses side by
    side.
    """
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        same = [f"--model.base={folder}/here/base/model", f"--data.pairs={folder}/here/iter0/generated"]
        for name, hidden, more in (("here", None, []), ("cpu", "", same)):
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": hidden} if hidden is not None else {})
            run = Path(folder) / name
            began = time.perf_counter()
            command = [sys.executable, "train.py", "--iter", "0", f"--run.dir={run}", *more]
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
            curves[name] = [json.loads(line)["loss"] for line in open(run / "iter0/metrics.jsonl")]
            summary = read_json(run / "iter0/evaluation/summary.json")["tasks"]["heldout"]
            curves[name + " right when sampled"] = summary["exact_match_sampled"]
            curves[name + " seconds"] = time.perf_counter() - began
    apart = [abs(a - b) for a, b in zip(curves["here"], curves["cpu"], strict=True)]
    return curves | {"largest difference of a loss": max(apart)}


def resume(shape: Shape, options) -> dict:
    """A checkpoint written here is resumed on the CPU, to the losses that a run on the CPU alone has."""
    settings = ["--train.checkpoint_every=10", "--evaluate.tasks="]

    def command(run):
        return [sys.executable, "train.py", "--iter", "0", f"--run.dir={run}", *settings]

    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        with open(run.with_suffix(".log"), "w") as log:
            process = subprocess.Popen(command(run), cwd=ROOT, stdout=log, stderr=log)
            metrics = run / "iter0/metrics.jsonl"
            while process.poll() is None and not (
                metrics.is_file() and len(metrics.read_text(encoding="utf-8").splitlines()) >= 15
            ):
                time.sleep(0.01)
            process.terminate()
            process.wait()
        reached = len(metrics.read_text(encoding="utf-8").splitlines())
        subprocess.run(command(run), cwd=ROOT, env=hidden, check=True)
        shared = [f"--model.base={run}/base/model", f"--data.pairs={run}/iter0/generated"]
        subprocess.run([*command(Path(folder) / "cpu"), *shared], cwd=ROOT, env=hidden, check=True)
        logs = [Path(folder) / name / "iter0/metrics.jsonl" for name in ("run", "cpu")]
        losses = [[json.loads(line)["loss"] for line in open(log)] for log in logs]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    return {"steps here": reached, "steps in all": len(losses[0]), "largest difference of a loss": apart}


def profile(shape: Shape, options) -> dict:
    """What a training step's time goes to: operators by their own time on the device."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    cuda = torch.cuda.is_available()
    on, field = (
        (DeviceType.CUDA, "self_device_time_total") if cuda else (DeviceType.CPU, "self_cpu_time_total")
    )
    # Some pairs: a step's kernels are the same ones over and over. Weights are made outside.
    few = replace(shape, pairs=min(16, shape.pairs), steps=2)
    with ranks() as group, tempfile.TemporaryDirectory() as directory:
        model, items = random_model(few, group, SETTINGS["full"]), ultrachat_like(few, few.pairs)
        Checkpoints.save = lambda self, step: None
        budget = few.budgets[0]
        settings = part(
            "bfloat16", few.pairs, 2, lr=1e-6, token_budget=budget, logit_chunk=few.chunk, **SETTINGS["full"]
        )
        opponent = score(model, items, budget, few.chunk, group)
        with profiled(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as record:
            train(settings, model, items, opponent, Path(directory), group)

    def own(event):
        return getattr(event, field)

    events = [
        e for e in record.key_averages() if e.device_type == on and not e.is_user_annotation and own(e) > 0
    ]
    total = sum(map(own, events))
    most = sorted(events, key=own, reverse=True)[:15]
    return {"share of the time": {event.key[:80]: own(event) / total for event in most}}


def evaluating(shape: Shape, options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder)
        if not options.data:
            write_documents(data, max(6, shape.documents))
        names = [name for name, task in BENCHMARKS.items() if not task.source.missing(data)]
        if shape.name == "tiny":
            names = ["arc_challenge", "winogrande", "mmlu_virology", "gsm8k"]
        result = evaluated_alone(shape.config, this_device().type, data, names, shape.documents)
        return result | {"documents": str(options.data or "of random words")}


def memory(shape: Shape, options) -> dict:
    """What spin.plan counts next to what torch has allocated: a step of two micro-batches of the longest
    pairs, scoring, decoding in the most slots; and a step with the largest budget that the plan says fits (or
    the part fails).
    """
    budget, result = shape.budgets[0], {}
    changes = {
        "train.token_budget": budget,
        "train.logit_chunk": shape.chunk,
        "train.activation_checkpointing": "full",
    }
    config = build(changes | {"train.batch_size": 64})
    with pretended_ranks(1) as group:
        plan = Plan(config, shape.config, group)
        result["score planned"] = sum(plan.score(budget).values()) / GIB
        result["train planned"] = sum(plan.train(budget).values()) / GIB
        free = torch.cuda.mem_get_info()[0] - 4 * GIB if torch.cuda.is_available() else GIB / 4
        result["largest budget"] = plan.largest_budget(free)
        weights = sum(weight.numel() for weight in plan.model.parameters()) * 2
    length = 512 + shape.max_new_tokens
    slot = KVCache.bytes_per_slot(shape.config, length, torch.bfloat16)
    result["generate planned"] = (weights + max(shape.slots) * slot) / GIB
    context = multiprocessing.get_context("spawn")  # another process group, and an empty device
    for what, tried in (("", budget), (" with the largest budget", result["largest budget"])):
        with context.Pool(1) as pool:
            try:
                measured = pool.apply(_measured_memory, (shape, changes | {"train.token_budget": tried}))
            except torch.OutOfMemoryError as error:
                measured = {"out of memory": str(error)[:200]}
        result |= {name + what: value for name, value in measured.items()}
    with context.Pool(1) as pool:
        return result | pool.apply(_generating_memory, (shape, length))


def _generating_memory(shape: Shape, length: int) -> dict:
    with ranks() as group:
        with group.device:
            model = Mistral(shape.config).to(torch.bfloat16).eval().requires_grad_(False)
        group.release_memory()  # the fp32 weights that these were
        slots = max(shape.slots)
        generate(model, [[5] * 100] * slots, max_new_tokens=4, slots=slots, slot_length=length)
        return {"generate measured": group.peak_memory() / GIB}


def _measured_memory(shape: Shape, changes: dict) -> dict:
    budget, config = changes["train.token_budget"], build(changes)
    with ranks() as group, tempfile.TemporaryDirectory() as directory:
        model = random_model(shape, group, {"activation_checkpointing": "full"})
        items = 2 * filling(budget, config)
        reset_peak(group.device)
        opponent = score(model, items, budget, shape.chunk, group)
        result = {"score measured": group.peak_memory() / GIB}
        reset_peak(group.device)
        Checkpoints.save = lambda self, step: None
        settings = part(
            "bfloat16",
            len(items),
            3,
            lr=1e-6,
            token_budget=budget,
            logit_chunk=shape.chunk,
            **SETTINGS["full"],
        )
        train(settings, model, items, opponent, Path(directory), group)
        return result | {"train measured": group.peak_memory() / GIB}


def parts(shape: Shape) -> dict[str, Callable]:
    """Every part by its name, in the order in which they are run."""
    result: dict[str, Callable] = {"ceilings": ceilings, "tests": tests}
    result |= {name: partial(training, name) for name in trainings(shape)}
    result |= {"profile": profile, "score": scoring, "generate": generating, "evaluate": evaluating}
    return result | {"memory": memory, "company": company, "recipe": recipe, "resume": resume}


# The report


@dataclass(frozen=True)
class Figure:
    """A line of the report: how much of what, the floor's rate, and the share that is aimed at."""

    what: str
    unit: str
    measured: float | None
    ceiling: float
    aim: float
    allowed: float | None = None  # share of the floor, if every operator reached its own


def figures(shape: Shape, results: dict) -> list[Figure]:
    """Rates next to what the ceilings allow."""
    matmul, copy = (results.get("ceilings", ASSUMED)[name] for name in ("matmul", "copy"))
    allowed = operators_shares(shape)
    items = ultrachat_like(shape, 4 * shape.pairs)
    forward = sum(flops(shape.config, item) for item in items) / len(items)
    lines = []
    for name in trainings(shape):
        # what is compiled has fewer operators: at least that
        share = allowed.get(name.replace(" compiled", ""))
        measured = _value(results, name, "pairs/s")
        lines.append(Figure(name, "pairs/s", measured, matmul / (3 * forward), AIMS["train"], share))
    measured = _value(results, "score", "pairs/s")
    lines.append(Figure("score", "pairs/s", measured, matmul / forward, AIMS["score"], allowed.get("score")))
    for slots in shape.slots:
        measured = results.get("generate", {}).get("by slots", {}).get(str(slots))
        ceiling, name = decoding_rate(shape, slots, matmul, copy), f"generate, {slots} slots"
        share = None
        if allowed:
            share = (
                decoding_rate(shape, slots, matmul, copy, share=(allowed[name], allowed["score"])) / ceiling
            )
        lines.append(
            Figure(name, "tokens/s", measured and measured["tokens/s"], ceiling, AIMS["generate"], share)
        )
    rates = {name: matmul / flops(shape.config, Item([1] * n, ([1],))) for name, n in DOCUMENT_TOKENS.items()}
    prompt, answer = GSM8K_TOKENS
    rates["gsm8k"] = (
        decoding_rate(replace(shape, max_new_tokens=answer), max(shape.slots), matmul, copy, prompt) / answer
    )
    of_words = results.get("evaluate", {}).get("documents") == "of random words"  # shorter than the floor's
    if "gsm8k" in results.get("evaluate", {}):  # random weights never stop
        slots = min(max(shape.slots), results["evaluate"]["gsm8k"]["documents"])
        rates["gsm8k"] = decoding_rate(replace(shape, max_new_tokens=256), slots, matmul, copy, prompt) / 256
    for name, ceiling in rates.items():
        measured = None if of_words else results.get("evaluate", {}).get(name, {}).get("documents/s")
        lines.append(Figure(f"evaluate, {name}", "documents/s", measured, ceiling, AIMS["evaluate"]))
    return lines


def decoding_rate(
    shape: Shape,
    slots: int,
    matmul: float,
    copy: float,
    prompt: int = PROMPT,
    share: Sequence[float] = (1, 1),
) -> float:
    """Tokens/s of answers of max_new_tokens, prompts read at the matrix product's rate.

    share: how much of their floors' rates steps and prompts reach.
    """
    step = decoding_step(shape, slots, matmul, copy, prompt) / share[0]
    read = flops(shape.config, Item([1] * prompt, ([1],))) / matmul / share[1]
    return slots * shape.max_new_tokens / (shape.max_new_tokens * step + slots * read)


def decoding_step(shape: Shape, slots: int, matmul: float, copy: float, prompt: int = PROMPT) -> float:
    """Seconds of a token more in each slot, if that took the larger of its bytes' and its FLOPs' time."""
    config = shape.config
    with torch.device("meta"):
        weights = (
            sum(weight.numel() for weight in Mistral(config).parameters())
            - config.vocab_size * config.hidden_size
        )
    held = KVCache.bytes_per_slot(config, prompt + shape.max_new_tokens // 2, torch.bfloat16)
    return max((2 * weights + slots * held) / copy, 2 * weights * slots / matmul)


def operators_shares(shape: Shape) -> dict[str, float]:
    """Share of the floor by figure, as benchmarks/roofline.py left it; empty where it was not run for this
    shape.
    """
    file = ROOT / f"benchmarks/results/roofline-{shape.name}.json"
    return (
        {name: of["share"] for name, of in read_json(file).items() if "share" in of} if file.is_file() else {}
    )


def _value(results: dict, part_name: str, key: str) -> float | None:
    return results.get(part_name, {}).get(key)


def bill(shape: Shape, results: dict) -> list[tuple[str, float, float, float, bool]]:
    """Hours to generate, score and train of the paper's four iterations, and whether they are predicted."""
    best = best_training(shape, results)
    scored = next(f for f in figures(shape, results) if f.what == "score")
    written = max((f for f in figures(shape, results) if f.what.startswith("generate")), key=_rate)
    predicted = None in (best.measured, scored.measured, written.measured)
    rows = []
    for n in range(4):
        pairs = 50_000 * (1 + (n > 0))
        # 180 tokens a response
        hours = [50_000 * 180 / _rate(written), pairs / _rate(scored), 2 * pairs / _rate(best)]
        rows.append((f"iteration {n}", *(value / 3600 for value in hours), predicted))
    return rows


def best_training(shape: Shape, results: dict) -> Figure:
    """The settings that train fastest."""
    return max(
        (f for f in figures(shape, results) if f.what.startswith("train ") and "80" not in f.what), key=_rate
    )


def _rate(figure: Figure) -> float:
    """Measured, or predicted."""
    return figure.measured or (PREDICTED * figure.allowed if figure.allowed else figure.aim) * figure.ceiling


def report(shape: Shape, results: dict) -> str:
    """Markdown."""
    failed = {
        name: result["failed"] for name, result in results.items() if isinstance(result.get("failed"), str)
    }
    results = {name: result for name, result in results.items() if name not in failed}
    measured = "ceilings" in results
    ceiling = results.get("ceilings", ASSUMED)
    device = results.get("ceilings", {}).get("device", "H200")
    lines = [
        f"# {shape.name} on {device}",
        "",
        f"`python -m benchmarks.gpu{' --shape tiny' * (shape.name == 'tiny')}`, random weights, bf16. "
        "Ceilings, "
        + (f"measured (torch {ceiling['torch']})" if measured else "**assumed, nothing was measured**")
        + f": {_si(ceiling['matmul'])}FLOP/s in a large matrix product, {_si(ceiling['copy'])}B/s in a "
        "large copy. The floor is what the useful FLOPs (training: forward and twice as much backward) take "
        "at the first, or, in decoding, the bytes at the second. What the operators allow is the share at "
        "which each of them, one after the other (in decoding with its "
        "prompts), takes what its own FLOPs or bytes take (`python -m benchmarks.roofline`, for "
        f"{_si(ASSUMED['matmul'])}FLOP/s and {_si(ASSUMED['copy'])}B/s); where "
        "that is less than the aim, the aim needs fewer operators (compilation) or another setting. What is "
        f"compiled is allowed that much at least. Predictions are {PREDICTED:.0%} of what is allowed, or "
        "the aim.",
        "",
        "| | rate | at the floor | share | operators allow | aim |",
        "|---|---|---|---|---|---|",
    ]
    for figure in figures(shape, results):
        rate = f"{_number(_rate(figure))} {figure.unit}" + ", predicted" * (figure.measured is None)
        share = f"{_rate(figure) / figure.ceiling:.0%}" + ", predicted" * (figure.measured is None)
        allowed = f"{figure.allowed:.0%}" if figure.allowed else ""
        lines.append(
            f"| {figure.what} | {rate} | {_number(figure.ceiling)} | {share} | {allowed} | {figure.aim:.0%} |"
        )
    best = best_training(shape, results).what.removeprefix("train ")
    lines += [
        "",
        "Hours of this one GPU for the paper's iterations (50k prompts each, 50k pairs and then 100k, 2 "
        f"epochs; trained with {best}):",
        "",
    ]
    lines += ["| | generate | score | train | all |", "|---|---|---|---|---|"]
    for name, *hours, predicted in bill(shape, results):
        values = " | ".join(f"{value:.2f}" for value in [*hours, sum(hours)])
        lines.append(f"| {name} | {values}{', predicted' * predicted} |")
    documents = [f for f in figures(shape, results) if f.what.startswith("evaluate, ")]
    hours = sum(WHOLE[f.what.removeprefix("evaluate, ")] / _rate(f) for f in documents) / 3600
    predicted = any(f.measured is None for f in documents)
    lines += ["", f"The whole leaderboard of one model: {hours:.2f} hours{', predicted' * predicted}.", ""]
    transformers = results.get("generate", {}).get("ratio")
    ratio = f"{transformers:.1f} times" if transformers else "not measured"
    lines += [f"- Beside transformers' generate at batch 16: {ratio} (aim: {TRANSFORMERS_AIM})."]
    for name in ("tests", "memory", "company", "evaluate", "recipe", "resume", "train in 80 GB", "profile"):
        shown = json.dumps(_rounded(results[name])) if name in results else "not measured"
        lines.append(f"- {name}: {shown}")
    lines += [f"- **{name} did not end well:** {why}" for name, why in failed.items()]
    return "\n".join(lines) + "\n"


def _si(value: float) -> str:
    size, letter = next((s, c) for s, c in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1, "")) if value >= s)
    return f"{value / size:.3g} {letter}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items() if key not in ("here", "cpu")}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--shape", choices=SHAPES, default="7b")
    arguments.add_argument("--parts", help="names or their beginnings, with commas; default: all")
    arguments.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    arguments.add_argument(
        "--limit", type=int, default=480, help="seconds for each part (default: %(default)s)"
    )
    arguments.add_argument(
        "--data", type=Path, help="benchmarks' documents as hf download leaves them, for evaluate"
    )
    arguments.add_argument("--again", action="store_true", help="run again what has results")
    arguments.add_argument("--predict", action="store_true", help="measure nothing: the report alone")
    # of a part's own process: its name; --out is then its file
    arguments.add_argument("--part", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    shape = SHAPES[options.shape]
    if options.part:
        write_whole(options.out, to_json(parts(shape)[options.part](shape, options)))
        return
    name = "h200" if shape.name == "7b" else shape.name
    file = options.out / f"{name}.json"
    results = read_json(file) if file.is_file() else {}
    names = list(parts(shape))
    wanted = [part_name.strip() for part_name in (options.parts or ",".join(names)).split(",")]
    for part_name in wanted:
        if not part_name or not any(n.startswith(part_name) for n in names):
            raise SystemExit(f"--parts: {part_name!r} begins none of these: {', '.join(names)}")
    chosen = [n for n in names if n.startswith(tuple(wanted))]
    if shape.name == "7b" and not options.predict and not torch.cuda.is_available():
        raise SystemExit("the 7b shape needs a GPU; --shape tiny runs on a CPU, --predict measures nothing")
    options.out.mkdir(parents=True, exist_ok=True)
    ended = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # micro-batches differ in length
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for part_name in chosen if not options.predict else []:
        if part_name in results and "failed" not in results[part_name] and not options.again:
            continue
        print(f"--- {part_name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            own = Path(folder) / "result.json"
            command = [
                sys.executable,
                "-u",
                "-m",
                "benchmarks.gpu",
                "--shape",
                shape.name,
                "--part",
                part_name,
            ]
            command += ["--out", str(own)] + (["--data", str(options.data)] if options.data else [])
            began = time.perf_counter()
            process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=environment)
            try:
                ended[part_name] = process.wait(options.limit)
            except subprocess.TimeoutExpired:
                ended[part_name] = "longer than the limit"
            finally:  # its children too: they hold the GPU
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            results[part_name] = (
                read_json(own) if own.is_file() else {"failed": f"ended with {ended[part_name]}"}
            )
            results[part_name]["seconds"] = round(time.perf_counter() - began, 1)
        write_whole(file, to_json(results))
        write_whole(file.with_suffix(".md"), report(shape, results))
    write_whole(file.with_suffix(".md"), report(shape, results))
    print(report(shape, results))
    absent = [part_name for part_name in parts(shape) if part_name not in results]
    print(json.dumps({"name": "gpu", "shape": shape.name, "ended": ended, "not measured": absent}))


if __name__ == "__main__":
    main()
