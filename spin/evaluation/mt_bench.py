"""MT-Bench's questions, answered in FastChat's form, and its judge's verdicts, read back.

The answers are <evaluation>/mt_bench.jsonl, in the form of FastChat's
data/mt_bench/model_answer/<model>.jsonl: copied there under the name of its model_id, FastChat's own
gen_judgment.py scores them. What that leaves, data/mt_bench/model_judgment/<judge>_single.jsonl, goes to
<run>/mt_bench_judgment/ for the report.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.tokenizer import Tokenizer
from spin.config import Data, Evaluate
from spin.data import read_rows
from spin.engine.files import file_digest
from spin.evaluation.engine import Engine

log = logging.getLogger("spin")
QUESTIONS = "mt_bench/question.jsonl"
MAX_NEW_TOKENS = 1024
# FastChat's temperatures by category; 0.7 where it says nothing.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "stem": 0.1,
    "humanities": 0.1,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "arena-hard-200": 0.0,
}


class MTBench:
    """Two turns a question, the second asked after the first one's answer; FastChat's temperatures."""

    name = "mt_bench"

    def __init__(self, settings: Evaluate, data: Data, template: str):
        self.settings, self.template, self.file = settings, template, Path(settings.data) / QUESTIONS
        self.questions = [self._checked(where, row) for where, row in read_rows(str(self.file))]
        self.questions = self.questions[: settings.limit or None]
        if template == "plain":
            log.warning(
                "mt_bench: the questions are put as they are; for a chat model set train.template, to "
                "zephyr, say"
            )

    @staticmethod
    def missing(settings: Evaluate) -> str:
        """What is not there, with the command that gets it; empty if all is."""
        file = Path(settings.data) / QUESTIONS
        if file.is_file():
            return ""
        source = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data/mt_bench/question.jsonl"
        return f"{file}: no such file; get it by\n    curl --create-dirs -o {file} {source}"

    @staticmethod
    def _checked(where: str, row: dict) -> dict:
        turns = row.get("turns") if isinstance(row, dict) and "question_id" in row else None
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{where}: a question needs question_id, category and a list of turns")
        return row

    def __len__(self) -> int:
        return len(self.questions)

    def origin(self) -> dict:
        settings = {"template": self.template, "seed": self.settings.seed}
        return {"documents": file_digest(self.file), "number of documents": len(self)} | settings

    def check(self, tokenizer: Tokenizer, max_length: int) -> None:
        if max_length <= MAX_NEW_TOKENS:
            raise ValueError(
                f"mt_bench: the model reads {max_length} tokens: no room for an answer; leave it out"
            )

    def cost(self, doc: int) -> float:
        return 4 * MAX_NEW_TOKENS * len(self.questions[doc]["turns"])

    def answers(self, engine: Engine, docs: Sequence[int]) -> Iterator[dict]:
        talks: dict[int, list[dict]] = {doc: [] for doc in docs}
        for turn in range(max(len(self.questions[doc]["turns"]) for doc in docs)):
            asked = [doc for doc in docs if turn < len(self.questions[doc]["turns"])]
            for temperature in sorted({self.temperature(doc) for doc in asked}):
                together = [doc for doc in asked if self.temperature(doc) == temperature]
                for doc in together:
                    talks[doc].append({"role": "user", "content": self.questions[doc]["turns"][turn]})
                most = engine.max_length - MAX_NEW_TOKENS
                prompts = [
                    engine.tokenizer.encode_prompt(talks[doc], self.template)[-most:] for doc in together
                ]
                stream = engine.generate(
                    prompts,
                    max_new_tokens=MAX_NEW_TOKENS,
                    temperature=temperature,
                    seed=self.settings.seed + turn,
                    streams=together,
                )
                for response in stream:
                    doc = together[response.index]
                    text = engine.tokenizer.decode_continuation(response.ids).strip()
                    talks[doc].append({"role": "assistant", "content": text})
                    engine.tick(self.cost(doc) / len(self.questions[doc]["turns"]))
                    if turn == len(self.questions[doc]["turns"]) - 1:
                        yield self._answer(engine.name, doc, [said["content"] for said in talks[doc][1::2]])

    def _answer(self, model: str, doc: int, turns: list[str]) -> dict:
        question = self.questions[doc]["question_id"]
        return {
            "doc": doc,
            "question_id": question,
            "answer_id": hashlib.sha256(json.dumps([model, question, turns]).encode()).hexdigest()[:22],
            "model_id": model,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
        }

    def temperature(self, doc: int) -> float:
        return TEMPERATURES.get(self.questions[doc].get("category", ""), 0.7)

    def summary(self, rows: Sequence[dict]) -> dict:
        empty = sum(not text for row in rows for text in row["choices"][0]["turns"])
        return {
            "documents": len(rows),
            "harness": "FastChat",
            "few_shot": 0,
            "model_id": rows[0]["model_id"],
            "empty": empty,
        }


def read_judgments(directory: Path) -> dict[str, dict[str, float]]:
    """{model_id: {"turn 1", "turn 2", "average": mean score}} from the judge's files in `directory`.

    Verdicts without a score (-1) are left out, as FastChat's show_result.py does.
    """
    scores: dict[str, dict[int, list[float]]] = {}
    files = sorted(directory.glob("*.jsonl"))
    if len(files) > 1:
        raise ValueError(
            f"{directory}: {len(files)} files, where one judge's verdicts are wanted: {files[0].name}, …"
        )
    for file in files:
        for where, row in read_rows(str(file)):
            if not isinstance(row, dict) or not {"model", "score", "turn"} <= row.keys():
                raise ValueError(
                    f"{where}: a verdict needs model, turn and score; is it FastChat's single-answer grading?"
                )
            if row["score"] != -1:
                scores.setdefault(row["model"], {}).setdefault(row["turn"], []).append(row["score"])
    result = {}
    for model, turns in scores.items():
        every = [score for of_turn in turns.values() for score in of_turn]
        result[model] = {
            f"turn {turn}": sum(of_turn) / len(of_turn) for turn, of_turn in sorted(turns.items())
        }
        result[model]["average"] = sum(every) / len(every)
    return result
