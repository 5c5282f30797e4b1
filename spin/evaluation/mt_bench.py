"""MT-Bench: answers in the format of FastChat, whose gen_judgment.py scores them, and its judge's scores.

<evaluation>/mt_bench.jsonl has the format of FastChat's data/mt_bench/model_answer/<model_id>.jsonl. What the
judge writes, data/mt_bench/model_judgment/<judge>_single.jsonl, is copied to <run>/mt_bench_judgment/.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

from model.tokenizer import Message
from spin.config import Data, Evaluate
from spin.engine.files import file_digest, read_jsonl
from spin.evaluation.task import LoadedModel, Task

log = logging.getLogger("spin")
QUESTIONS = "mt_bench/question.jsonl"
URL = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data/mt_bench/question.jsonl"
MAX_NEW_TOKENS = 1024
# FastChat's temperatures by category; 0.7 for all others.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning", "arena-hard-200"), 0.0)
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
CATEGORY_OF = {81 + i: CATEGORIES[i // 10] for i in range(80)}  # by FastChat's question_id


def load_mt_bench(settings: Evaluate, data: Data, template: str) -> Task:
    """The MT-Bench task. Raises FileNotFoundError with the download command, or ValueError."""
    file = Path(settings.data) / QUESTIONS
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; get it by\n    curl --create-dirs -o {file} {URL}")
    questions = [row for _, row in read_jsonl(file)][: settings.limit or None]
    if template == "plain":
        log.warning("mt_bench: asked without a chat template; for a chat model set train.template")
    record = {"documents": file_digest(file), "number of documents": len(questions)}
    record |= {"template": template, "seed": settings.seed}
    answer = partial(_answer, questions, template)
    return Task("mt_bench", questions, record, answer, _summarise, MAX_NEW_TOKENS)


def _answer(
    questions: Sequence[dict], template: str, model: LoadedModel, docs: Sequence[int]
) -> Iterator[dict]:
    """A question has two turns; the second is asked after the answer to the first."""
    turns = {doc: questions[doc]["turns"] for doc in docs}
    temperatures = {doc: TEMPERATURES.get(questions[doc].get("category", ""), 0.7) for doc in docs}
    talks: dict[int, list[Message]] = {doc: [] for doc in docs}
    most = model.max_length - MAX_NEW_TOKENS
    rounds = product(range(max(map(len, turns.values()))), sorted(set(temperatures.values())))
    for turn, temperature in rounds:
        asked = [doc for doc in docs if turn < len(turns[doc]) and temperatures[doc] == temperature]
        for doc in asked:
            talks[doc].append({"role": "user", "content": turns[doc][turn]})
        prompts = [model.tokenizer.encode_prompt(talks[doc], template)[-most:] for doc in asked]
        sampling = {"temperature": temperature, "seed": model.settings.seed + turn, "streams": asked}
        for response in model.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, **sampling):
            doc = asked[response.index]
            text = model.tokenizer.decode_continuation(response.ids).strip()
            talks[doc].append({"role": "assistant", "content": text})
            if turn == len(turns[doc]) - 1:
                answers = [said["content"] for said in talks[doc][1::2]]
                yield {"doc": doc} | _row(model.name, questions[doc], answers)


def _row(model: str, question: dict, answers: list[str]) -> dict:
    """FastChat's form of an answer."""
    number = question["question_id"]
    answer_id = hashlib.sha256(json.dumps([model, number, answers]).encode()).hexdigest()[:22]
    row = {"question_id": number, "answer_id": answer_id, "model_id": model}
    return row | {"choices": [{"index": 0, "turns": answers}], "tstamp": time.time()}


def _summarise(rows: Sequence[dict]) -> dict:
    empty = sum(not text for row in rows for text in row["choices"][0]["turns"])
    about = {"documents": len(rows), "harness": "FastChat", "few_shot": 0}
    return about | {"model_id": rows[0]["model_id"], "empty": empty}


def read_judgments(directory: Path) -> dict[str, dict[str, float]]:
    """{model_id: {"turn 1", "turn 2", "average", category: mean score}} from the judge's file in `directory`.

    Judgments without a score (-1) are left out, as in FastChat's show_result.py.
    """
    files = sorted(directory.glob("*_single.jsonl"))
    if len(files) > 1:
        raise ValueError(f"{directory}: {len(files)} files; one judge's judgments are needed")
    scores: dict[str, dict[str, list[float]]] = {}
    for _, row in (line for file in files for line in read_jsonl(file)):
        if row["score"] != -1:
            for key in filter(None, (f"turn {row['turn']}", "average", CATEGORY_OF.get(row["question_id"]))):
                scores.setdefault(row["model"], {}).setdefault(key, []).append(row["score"])
    return {model: {key: mean(values) for key, values in of.items()} for model, of in scores.items()}
