"""The evaluator's numbers against lm-evaluation-harness's own, run offline: every document of every task."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from tokenizers import processors

from model.mistral import Mistral
from model.tokenizer import Tokenizer
from model.weights import save_model
from spin.evaluation.documents import Question
from spin.evaluation.scoring import Encoder, text_hash
from spin.evaluation.tasks import (
    BENCHMARKS,
    GROUPS,
    MMLU,
    MMLU_GROUPS,
    final_number,
    in_harness,
    mmlu_groups,
    stated_answer,
)
from tests.helpers import BYTE_LEVEL, END, FAMILIES, ROOT, START, odd_strings, run_script, small_config

home = tempfile.TemporaryDirectory()  # where HOME cannot be written, and so that nothing is left in it
os.environ |= {"HF_HOME": home.name, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
lm_eval = pytest.importorskip("lm_eval")
shared = pytest.mark.skipif(
    not (ROOT / "../shared/data/eval").is_dir(), reason="../shared/data/eval is not here"
)
pytestmark = pytest.mark.slow
BBH = GROUPS["bbh"]
# What 0.4.0 does otherwise: no BOS, of which ARC and MMLU are examples, and the others' own rules.
PAPER_TASKS = ["arc_challenge", "winogrande", "truthfulqa_mc2", "gsm8k", "mmlu_anatomy", *BBH]
TASKS = [name for name in BENCHMARKS if not name.startswith("mmlu")] + [
    "mmlu_anatomy",
    "mmlu_sociology",
    "mmlu_virology",
]
BYTE_LEVEL_TASKS = ["hellaswag", "openbookqa", "bigbench_causal_judgment", *PAPER_TASKS]


# Tokenizers: Mistral's, which adds BOS; as SmolLM2's, which has one and adds none; as Qwen2's, without one;
# as Llama 3's, whose post-processor adds it. Each with its BOS and EOS, and the model's family.
KINDS: dict[str, tuple] = {
    "mistral": ("", None, None, {}),
    "smollm2": ("gpt-2", START, END, {"model_type": "llama", "tie_word_embeddings": True}),
    "qwen2": ("qwen", None, "<|endoftext|>", FAMILIES["qwen2"]),
    "llama 3": ("llama 3", START, END, FAMILIES["llama 3.1"]),
}


@pytest.fixture(scope="module", params=KINDS)
def asked(request, tmp_path_factory, mistral_tokenizer):
    """A random model of 640 tokens' length, in which some contexts are cut, with its tokenizer; the same
    with 2,048, of which BBH's answers need 1,024; and documents.
    """
    from benchmarks.harness import write_documents, write_tokenizer_json

    folder = tmp_path_factory.mktemp("harness")
    kind, bos, eos, family = KINDS[request.param]
    (folder / "model").mkdir()
    if kind:
        tokenizer = BYTE_LEVEL[kind]()
        if request.param == "llama 3":
            adds = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, 1)])
            tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), adds])
        tokenizer.save(str(folder / "model" / "tokenizer.json"))
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
        (folder / "model" / "tokenizer_config.json").write_text(json.dumps(names))
    else:
        shutil.copy(mistral_tokenizer.file, folder / "model" / "tokenizer.model")
        write_tokenizer_json(folder / "model")
    ours = Tokenizer(folder / "model")
    ids = {"bos_token_id": None if ours.bos_id < 0 else ours.bos_id, "eos_token_id": ours.eos_id}
    config = small_config(vocab_size=ours.vocab_size, max_position_embeddings=640, **ids, **family)
    model = Mistral(config).init_weights(0)
    for weight in model.parameters():
        if weight.dim() > 1:  # wide enough that attention is far from uniform
            weight.data.mul_(0.3 / weight.data.std())
    save_model(model, folder / "model", torch.float32)
    shutil.copytree(folder / "model", folder / "long")
    settings = json.loads((folder / "model/config.json").read_text(encoding="utf-8"))
    (folder / "long/config.json").write_text(json.dumps(settings | {"max_position_embeddings": 2048}))
    write_documents(folder / "data")
    return folder


@pytest.fixture(scope="module", params=["0.4.13", "0.4.0"])
def both(request, asked):
    """(harness, its result, our directory) for every task."""
    from benchmarks.harness import run_harness

    harness, paper = request.param, request.param == "0.4.0"
    names, batch_size = PAPER_TASKS if paper else TASKS, 8
    if not (asked / "model" / "tokenizer.model").exists():
        if paper:
            pytest.skip("with Mistral's tokenizer alone")
        # In a batch, <|im_end|> as a control token that is not EOS ends no response before all have ended.
        names, batch_size = BYTE_LEVEL_TASKS, 1
    theirs, out = {"results": {}, "samples": {}}, asked / f"out{harness}"
    for model, limit in (("model", 11), ("long", 4)):
        part = [name for name in names if (name in BBH) == (model == "long")]
        where = (asked / model, part, asked / "data")
        found = run_harness(*where, asked / f"tasks{harness}", paper, limit, batch_size=batch_size)
        theirs = {key: theirs[key] | found[key] for key in theirs}
        run_script("evaluate.py", *ours(*where, out / model, "--harness", harness, "--limit", str(limit)))
    return harness, theirs, out


def ours(model, tasks, data, out, *more):
    where = ["--model", str(model), "--data", str(data), "--out", str(out)]
    return [*where, "--tasks", ",".join(tasks), "--dtype", "float32", *more]


def rows(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in open(next(out.rglob(f"{name}.jsonl")))]


@pytest.mark.parametrize("name", TASKS)
def test_every_documents_context_scores_prediction_and_metrics_are_the_harnesss(both, name):
    from benchmarks.evaluate import agree

    harness, theirs, out = both
    if name not in theirs["samples"]:
        pytest.skip("0.4.0 asks it as 0.4.13 does, but for BOS; or asked with Mistral's tokenizer alone")
    samples, mine = theirs["samples"][name], rows(out, name)
    apart, differing = agree(name, mine, samples)
    assert apart < 1e-4 and differing == 0
    by_doc = {sample["doc_id"]: sample for sample in samples}
    for row in mine:
        arguments = [argument[:2] for argument in by_doc[row["doc"]]["arguments"]]
        if "text" in row:
            texts = [arguments[0][0]]
        else:  # contexts, then choices without the blank between
            texts = [context for context, _ in arguments] + [choice[1:] for _, choice in arguments]
        assert row["hash"] == text_hash(texts), (name, row["doc"])
    folder = "long" if name in BBH else "model"
    summary = json.loads((out / folder / "summary.json").read_text(encoding="utf-8"))["tasks"][name]
    result, filter = theirs["results"][name], "get-answer" if name in BBH else "strict-match"
    metrics = {"acc": "acc,none", "acc_norm": "acc_norm,none", "exact_match": f"exact_match,{filter}"}
    metrics |= {"exact_match_flexible": "exact_match,flexible-extract"}
    compared = [metric for metric in metrics if metric in summary]
    assert compared and all(metrics[metric] in result for metric in compared)
    for metric in compared:
        assert summary[metric] == pytest.approx(result[metrics[metric]], abs=1e-6)
        error = result[metrics[metric].replace(",", "_stderr,")]
        assert summary[f"{metric}_stderr"] == pytest.approx(error, abs=1e-6)
    assert summary["harness"] == harness and summary["documents"] == len(mine)


def test_token_ids_and_cuts_are_the_harnesss(asked):
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(str(asked / "model"), dtype="float32", device="cpu")
    tokenizer = Tokenizer(asked / "model")
    encoder = Encoder(tokenizer, tokenizer.adds_bos)
    assert encoder._by_line == (tokenizer.file.suffix == ".model")  # "\n\n" is a token of the others
    cut = 0
    for name in TASKS:
        task = BENCHMARKS[name]
        if task.max_new_tokens:
            continue
        for _, before, question in task.documents(asked / "data", 6):
            for text, choice in zip(question.texts, question.choices):
                context, continuation = backend._encode_pair(before + text, " " + choice)
                request, was_cut = encoder.request(before + text, " " + choice, 640, name)
                assert request.ids == (context + continuation)[-641:]
                assert request.continuation == len(continuation)
                cut += was_cut
    assert cut > 5


def test_awkward_texts_are_encoded_line_by_line_as_in_one(mistral_tokenizer):
    encoder = Encoder(mistral_tokenizer, bos=False)
    texts = odd_strings()
    for text in [*texts, *(f"{a}\n{b}" for a, b in zip(texts, texts[7:]))]:
        assert encoder.encode(text) == mistral_tokenizer.encode(text), repr(text)


@pytest.mark.parametrize(
    "text",
    [
        "so 3 + 4 = 7\n#### 7",
        "#### -1,234.50.",
        "#### $18.00",
        "it is 18.0",
        "18 and then $1,000.",
        "none",
        "...",
        "#### 5 #### 6",
        "-.5",
        "####7",
        "#### 7.",
        "costs $ 7",
        "1,2,3",
        "#### abc 3",
        "#### 18 dollars, 19",
    ],
)
@pytest.mark.parametrize("answer", ["work\n#### 18", "#### -1,234.5", "x\n#### 7", "#### 1000", "#### 5"])
def test_numbers_are_found_and_compared_as_the_harness_does(text, answer):
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    found = {
        "": RegexFilter("#### (\\-?[0-9\\.\\,]+)"),
        "_flexible": RegexFilter("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    }
    row = final_number(Question(("",), (answer,)), text)
    ignored = [",", "\\$", "(?s).*#### ", "\\.$"]
    for suffix, filter in found.items():
        ((extracted,),) = filter.apply([[text]], [{}])
        assert row[f"prediction{suffix}"] == extracted
        same = exact_match_hf_evaluate([extracted], [answer], regexes_to_ignore=ignored, ignore_case=True)[
            "exact_match"
        ]
        assert row[f"exact_match{suffix}"] == same


@pytest.mark.parametrize("target", ["Yes", "no", "valid", ""])
@pytest.mark.parametrize(
    "text",
    [
        "Goal tending is part of basketball. So the answer is no.",
        "so\nthe answer is Yes.\nthe answer is no.",
        "the answer is valid",
        "the answer is  valid . ",
        "The answer is valid.",
        "the answer is \nno.",
        "the answer is .",
        "the answer is",
        "so the answer is the answer is no.",
        "",
    ],
)
def test_stated_answers_are_found_and_compared_as_the_harness_does(text, target):
    import yaml
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    stock = Path(lm_eval.__file__).parent / "tasks/bbh/cot_fewshot/_cot_fewshot_template_yaml"
    ((filter, _),) = [of["filter"] for of in yaml.safe_load(stock.read_text())["filter_list"]]
    ((extracted,),) = RegexFilter(filter["regex_pattern"]).apply([[text]], [{}])
    row = stated_answer(Question(("",), (target,)), text)
    assert row["prediction"] == extracted
    assert row["exact_match"] == exact_match_hf_evaluate([extracted], [target])["exact_match"]


def test_bbhs_texts_in_the_papers_harness_are_those_of_its_commit():
    # SHA-256, the first digits, of description + doc_to_text of lm_eval/tasks/bbh/cot_fewshot/ at 46c79664.
    for name, digest in (
        ("causal_judgement", "6820203dea661f93"),
        ("formal_fallacies", "9744788fb62c8396"),
        ("sports_understanding", "838794f5f17d06fa"),
    ):
        task = in_harness(f"bbh_cot_fewshot_{name}", "0.4.0")
        text = task.prompt() + task.question({"input": "{{input}}", "target": ""}).texts[0]
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_mmlus_means_and_errors_are_the_harnesss():
    from lm_eval.api.metrics import pooled_sample_stderr, unweighted_mean_stderr

    names = list(MMLU)[:9] + ["virology"]
    tasks = {
        f"mmlu_{name}": {
            "acc": 0.2 + 0.05 * i,
            "acc_stderr": 0.01 + 0.003 * i,
            "documents": 30 + 7 * i,
            "few_shot": 5,
            "harness": "0.4.13",
            "truncated": 0,
        }
        for i, name in enumerate(names)
    }
    errors, sizes = ([task[key] for task in tasks.values()] for key in ("acc_stderr", "documents"))
    group = mmlu_groups(tasks, tasks)["mmlu"]
    assert group["acc_stderr"] == pytest.approx(pooled_sample_stderr(errors, sizes))
    assert group["acc_by_subject_stderr"] == pytest.approx(unweighted_mean_stderr(errors))
    assert group["acc"] == pytest.approx(sum(t["acc"] * t["documents"] for t in tasks.values()) / sum(sizes))
    assert (group["subjects"], group["of_subjects"]) == (10, 57)


def test_mmlus_subjects_groups_and_descriptions_are_the_harnesss():
    import yaml

    folder = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    stock = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in folder.glob("mmlu_*.yaml")]
    assert {f"mmlu_{subject}" for subject in MMLU} == {task["task"] for task in stock}
    for task in stock:
        assert BENCHMARKS[task["task"]].description == task["description"]
        assert MMLU[task["dataset_name"]] == task["tag"].removeprefix("mmlu_").removesuffix("_tasks")
    assert sum(len(subjects.split()) for subjects in MMLU_GROUPS.values()) == 57


@shared
@pytest.mark.parametrize("asked", ["mistral"], indirect=True)
def test_real_documents_too(asked, tmp_path):
    from benchmarks.evaluate import agree
    from benchmarks.harness import run_harness

    data = (ROOT / "../shared/data/eval").resolve()
    names = [name for name, task in BENCHMARKS.items() if not task.source.missing(data)]
    assert len(names) > 17
    theirs = run_harness(asked / "long", names, data, tmp_path / "tasks", limit=2)
    run_script("evaluate.py", *ours(asked / "long", names, data, tmp_path / "out", "--limit", "2"))
    for name in names:
        apart, differing = agree(name, rows(tmp_path / "out", name), theirs["samples"][name])
        assert apart < 1e-4 and differing == 0, name
