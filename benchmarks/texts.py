r"""What models write on held-out questions of GSM8K, next to the reference answers (docs/smollm2.md).

    python -m benchmarks.texts --select data/gsm8k      # short questions; writes short-{train,heldout}.jsonl
    python -m benchmarks.texts --data data/gsm8k/short-heldout.jsonl --out DIR \
        SFT=runs/smollm2/base/evaluation "SPIN 0=runs/smollm2/iter0/evaluation" ...

Reads `<directory>/heldout.jsonl` of evaluations of the same questions; writes texts.md and texts.png. For
greedy and for sampled answers:

    right        the number after "####" is the reference's
    arithmetic   of the calculator annotations, such as <<16-3-4=9>>, how many are right
    well-formed  the last line is "#### <number>"
    loops        a line occurs three times
    AUC          of sampled answers: a classifier tells them from the reference answers (0.5: it cannot)

Standard errors are from 1,000 bootstrap samples of the questions. The last lines of the table are differences
to the model named by --against, on the same bootstrap samples.
"""

import argparse
import ast
import json
import operator
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spin.engine.files import read_jsonl, to_jsonl
from spin.engine.rows import read_rows
from spin.report.figures import curve, finish, save, subplots

ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>]*)>>")
WELL_FORMED = re.compile(r"#### -?[\d.,]*\d$")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MEASURES = ("right", "arithmetic", "well-formed", "loops")
BOOTSTRAP, FOLDS, VOCABULARY, TRAINED = 1000, 8, 150, 1000


def value(expression: str) -> float | None:
    """The value of a sum or product of numbers, None if it isn't one."""

    def evaluate(node) -> float:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            return OPERATORS[ast.Sub if isinstance(node.op, ast.USub) else ast.Add](0, evaluate(node.operand))
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        raise ValueError(ast.dump(node))

    # 1,200 and 05 and 20% are numbers to GSM8K's authors, not to Python.
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", expression.replace(",", "").replace("$", ""))
    try:
        return float(evaluate(ast.parse(re.sub(r"([\d.]+)%", r"(\1/100)", text).strip(), mode="eval").body))
    except (ValueError, SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def arithmetic(text: str) -> tuple[int, int]:
    """How many annotations of a text are right, and how many it has. A result may be rounded or truncated."""
    found = ANNOTATION.findall(text)
    right = 0
    for expression, result in found:
        left, stated = value(expression), value(result)
        digits = len(result.partition(".")[2])
        right += (
            left is not None
            and stated is not None
            and abs(left - stated) < 10.0**-digits * (digits > 0) + 1e-6
        )
    return right, len(found)


def loops(text: str) -> bool:
    """Whether a line, without its numbers, occurs three times."""
    lines = Counter(re.sub(r"[\d.,]+", "", line).strip() for line in text.splitlines() if line.strip())
    return max(lines.values(), default=0) >= 3


def measures(text: str, right: int) -> np.ndarray:
    """(measures, 2): numerator and denominator of each of MEASURES."""
    formed = bool(WELL_FORMED.search(text.strip()))
    return np.array([(right, 1), arithmetic(text), (formed, 1), (loops(text), 1)], dtype=float)


def features(texts: Sequence[str]) -> np.ndarray:
    """(texts, features): length, lines, annotations, share of digits, counts of common words and bigrams."""
    words = [re.findall(r"[a-z']+|\d|[^\sa-z\d]+", text.lower()) for text in texts]
    counts = [Counter(w) + Counter(zip(w, w[1:])) for w in words]
    frequent = [key for key, _ in Counter(k for c in counts for k in c).most_common(VOCABULARY)]
    rows = [
        [len(w), text.count("\n"), *arithmetic(text), sum(c.isdigit() for c in text) / (len(text) + 1)]
        + [np.log1p(c[key]) for key in frequent]
        for text, w, c in zip(texts, words, counts)
    ]
    x = np.array(rows)
    return (x - x.mean(0)) / (x.std(0) + 1e-9)


def held_out_scores(x: np.ndarray, y: np.ndarray, fold: np.ndarray, penalty: float = 10.0) -> np.ndarray:
    """Log-odds of y = 1 for each row, by a ridge-penalized logistic regression on the other folds."""
    scores, x = np.zeros(len(y)), np.concatenate((x, np.ones((len(x), 1))), 1)
    for part in range(FOLDS):
        a, b, w = x[fold != part], y[fold != part], np.zeros(x.shape[1])
        for _ in range(12):  # Newton's method
            p = 1 / (1 + np.exp(-a @ w))
            hessian = (a * (p * (1 - p))[:, None]).T @ a + penalty * np.eye(len(w))
            w -= np.linalg.solve(hessian, a.T @ (p - b) + penalty * w)
        scores[fold == part] = x[fold == part] @ w
    return scores


def auc(real: np.ndarray, generated: np.ndarray) -> float:
    """P(score of a generated text > score of a real one), ties counting half."""
    difference = generated[:, None] - real[None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def statistics(rows: Sequence[dict], real: Sequence[str], samples: np.ndarray) -> dict[str, np.ndarray]:
    """Each quantity of a model on all questions and on each of the bootstrap `samples`: (1 + BOOTSTRAP,)."""
    every = np.concatenate((np.arange(len(rows))[None], samples))
    result = {}
    for kind, text, right in (
        ("sampled", "sampled", "exact_match_sampled"),
        ("greedy", "text", "exact_match"),
    ):
        parts = np.stack([measures(row[text], row[right]) for row in rows])  # (questions, measures, 2)
        sums = parts[every].sum(1)  # (1 + BOOTSTRAP, measures, 2)
        with np.errstate(invalid="ignore"):  # no annotation at all
            shares = sums[..., 0] / sums[..., 1]
        result |= {f"{name}, {kind}": shares[:, i] for i, name in enumerate(MEASURES)}
    x = features([*real, *(row["sampled"] for row in rows)])
    fold = np.random.default_rng(0).permutation(len(rows)) % FOLDS  # both texts of a question are in one fold
    scores = held_out_scores(x, np.repeat([0.0, 1.0], len(rows)), np.tile(fold, 2)).reshape(2, -1)
    result["AUC"] = np.array([auc(scores[0, chosen], scores[1, chosen]) for chosen in every])
    result["log p(reference), nats"] = np.array([row["logp"] for row in rows])[every].mean(1)
    return result


def select(folder: Path) -> None:
    """Write questions of up to 250 characters with answers of up to 170: 1,000 to train on, others held out.

    Reads `folder`/main as `hf download` leaves it, or train.jsonl and test.jsonl.
    """
    short: dict[str, list[dict]] = {}
    for split in ("train", "test"):
        hub = folder / "main"
        rows = read_rows(str(hub / f"{split}-*.parquet" if hub.is_dir() else folder / f"{split}.jsonl"))
        short[split] = [r for _, r in rows if len(r["question"]) <= 250 and len(r["answer"]) <= 170]
    parts = {"train": short["train"][:TRAINED], "heldout": short["train"][TRAINED:] + short["test"]}
    for name, chosen in parts.items():
        (folder / f"short-{name}.jsonl").write_text(to_jsonl(chosen), encoding="utf-8")


def table(results: dict[str, dict], against: str) -> str:
    """Markdown: quantities ± standard errors of each model, then the differences to the model `against`."""
    names = list(next(iter(results.values())))
    lines = [f"| model | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    rows = dict(results)
    for model in results:
        if against and model != against:
            minus = {name: results[model][name] - results[against][name] for name in names}
            rows[f"{model} − {against}"] = minus
    for model, quantities in rows.items():
        cells = (_cell(quantities[name], "+" if "−" in model else "") for name in names)
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: np.ndarray, sign: str) -> str:
    if np.isnan(values[0]):
        return ""
    digits = 3 if abs(values[0]) < 5 else 2
    return f"{values[0]:{sign}.{digits}f} ± {values[1:].std():.{digits}f}"


def draw(results: dict[str, dict], path: Path) -> None:
    """One panel for each of the quantities that sampling shows, a point with a standard error per model."""
    shown = ("arithmetic, sampled", "well-formed, sampled", "AUC", "log p(reference), nats")
    figure, axes = subplots(1, len(shown), size=(3.0 * len(shown), 3.6))
    for panel, name in zip(axes[0], shown):
        values = [result[name] for result in results.values()]
        errors = [v[1:].std() for v in values]
        curve(panel, range(len(values)), [v[0] for v in values], 0, yerr=errors, linestyle="none")
        panel.set_xticks(range(len(values)), list(results), rotation=60, ha="right", fontsize=8)
        finish(panel, name)
    save(figure, path, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluations", nargs="*", metavar="NAME=DIR")
    parser.add_argument("--select", type=Path, metavar="DIR", help="select short questions from DIR, and end")
    parser.add_argument("--data", type=Path, help="the questions' JSONL file")
    parser.add_argument(
        "--column", default="answer", help="its column of reference answers (default: answer)"
    )
    parser.add_argument("--against", default="", metavar="NAME", help="show differences to this model")
    parser.add_argument("--out", type=Path, help="directory of texts.md and texts.png")
    options = parser.parse_args()
    if options.select:
        return select(options.select)
    if not (options.evaluations and options.data and options.out):
        parser.error("evaluations, --data and --out are needed")
    real = [json.loads(line)[options.column] for line in options.data.open(encoding="utf-8")]
    results, samples, questions = {}, None, None
    for argument in options.evaluations:
        name, _, directory = argument.partition("=")
        rows = [row for _, row in read_jsonl(Path(directory) / "heldout.jsonl")]
        if questions not in (None, [row["prompt"] for row in rows]):
            raise SystemExit(f"{directory}: other questions than the first evaluation's")
        if samples is None:
            samples = np.random.default_rng(0).integers(len(rows), size=(BOOTSTRAP, len(rows)))
        questions = [row["prompt"] for row in rows]
        results[name] = statistics(rows, [real[row["doc"]] for row in rows], samples)
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(results, options.against)
    (options.out / "texts.md").write_text(text, encoding="utf-8")
    draw(results, options.out / "texts.png")
    print(text)


if __name__ == "__main__":
    main()
