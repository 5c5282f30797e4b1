"""Evaluate one model on all tasks: missing documents are run, on any number of ranks, and results are kept.

A finished task has <directory>/<task>.jsonl, an object for each document, and in <directory>/summary.json its
metrics ("tasks") and what they depend on ("records"). A task in progress has its rows in
<directory>/<task>.partial/.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.weights import fingerprint, load_model
from spin.config import Config, Data, Evaluate
from spin.engine.distributed import Ranks
from spin.engine.files import read_json, to_json, to_jsonl, write_whole
from spin.engine.stages import Rows, check_claim, check_record
from spin.evaluation.benchmark import load_benchmark
from spin.evaluation.heldout import load_heldout
from spin.evaluation.mt_bench import load_mt_bench
from spin.evaluation.scoring import Encoder
from spin.evaluation.task import LoadedModel, Task
from spin.evaluation.tasks import BENCHMARKS, GROUPS, HARNESSES, in_harness, mmlu_groups, subjects_with_data

SLICE = 1024  # documents that are answered before all of their rows are written
OWN = {"heldout": load_heldout, "mt_bench": load_mt_bench}
log = logging.getLogger("spin")


def load_tasks(config: Config) -> list[Task]:
    """The tasks of evaluate.tasks. Raises ValueError for an unknown task or a bad document.

    Raises FileNotFoundError, with the command that downloads each missing data set.
    """
    return _load(config.evaluate, config.data, config.train.template) if config.evaluates else []


@lru_cache(8)  # most iterations have the same tasks
def _load(settings: Evaluate, data: Data, template: str) -> list[Task]:
    if settings.harness not in HARNESSES:
        raise ValueError(f"evaluate.harness = {settings.harness!r} is not one of {', '.join(HARNESSES)}")
    folder, tasks, missing = Path(settings.data), {}, []
    for name in _names(settings.tasks):
        try:
            if name in OWN:
                tasks[name] = OWN[name](settings, data, template)
                continue
            for member in subjects_with_data(folder) if name == "mmlu" else [name]:
                benchmark = in_harness(member, settings.harness)
                tasks[member] = load_benchmark(benchmark, folder, settings.limit, settings.harness)
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise FileNotFoundError("\n".join(missing))
    return list(tasks.values())


def _names(tasks: str) -> list[str]:
    """The names in evaluate.tasks, groups replaced by their members except for mmlu."""
    names: list[str] = []
    for name in filter(None, map(str.strip, tasks.split(","))):
        if name not in (*OWN, *GROUPS, *BENCHMARKS):
            known = [*OWN, *GROUPS, *(n for n in BENCHMARKS if not n.startswith("mmlu_")), "mmlu_<subject>"]
            raise ValueError(f"evaluate.tasks: unknown task {name!r}; known are {', '.join(known)}")
        names += GROUPS.get(name, [name])
    return list(dict.fromkeys(names))


def evaluate(config: Config, model_dir: Path, directory: Path, ranks: Ranks) -> dict:
    """Run every task that has no results in `directory`. Returns the summary.

    Raises ValueError for existing results of another model or other settings.
    """
    settings, tasks, tokenizer = config.evaluate, load_tasks(config), Tokenizer(model_dir)
    bos = settings.harness != "0.4.0" and tokenizer.adds_bos
    common = {"model": ranks.from_first(lambda: fingerprint(model_dir)), "dtype": settings.dtype}
    records = {task.name: common | task.record for task in tasks}
    for record in records.values():
        if "harness" in record:
            record["bos"] = bos
    summary = ranks.from_first(lambda: _summary(directory, common, records))
    missing = [task for task in tasks if task.name not in summary["tasks"]]
    longest = ModelConfig.from_pretrained(model_dir).max_position_embeddings
    if short := [task.name for task in missing if task.max_new_tokens >= longest]:
        raise ValueError(f"{short[0]}: the model reads {longest} tokens: no room for an answer; leave it out")
    if missing:
        weights = load_model(model_dir, getattr(torch, settings.dtype), ranks.device, config.model.attention)
        name = _model_name(config, model_dir)
        model = LoadedModel(name, settings, weights, tokenizer, Encoder(tokenizer, bos), ranks)
        _run(model, missing, records, directory)
        summary = ranks.from_first(lambda: read_json(directory / "summary.json"))
    elif tasks:
        log.info("%s: finished, nothing to do", directory)
    return summary


def _summary(directory: Path, common: dict, records: dict[str, dict]) -> dict:
    """The existing summary, or a new one. Raises ValueError if the results can't be resumed."""
    file = directory / "summary.json"
    if not file.is_file():
        if any(path.name not in (".lock", "summary.json.partial") for path in directory.glob("*")):
            raise ValueError(f"{directory}: exists and is no evaluation; choose another, or remove it")
        write_whole(file, to_json({"tasks": {}, "records": {}}))
    summary = read_json(file)
    for name, record in summary["records"].items():  # a directory has results of one model
        check_record(directory, record, records.get(name, common), name)
    for partial in directory.glob("*.partial/"):
        if partial.stem in summary["tasks"]:
            shutil.rmtree(partial)
        elif partial.stem in records:
            check_claim(partial, records[partial.stem])
    return summary


def _run(model: LoadedModel, tasks: Sequence[Task], records: dict[str, dict], directory: Path) -> None:
    """Run tasks one after the other, each with its documents dealt to the ranks."""
    ranks, total = model.ranks, sum(len(task.documents) for task in tasks)
    with ranks.progress(total, f"evaluate {model.name}", "document") as bar:

        def counted(rows: Iterator[dict]) -> Iterator[dict]:
            for row in rows:
                yield row
                bar.update(min(ranks.world_size, total - bar.n))

        for task in tasks:
            bar.set_postfix({"task": task.name})
            rows = Rows(directory / f"{task.name}.partial", records[task.name], ranks)
            bar.update(len(rows.done))
            left = [doc for doc in range(len(task.documents)) if doc not in rows.done]
            rows.append(counted(answers(task, model, left[ranks.rank :: ranks.world_size])))
            ranks.barrier()
            ranks.from_first(lambda: _finish(directory, task, rows, records))


def answers(task: Task, model: LoadedModel, docs: Sequence[int]) -> Iterator[dict]:
    """A row for each document, in any order."""
    for start in range(0, len(docs), SLICE):
        yield from task.answer(model, docs[start : start + SLICE])


def _finish(directory: Path, task: Task, rows: Rows, records: dict[str, dict]) -> None:
    """Write a task's rows in order, then its part of the summary."""
    complete = rows.complete(len(task.documents))
    write_whole(directory / f"{task.name}.jsonl", to_jsonl(complete))
    summary = read_json(directory / "summary.json")
    summary["tasks"][task.name] = task.summarise(complete)
    summary["records"][task.name] = records[task.name]
    single = {name: summary["tasks"][name] for name in summary["records"]}
    summary["tasks"] = single | mmlu_groups(single, {*records, *single})
    write_whole(directory / "summary.json", to_json(summary))
    shutil.rmtree(rows.directory)


def _model_name(config: Config, model_dir: Path) -> str:
    """<run>-<iteration> for a model of the run, else the name of its directory."""
    path = model_dir.resolve()
    if path.is_relative_to(Path(config.run.dir).resolve()):
        return f"{Path(config.run.dir).name}-{path.parent.name}"
    return path.parent.name if path.name == "model" else path.name
