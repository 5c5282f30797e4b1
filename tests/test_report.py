"""The report of a run, finished or not."""

import json
import math
import subprocess
import sys

import pytest

from spin.report.leaderboard import DOCUMENTS, LEADERBOARD
from spin.report.markdown import marked
from spin.report.run import evaluations, plot_training, table, write_report
from spin.talk import side_by_side
from tests.helpers import ROOT, write_jsonl


def evaluation(directory, greedy, sampled):
    metrics = {"exact_match": greedy, "exact_match_sampled": sampled, "logp": -1.0}
    metrics |= {f"{name}_stderr": 0.01 for name in metrics} | {"documents": 2, "harness": "own"}
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


def test_a_finished_run_beside_its_control(tmp_path):
    evaluation(tmp_path / "base", 0.5, 0.25)
    for n in (0, 1):
        steps(tmp_path / f"iter{n}", 30)
        evaluation(tmp_path / f"iter{n}", 0.6, 0.3)
        evaluation(tmp_path / "control" / f"iter{n}", 0.55, 0.2)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "| SFT model | 0.250 ± 0.010 | 0.500 ± 0.010 |" in text
    assert "| iteration 1 | 0.300 ± 0.010 | 0.600 ± 0.010 |" in text
    assert "| control, SFT: iteration 1 | 0.200 ± 0.010 | 0.550 ± 0.010 |" in text
    assert "| 1 | 30 | 0.5000 | 0.500 |" in text
    assert "| a\\|b | x | y z | y z | y z |" in text
    assert is_picture(tmp_path / "accuracy.png") and is_picture(tmp_path / "training.png")


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_run_under_way_shows_what_there_is(tmp_path, evaluated):
    steps(tmp_path / "iter0", 1)
    if evaluated:
        evaluation(tmp_path / "base", 0.5, 0.25)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert ("accuracy.png" in text) == evaluated and "training.png" in text
    assert list(evaluations(tmp_path)) == (["base"] if evaluated else [])
    assert table(tmp_path).count("\n") == (2 if evaluated else 1)


@pytest.mark.slow
def test_the_figure_of_a_run_that_is_writing_has_its_held_out_pairs(tmp_path):
    steps(tmp_path / "iter0", 20)
    file = tmp_path / "iter0/metrics.jsonl"
    rows = [json.loads(line) for line in open(file)]
    plot_training(tmp_path)
    without = (tmp_path / "training.png").read_bytes()
    for row in rows[4::5]:
        row |= {"heldout_loss": 0.7, "heldout_accuracy": 0.4, "heldout_margin": 0.6}
    write_jsonl(file, rows)
    with open(file, "a") as log:
        log.write('{"step": 21, "lo')  # a line of which half is there
    done = subprocess.run(
        [sys.executable, "-m", "spin.report", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "report.md") in done.stderr and "| 0 | 20 |" in (tmp_path / "report.md").read_text(
        encoding="utf-8"
    )
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
    for name in ("average", "tasks", "radar", "accuracy"):
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
    sizes = {name: count for (name, *_), count in zip(LEADERBOARD, DOCUMENTS)}
    found = {name: task | {"documents": sizes.get(name, 100) // divisor} for name in tasks}
    (directory / "summary.json").write_text(json.dumps({"tasks": found}))


def test_the_leaderboard_stands_beside_the_papers(tmp_path):
    benchmark_results(tmp_path / "base/evaluation", 0)
    benchmark_results(tmp_path / "iter0/evaluation", 0.025)
    benchmark_results(tmp_path / "beside/zephyr-7b-beta", 0.1)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "| iteration 0 |" + " 52.50 ± 5.00 |" * 6 + " 52.50 |" in text
    assert "| — the paper | 60.41 | 43.73 | 74.19 | 26.76 | 82.85 | 60.92 | 58.14 |" in text
    assert "| — difference | -10.90 | +3.32 | -20.19 | +17.40 | -31.88 | -7.53 | -8.30 |" in text
    assert "| zephyr-7b-beta |" in text and "mmlu 14042 (2 truncated, 6 of its 57 subjects)" in text
    assert "harness 0.4.0" in text and "arc_challenge 1172 (2 truncated" in text
    for name in ("average", "tasks", "radar"):
        assert f"({name}.png)" in text and is_picture(tmp_path / f"{name}.png")


def test_a_leaderboard_that_is_not_complete_shows_what_there_is(tmp_path):
    benchmark_results(tmp_path / "base/evaluation", 0)
    benchmark_results(tmp_path / "iter0/evaluation", 0.025, ("arc_challenge", "openbookqa"))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "| iteration 0 | 52.50 ± 5.00 |  |  |  |  |  |  |" in text and "openbookqa acc_norm" in text
    assert is_picture(tmp_path / "average.png") and not (tmp_path / "radar.png").exists()


def test_parts_of_the_tasks_are_not_set_against_the_papers_whole_ones(tmp_path):
    benchmark_results(tmp_path / "base/evaluation", 0)
    benchmark_results(tmp_path / "iter0/evaluation", 0.025, divisor=10)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "| — difference |  |  |  |  |  |  |  |" in text and "| — difference | -10.41 |" in text
    assert "SFT model: scored as" in text and "iteration 0: scored as" in text
    assert "arc_challenge 117 (" in text


def test_judgments_stand_in_the_report(tmp_path):
    benchmark_results(tmp_path / "base/evaluation", 0, ())
    answered = {"documents": 80, "few_shot": 0, "harness": "FastChat", "model_id": "x-base", "empty": 0}
    (tmp_path / "base/evaluation/summary.json").write_text(json.dumps({"tasks": {"mt_bench": answered}}))
    assert "| SFT model |  |  |  |" in write_report(tmp_path).read_text(encoding="utf-8")
    verdicts = [{"model": "x-base", "turn": turn, "score": score} for turn, score in ((1, 6), (1, 7), (2, 5))]
    write_jsonl(tmp_path / "mt_bench_judgment" / "gpt-4_single.jsonl", verdicts)
    assert "| SFT model | 6.50 | 5.00 | 6.00 |" in write_report(tmp_path).read_text(encoding="utf-8")


def test_what_the_opponents_wrote_is_shown_with_the_differences(tmp_path):
    def turns(text, answer):
        return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    prompts = ["In Southampton, how do people commute?", "another prompt"]
    for n, said in enumerate(("55% of commuters use cars", "most commuters use buses and trains")):
        pairs = [{"real": turns(text, "mostly buses"), "generated": turns(text, said)} for text in prompts]
        write_jsonl(tmp_path / f"iter{n}/generated/part-00000-of-00001.jsonl", pairs)
    text = write_report(tmp_path, ["Southampton"]).read_text(encoding="utf-8")
    assert "*data:* mostly buses\n" in text and "another prompt" not in text
    assert "*SFT model:* **55% of commuters use cars**\n" in text
    assert "*iteration 0:* **most** commuters use **buses and trains**\n" in text
    with pytest.raises(ValueError, match="contains 'Portsmouth'"):
        write_report(tmp_path, ["Portsmouth"])


def test_markup_in_held_out_texts_is_shown_and_not_rendered(tmp_path):
    evaluation(tmp_path / "base", 0.5, 0.25)
    file = tmp_path / "base/evaluation/heldout.jsonl"
    row = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    write_jsonl(file, [row | {"prompt": "<b>x</b>|![i](u)", "target": "[a](b)", "sampled": "`c`\\"}])
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert r"| \<b\>x\</b\>\|!\[i\](u) | \[a\](b) | \`c\`\\ |" in text


def test_markdown_in_a_text_stays_text():
    assert marked("a b", "a *b* _c_ | d") == "a **\\*b\\* \\_c\\_ \\| d**"
