"""The report of a run, finished or not."""

import json
import math
import subprocess
import sys

import pytest

from spin.report.leaderboard import DOCUMENTS, LEADERBOARD, table
from spin.report.results import evaluated, evaluations, with_others
from spin.report.run import HELDOUT, write_report
from spin.talk import as_markdown, marked, side_by_side
from tests.helpers import ROOT, write_jsonl


def evaluation(directory, greedy, sampled):
    metrics = {"exact_match": greedy, "exact_match_sampled": sampled, "logp": -1.0}
    metrics |= {f"{name}_stderr": 0.01 for name in metrics} | {
        "documents": 2,
        "few_shot": 0,
        "harness": "own",
    }
    row = {
        "prompt": "a|b",
        "target": "x",
        "text": "x",
        "sampled": "y\nz",
        "exact_match": 1,
        "exact_match_sampled": 0,
    }
    write_jsonl(directory / "evaluation" / "heldout.jsonl", [row | {"doc": 0}, row | {"doc": 1}])
    (directory / "evaluation" / "summary.json").write_text(json.dumps({"tasks": {"heldout": metrics}}))


def steps(directory, count):
    keys = "loss accuracy margin reward_real reward_generated logps_real logps_generated grad_norm lr".split()
    write_jsonl(directory / "metrics.jsonl", [{"step": n + 1} | {k: 0.5 for k in keys} for n in range(count)])


def is_picture(file):
    return file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5_000


def run_report(*arguments, fails=False):
    command = [sys.executable, "-m", "spin.report", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr


def test_a_finished_run_beside_its_control(tmp_path):
    evaluation(tmp_path / "base", 0.5, 0.25)
    evaluation(tmp_path / "control/base", 0.5, 0.25)
    for n in (0, 1):
        steps(tmp_path / f"iter{n}", 30)
        evaluation(tmp_path / f"iter{n}", 0.6, 0.3)
        evaluation(tmp_path / "control" / f"iter{n}", 0.55, 0.2)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "| SFT model | 0.250 ± 0.010 | 0.500 ± 0.010 |" in text
    assert "| SPIN: iteration 1 | 0.300 ± 0.010 | 0.600 ± 0.010 |" in text
    assert "| continued SFT: iteration 1 | 0.200 ± 0.010 | 0.550 ± 0.010 |" in text
    assert text.count("\n| SFT model |") == 1  # of both
    assert text.index("| SFT model |") < text.index("| SPIN: iteration 0 |")
    assert "| 1 | 30 | 0.5000 | 0.500 |" in text
    assert "| a\\|b | x | y z | y z | y z | y z |" in text  # the run's three models, the control's last
    assert is_picture(tmp_path / "accuracy.png") and is_picture(tmp_path / "training.png")


@pytest.mark.parametrize("has_base", [False, True])
def test_a_run_under_way_shows_what_there_is(tmp_path, has_base):
    steps(tmp_path / "iter0", 1)
    if has_base:
        evaluation(tmp_path / "base", 0.5, 0.25)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert ("accuracy.png" in text) == has_base and "training.png" in text
    assert list(evaluations(tmp_path)) == (["base"] if has_base else [])
    assert table(evaluated(with_others([tmp_path])), HELDOUT).count("\n") == (2 if has_base else 0)


@pytest.mark.slow
def test_the_figure_of_a_run_that_is_writing_has_its_held_out_pairs(tmp_path):
    steps(tmp_path / "iter0", 20)
    file = tmp_path / "iter0/metrics.jsonl"
    rows = [json.loads(line) for line in open(file)]
    write_report(tmp_path)
    without = (tmp_path / "training.png").read_bytes()
    for row in rows[4::5]:
        row |= {"heldout_loss": 0.7, "heldout_accuracy": 0.4, "heldout_margin": 0.6}
    write_jsonl(file, rows)
    with open(file, "a") as log:
        log.write('{"step": 21, "lo')  # a line of which half is there
    assert str(tmp_path / "report.md") in run_report(tmp_path)
    assert "| 0 | 20 |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert is_picture(tmp_path / "training.png") and (tmp_path / "training.png").read_bytes() != without


def test_nan_and_missing_scores_are_empty_cells_and_gaps(tmp_path):
    evaluation(tmp_path / "base", 0.5, math.nan)
    evaluation(tmp_path / "iter0", 0.5, 0.25)
    tasks = [name for name, *_ in LEADERBOARD]
    for directory in (tmp_path / "base/evaluation", tmp_path / "iter0/evaluation"):
        heldout = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["tasks"]
        benchmark_results(directory, 0, tasks)
        found = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["tasks"]
        (directory / "summary.json").write_text(json.dumps({"tasks": heldout | found}))
    summary = tmp_path / "iter0/evaluation/summary.json"
    text = summary.read_text(encoding="utf-8").replace('"acc": 0.5', '"acc": NaN')
    summary.write_text(text.replace('"acc_stderr": 0.05', '"acc_stderr": NaN'))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    cells = "50.00 ± 5.00 | 50.00 ± 5.00 | 50.00 ± 5.00"
    assert f"| SFT model | {cells} | {cells} | 50.00 |" in text
    assert f"| iteration 0 | 50.00 ± 5.00 |  |  | {cells} |  |" in text
    assert "| SFT model |  | 0.500 ± 0.010 |" in text and "nan" not in text.split("\n", 1)[1]
    for name in ("average", "tasks", "accuracy"):
        assert is_picture(tmp_path / f"{name}.png")


def test_a_model_without_any_score_leaves_a_report(tmp_path):
    benchmark_results(tmp_path / "base/evaluation", math.nan)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "| SFT model |  |  |  |  |  |  |  |" in text and not list(tmp_path.glob("*.png"))


def test_a_figure_replaces_a_symlink_and_does_not_follow_it(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    evaluation(run / "base", 0.5, 0.25)
    outside.write_text("kept")
    (run / "accuracy.png").symlink_to(outside)
    write_report(run)
    assert outside.read_text(encoding="utf-8") == "kept"
    assert is_picture(run / "accuracy.png") and not (run / "accuracy.png").is_symlink()


def test_an_empty_run_has_an_empty_report(tmp_path):
    assert write_report(tmp_path).read_text(encoding="utf-8").startswith("#")
    assert not list(tmp_path.glob("*.png"))


def test_answers_stand_side_by_side_or_one_below_the_other():
    texts = {"base": "one two three\n\nfour", "iteration 0": "a"}
    assert side_by_side(texts, 51) == (
        "base                     | iteration 0\n"
        "------------------------ | ------------------------\n"
        "one two three            | a\n"
        "                         |\n"
        "four                     |"
    )
    assert side_by_side(texts, 50) == "base\n----\none two three\n\nfour\n\niteration 0\n-----------\na"


def benchmark_results(directory, shift, tasks=tuple(name for name, *_ in LEADERBOARD), divisor=1):
    metrics = ("acc", "acc_norm", "exact_match", "acc_by_subject")
    task = {
        "documents": 100,
        "few_shot": 5,
        "harness": "0.4.0",
        "truncated": 2,
        "subjects": 6,
        "of_subjects": 57,
    }
    task |= {metric: 0.5 + shift for metric in metrics} | {f"{metric}_stderr": 0.05 for metric in metrics}
    directory.mkdir(parents=True, exist_ok=True)
    found = {name: task | {"documents": DOCUMENTS.get(name, 100) // divisor} for name in tasks}
    (directory / "summary.json").write_text(json.dumps({"tasks": found}))


def of_paper(run):
    (run / "iter0").mkdir(parents=True, exist_ok=True)
    (run / "iter0/config.toml").write_text("[run]\npaper = true\n")


def test_the_leaderboard_stands_beside_the_papers(tmp_path):
    of_paper(tmp_path)
    benchmark_results(tmp_path / "base/evaluation", 0)
    benchmark_results(tmp_path / "iter0/evaluation", 0.025)
    benchmark_results(tmp_path / "beside/zephyr-7b-beta", 0.1)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "| iteration 0 |" + " 52.50 ± 5.00 |" * 6 + " 52.50 |" in text
    assert "| — the paper | 60.41 | 43.73 | 74.19 | 26.76 | 82.85 | 60.92 | 58.14 |" in text
    assert "| — difference | -10.90 | +3.32 | -20.19 | +17.40 | -31.88 | -7.53 | -8.30 |" in text
    assert "| zephyr-7b-beta |" in text
    facts = "14042 | 5 | 0.4.0 | 2 truncated, 6 of its 57 subjects"
    assert f"| mmlu | acc | {facts} | 50.000 ± 5.000 | 52.500 ± 5.000 | 60.000 ± 5.000 |" in text
    for name in ("average", "tasks"):
        assert f"({name}.png)" in text and is_picture(tmp_path / f"{name}.png")


def test_a_leaderboard_that_is_not_complete_shows_what_there_is(tmp_path):
    benchmark_results(tmp_path / "base/evaluation", 0)
    benchmark_results(tmp_path / "iter0/evaluation", 0.025, ("arc_challenge", "openbookqa"))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "| iteration 0 | 52.50 ± 5.00 |  |  |  |  |  |  |" in text and "| model | OpenBookQA |" in text
    assert is_picture(tmp_path / "average.png")


def test_parts_of_the_tasks_are_not_set_against_the_papers_whole_ones(tmp_path):
    of_paper(tmp_path)
    benchmark_results(tmp_path / "base/evaluation", 0)
    benchmark_results(tmp_path / "iter0/evaluation", 0.025, divisor=10)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "| — difference |  |  |  |  |  |  |  |" in text and "| — difference | -10.41 |" in text
    facts = "5 | 0.4.0 | 2 truncated, 6 of its 57 subjects"
    assert f"| arc_challenge | acc | 1172 | {facts} | 50.000 ± 5.000 |  |" in text
    assert f"| arc_challenge | acc | 117 | {facts} |  | 52.500 ± 5.000 |" in text


def test_judgments_stand_in_the_report(tmp_path):
    benchmark_results(tmp_path / "base/evaluation", 0, ())
    answered = {"documents": 80, "few_shot": 0, "harness": "FastChat", "model_id": "x-base", "empty": 0}
    (tmp_path / "base/evaluation/summary.json").write_text(json.dumps({"tasks": {"mt_bench": answered}}))
    assert "| SFT model |  |  |  |" in write_report(tmp_path).read_text(encoding="utf-8")
    given = ((1, 81, 6), (1, 91, 7), (2, 81, 5))
    keys = ("turn", "question_id", "score")
    verdicts = [{"model": "x-base"} | dict(zip(keys, values)) for values in given]
    file = tmp_path / "mt_bench_judgment" / "gpt-4_single.jsonl"
    write_jsonl(file, verdicts)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "| SFT model | 6.50 | 5.00 | 6.00 | 5.50 | 7.00 |  |" in text and "the paper" not in text
    (tmp_path / "iter0").mkdir()
    (tmp_path / "iter0/config.toml").write_text("[run]\npaper = true\n")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "| — the paper | 5.94 |\n| — difference | +0.06 |" in text  # table 6
    assert "| — the paper |  |  | 5.94 |  |" in text
    assert not (tmp_path / "mt_bench.png").exists()  # not all categories
    verdicts += [dict(zip(("model", *keys), ("x-base", 1, number, 4))) for number in range(101, 161, 10)]
    write_jsonl(file, verdicts)
    assert "| 7.00 | 4.00 | 4.00 | 4.00 | 4.00 | 4.00 | 4.00 |" in write_report(tmp_path).read_text("utf-8")
    assert is_picture(tmp_path / "mt_bench.png")


def test_the_papers_rows_need_a_recipe_that_says_so(tmp_path):
    benchmark_results(tmp_path / "base/evaluation", 0)
    assert "the paper" not in write_report(tmp_path).read_text(encoding="utf-8")
    of_paper(tmp_path)
    (tmp_path / "iter0/config.toml").write_text('[run]\npaper = true\n[train]\nobjective = "sft"\n')
    assert "the paper |" not in write_report(tmp_path).read_text(encoding="utf-8")  # of SPIN, not its control


def test_named_evaluations_stand_next_to_a_run_with_the_papers_rows_and_hours(tmp_path):
    of_paper(tmp_path / "spin")
    benchmark_results(tmp_path / "spin/iter0/evaluation", 0.1)
    benchmark_results(tmp_path / "dpo", 0.2)
    steps(tmp_path / "spin/iter0", 3)
    ends = [{"stage": "generate", "seconds": 5400}, {"stage": "train", "seconds": 1800}]
    starts = [{"stage": stage, "started": 1.0} for stage in ("generate", "train", "train")]
    write_jsonl(tmp_path / "spin/iter0/stages.jsonl", [*starts, *ends])
    out = tmp_path / "out"
    run_report(tmp_path / "spin", tmp_path / "dpo", "--names", "SPIN,DPO", "--out", out)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "| DPO |" + " 70.00 ± 5.00 |" * 6 + " 70.00 |" in text
    # Table 3: zephyr-7b-dpo-full.
    assert "| — the paper | 63.65 | 55.19 | 72.61 | 33.43 | 84.44 | 58.52 | 61.31 |" in text
    assert "| 1.5 |  | ≥ 0.5 | 1.45 | 4.32 |" in text  # a process was killed; table 2
    assert "Not compared" in text and is_picture(out / "tasks.png")


def test_seeds_are_means_with_deviations_and_leads_seed_by_seed(tmp_path):
    for seed, (spin, sft) in enumerate([(0.6, 0.5), (0.7, 0.4), (0.8, 0.6)]):
        evaluation(tmp_path / f"{seed}/iter0", spin, 0.5)
        evaluation(tmp_path / f"{seed}/control/iter0", sft, 0.5)
    evaluation(tmp_path / "2/iter1", 0.9, 0.5)
    out = tmp_path / "out"
    run_report(*(tmp_path / str(seed) for seed in range(3)), "--names", "SPIN", "--out", out)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "| SPIN: iteration 0 | 0.500 ± 0.000 | 0.700 ± 0.100 |" in text
    assert "| continued SFT: iteration 0 | 0.500 ± 0.000 | 0.500 ± 0.100 |" in text
    # 0.1, 0.3, 0.2
    assert "| SPIN − continued SFT: iteration 0 | +0.000 ± 0.000 | +0.200 ± 0.100 |" in text
    assert "| SPIN: iteration 1 (1 of 3 runs) | 0.500 ± 0.010 | 0.900 ± 0.010 |" in text
    assert "standard deviation between 3 runs" in text and is_picture(out / "accuracy.png")


def test_models_in_beside_are_shown_with_their_held_out_answers_and_compared(tmp_path):
    evaluation(tmp_path / "iter0", 0.6, 0.3)
    evaluation(tmp_path / "beside/x", 0.5, 0.2)
    for file in (tmp_path / "beside/x/evaluation").iterdir():
        file.rename(tmp_path / "beside/x" / file.name)
    for directory in (tmp_path / "iter0/evaluation", tmp_path / "beside/x"):
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        (directory / "summary.json").write_text(json.dumps(summary | {"records": {"heldout": {"seed": 1}}}))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "| x | 0.200 ± 0.010 | 0.500 ± 0.010 |" in text and "| a\\|b | x | y z | y z |" in text
    assert "## iteration 0 compared with x" in text and "| heldout | exact_match | 2 |" in text


def test_models_along_the_way_have_rows_and_places_between_the_iterations(tmp_path):
    for path in ("base", "iter0", "iter0/epoch1", "iter0/epoch5", "iter1"):
        evaluation(tmp_path / path, 0.5, 0.25)
    (tmp_path / "iter0/config.toml").write_text("[train]\nepochs = 2\n")
    models = evaluated(with_others([tmp_path]))
    # Two epochs are one iteration.
    places = [("SFT model", 0), ("iteration 0", 1), ("iteration 1", 2)]
    places += [("iteration 0, epoch 1", 0.5), ("iteration 0, epoch 5", 2.5)]
    assert [(model.name, model.x) for model in models] == places
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "| iteration 0, epoch 5 | 0.250 ± 0.010 | 0.500 ± 0.010 |" in text
    assert is_picture(tmp_path / "accuracy.png")


def test_what_is_asked_for_wrongly_is_refused(tmp_path):
    evaluation(tmp_path / "a/base", 0.5, 0.25)
    (tmp_path / "b").mkdir()
    a, b = tmp_path / "a", tmp_path / "b"
    for arguments, message in (
        ([tmp_path / "none"], "none: no such run or evaluation, or it has nothing to report yet"),
        ([b], "b: no such run or evaluation, or it has nothing to report yet"),
        ([a, a, "--names", "x,y,z"], "'x,y,z' for 2 runs: give one for each"),
        ([a, a, "--names", "x,y"], "several runs need --out"),
    ):
        assert message in run_report(*arguments, fails=True)


def test_markup_in_held_out_texts_is_shown_and_not_rendered(tmp_path):
    evaluation(tmp_path / "base", 0.5, 0.25)
    file = tmp_path / "base/evaluation/heldout.jsonl"
    row = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    write_jsonl(file, [row | {"prompt": "<b>x</b>|![i](u)", "target": "[a](b)", "sampled": "`c`\\"}])
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert r"| \<b\>x\</b\>\|!\[i\](u) | \[a\](b) | \`c\`\\ |" in text


def test_markdown_in_a_text_stays_text():
    assert marked("a b", "a *b* _c_ | d") == "a **\\*b\\* \\_c\\_ \\| d**"


def test_answers_in_markdown_mark_what_differs_from_the_model_above():
    texts = {"base": "55% of commuters use cars\n\nBye", "iteration 0": "most commuters use buses\n\nBye"}
    assert as_markdown({"In Southampton?": texts}) == (
        "**Prompt.** In Southampton?\n\n"
        "*base:* 55% of commuters use cars <br> Bye\n\n"
        "*iteration 0:* **most** commuters use **buses** <br> Bye\n\n"
        "---\n\nBold: words that differ from the answer above.\n"
    )
