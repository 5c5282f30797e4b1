"""All tasks of one model: what is missing is run, on any number of ranks, and what is there is kept.

A task leaves <directory>/<task>.jsonl, an object for each document, and its line in <directory>/summary.json. Until then
its documents are in <directory>/partial/, a file for each rank, from which a killed run goes on.
"""

import json
import logging
import math
import shutil
from pathlib import Path

import torch

from model.mistral import Mistral
from model.tokenizer import Tokenizer
from model.weights import fingerprint, load_model
from spin.config import Config
from spin.distributed import Ranks
from spin.evaluation.benchmark import Benchmark
from spin.evaluation.engine import Engine, Task
from spin.evaluation.heldout import Heldout
from spin.evaluation.mt_bench import MTBench
from spin.evaluation.scoring import Encoder
from spin.evaluation.statistics import pooled
from spin.evaluation.tasks import BENCHMARKS, GROUPS, HARNESSES, MMLU_GROUPS
from spin.files import cut_unfinished_line, only_process, read_json, to_json, write_whole

log = logging.getLogger("spin")


def load_tasks(config: Config) -> list[Task]:
    """The tasks that evaluate.tasks names, with their documents.

    Raises FileNotFoundError, naming for every data set that is not there the command that gets it, or ValueError for an
    unknown task or a document that cannot be asked.
    """
    settings = config.evaluate
    if not config.evaluates:
        return []
    if settings.harness not in HARNESSES:
        raise ValueError(f"evaluate.harness = {settings.harness!r} is not one of {', '.join(HARNESSES)}")
    own, data = {"heldout": Heldout, "mt_bench": MTBench}, Path(settings.data)
    wanted: list[str] = []
    absent: list[str] = []
    for name in filter(None, (name.strip() for name in settings.tasks.split(","))):
        if name not in (*own, *BENCHMARKS, *GROUPS):
            known = ", ".join([*own, *GROUPS, *(n for n in BENCHMARKS if not n.startswith("mmlu_")), "mmlu_<subject>"])
            raise ValueError(f"evaluate.tasks: unknown task {name!r}; known are {known}")
        for member in [name] if name == "mmlu" else GROUPS.get(name, [name]):
            if member == "mmlu":  # the subjects that are there, if any are
                sources = {subject: BENCHMARKS[subject].source for subject in GROUPS["mmlu"]}
                there = [subject for subject, source in sources.items() if not source.missing(data)]
                if not there:
                    command = BENCHMARKS[GROUPS["mmlu"][0]].source.command(data)
                    absent.append(f"{data / 'mmlu'}: no subject with a test and a dev split; get them by\n    {command}")
                elif len(there) < len(sources):
                    log.warning("%s: %d of MMLU's %d subjects; the others are left out", data / "mmlu", len(there), len(sources))
            else:
                there = [member]
                absent.append(own[member].missing(config) if member in own else BENCHMARKS[member].source.missing(data))
            wanted += [task for task in there if task not in wanted]
    if any(absent):
        raise FileNotFoundError("\n".join(filter(None, absent)))
    load = lambda name: Benchmark(BENCHMARKS[name].load(data, settings.limit, settings.harness))  # noqa: E731
    return [own[name](config) if name in own else load(name) for name in wanted]


def evaluate(
    config: Config, model_dir: Path, directory: Path, ranks: Ranks, tasks: list[Task] | None = None
) -> tuple[dict, bool]:
    """Run every task that is not in `directory` yet. Returns the summary, and whether there was something to do.

    `tasks`, where the caller has loaded them. Raises ValueError for results there of another model or other settings.
    """
    settings = config.evaluate
    tasks = load_tasks(config) if tasks is None else tasks
    tokenizer = Tokenizer(model_dir)
    origin = {
        "model": ranks.from_first(lambda: fingerprint(model_dir)),
        "dtype": settings.dtype,
        "limit": settings.limit,
    }
    with only_process(directory, hold=ranks.first):
        summary = ranks.from_first(lambda: _begin(directory, origin, tasks))
        missing = [task for task in tasks if task.name not in summary["tasks"]]
        if missing:
            model = load_model(model_dir, getattr(torch, settings.dtype), ranks.device, config.model.attention)
            run_tasks(_name(config, model_dir), config, model, tokenizer, missing, directory, ranks)
            ranks.barrier()
            summary = ranks.from_first(lambda: read_json(directory / "summary.json"))
        if ranks.first:
            shutil.rmtree(directory / "partial", ignore_errors=True)
    return summary, bool(missing)


def run_tasks(
    name: str, config: Config, model: Mistral, tokenizer: Tokenizer, tasks: list[Task], directory: Path, ranks: Ranks
) -> None:
    """Run the tasks one after the other, the documents of each dealt to the ranks by cost."""
    dealt = []
    for task in tasks:
        done = ranks.from_first(lambda: {row["doc"] for row in _rows(directory, task.name)})
        left = sorted((doc for doc in range(len(task)) if doc not in done), key=lambda doc: -task.cost(doc))
        dealt.append(sorted(left[ranks.rank :: ranks.world_size]))
    total = sum(task.cost(doc) for task, mine in zip(tasks, dealt) for doc in mine)
    bar = ranks.progress(math.ceil(total), f"evaluate {name}", "token")
    bar.unit_scale = True
    encoder = Encoder(tokenizer, bos=config.evaluate.harness != "0.4.0" and _adds_bos(tokenizer))
    engine = Engine(name, config, model, tokenizer, encoder, ranks, bar.update)
    for task, mine in zip(tasks, dealt):
        bar.set_postfix({"task": task.name})
        (directory / "partial").mkdir(exist_ok=True)
        with open(directory / "partial" / f"{task.name}.rank{ranks.rank}.jsonl", "a", encoding="utf-8", buffering=1) as file:
            for row in task.answers(engine, mine) if mine else ():
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        ranks.barrier()
        ranks.from_first(lambda: _finish(directory, task))
    bar.close()


def _name(config: Config, model_dir: Path) -> str:
    """What the model is called: the run and the iteration, or its directory."""
    path = model_dir.resolve()
    if path.is_relative_to(Path(config.run.dir).resolve()):
        return f"{Path(config.run.dir).name}-{path.parent.name}"
    return path.parent.name if path.name == "model" else path.name


def _adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether transformers would put a BOS in front, by the tokenizer_config.json beside the sentencepiece model."""
    file = tokenizer.file.parent / "tokenizer_config.json"
    return not file.is_file() or read_json(file).get("add_bos_token") is not False


def _begin(directory: Path, origin: dict, tasks: list[Task]) -> dict:
    """The summary that is there, once it is sure that it may be gone on with."""
    file = directory / "summary.json"
    if not file.is_file():
        if any(path.name != ".lock" for path in directory.iterdir()):
            raise ValueError(f"{directory}: exists and is no evaluation; choose another directory, or remove it")
        write_whole(file, to_json({"origin": origin, "tasks": {}}))
    summary = read_json(file)
    changed = [key for key in origin if summary["origin"].get(key) != origin[key]]
    started = summary.setdefault("started", {})
    for task in tasks:
        own = task.origin()
        was = started.setdefault(task.name, own)
        changed += [f"{key} of {task.name}" for key in own if was.get(key) != own[key]]
    if changed:
        raise ValueError(f"{directory}: made with another {', '.join(changed)}; remove it to evaluate again")
    write_whole(file, to_json(summary))
    for partial in directory.glob("partial/*.jsonl"):
        cut_unfinished_line(partial)
    return summary


def _rows(directory: Path, name: str) -> list[dict]:
    rows = []
    for file in sorted(directory.glob(f"partial/{name}.rank*.jsonl")):
        rows += [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    return rows


def _finish(directory: Path, task: Task) -> None:
    """A task's rows in their order, and its line in the summary."""
    by_doc = {row["doc"]: row for row in _rows(directory, task.name)}
    if sorted(by_doc) != list(range(len(task))):
        raise ValueError(f"{directory}: {task.name} lacks {len(task) - len(by_doc)} documents; run the same command again")
    rows = [by_doc[doc] for doc in range(len(task))]
    write_whole(directory / f"{task.name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    summary = read_json(directory / "summary.json")
    summary["tasks"][task.name] = task.summary(rows)
    summary["tasks"] |= mmlu_groups(summary["tasks"])
    write_whole(directory / "summary.json", to_json(summary))


def mmlu_groups(tasks: dict[str, dict]) -> dict[str, dict]:
    """MMLU and its four groups, of the subjects that are there.

    acc weighs documents alike, as the harness does, with its pooled standard error; acc_by_subject weighs subjects alike,
    as the leaderboard did.
    """
    result = {}
    groups = {f"mmlu_{group}": subjects.split() for group, subjects in MMLU_GROUPS.items()}
    groups["mmlu"] = [subject for subjects in groups.values() for subject in subjects]
    for name, subjects in groups.items():
        there = [tasks[f"mmlu_{subject}"] for subject in subjects if f"mmlu_{subject}" in tasks]
        if not there:
            continue
        means, errors, sizes = ([task[key] for task in there] for key in ("acc", "acc_stderr", "documents"))
        acc, error = pooled(means, errors, sizes)
        result[name] = {
            "acc": acc, "acc_stderr": error, "acc_by_subject": sum(means) / len(means),
            "acc_by_subject_stderr": math.hypot(*errors) / len(errors), "documents": sum(sizes),
            "subjects": len(there), "of_subjects": len(subjects), "few_shot": there[0]["few_shot"],
            "harness": there[0]["harness"], "truncated": sum(task["truncated"] for task in there),
        }  # fmt: skip
    return result
