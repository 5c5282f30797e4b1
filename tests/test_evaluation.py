"""The evaluator apart from the harness: the tree of requests, results that last, bad data, comparisons,
MT-Bench, tables.
"""

import json
import math
import random
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import torch

from model.mistral import Mistral
from model.sampler import generate
from model.weights import save_model
from spin.config import Data
from spin.engine.recipe import build
from spin.evaluation.benchmark import StopStrings
from spin.evaluation.compare import compare
from spin.evaluation.documents import draw_examples
from spin.evaluation.heldout import extract
from spin.evaluation.mt_bench import CATEGORY_OF, TEMPERATURES, load_mt_bench, read_judgments
from spin.evaluation.runner import load_tasks
from spin.evaluation.scoring import Request, loglikelihoods, pack_tree
from spin.evaluation.statistics import mean_and_stderr, paired_test, pooled, sign_test
from spin.evaluation.tasks import BENCHMARKS, in_harness
from tests.helpers import (
    ROOT,
    random_ids,
    reference,
    run_script,
    small_config,
    small_model,
    write_jsonl,
)


def test_answers_are_the_last_match_or_the_whole_text():
    pattern = r"#### (-?[0-9.,]+)"
    assert extract("1 + 1 = 2\n#### 2", pattern) == "2"
    assert extract("#### 3\n#### -4.5 ", pattern) == "-4.5"
    assert extract("so it is 2", pattern) is None
    assert extract(" oh ", "") == "oh"


def documents(rng, shared):
    """Documents of several requests that share beginnings in every way, all after `shared` tokens."""
    prefix, result = random_ids(rng, shared), []
    for _ in range(9):
        context = prefix + random_ids(rng, rng.randint(1, 12))
        requests = [Request(context + random_ids(rng, n), n) for n in (1, 1, rng.randint(2, 6))]
        # all but the last
        requests.append(Request(requests[-1].ids[:-1] + random_ids(rng, 1), requests[-1].continuation))
        requests.append(Request(context + random_ids(rng, 3) + [5], 1))  # a context of its own
        result.append(requests)
    return [*result, result[0]]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("shared", [0, 3, 40])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_log_likelihoods_are_those_of_each_request_alone(window, shared, budget):
    model = small_model(sliding_window=window).eval()
    other, asked = reference(model), documents(random.Random(shared), shared)
    got = dict(loglikelihoods(model, asked, budget, logit_chunk=5))
    assert sorted(got) == list(range(len(asked)))
    for i, requests in enumerate(asked):
        for request, score in zip(requests, got[i], strict=True):
            with torch.no_grad():
                logps = other(torch.tensor([request.ids])).logits[0].double().log_softmax(-1)
            places = range(len(request.ids) - request.continuation, len(request.ids))
            assert score == pytest.approx(
                sum(float(logps[p - 1, request.ids[p]]) for p in places), rel=1e-5, abs=1e-5
            )


def test_what_requests_share_is_in_the_stream_once():
    shared = [5, 6, 7, 8]
    requests = [Request([*shared, 9, 10], 1), Request([*shared, 9, 11], 1), Request([*shared, 12, 13], 2)]
    packed = pack_tree(requests)
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 12]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 4]
    assert packed.at.tolist() == [4, 4, 3, 5] and packed.targets.tolist() == [10, 11, 12, 13]


def test_few_shot_examples_are_pythons_draws_and_never_the_document():
    pool = [("", {"n": n % 4}) for n in range(12)]
    rows = [("", {"n": n}) for n in (0, 9, 3)]
    rng = random.Random(1234)
    assert draw_examples(rows, pool, 3, spare=False) == [rng.sample(range(12), 3) for _ in rows]
    rng = random.Random(1234)
    for (_, row), chosen in zip(rows, draw_examples(rows, pool, 5, spare=True)):
        assert chosen == [i for i in rng.sample(range(12), 6) if pool[i][1] != row][:5]
    assert draw_examples(rows, pool, 3, first=True) == [[0, 1, 2]] * 3


def test_generation_ends_where_a_stop_string_is_complete(letters):
    model = Mistral(small_config(vocab_size=letters.vocab_size)).init_weights(3)
    settings = dict(max_new_tokens=40, temperature=1.0, seed=1, slots=3)
    prompts = [letters.encode(text) for text in ("abc", "d", "efgh", "ij")]
    whole = [letters.decode(ids) for ids in generate(model, prompts, **settings)]
    pairs = (text[k : k + 2] for text in whole for k in range(4, len(text) - 2))
    pair = next(pair for pair in pairs if pair.strip() == pair)
    answers = generate(model, prompts, stop=StopStrings(letters, [pair, "?!"]), **settings)
    stopped = [letters.decode(ids) for ids in answers]
    for before, after in zip(whole, stopped):
        end = before.find(pair)
        assert after == (before if end < 0 else before[: end + len(pair)])
    assert any(len(after) < len(before) for before, after in zip(whole, stopped))


def test_means_errors_and_tests_against_hand_and_scipy():
    mean, error = mean_and_stderr([1, 0, 0, 1, 1])
    assert (mean, error) == (0.6, pytest.approx((0.6 * 0.4 / 4) ** 0.5))
    assert math.isnan(mean_and_stderr([1.0])[1])
    assert pooled([0.5, 1.0], [0.1, 0.2], [10, 30])[0] == pytest.approx(0.875)
    assert sign_test(0, 0) == 1 and sign_test(1, 9) == pytest.approx(2 * 11 / 1024)
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in ((3, 4), (0, 12), (40, 61)):
        assert sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
    values = [0.3, -0.1, 0.25, 0.5, -0.4, 0.2]
    z = sum(values) / 6 / (torch.tensor(values).std().item() / 6**0.5)
    assert paired_test(values) == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-5)


# Runs on documents of random words, with a character, a token.

TASKS = "arc_challenge,winogrande,truthfulqa_mc2,mmlu,gsm8k,mt_bench"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, letters):
    from benchmarks.harness import write_documents

    folder = tmp_path_factory.mktemp("evaluation")
    config = small_config(
        vocab_size=letters.vocab_size,
        bos_token_id=letters.bos_id,
        eos_token_id=letters.eos_id,
        max_position_embeddings=1200,
        sliding_window=64,
    )
    for name in ("model", "other"):
        save_model(Mistral(config).init_weights(int(name == "other")), folder / name, torch.float32)
        shutil.copy(letters.file, folder / name / "tokenizer.model")
    write_documents(folder / "data", count=5)
    questions = [
        {"question_id": 81 + i, "category": category, "turns": ["tell me", "and then"]}
        for i, category in enumerate(("writing", "math", "stem"))
    ]
    write_jsonl(folder / "data/mt_bench/question.jsonl", questions)
    return folder


def evaluated(folder, out, *more, model="model", tasks=TASKS, **settings):
    return run_script(
        "evaluate.py",
        "--model",
        str(folder / model),
        "--out",
        str(out),
        "--tasks",
        tasks,
        "--data",
        str(folder / "data"),
        "--dtype",
        "float32",
        *more,
        **settings,
    )


def results(out):
    return {file.stem: [json.loads(line) for line in open(file)] for file in sorted(out.glob("*.jsonl"))}


@pytest.fixture(scope="module")
def out(folder):
    output = evaluated(folder, folder / "out")
    assert "| arc_challenge | acc_norm |" in output and "3 of MMLU's 57 subjects" in output
    return folder / "out"


def without_time(found):
    return {
        name: [{k: v for k, v in row.items() if k != "tstamp"} for row in rows]
        for name, rows in found.items()
    }


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(folder, out, tmp_path):
    evaluated(folder, tmp_path / "two", ranks=2)
    one, two = without_time(results(out)), without_time(results(tmp_path / "two"))
    assert one.keys() == two.keys() and set(one) >= {"arc_challenge", "mmlu_virology", "gsm8k", "mt_bench"}
    for name in one:
        for a, b in zip(one[name], two[name], strict=True):
            assert a.pop("scores", []) == pytest.approx(b.pop("scores", []), rel=1e-5)
            a.pop("acc", None), b.pop("acc", None)  # of mc2: a mean of exponentials of scores
            assert a == b


def test_a_killed_evaluation_resumes_and_a_finished_task_is_not_run_again(folder, out, tmp_path):
    killed = tmp_path / "killed"
    shutil.copytree(out, killed)
    summary = json.loads((killed / "summary.json").read_text(encoding="utf-8"))
    lines = (killed / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    marked = json.loads(lines[0]) | {"text": "kept from before", "exact_match": 0}
    partial = killed / "gsm8k.partial"
    partial.mkdir()
    (partial / "rank3.jsonl").write_text(json.dumps(marked) + "\n" + lines[2] + lines[1][:30])
    (partial / "inputs.json").write_text(json.dumps(summary["records"].pop("gsm8k")))
    (killed / "gsm8k.jsonl").unlink()
    del summary["tasks"]["gsm8k"]
    (killed / "summary.json").write_text(json.dumps(summary))
    times = {file.name: file.stat().st_mtime_ns for file in killed.glob("*.jsonl")}
    evaluated(folder, killed)
    assert {name: (killed / name).stat().st_mtime_ns for name in times} == times
    after = results(killed)["gsm8k"]
    assert after[0]["text"] == "kept from before" and after[1:] == results(out)["gsm8k"][1:]
    assert not partial.exists()
    assert json.loads((killed / "summary.json").read_text(encoding="utf-8"))["tasks"].keys() == {
        *summary["tasks"],
        "gsm8k",
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (["--harness", "0.4.0"], "arc_challenge made with harness = '0.4.13', now '0.4.0'"),
        (["--limit", "3"], "arc_challenge made with number of documents = 5, now 3"),
        (["--evaluate.seed=5"], "mt_bench made with seed = 1, now 5"),
        (["--dtype", "bfloat16"], "made with dtype = 'float32', now 'bfloat16'"),
    ],
)
def test_results_of_other_settings_are_refused(folder, out, change, message):
    assert message in evaluated(folder, out, *change, fails=True)


def test_results_of_another_model_or_in_a_directory_of_other_things_are_refused(folder, out, tmp_path):
    assert "made with other model" in evaluated(folder, out, model="other", fails=True)
    assert "made with other model" in evaluated(folder, out, model="other", tasks="openbookqa", fails=True)
    (tmp_path / "photo.png").touch()
    assert "is no evaluation" in evaluated(folder, tmp_path, fails=True)


def test_missing_data_is_named_with_the_commands_that_get_it_before_anything_runs(folder, tmp_path):
    output = run_script(
        "evaluate.py",
        "--model",
        str(folder / "model"),
        "--out",
        str(tmp_path / "out"),
        "--tasks",
        "leaderboard,mt_bench",
        "--data",
        str(tmp_path),
        fails=True,
    )
    command = (
        "hf download --repo-type dataset allenai/ai2_arc --include 'ARC-Challenge/*' --local-dir "
        f"{tmp_path}/ai2_arc"
    )
    assert (
        command in output
        and f"cais/mmlu --local-dir {tmp_path}/mmlu" in output
        and "question.jsonl" in output
    )
    assert output.count("hf download") == 6 and not (tmp_path / "out").exists()


def change(folder, tmp_path, repository, configuration, split, edit):
    shutil.copytree(folder / "data", tmp_path / "data")
    file = tmp_path / "data" / repository / configuration / f"{split}-00000-of-00001.parquet"
    found = pyarrow.parquet.read_table(file).to_pylist()
    edit(found)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), file)
    return {"evaluate.data": str(tmp_path / "data"), "evaluate.dtype": "float32"}


def test_what_a_model_is_too_short_for_is_refused_before_anything_runs(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "short")
    file = tmp_path / "short/config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"max_position_embeddings": 40})
    )
    tasks = "mmlu_virology,gsm8k"
    output = evaluated(folder, tmp_path / "out", model=tmp_path / "short", tasks=tasks, fails=True)
    assert "gsm8k: the model reads 40 tokens: no room" in output
    assert not list((tmp_path / "out").glob("*.jsonl"))
    output = evaluated(folder, tmp_path / "out", model=tmp_path / "short", tasks="truthfulqa_mc2", fails=True)
    assert "tokens in the choice" in output


def test_benchmarks_join_a_held_out_result_and_other_settings_of_another_iteration_are_its_own(
    folder, tmp_path, letters
):
    run = tmp_path / "run"
    shutil.copytree(folder / "model", run / "base/model")
    shutil.copytree(folder / "other", run / "iter0/model")
    shutil.copytree(folder / "other", run / "iter1/model")
    write_jsonl(tmp_path / "heldout.jsonl", [{"prompt": "a", "response": "b"}] * 3)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'''
        [run]
        dir = "{run}"
        [evaluate]
        heldout = "{tmp_path}/heldout.jsonl"
        data = "{folder}/data"
        max_new_tokens = 3
        dtype = "float32"
        [[iteration]]
        evaluate.tasks = "heldout"
        [[iteration]]
        evaluate.tasks = "heldout,openbookqa"
        '''
    )
    output = run_script("evaluate.py", "--config", str(recipe), "--iter", "base,0-1")
    assert {name: set(results(run / f"{name}/evaluation")) for name in ("base", "iter0", "iter1")} == {
        "base": {"heldout"},
        "iter0": {"heldout"},
        "iter1": {"heldout", "openbookqa"},
    }
    assert "| iteration 1 |" in output
    more = ["--iter", "0", "--tasks", "heldout,openbookqa,bigbench", "--harness", "0.4.0"]
    run_script("evaluate.py", "--config", str(recipe), *more)
    assert len(results(run / "iter0/evaluation")) == 5
    assert "finished, nothing to do" in run_script("evaluate.py", "--config", str(recipe), "--iter", "1")


@pytest.mark.parametrize(
    "task, where, edit, message",
    [
        (
            "arc_challenge",
            ("ai2_arc", "ARC-Challenge", "train"),
            lambda r: r[1].update(answerKey="9"),
            "train.*:2: is it a row of allenai/ai2_arc",
        ),
        (
            "gsm8k",
            ("gsm8k", "main", "test"),
            lambda r: [row.pop("answer") for row in r],
            r"is it a row of openai/gsm8k\? KeyError\('answer'\)",
        ),
        ("mmlu_virology", ("mmlu", "virology", "dev"), lambda r: r[0]["choices"].pop(), "dev.*:1:"),
    ],
)
def test_a_document_that_cannot_be_asked_is_named(folder, tmp_path, task, where, edit, message):
    settings = change(folder, tmp_path, *where, edit)
    with pytest.raises(ValueError, match=message):
        load_tasks(build(settings | {"evaluate.tasks": task}))


def test_an_empty_choice_is_scored_counted_and_never_taken_by_length(folder, tmp_path):
    def edit(found):
        found[1]["choices"]["text"][0] = ""

    settings = change(folder, tmp_path, "ai2_arc", "ARC-Challenge", "test", edit)
    arguments = ["--model", str(folder / "model"), "--out", str(tmp_path / "out"), "--tasks", "arc_challenge"]
    run_script("evaluate.py", *arguments, "--data", settings["evaluate.data"], "--dtype", "float32")
    row = results(tmp_path / "out")["arc_challenge"][1]
    assert row["scores"][0] < 0 and row["prediction_norm"] != 0
    assert (
        json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))["tasks"]["arc_challenge"][
            "empty_choices"
        ]
        == 1
    )


def test_jsonl_with_the_same_columns_is_read_too(folder, out, tmp_path):
    source = BENCHMARKS["openbookqa"].source
    for split in ("train", "test"):
        (table,) = source.files(folder / "data", split)
        rows = pyarrow.parquet.read_table(table).to_pylist()
        write_jsonl(tmp_path / f"openbookqa/main/{split}.jsonl", rows)
    tasks = [
        load_tasks(build({"evaluate.tasks": "openbookqa", "evaluate.data": str(d)}))[0]
        for d in (folder / "data", tmp_path)
    ]
    first, second = ([document[1:] for document in task.documents] for task in tasks)
    assert first == second and len(first) == 5


def test_contexts_that_are_cut_are_counted(out):
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))["tasks"]
    cut = sum(row["truncated"] for row in results(out)["arc_challenge"])
    assert summary["arc_challenge"]["truncated"] == cut > 0


# Comparing


@pytest.mark.slow
def test_two_models_are_compared_document_by_document(folder, out, tmp_path):
    evaluated(folder, tmp_path / "b", model="other")
    text = run_script("evaluate.py", "--compare", str(out), str(tmp_path / "b"), stderr=False)
    a, b = results(out)["mmlu_virology"], results(tmp_path / "b")["mmlu_virology"]
    lost = [x["doc"] for x, y in zip(a, b) if x["acc"] > y["acc"]]
    won = [x["doc"] for x, y in zip(a, b) if x["acc"] < y["acc"]]
    p = sign_test(len(won), len(lost))
    means = [sum(row["acc"] for row in part) / 5 for part in (a, b)]
    values = (
        f"{means[0]:.4f} | {means[1]:.4f} | {means[1] - means[0]:+.4f} | {len(lost)} | {len(won)} | {p:.4f}"
    )
    assert f"| mmlu_virology | acc | 5 | {values} |" in text
    assert not won or f"mmlu_virology acc, only B right: {', '.join(map(str, won))}" in text
    assert "| truthfulqa_mc2 | acc | 5 |" in text


def test_tasks_that_were_not_evaluated_the_same_way_are_not_compared(folder, out, tmp_path):
    # its texts are the same
    evaluated(folder, tmp_path / "old", "--harness", "0.4.0", tasks="truthfulqa_mc2")
    with pytest.raises(
        ValueError, match=r"not evaluated the same way: truthfulqa_mc2 \(another harness, bos\)"
    ):
        compare(out, tmp_path / "old")
    shutil.copytree(out, tmp_path / "part")
    rows = results(out)["winogrande"]
    write_jsonl(tmp_path / "part/winogrande.jsonl", [rows[0] | {"hash": "other"}, *rows[1:]])
    text = compare(out, tmp_path / "part")
    assert "winogrande (another documents or examples)" in text and "| arc_challenge | acc |" in text
    with pytest.raises(FileNotFoundError, match="summary.json"):
        compare(out, tmp_path)


# MT-Bench


def test_mt_benchs_answers_have_fastchats_form_and_the_second_turn_sees_the_first(folder, out):
    answers = results(out)["mt_bench"]
    assert [row["question_id"] for row in answers] == [81, 82, 83]
    for row in answers:
        assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= row.keys()
        assert row["choices"][0]["index"] == 0 and len(row["choices"][0]["turns"]) == 2
    assert len({row["answer_id"] for row in answers}) == 3 and {row["model_id"] for row in answers} == {
        folder.name
    }
    assert TEMPERATURES["math"] == 0 and TEMPERATURES["writing"] == 0.7


def test_the_second_turn_is_asked_with_the_first_answer(folder):
    class Model:
        name, max_length, settings = "x-iter0", 4000, build({}).evaluate

        class tokenizer:
            encode_prompt = staticmethod(lambda messages, template: [json.dumps(messages)])
            decode_continuation = staticmethod(lambda ids: ids[0])

        def generate(self, prompts, *, temperature, streams, **settings):
            asked.extend((temperature, json.loads(prompt[0])) for prompt in prompts)
            for place, prompt in enumerate(prompts):
                yield type(
                    "Response", (), {"index": place, "ids": [f" answer to {len(json.loads(prompt[0]))} "]}
                )

    asked = []
    task = load_mt_bench(build({"evaluate.data": str(folder / "data")}).evaluate, Data(), "zephyr")
    rows = list(task.answer(Model(), [0, 2]))
    assert [row["choices"][0]["turns"] for row in rows] == [["answer to 1", "answer to 3"]] * 2
    assert rows[0]["model_id"] == "x-iter0"
    second = [messages for _, messages in asked if len(messages) == 3]
    assert [turn["content"] for turn in second[0]] == ["tell me", "answer to 1", "and then"]
    assert sorted({temperature for temperature, _ in asked}) == [0.1, 0.7]


def test_mc2_of_the_papers_harness_ends_at_the_first_false_answer():
    row = {"question": "q", "mc2_targets": {"choices": ["a", "b", "c"], "labels": [1, 0, 1]}}
    mass = [math.exp(-1), math.exp(-2), math.exp(-3)]

    def measured(harness, scores=(-1.0, -2.0, -3.0)):
        task = in_harness("truthfulqa_mc2", harness)
        return task.measure(task.question(row), scores)["acc"]

    assert measured("0.4.13") == pytest.approx((mass[0] + mass[2]) / sum(mass))
    assert measured("0.4.0") == pytest.approx(mass[0] / sum(mass))
    assert math.isnan(measured("0.4.13", (-800.0, -900.0, -850.0)))


def test_judgments_are_read_back_without_the_failed_ones(tmp_path):
    def verdict(model, turn, score, question=81):
        return {"question_id": question, "model": model, "turn": turn, "score": score}

    scores = [
        verdict("a", 1, 8),
        verdict("a", 1, 6, question=90),
        verdict("a", 2, 4, question=91),
        verdict("a", 2, -1),
        verdict("b", 1, 10, question=7),  # not one of MT-Bench's
    ]
    write_jsonl(tmp_path / "gpt-4_single.jsonl", scores)
    assert read_judgments(tmp_path) == {
        "a": {"turn 1": 7, "turn 2": 4, "average": 6, "writing": 7, "roleplay": 4},
        "b": {"turn 1": 10, "average": 10},
    }
    write_jsonl(tmp_path / "gpt-4_pair.jsonl", [{"winner": "model_1"}])
    assert set(read_judgments(tmp_path)) == {"a", "b"}
    write_jsonl(tmp_path / "claude_single.jsonl", scores)
    with pytest.raises(ValueError, match="one judge's judgments"):
        read_judgments(tmp_path)


def test_categories_are_those_of_mt_benchs_questions():
    file = ROOT / "../shared/data/mt_bench/question.jsonl"
    if not file.is_file():
        pytest.skip("../shared/data/mt_bench is not here")
    questions = [json.loads(line) for line in open(file, encoding="utf-8")]
    assert {question["question_id"]: question["category"] for question in questions} == CATEGORY_OF


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--iter", "0", "--out", "x"], "go together"),
        (["--model", "x"], "go together"),
    ],
)
def test_flags_without_the_one_that_they_belong_to_are_refused(arguments, message):
    assert message in run_script("evaluate.py", *arguments, fails=True)


def test_unknown_tasks_and_harnesses_are_refused():
    for settings, message in (
        ({"evaluate.tasks": "hellaswog"}, "unknown task 'hellaswog'"),
        ({"evaluate.tasks": "mmlu", "evaluate.harness": "0.4.1"}, "is not one of 0.4.13, 0.4.0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tasks(build(settings))


def test_the_tables_columns_are_the_papers():
    from spin.report.leaderboard import LEADERBOARD, PAPER

    averages = {model: sum(row[column[:2]] for column in LEADERBOARD) / 6 for model, row in PAPER.items()}
    # The paper states 64.05 of "SPIN then DPO", which is not the mean of its six numbers.
    assert [*averages.values()] == pytest.approx(
        [58.14, 60.80, 62.12, 62.97, 63.16, 61.31, 64.74, 57.23], abs=0.011
    )
    assert {task for task, *_ in LEADERBOARD} <= {*BENCHMARKS, "mmlu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("shared", [0, 200])
def test_on_a_gpu_log_likelihoods_in_bf16_are_those_of_fp32_on_the_cpu_within_rounding(window, shared):
    model = small_model(hidden_size=256, head_dim=64, sliding_window=window).eval()
    asked = documents(random.Random(1), shared)
    expected = dict(loglikelihoods(model, asked, 10_000, 64))
    got = dict(loglikelihoods(model.to("cuda", torch.bfloat16), asked, 10_000, 64))
    apart = torch.tensor([a - b for i in expected for a, b in zip(expected[i], got[i], strict=True)])
    size = torch.tensor([a for scores in expected.values() for a in scores])
    assert apart.norm() < 3e-2 * size.norm()
