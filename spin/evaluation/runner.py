"""All tasks of one model: what is missing is run, on any number of ranks, and what is there is kept.

A task leaves <directory>/<task>.jsonl, an object for each document, and its line in <directory>/summary.json.
Until then its documents are in <directory>/partial/, a file for each rank, from which a killed run goes on.
"""

import json
import logging
import math
import shutil
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

import torch

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.weights import fingerprint, load_model
from spin.config import Config, Data, Evaluate
from spin.engine.distributed import Ranks
from spin.engine.files import cut_unfinished_line, read_json, to_json, write_whole
from spin.evaluation.benchmark import Benchmark
from spin.evaluation.engine import Engine, Task
from spin.evaluation.heldout import Heldout
from spin.evaluation.mt_bench import MTBench
from spin.evaluation.scoring import Encoder
from spin.evaluation.statistics import pooled
from spin.evaluation.tasks import BENCHMARKS, GROUPS, HARNESSES, MMLU_GROUPS

log = logging.getLogger("spin")


def load_tasks(config: Config) -> list[Task]:
    """The tasks that evaluate.tasks names, with their documents.

    Raises FileNotFoundError, naming for every data set that is not there the command that gets it, or
    ValueError for an unknown task or a document that cannot be asked.
    """
    return _load(config.evaluate, config.data, config.train.template) if config.evaluates else []


@lru_cache(8)  # iterations mostly have the same ones
def _load(settings: Evaluate, form: Data, template: str) -> list[Task]:
    if settings.harness not in HARNESSES:
        raise ValueError(f"evaluate.harness = {settings.harness!r} is not one of {', '.join(HARNESSES)}")
    own: dict[str, type[Heldout | MTBench]] = {"heldout": Heldout, "mt_bench": MTBench}
    data = Path(settings.data)
    wanted: list[str] = []
    absent: list[str] = []
    for name in filter(None, (name.strip() for name in settings.tasks.split(","))):
        if name not in (*own, *BENCHMARKS, *GROUPS):
            known = ", ".join(
                [*own, *GROUPS, *(n for n in BENCHMARKS if not n.startswith("mmlu_")), "mmlu_<subject>"]
            )
            raise ValueError(f"evaluate.tasks: unknown task {name!r}; known are {known}")
        for member in [name] if name == "mmlu" else GROUPS.get(name, [name]):
            if member == "mmlu":  # the subjects that are there, if any are
                sources = {subject: BENCHMARKS[subject].source for subject in GROUPS["mmlu"]}
                there = [subject for subject, source in sources.items() if not source.missing(data)]
                if not there:
                    command = BENCHMARKS[GROUPS["mmlu"][0]].source.command(data)
                    absent.append(
                        f"{data / 'mmlu'}: no subject with a test and a dev split; get them by\n    {command}"
                    )
                elif len(there) < len(sources):
                    log.warning(
                        "%s: %d of MMLU's %d subjects; the others are left out",
                        data / "mmlu",
                        len(there),
                        len(sources),
                    )
            else:
                there = [member]
                absent.append(
                    own[member].missing(settings)
                    if member in own
                    else BENCHMARKS[member].source.missing(data)
                )
            wanted += [task for task in there if task not in wanted]
    if any(absent):
        raise FileNotFoundError("\n".join(filter(None, absent)))

    def load(name: str) -> Task:
        return Benchmark(BENCHMARKS[name].load(data, settings.limit, settings.harness))

    return [own[name](settings, form, template) if name in own else load(name) for name in wanted]


def evaluate(config: Config, model_dir: Path, directory: Path, ranks: Ranks) -> tuple[dict, bool]:
    """Run every task that is not in `directory` yet. Returns the summary, and whether there was something to
    do.

    Raises ValueError for results there of another model or other settings.
    """
    settings, tasks, tokenizer = config.evaluate, load_tasks(config), Tokenizer(model_dir)
    bos = settings.harness != "0.4.0" and _adds_bos(tokenizer)
    length = ModelConfig.from_pretrained(model_dir).max_position_embeddings
    origin = {"model": ranks.from_first(lambda: fingerprint(model_dir)), "dtype": settings.dtype}
    summary = ranks.from_first(lambda: _begin(directory, origin, tasks, bos))
    missing = [task for task in tasks if task.name not in summary["tasks"]]
    for task in missing:
        task.check(tokenizer, length)
    if missing:
        model = load_model(model_dir, getattr(torch, settings.dtype), ranks.device, config.model.attention)
        engine = Engine(_name(config, model_dir), settings, model, tokenizer, Encoder(tokenizer, bos), ranks)
        run_tasks(engine, missing, directory)
        ranks.barrier()
        summary = ranks.from_first(lambda: read_json(directory / "summary.json"))
    elif tasks:
        log.info("%s: finished, nothing to do", directory)
    if ranks.first:
        shutil.rmtree(directory / "partial", ignore_errors=True)
    return summary, bool(missing)


def run_tasks(engine: Engine, tasks: list[Task], directory: Path) -> None:
    """Run the tasks one after the other, the documents of each dealt to the ranks by cost."""
    ranks, dealt = engine.ranks, []
    for task in tasks:
        done = ranks.from_first(lambda: {row["doc"] for row in _rows(directory, task.name)})
        left = sorted((doc for doc in range(len(task)) if doc not in done), key=lambda doc: -task.cost(doc))
        dealt.append(sorted(left[ranks.rank :: ranks.world_size]))
    total = sum(task.cost(doc) for task, mine in zip(tasks, dealt) for doc in mine)
    with ranks.progress(math.ceil(total), f"evaluate {engine.name}", "token", unit_scale=True) as bar:
        engine.tick = bar.update
        for task, mine in zip(tasks, dealt):
            bar.set_postfix({"task": task.name})
            (directory / "partial").mkdir(exist_ok=True)
            rows = directory / "partial" / f"{task.name}.rank{ranks.rank}.jsonl"
            with open(rows, "a", encoding="utf-8", buffering=1) as file:
                for row in task.answers(engine, mine) if mine else ():
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            ranks.barrier()
            ranks.from_first(lambda: _finish(directory, task))
        bar.update(bar.total - bar.n)


def _name(config: Config, model_dir: Path) -> str:
    """What the model is called: the run and the iteration, or its directory."""
    path = model_dir.resolve()
    if path.is_relative_to(Path(config.run.dir).resolve()):
        return f"{Path(config.run.dir).name}-{path.parent.name}"
    return path.parent.name if path.name == "model" else path.name


def _adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether transformers would put a BOS in front, by the tokenizer_config.json beside the sentencepiece
    model.
    """
    file = tokenizer.file.parent / "tokenizer_config.json"
    return not file.is_file() or read_json(file).get("add_bos_token") is not False


def _begin(directory: Path, origin: dict, tasks: list[Task], bos: bool) -> dict:
    """The summary that is there, once it is sure that it may be gone on with."""
    file = directory / "summary.json"
    if not file.is_file():
        leftovers = (".lock", "summary.json.partial")
        if directory.is_dir() and any(path.name not in leftovers for path in directory.iterdir()):
            raise ValueError(
                f"{directory}: exists and is no evaluation; choose another directory, or remove it"
            )
        write_whole(file, to_json({"origin": origin, "origins": {}, "tasks": {}}))
    summary = read_json(file)
    before = to_json(summary)
    if "origins" not in summary:
        raise ValueError(f"{directory}: an older version's evaluation; remove it to evaluate again")
    begun = {file.name.split(".rank")[0] for file in directory.glob("partial/*.jsonl") if file.stat().st_size}
    begun |= set(summary["tasks"])
    if not begun:
        summary["origin"] = origin
    changed: dict[str, list[str]] = {}  # what, of which tasks
    for key in (key for key in origin if summary["origin"].get(key) != origin[key]):
        changed[_difference(key, summary["origin"].get(key), origin[key])] = []
    for task in tasks:
        own = task.origin()
        own |= {"bos": bos} if "harness" in own else {}
        if task.name not in begun:
            summary["origins"][task.name] = own
        was = summary["origins"][task.name]
        for key in (key for key in own if was.get(key) != own[key]):
            changed.setdefault(_difference(key, was.get(key), own[key]), []).append(task.name)
    if changed:

        def few(names):
            return f" ({', '.join(names[:3])}{', …' * (len(names) > 3)})" if names else ""

        listed = [what + few(names) for what, names in changed.items()]
        raise ValueError(
            f"{directory}: made with {'; '.join(listed)}. Choose another directory, or remove it"
        )
    if to_json(summary) != before:
        write_whole(file, to_json(summary))
    for partial in directory.glob("partial/*.jsonl"):
        cut_unfinished_line(partial)
    return summary


def _difference(key: str, was, now) -> str:
    short = all(isinstance(value, (str, int, float)) and len(str(value)) < 20 for value in (was, now))
    return f"{key} = {was}, not {now}" if short else f"another {key}"


def _rows(directory: Path, name: str) -> list[dict]:
    rows = []
    for file in sorted(directory.glob(f"partial/{name}.rank*.jsonl")):
        rows += [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    return rows


def _finish(directory: Path, task: Task) -> None:
    """A task's rows in their order, and its line in the summary."""
    by_doc = {row["doc"]: row for row in _rows(directory, task.name)}
    if sorted(by_doc) != list(range(len(task))):
        raise ValueError(
            f"{directory}: {task.name} lacks {len(task) - len(by_doc)} documents; run the same command again"
        )
    rows = [by_doc[doc] for doc in range(len(task))]
    write_whole(
        directory / f"{task.name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    summary = read_json(directory / "summary.json")
    summary["tasks"][task.name] = task.summary(rows)
    groups = {"mmlu", *(f"mmlu_{group}" for group in MMLU_GROUPS)}
    single = {name: values for name, values in summary["tasks"].items() if name not in groups}
    summary["tasks"] = single | mmlu_groups(single, summary["origins"])
    write_whole(directory / "summary.json", to_json(summary))
    for file in directory.glob(f"partial/{task.name}.rank*.jsonl"):
        file.unlink()


def mmlu_groups(tasks: dict[str, dict], wanted: Collection[str]) -> dict[str, dict]:
    """MMLU and its four groups, of the subjects that are wanted, once all of those are there.

    acc weighs documents alike, as the harness does, with its pooled standard error; acc_by_subject weighs
    subjects alike, as the leaderboard did.
    """
    result = {}
    groups = {f"mmlu_{group}": subjects.split() for group, subjects in MMLU_GROUPS.items()}
    groups["mmlu"] = [subject for subjects in groups.values() for subject in subjects]
    for name, subjects in groups.items():
        names = [f"mmlu_{subject}" for subject in subjects if f"mmlu_{subject}" in wanted]
        there = [tasks[name] for name in names if name in tasks]
        if not there or len(there) < len(names):
            continue
        means, errors, sizes = ([task[key] for task in there] for key in ("acc", "acc_stderr", "documents"))
        acc, error = pooled(means, errors, sizes)
        result[name] = {
            "acc": acc,
            "acc_stderr": error,
            "acc_by_subject": sum(means) / len(means),
            "acc_by_subject_stderr": math.hypot(*errors) / len(errors),
            "documents": sum(sizes),
            "subjects": len(there),
            "of_subjects": len(subjects),
            "few_shot": there[0]["few_shot"],
            "harness": there[0]["harness"],
            "truncated": sum(task["truncated"] for task in there),
        }
    return result
