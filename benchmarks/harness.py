"""lm-evaluation-harness, offline, on folders as `hf download` leaves them: what the evaluator is compared
with.
"""

import json
from pathlib import Path

from spin.evaluation.tasks import BENCHMARKS, GROUPS, in_harness

STOCK = {  # the harness's own task files; MMLU's, BBH's and BIG-bench's are found by their names
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
SPLITS = {"training": "train", "validation": "validation"}  # the task files' names of splits, and the files'


def stock_file(name: str) -> str:
    if name.startswith("mmlu_"):
        return f"mmlu/default/{name}.yaml"
    if name.startswith("bbh_"):
        return f"bbh/cot_fewshot/{name.removeprefix('bbh_cot_fewshot_')}.yaml"
    return STOCK.get(name) or f"bigbench/multiple_choice/{name.removeprefix('bigbench_')}.yaml"


def write_tokenizer_json(model_dir: Path) -> None:
    """tokenizer.json from a directory's tokenizer.model, as transformers 4 converted Llama's.

    transformers 5, given the sentencepiece model alone, puts no blank in front of a text.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    model = SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces):
        halves = [
            (piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in ids and piece[k:] in ids
        ]
        merges += [
            (-model.get_score(i), ids[a], ids[b], (a, b)) for a, b in halves if not model.is_control(i)
        ]
    merges = [pair for *_, pair in sorted(merges, key=lambda merge: merge[:3])]
    tokenizer = Tokenizer(BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", model.bos_id())]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(model_dir / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (model_dir / "tokenizer_config.json").write_text(
        json.dumps(settings | {"clean_up_tokenization_spaces": False})
    )


def write_tasks(names: list[str], data: Path, folder: Path, paper: bool = False) -> None:
    """Task files that read `data` and else are the stock ones; `paper`: changed to what 0.4.0 did."""
    import lm_eval

    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        source, files = BENCHMARKS[name].source, {}
        for split in ("train", "validation", "test", "dev", "default"):
            if found := source.files(data, split):
                files[split] = [str(file.resolve()) for file in found]
        parquet = all(file.endswith(".parquet") for found in files.values() for file in found)
        lines = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / stock_file(name)),
            "task": f"own_{name}",
            "dataset_path": "parquet" if parquet else "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "tag": None,
        }
        lines |= {f"{key}_split": None for key, split in SPLITS.items() if split not in files}
        lines |= paper_settings(name) if paper else {}
        text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in lines.items())
        (folder / f"{name}.yaml").write_text(text)


def paper_settings(name: str) -> dict:
    """What a task file of 0.4.0 has that differs."""
    task = in_harness(name, "0.4.0")
    if task.prompt:  # the examples are a part of the text
        return {"description": task.prompt(), "fewshot_config": None}
    if name != "gsm8k":
        return {}
    strict = {"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"}
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
    metric |= {"ignore_punctuation": False, "regexes_to_ignore": [",", "\\$", "(?s).*#### "]}
    return {
        "generation_kwargs": {"until": list(task.stops), "do_sample": False, "temperature": 0.0},
        "filter_list": [{"name": "strict-match", "filter": [strict, {"function": "take_first"}]}],
        "metric_list": [metric],
    }


def run_harness(
    model_dir: Path,
    names: list[str],
    data: Path,
    folder: Path,
    paper: bool = False,
    limit: int | None = None,
    dtype: str = "float32",
    batch_size: int | str = 8,
    model=None,
) -> dict:
    """simple_evaluate's result, {"results", "samples", …}, with the tasks' own names."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    evaluator.add_env_info = lambda storage: None  # lists the installed packages with pip, each time
    write_tasks(names, data, folder, paper)

    if model is None:
        model = HFLM(
            str(model_dir),
            dtype=dtype,
            batch_size=batch_size,
            device="cpu",
            add_bos_token=False if paper else None,
        )
    manager, results, samples = TaskManager(include_path=str(folder), include_defaults=False), {}, {}
    for name in names:
        task = in_harness(name, "0.4.0" if paper else "0.4.13")
        few_shot = 0 if paper and task.prompt else task.few_shot
        got = evaluator.simple_evaluate(
            model,
            tasks=[f"own_{name}"],
            num_fewshot=few_shot,
            limit=limit,
            log_samples=True,
            bootstrap_iters=100,
            task_manager=manager,
        )
        results[name], samples[name] = got["results"][f"own_{name}"], got["samples"][f"own_{name}"]
    return {"results": results, "samples": samples}


WORDS = """water light stone river garden window market teacher winter doctor engine forest bottle letter
machine animal summer planet silver button morning kitchen number picture history music island
student energy animal the a of to and in is was that it for with as at by from not are were this
have had which one two three she he they we you""".split()


def write_documents(folder: Path, count: int = 12, seed: int = 0) -> None:
    """Small data sets in the Hub's folders, of random words, with what real ones have that is awkward.

    Double blanks, blanks at the ends, markup, labels that are numbers, other scripts, an empty ending, a
    document that stands among the examples as well, numbers in every form that an answer takes.
    """
    import random

    rng = random.Random(seed)
    awkward = [
        "naïve café",
        "ﬁne  print",
        " 50% ",
        "3.5 km",
        "“quoted”",
        "中文",
        "e=mc²",
        "a_b",
        "[step]",
        "[title]",
    ]
    awkward += ["\t", "😀"]

    def text(low: int, high: int) -> str:
        words = rng.choices(WORDS, k=rng.randint(low, high))
        if rng.random() < 0.4:
            words.insert(rng.randrange(len(words)), rng.choice(awkward))
        return " ".join(words)

    def labelled(row: int) -> dict:
        labels = (
            ["1", "2", "3", "4"] if row % 5 == 4 else ["A", "B", "C", "D", "E"][: 5 if row % 7 == 6 else 4]
        )
        return {"text": [text(1, 6) for _ in labels], "label": labels}

    def arc(row: int) -> dict:
        choices = labelled(row)
        return {
            "id": f"q{row}",
            "question": text(5, 20) + "?",
            "choices": choices,
            "answerKey": rng.choice(choices["label"]),
        }

    def openbookqa(row: int) -> dict:
        made = arc(row)
        made["question_stem"] = made.pop("question") + " " * (row % 3 == 1)
        return made

    def hellaswag(row: int) -> dict:
        endings = [text(3, 12) + "." for _ in range(4)]
        if row % 4 == 3:
            marked = ["[substeps] " + text(2, 5), "[header]", text(2, 4) + " [title] " + text(2, 4)]
            endings[rng.randrange(4)] = rng.choice(marked)
        return {
            "ind": row,
            "activity_label": text(1, 2),
            "ctx_a": text(5, 15) + ".",
            "ctx_b": rng.choice(["", text(1, 3)]),
            "endings": endings,
            "label": str(rng.randrange(4)),
        }

    def winogrande(row: int) -> dict:
        sentence = f"{text(4, 9)} _ {text(3, 8)}." if row % 5 else f"_ {text(4, 9)}."
        return {
            "sentence": sentence,
            "option1": text(1, 2),
            "option2": text(1, 2),
            "answer": rng.choice("12"),
        }

    def truthfulqa(row: int) -> dict:
        many = rng.randint(2, 7)
        right = rng.randint(1, many - 1)
        return {
            "question": text(5, 12) + "?",
            "mc1_targets": {"choices": [text(2, 9) for _ in range(many)], "labels": [1] + [0] * (many - 1)},
            "mc2_targets": {
                "choices": [text(2, 9) for _ in range(many)],
                "labels": [1] * right + [0] * (many - right),
            },
        }

    def mmlu(row: int) -> dict:
        return {
            "question": rng.choice(["", " "]) + text(5, 40) + rng.choice(["", "\n"]),
            "subject": "any",
            "choices": [text(1, 8) for _ in range(4)],
            "answer": rng.randrange(4),
        }

    def gsm8k(row: int) -> dict:
        number = rng.choice(["18", "1,234", "-5", "3.50", "$70", "0"])
        return {
            "question": text(10, 30) + "?",
            "answer": f"{text(5, 15)} <<1+1=2>>2\n{text(3, 9)}\n#### {number}",
        }

    def bigbench(row: int) -> dict:
        choices = [text(1, 3), text(1, 3)] if row % 6 != 5 else []
        inputs = "Q: " + text(8, 25) + ["?\n", "\nA: "][row % 2]
        return {
            "idx": row,
            "inputs": inputs,
            "targets": [rng.choice(choices) if choices else "none"],
            "multiple_choice_targets": choices,
            "multiple_choice_scores": [0] * len(choices),
        }

    def bbh(row: int) -> dict:
        return {"input": f"{text(5, 40)}?\nOptions:\n- Yes \n- No", "target": rng.choice(["Yes", "No"])}

    makers = {
        "arc_challenge": arc,
        "openbookqa": openbookqa,
        "hellaswag": hellaswag,
        "winogrande": winogrande,
        "truthfulqa_mc1": truthfulqa,
        "gsm8k": gsm8k,
    }
    makers |= dict.fromkeys(("mmlu_anatomy", "mmlu_sociology", "mmlu_virology"), mmlu)
    makers |= dict.fromkeys(GROUPS["bigbench"], bigbench) | dict.fromkeys(GROUPS["bbh"], bbh)
    for name, make in makers.items():
        source = BENCHMARKS[name].source
        at = folder / source.repository.split("/")[1] / source.configuration
        rows = [make(row) for row in range(count)]
        _write_rows(at / f"{source.split}-00000-of-00001.parquet", rows)
        if source.examples:
            pool = [make(row) for row in range(5 if name.startswith("mmlu") else 40)]
            if name in ("hellaswag", "winogrande"):
                pool[3], pool[8] = rows[0], rows[0]
            _write_rows(at / f"{source.examples}-00000-of-00001.parquet", pool)


def _write_rows(file: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
