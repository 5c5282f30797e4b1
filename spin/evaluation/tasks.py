"""The paper's benchmarks: where their documents are, how they are put to a model, and what their scores mean.

Everything is as lm-evaluation-harness has it, in the version that `evaluate.harness` names: 0.4.13, or 0.4.0,
the paper's (its commit 46c79664). What differs between the two is marked with HARNESSES. Documents lie as `hf
download` leaves them:

    <data>/<folder>/<configuration>/<split>-00000-of-00001.parquet   or <split>.jsonl, the same columns
"""

import math
import random
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from spin.data import read_rows
from spin.engine.files import file_digest
from spin.evaluation.statistics import mean_and_stderr

HARNESSES = ("0.4.13", "0.4.0")
FEW_SHOT_SEED = 1234  # the harness's own


@dataclass(frozen=True)
class Question:
    """A document: the text that each choice follows, the choices, and the right ones."""

    texts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: tuple[int, ...]

    @property
    def solved(self) -> str:
        """As an example for other documents."""
        return f"{self.texts[self.gold[0]]} {self.choices[self.gold[0]]}\n\n"


@dataclass(frozen=True)
class Source:
    """A task's documents on the Hugging Face Hub."""

    repository: str
    configuration: str
    split: str
    examples: str = ""  # the split that few-shot examples are drawn from

    def files(self, data: Path, split: str) -> list[Path]:
        """The files of a split; none if it is not there."""
        folder = data / self.repository.split("/")[1] / self.configuration
        found = [f for pattern in (f"{split}-*", f"{split}.*") for f in folder.glob(pattern)]
        return sorted(f for f in found if f.suffix in (".parquet", ".jsonl"))

    def missing(self, data: Path) -> str:
        """What is not there, with the command that gets it; empty if all is."""
        absent = [split for split in filter(None, (self.split, self.examples)) if not self.files(data, split)]
        if not absent:
            return ""
        folder = data / self.repository.split("/")[1] / self.configuration
        return (
            f"{folder}: no {' and no '.join(absent)} split; get it by\n    "
            f"{self.command(data, self.configuration)}"
        )

    def command(self, data: Path, only: str = "") -> str:
        """The shell command that gets the data set, or one configuration of it."""
        include = ["--include", f"{only}/*"] if only else []
        get = ["hf", "download", "--repo-type", "dataset", self.repository, *include]
        return shlex.join([*get, "--local-dir", str(data / self.repository.split("/")[1])])

    def rows(self, data: Path, split: str, columns: Sequence[str]) -> list[tuple[str, dict]]:
        """(where, row) of a split, in file order. Raises ValueError for a row without one of the columns."""
        rows = []
        for file in self.files(data, split):
            for where, row in read_rows(str(file)):
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: a row must be an object, not {type(row).__name__}")
                lacking = [column for column in columns if row.get(column) is None]
                if lacking:
                    raise ValueError(
                        f"{where}: no {lacking[0]!r}, found {', '.join(map(repr, row))}; is it "
                        f"{self.repository}?"
                    )
                rows.append((where, row))
        if not rows:
            raise ValueError(f"{data}: no rows in {self.repository}'s {split} split")
        return rows


def _arc(row: dict) -> Question:
    return _labelled(f"Question: {row['question']}\nAnswer:", row["choices"], row["answerKey"])


def _openbookqa(row: dict) -> Question:
    return _labelled(row["question_stem"], row["choices"], row["answerKey"].lstrip())


def _labelled(text: str, choices: dict, answer: str) -> Question:
    if answer not in choices["label"]:
        raise ValueError(
            f"the answer key {answer!r} is none of the labels {', '.join(map(repr, choices['label']))}"
        )
    if len(choices["text"]) != len(choices["label"]):
        raise ValueError(f"{len(choices['text'])} choices for {len(choices['label'])} labels")
    return _question(text, choices["text"], choices["label"].index(answer))


def _hellaswag(row: dict) -> Question:
    def clean(text: str) -> str:  # WikiHow's markup
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    text = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return _question(text, [clean(ending) for ending in row["endings"]], int(row["label"]))


def _winogrande(row: dict) -> Question:
    """The options stand in the text; what is scored is the same end of the sentence after each."""
    gap = row["sentence"].index("_")
    texts = tuple(row["sentence"][:gap] + row[option] for option in ("option1", "option2"))
    return Question(texts, (row["sentence"][gap + 1 :].strip(),) * 2, ({"1": 0, "2": 1}[row["answer"]],))


def _mmlu(row: dict) -> Question:
    lettered = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return _question(f"{row['question'].strip()}\n{lettered}Answer:", "ABCD", row["answer"])


def _bigbench(row: dict) -> Question:
    choices = row["multiple_choice_targets"]
    if row["targets"][0] not in choices:
        raise ValueError(f"the target {row['targets'][0]!r} is none of the choices {choices}")
    return _question(row["inputs"], choices, choices.index(row["targets"][0]))


def _truthfulqa(which: str) -> Callable[[dict], Question]:
    def question(row: dict) -> Question:
        choices, labels = row[which]["choices"], row[which]["labels"]
        right = tuple(i for i, label in enumerate(labels) if label == 1)
        if len(choices) != len(labels) or not right:
            raise ValueError(
                f"{which} has {len(choices)} choices with {len(labels)} labels, {len(right)} of them 1"
            )
        text = f"{_TRUTHFULQA_EXAMPLES}\n\nQ: {row['question']}\nA:"
        return _question(text, choices, right if which == "mc2_targets" else 0)

    return question


_TRUTHFULQA_EXAMPLES = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain."""


def _question(text: str, choices: Sequence[str], gold: int | tuple[int, ...]) -> Question:
    gold = (gold,) if isinstance(gold, int) else gold
    if not all(0 <= g < len(choices) for g in gold):
        raise ValueError(f"the right answer is number {gold[0]}, of {len(choices)} choices")
    return Question((text,) * len(choices), tuple(choices), gold)


@dataclass(frozen=True)
class MultipleChoice:
    """A benchmark whose choices are scored by their log-likelihood."""

    name: str
    source: Source
    columns: tuple[str, ...]
    question: Callable[[dict], Question]
    few_shot: int = 0
    metrics: tuple[str, ...] = ("acc",)
    first: bool = False  # the examples are the first ones of their split, not drawn
    spare: bool = False  # one more example is drawn, lest the document itself be among them
    description: str = ""

    def load(self, data: Path, limit: int, harness: str) -> "Documents":
        """Raises ValueError with file and row for a document that cannot be asked."""
        # that version dropped them
        few_shot = 0 if self.name == "winogrande" and harness == "0.4.0" else self.few_shot
        rows = self.source.rows(data, self.source.split, self.columns)
        if self.name.startswith("bigbench"):
            rows = [(where, row) for where, row in rows if row["multiple_choice_targets"]]
        rows = rows[: limit or None]
        questions = [self._read(where, row) for where, row in rows]
        texts = [self.description] * len(questions)
        if few_shot:
            pool = self.source.rows(data, self.source.examples, self.columns)
            solved = [self._read(where, row).solved for where, row in pool]
            if len(pool) < few_shot:
                raise ValueError(
                    f"{pool[0][0]}: {few_shot} examples are needed, and its split has {len(pool)}"
                )
            draw = [range(few_shot)] * len(rows) if self.first else drawn(rows, pool, few_shot, self.spare)
            texts = [self.description + "".join(solved[i] for i in chosen) for chosen in draw]
        return Documents(self, data, harness, few_shot, [where for where, _ in rows], questions, texts)

    def _read(self, where: str, row: dict) -> Question:
        try:
            question = self.question(row)
            for text in (*question.texts, *question.choices):
                if not isinstance(text, str):
                    raise ValueError(f"a choice must be a text, not {text!r}")
                text.encode()
            return question
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{where}: {error if type(error) is ValueError else repr(error)}") from None

    def measured(self, question: Question, scores: Sequence[float], harness: str) -> dict:
        """Prediction and metrics of one document from its choices' log-likelihoods."""
        prediction = scores.index(max(scores))
        row = {"scores": list(scores), "prediction": prediction, "target": question.gold[0]}
        if self.name == "truthfulqa_mc2":
            gold: Sequence[int] = question.gold
            if harness == "0.4.0":  # the true answers are what comes before the first false one
                wrong = sorted(set(range(len(scores))) - set(gold))
                gold = range(wrong[0]) if wrong else gold
            mass = [math.exp(score) for score in scores]
            total = sum(mass)
            return row | {
                "target": list(question.gold),
                "acc": sum(mass[i] for i in gold) / total if total else math.nan,
            }
        row["acc"] = int(prediction in question.gold)
        if "acc_norm" in self.metrics:  # by characters of the choice; an empty one is never taken
            by_length = [s / len(c) if c else -math.inf for s, c in zip(scores, question.choices)]
            row["prediction_norm"] = by_length.index(max(by_length))
            row["acc_norm"] = int(row["prediction_norm"] in question.gold)
        return row


def drawn(rows: Sequence, pool: Sequence, count: int, spare: bool) -> list[list[int]]:
    """For each document in turn the places of its examples in the pool: one stream of random numbers for all
    of them.

    Raises ValueError for a pool that is too small.
    """
    if len(pool) < count + spare:
        raise ValueError(
            f"{pool[0][0]}: {len(pool)} rows, {count + spare} are needed to draw {count} examples"
        )
    rng = random.Random(FEW_SHOT_SEED)
    result = []
    for _, row in rows:
        chosen = rng.sample(range(len(pool)), count + spare)
        if spare:
            chosen = [i for i in chosen if pool[i][1] != row][:count]
            if len(chosen) < count:  # the document stands several times in the pool
                chosen = rng.sample([i for i in range(len(pool)) if pool[i][1] != row], count)
        result.append(chosen)
    return result


@dataclass
class Documents:
    """A task's documents, ready to be asked."""

    task: "MultipleChoice | GSM8K"
    data: Path
    harness: str
    few_shot: int
    where: list[str]
    questions: list
    examples: list[str]  # what stands before each question

    def __len__(self) -> int:
        return len(self.questions)

    @cached_property
    def digest(self) -> dict[str, str]:
        """{file: SHA-256} of what was read."""
        source, splits = (
            self.task.source,
            {self.task.source.split, *([self.task.source.examples] if self.few_shot else [])},
        )
        files = [file for split in splits for file in source.files(self.data, split)]
        return {str(file.relative_to(self.data)): file_digest(file) for file in sorted(files)}


@dataclass(frozen=True)
class GSM8K:
    """Grade-school mathematics: the answer is generated greedily, and the number found in it compared."""

    name: str = "gsm8k"
    source: Source = Source("openai/gsm8k", "main", "test", "train")
    few_shot: int = 5
    max_new_tokens: int = 256

    def load(self, data: Path, limit: int, harness: str) -> Documents:
        columns = ("question", "answer")
        rows = self.source.rows(data, self.source.split, columns)[: limit or None]
        pool = self.source.rows(data, self.source.examples, columns)

        def ask(row):
            return f"Question: {row['question']}\nAnswer:"

        solved = [f"{ask(row)} {row['answer']}\n\n" for _, row in pool]
        texts = [
            "".join(solved[i] for i in chosen) for chosen in drawn(rows, pool, self.few_shot, spare=False)
        ]
        questions = [(ask(row), row["answer"]) for _, row in rows]
        return Documents(self, data, harness, self.few_shot, [where for where, _ in rows], questions, texts)

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("exact_match", "exact_match_flexible")

    @staticmethod
    def stops(harness: str) -> list[str]:
        """An answer ends before the first of these."""
        return ["\n\n", "Question:"] if harness == "0.4.0" else ["Question:", "</s>", "<|im_end|>"]

    def measured(self, answer: str, text: str, harness: str) -> dict:
        """Predictions and metrics of one document. exact_match is the harness's strict-match, the
        leaderboard's.

        Strict takes the first number after ####; flexible, which 0.4.0 did not have, the last number of the
        text.
        """
        found = re.search(r"#### (\-?[0-9\.\,]+)", text)
        prediction = found[1].strip() if found else "[invalid]"

        def same(a):
            return int(_plain(a, harness) == _plain(answer, harness))

        row = {
            "text": text,
            "prediction": prediction,
            "target": answer.split("#### ")[-1],
            "exact_match": same(prediction),
        }
        if harness == "0.4.0":
            return row
        numbers = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
        last = next(filter(None, numbers[-1])).strip() if numbers else "[invalid]"
        return row | {"prediction_flexible": last, "exact_match_flexible": same(last)}


def _plain(text: str, harness: str) -> str:
    """An answer without what exact_match ignores."""
    patterns = [",", r"\$", r"(?s).*#### "] + [r"\.$"] * (harness != "0.4.0")
    for pattern in patterns:
        text = re.sub(pattern, "", text)
    return text.lower()


MMLU_GROUPS = {
    "stem": "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
    "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history "
    "high_school_world_history international_law jurisprudence logical_fallacies moral_disputes "
    "moral_scenarios philosophy prehistory professional_law world_religions",
    "social_sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging management "
    "marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine "
    "virology",
}
MMLU = {subject: group for group, subjects in MMLU_GROUPS.items() for subject in subjects.split()}


def _subject(name: str) -> MultipleChoice:
    about = name.replace("_", " ")
    return MultipleChoice(
        f"mmlu_{name}",
        Source("cais/mmlu", name, "test", "dev"),
        ("question", "choices", "answer"),
        _mmlu,
        few_shot=5,
        first=True,
        description=f"The following are multiple choice questions (with answers) about {about}.\n\n",
    )


def _bigbench_task(name: str) -> MultipleChoice:
    return MultipleChoice(
        f"bigbench_{name}",
        Source("hails/bigbench", f"{name}_zero_shot", "default"),
        ("inputs", "targets", "multiple_choice_targets"),
        _bigbench,
    )


_NORMED = ("acc", "acc_norm")
_ARC = Source("allenai/ai2_arc", "ARC-Challenge", "test", "train")
_TRUTHFULQA = Source("truthfulqa/truthful_qa", "multiple_choice", "validation")
_TASKS: list[MultipleChoice | GSM8K] = [
    MultipleChoice("arc_challenge", _ARC, ("question", "choices", "answerKey"), _arc, 25, _NORMED),
    MultipleChoice("truthfulqa_mc1", _TRUTHFULQA, ("question", "mc1_targets"), _truthfulqa("mc1_targets")),
    MultipleChoice("truthfulqa_mc2", _TRUTHFULQA, ("question", "mc2_targets"), _truthfulqa("mc2_targets")),
    MultipleChoice(
        "winogrande",
        Source("allenai/winogrande", "winogrande_xl", "validation", "train"),
        ("sentence", "option1", "option2", "answer"),
        _winogrande,
        5,
        spare=True,
    ),
    MultipleChoice(
        "hellaswag",
        Source("Rowan/hellaswag", "data", "validation", "train"),
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        _hellaswag,
        10,
        _NORMED,
        spare=True,
    ),
    MultipleChoice(
        "openbookqa",
        Source("allenai/openbookqa", "main", "test"),
        ("question_stem", "choices", "answerKey"),
        _openbookqa,
        0,
        _NORMED,
    ),
    *map(
        _bigbench_task,
        ("causal_judgment", "sports_understanding", "formal_fallacies_syllogisms_negation"),
    ),
    *map(_subject, MMLU),
    GSM8K(),
]
BENCHMARKS = {task.name: task for task in _TASKS}
GROUPS = {
    "mmlu": [f"mmlu_{subject}" for subject in MMLU],
    "bigbench": [name for name in BENCHMARKS if name.startswith("bigbench")],
    # gsm8k last: what takes long comes after what fails soon
    "leaderboard": ["arc_challenge", "truthfulqa_mc2", "winogrande", "hellaswag", "mmlu", "gsm8k"],
}


def summarise(task: MultipleChoice | GSM8K, rows: Sequence[dict]) -> dict[str, float]:
    """Means of a task's metrics and their standard errors."""
    result = {}
    for metric in task.metrics:
        if metric in rows[0]:
            result[metric], result[f"{metric}_stderr"] = mean_and_stderr([row[metric] for row in rows])
    return result
