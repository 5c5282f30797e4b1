"""MT-Bench's questions, answered in FastChat's form, and its judge's verdicts, read back.

The answers are <evaluation>/mt_bench.jsonl, in the form of FastChat's data/mt_bench/model_answer/<model>.jsonl: copied there
under the name of its model_id, FastChat's own gen_judgment.py scores them. What that leaves,
data/mt_bench/model_judgment/<judge>_single.jsonl, goes to <run>/mt_bench_judgment/ for the report.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from spin.config import Config
from spin.data import read_rows
from spin.evaluation.engine import Engine
from spin.files import file_digest

QUESTIONS = "mt_bench/question.jsonl"
MAX_NEW_TOKENS = 1024
# FastChat's temperatures by category; 0.7 where it says nothing.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0.0, "math": 0.0,
                "coding": 0.0, "reasoning": 0.0, "arena-hard-200": 0.0}  # fmt: skip


class MTBench:
    """Two turns for each question, the second asked with the first one's answer; temperatures are FastChat's."""

    name = "mt_bench"

    def __init__(self, config: Config):
        self.config, self.file = config, Path(config.evaluate.data) / QUESTIONS
        self.questions = [self._checked(where, row) for where, row in read_rows(str(self.file))]
        self.questions = self.questions[: config.evaluate.limit or None]

    @staticmethod
    def missing(config: Config) -> str:
        """What is not there, with the command that gets it; empty if all is."""
        file = Path(config.evaluate.data) / QUESTIONS
        if file.is_file():
            return ""
        source = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data/mt_bench/question.jsonl"
        return f"{file}: no such file; get it by\n    curl --create-dirs -o {file} {source}"

    @staticmethod
    def _checked(where: str, row: dict) -> dict:
        turns = row.get("turns")
        if "question_id" not in row or not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{where}: a question needs question_id, category and a list of turns")
        return row

    def __len__(self) -> int:
        return len(self.questions)

    def origin(self) -> dict:
        seed, template = self.config.evaluate.seed, self.config.train.template
        return {"documents": file_digest(self.file), "template": template, "seed": seed}

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
                if most < 1:
                    raise ValueError(f"mt_bench: the model reads {engine.max_length} tokens: no room for an answer")
                prompts = [engine.tokenizer.encode_prompt(talks[doc], self.config.train.template)[-most:] for doc in together]
                stream = engine.generate(
                    prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=temperature,
                    seed=self.config.evaluate.seed + turn, streams=together,
                )  # fmt: skip
                for response in stream:
                    doc = together[response.index]
                    text = engine.tokenizer.decode_continuation(response.ids).strip()
                    talks[doc].append({"role": "assistant", "content": text})
                    engine.tick(self.cost(doc) / len(self.questions[doc]["turns"]))
        for doc in docs:
            question, turns = self.questions[doc], [said["content"] for said in talks[doc] if said["role"] == "assistant"]
            identity = hashlib.sha256(json.dumps([engine.name, question["question_id"], turns]).encode()).hexdigest()[:22]
            yield {
                "doc": doc,
                "question_id": question["question_id"],
                "answer_id": identity,
                "model_id": engine.name,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": time.time(),
            }

    def temperature(self, doc: int) -> float:
        return TEMPERATURES.get(self.questions[doc].get("category"), 0.7)

    def summary(self, rows: Sequence[dict]) -> dict:
        empty = sum(not text for row in rows for text in row["choices"][0]["turns"])
        return {"documents": len(rows), "harness": "FastChat", "few_shot": 0, "model_id": rows[0]["model_id"], "empty": empty}


def read_judgments(directory: Path) -> dict[str, dict[str, float]]:
    """{model_id: {"turn 1", "turn 2", "average": mean score}} from the judge's files in `directory`.

    Verdicts without a score (-1) are left out, as FastChat's show_result.py does.
    """
    scores: dict[str, dict[int, list[float]]] = {}
    for file in sorted(directory.glob("*.jsonl")):
        for where, row in read_rows(str(file)):
            if not {"model", "score", "turn"} <= row.keys():
                raise ValueError(f"{where}: a verdict needs model, turn and score; is it FastChat's single-answer grading?")
            if row["score"] != -1:
                scores.setdefault(row["model"], {}).setdefault(row["turn"], []).append(row["score"])
    result = {}
    for model, turns in scores.items():
        every = [score for of_turn in turns.values() for score in of_turn]
        result[model] = {f"turn {turn}": sum(of_turn) / len(of_turn) for turn, of_turn in sorted(turns.items())}
        result[model]["average"] = sum(every) / len(every)
    return result
