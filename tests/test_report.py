"""The report of a run, finished or not."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, write_jsonl

from spin.report import evaluations, plot_training, table, write_report
from spin.talk import side_by_side


def evaluation(directory, greedy, sampled):
    metrics = {"exact_match": greedy, "exact_match_sampled": sampled, "logp": -1.0, "documents": 2}
    metrics |= {f"{name}_stderr": 0.01 for name in ("exact_match", "exact_match_sampled", "logp")}
    row = {"prompt": "a|b", "target": "x", "text": "x", "sampled": "y\nz", "exact_match": 1, "exact_match_sampled": 0}
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
    text = write_report(tmp_path).read_text()
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
    text = write_report(tmp_path).read_text()
    assert ("accuracy.png" in text) == evaluated and "training.png" in text
    assert list(evaluations(tmp_path)) == (["base"] if evaluated else [])
    assert table(tmp_path).count("\n") == (2 if evaluated else 1)


def test_the_figure_of_a_run_that_is_writing_has_its_held_out_pairs(tmp_path):
    steps(tmp_path / "iter0", 20)
    file = tmp_path / "iter0/metrics.jsonl"
    rows = [json.loads(line) for line in open(file)]
    without = plot_training(tmp_path).read_bytes()
    for row in rows[4::5]:
        row |= {"heldout_loss": 0.7, "heldout_accuracy": 0.4, "heldout_margin": 0.6}
    write_jsonl(file, rows)
    with open(file, "a") as log:
        log.write('{"step": 21, "lo')  # a line of which half is there
    done = subprocess.run(
        [sys.executable, "-m", "spin.report", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert str(tmp_path / "report.md") in done.stderr and "| 0 | 20 |" in (tmp_path / "report.md").read_text()
    assert is_picture(tmp_path / "training.png") and (tmp_path / "training.png").read_bytes() != without


def test_an_empty_run_has_an_empty_report(tmp_path):
    assert write_report(tmp_path).read_text().startswith("#")
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
