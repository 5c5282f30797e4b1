"""The evaluator next to lm-evaluation-harness's hf backend: the same documents, model and tokenizer.

    python -m benchmarks.evaluate [--data ../shared/data/eval] [--limit 24] [--repeats 3]

About 60M parameters, Mistral's shape and tokenizer, random weights, fp32. Every score, prediction and metric
is compared first. The reference takes, for each task, the best of some batch sizes, tried on its first
documents. Timed is what each side does with its documents in memory and its model loaded: encoding, forward
passes, generation; ours writes its results too. Peak memory is of a fresh process for each side, the
reference's with batches of one. Without --data, small documents of random words are made.

    python -m benchmarks.evaluate --shape 7b --device cuda --data DIR      # ours alone, random weights, bf16

gives the time of each task and projects the whole leaderboard's.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import run_harness, write_documents, write_tokenizer_json
from benchmarks.model import CONFIG, memory_status
from benchmarks.train import SEVEN_B
from model.config import ModelConfig
from model.mistral import Mistral
from model.tokenizer import Tokenizer
from model.weights import load_model, save_model
from spin.config import Config
from spin.engine.distributed import ranks
from spin.engine.recipe import build
from spin.evaluation.runner import answers, load_tasks
from spin.evaluation.scoring import Encoder
from spin.evaluation.task import LoadedModel
from spin.evaluation.tasks import BENCHMARKS
from spin.report.leaderboard import DOCUMENTS, LEADERBOARD

FAMILIES = {  # of tasks that cost alike
    "four choices": ("arc_challenge", "hellaswag", "openbookqa"),
    "MMLU": ("mmlu_",),
    "other choices": ("winogrande", "truthfulqa", "bigbench"),
    "generated": ("gsm8k", "bbh_"),
}
# Documents of the leaderboard's tasks, for the projection.
WHOLE = {task: DOCUMENTS[task] for task, *_ in LEADERBOARD}
FILTERS = {"strict-match": "", "get-answer": "", "flexible-extract": "_flexible"}  # and our metrics' suffixes
BATCH_SIZES = (1, 4, 16)
SHAPES = {"7b": SEVEN_B, "60m": CONFIG}


class Ours:
    def __init__(self, model_dir: Path, data: Path, names: list[str], limit: int):
        self.group = ranks().__enter__()
        changes = {
            "tasks": ",".join(names),
            "data": str(data),
            "limit": limit,
            "dtype": "float32",
            "token_budget": 4096,
        }
        self.config = build({f"evaluate.{key}": value for key, value in changes.items()})
        self.tasks = {task.name: task for task in load_tasks(self.config)}
        self.model, self.tokenizer = load_model(model_dir, torch.float32), Tokenizer(model_dir)

    def run(self, name: str, _: int = 0) -> tuple[float, list[dict]]:
        began = time.perf_counter()
        encoder = Encoder(self.tokenizer, self.tokenizer.adds_bos)
        model = LoadedModel("ours", self.config.evaluate, self.model, self.tokenizer, encoder, self.group)
        with tempfile.TemporaryFile("w") as file:
            rows = []
            for row in answers(self.tasks[name], model, range(len(self.tasks[name].documents))):
                file.write(json.dumps(row) + "\n")
                rows.append(row)
        return time.perf_counter() - began, sorted(rows, key=lambda row: row["doc"])


class Theirs:
    def __init__(self, model_dir: Path, data: Path, names: list[str], limit: int):
        os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
        from lm_eval.models.huggingface import HFLM

        self.model_dir, self.data, self.limit = model_dir, data, limit
        self.backend = HFLM(str(model_dir), dtype="float32", batch_size=1, device="cpu")
        self.seconds = 0.0
        for method in ("loglikelihood", "generate_until"):
            setattr(self.backend, method, self._timed(getattr(self.backend, method)))
        self.best: dict[str, int] = {}

    def _timed(self, method):
        def run(*arguments, **settings):
            began = time.perf_counter()
            result = method(*arguments, **settings)
            self.seconds += time.perf_counter() - began
            return result

        return run

    def run(self, name: str, batch_size: int = 0) -> tuple[float, list[dict]]:
        if batch_size:
            return self._run(name, batch_size, self.limit)
        if name not in self.best:
            took = {size: self._run(name, size, min(8, self.limit))[0] for size in BATCH_SIZES}
            self.best[name] = min(took, key=took.get)
        return self._run(name, self.best[name], self.limit)

    def _run(self, name: str, batch_size: int, limit: int) -> tuple[float, list[dict]]:
        self.backend.batch_size_per_gpu, self.seconds = batch_size, 0.0
        with tempfile.TemporaryDirectory() as folder:
            got = run_harness(
                self.model_dir, [name], self.data, Path(folder), limit=limit, model=self.backend
            )
        return self.seconds, got["samples"][name]


def agree(name: str, ours: list[dict], theirs: list[dict]) -> tuple[float, int]:
    """Largest difference of a score in nats, and documents whose text, prediction or metric differs."""
    samples: dict[int, list[dict]] = {}
    for sample in theirs:
        samples.setdefault(sample["doc_id"], []).append(sample)
    if sorted(samples) != [row["doc"] for row in ours]:
        raise SystemExit(f"{name}: other documents")
    apart, differing = 0.0, 0
    for row in ours:
        sample = samples[row["doc"]][0]
        if "text" in row:
            same = _bytes_alike(sample["resps"][0][0]) == _bytes_alike(row["text"])
            by_filter = {sample["filter"]: sample for sample in samples[row["doc"]]}
            for name_there, suffix in FILTERS.items():
                if found := by_filter.get(name_there):
                    same &= found["exact_match"] == row[f"exact_match{suffix}"]
                    same &= found["filtered_resps"] == [row[f"prediction{suffix}"]]
        else:
            scores = [float(of_choice[0][0]) for of_choice in sample["resps"]]
            apart = max([apart, *(abs(a - b) for a, b in zip(scores, row["scores"], strict=True))])
            same = all(
                math.isclose(sample[m], row[m], abs_tol=1e-4) for m in ("acc", "acc_norm") if m in sample
            )
            same &= row["prediction"] == scores.index(max(scores))
        differing += not same
    return apart, differing


def _bytes_alike(text: str) -> str:
    """Tokens of single bytes that are no UTF-8: of a run with a broken one transformers replaces all,
    sentencepiece that one.
    """
    return re.sub("[\ufffd\x00-\x1f]*\ufffd[\ufffd\x00-\x1f]*", lambda run: "\ufffd" * len(run[0]), text)


def _begin(kind: str, *arguments) -> None:
    global side, before
    import lm_eval.models.huggingface  # noqa: F401  so that code is not counted

    before = memory_status("VmRSS")
    side = {"ours": Ours, "theirs": Theirs}[kind](*arguments)


def _run(name: str, batch_size: int = 0):
    return side.run(name, batch_size)


def _memory() -> float:
    return memory_status("VmHWM") - before


def small_weights(directory: Path, config: ModelConfig = CONFIG) -> None:
    """Random weights, wide enough that attention is far from uniform, with Mistral's tokenizer for both
    sides.
    """
    import mistral_common

    model = Mistral(config).init_weights(0)
    for name, weight in model.named_parameters():
        scale = {"embed": 0.2, "q_proj": 0.06, "k_proj": 0.06, "lm_head": 0.1}.get(
            name.split(".")[-2].split("_t")[0], 0.05
        )
        if weight.dim() > 1:
            weight.data.mul_(scale / weight.data.std())
    save_model(model, directory, torch.float32)
    shutil.copy(
        Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", directory / "tokenizer.model"
    )
    write_tokenizer_json(directory)


def alone(config: ModelConfig, device: str, data: Path, names: list[str], limit: int) -> dict:
    """Ours in bf16 with random weights: seconds and documents per second by task, and the leaderboard's
    projected hours.
    """
    import mistral_common

    changes = {
        "tasks": ",".join(names),
        "data": str(data),
        "limit": limit,
        "dtype": "bfloat16",
        "logit_chunk": 2048,
    }
    settings: Config = build({f"evaluate.{key}": value for key, value in changes.items()})
    tokenizer = Tokenizer(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")
    with torch.device("meta"):
        model = Mistral(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_(1.0)
    result, rate = {}, {}
    with ranks() as group:
        for task in load_tasks(settings):
            encoder, count = Encoder(tokenizer, bos=True), len(task.documents)
            loaded = LoadedModel("random", settings.evaluate, model, tokenizer, encoder, group)
            list(answers(task, loaded, range(min(4, count))))  # allocates, captures graphs
            began = time.perf_counter()
            list(answers(task, loaded, range(count)))
            rate[task.name] = count / (time.perf_counter() - began)
            result[task.name] = {"documents": count, "documents/s": round(rate[task.name], 2)}
            print(task.name, result[task.name], flush=True)
    subjects = [value for name, value in rate.items() if name.startswith("mmlu_")]
    if subjects:
        rate["mmlu"] = len(subjects) / sum(1 / value for value in subjects)
        result["mmlu"] = {"subjects": len(subjects), "documents/s": round(rate["mmlu"], 2)}
    hours = {name: WHOLE[name] / rate[name] / 3600 for name in WHOLE if name in rate}
    result["projected hours"] = {name: round(value, 3) for name, value in hours.items()} | {
        "all": round(sum(hours.values()), 3)
    }
    if device == "cuda":
        result["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    return result


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--data", type=Path, help="data sets as hf download leaves them")
    arguments.add_argument(
        "--limit", type=int, default=24, help="documents of each task (default: %(default)s)"
    )
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--tasks", help="with commas; default: all that there is data for")
    arguments.add_argument("--shape", choices=SHAPES, help="ours alone, in this shape")
    arguments.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if not options.data:
            write_documents(work / "data", 24)
        data = options.data or work / "data"
        names = (
            options.tasks.split(",")
            if options.tasks
            else [n for n, t in BENCHMARKS.items() if not t.source.missing(data)]
        )
        if options.shape:
            print(
                json.dumps(
                    {"name": "evaluate"}
                    | alone(SHAPES[options.shape], options.device, data, names, options.limit)
                )
            )
            return
        small_weights(work / "model")
        print(json.dumps(measure(work / "model", data, names, options.limit, options.repeats)))


def measure(model_dir: Path, data: Path, names: list[str], limit: int, repeats: int) -> dict:
    """Compare every document, then time both sides task by task, in turn."""
    start = multiprocessing.get_context("spawn").Pool
    sides = {kind: start(1, _begin, (kind, model_dir, data, names, limit)) for kind in ("ours", "theirs")}
    apart, differing, documents = 0.0, {}, 0
    seconds: dict[str, dict[str, float]] = {}
    for name in names:
        rows = {kind: side.apply(_run, (name,))[1] for kind, side in sides.items()}
        of_task, differ = agree(name, rows["ours"], rows["theirs"])
        apart, documents = max(apart, of_task), documents + len(rows["ours"])
        if of_task > 1e-3 or differ > (0.1 * len(rows["ours"]) if "text" in rows["ours"][0] else 0):
            raise SystemExit(
                f"{name}: scores differ by {of_task:.1e}, {differ} of {len(rows['ours'])} documents differ"
            )
        if differ:
            differing[name] = differ  # long greedy texts, in which rounding tips a near tie
        took = {kind: [side.apply(_run, (name,))[0] for _ in range(repeats)] for kind, side in sides.items()}
        seconds[name] = {kind: statistics.median(values) for kind, values in took.items()}
        shown = {kind: round(value, 2) for kind, value in seconds[name].items()}
        print(f"{name}: {len(rows['ours'])} documents, {shown} s", flush=True)
    result = {"name": "evaluate", "documents": documents, "threads": torch.get_num_threads()}

    def total(kind, names):
        return sum(seconds[name][kind] for name in names)

    for family, prefixes in FAMILIES.items():
        members = [name for name in names if name.startswith(prefixes)]
        if members:
            ours, theirs = total("ours", members), total("theirs", members)
            result[family] = {
                "ratio": round(theirs / ours, 2),
                "ours": round(ours, 2),
                "lm-eval": round(theirs, 2),
            }
    ours, theirs = total("ours", names), total("theirs", names)
    for side in sides.values():
        side.terminate()
    memory = peak_memory(model_dir, data, names, limit)
    return result | {
        "ratio": round(theirs / ours, 2),
        "ours": round(ours, 2),
        "lm-eval": round(theirs, 2),
        "agreed": {"scores within": float(f"{apart:.1e}"), "documents that differ": differing},
        "tasks": {
            name: {kind: round(value, 2) for kind, value in both.items()} for name, both in seconds.items()
        },
        "peak_memory_gb": memory,
    }


def peak_memory(model_dir: Path, data: Path, names: list[str], limit: int) -> dict[str, float]:
    """GB that a fresh process of each side grows by; the reference with batches of one, its smallest."""
    grown = {}
    for kind, name in (("ours", "ours"), ("theirs", "lm-eval")):
        with multiprocessing.get_context("spawn").Pool(
            1, _begin, (kind, model_dir, data, names, limit)
        ) as side:
            for task in names:
                side.apply(_run, (task, 1))
            grown[name] = round(side.apply(_memory), 2)
    return grown


if __name__ == "__main__":
    main()
