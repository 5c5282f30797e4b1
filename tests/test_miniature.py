"""The miniature's figures: what is run for each, and means over the seeds by hand. Targets that move."""

import json
import re
import sys

import pytest

from miniature import paper
from miniature.dynamic_target import contests
from spin.data import Example
from tests.helpers import ROOT, metrics, run_script, write_jsonl


@pytest.fixture
def seeds(tmp_path):
    """Two seeds in which every model of every figure has been evaluated."""
    folders = [tmp_path / "seed0", tmp_path / "seed1"]
    for folder, value in zip(folders, (0.4, 0.6)):
        for _, curves in paper.FIGURES.values():
            for points in curves.values():
                for path in points.values():
                    control = 0.1 * ("control" in path)
                    metrics = {name: value - control * value for _, name, _ in paper.HELDOUT}
                    write_jsonl(folder / path / "evaluation/summary.json", [{"tasks": {"heldout": metrics}}])
    return folders


def test_tables_have_means_and_deviations_over_the_seeds_and_leads_seed_by_seed(seeds, tmp_path):
    text = "\n".join(paper.figure("2", seeds, tmp_path))
    assert "| SPIN: iteration 3 | 0.500 ± 0.141 | 0.500 ± 0.141 |" in text
    assert "| continued SFT: iteration 3 | 0.450 ± 0.127 |" in text
    assert "| SPIN − continued SFT: iteration 3 | +0.050 ± 0.014 |" in text
    assert text.count("| SFT model |") == 1


def test_one_command_runs_what_its_figures_need_and_writes_where_it_is_told(seeds, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(paper, "script", lambda *arguments: commands.append(arguments))
    monkeypatch.setattr(paper.world, "write", lambda seed, folder: None)
    arguments = ["paper", "--seeds", "2", "--out", str(tmp_path), "--figures", "2,4", "--", "--train.beta=1"]
    monkeypatch.setattr(sys, "argv", arguments)
    paper.main()
    runs = {part for command in commands for part in command if part.startswith("--run.dir")}
    assert {run.rsplit("seed1/")[1] for run in runs if "seed1" in run} == {
        "pretraining",
        "run",
        "run/control",
        "epochs",
    }
    trained = [command for command in commands if "--iter" in command]
    assert trained and all(command[-1] == "--train.beta=1" for command in trained)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in ("2", "4"):
        assert f"figure{name}.png" in report and (tmp_path / f"figure{name}.png").stat().st_size > 1000


def by_rule(prompt: str) -> str:
    """The right answer, by the rules of docs/miniature.md."""
    match = re.fullmatch("(reverse|flip|plural of|many|say|double|ends of|edges) ([a-z]+)(?: twice)?", prompt)
    operation, word = match.groups()
    plural = word[:-1] + "ves" if word[-1] == "f" else word + "es" if word[-1] in "sz" else word + "s"
    answers = (word[::-1], word[::-1], plural, plural, word * 2, word * 2, *[word[0] + word[-1]] * 2)
    return dict(zip("reverse|flip|plural of|many|say|double|ends of|edges".split("|"), answers))[operation]


def test_winners_of_a_dynamic_target_are_right_and_losers_wrong_and_both_are_trained_on(
    recipe, tmp_path, monkeypatch
):
    base = f"--model.base={ROOT}/miniature/seed0/base"
    samples, pairs = tmp_path / "samples", tmp_path / "pairs.jsonl"
    run_script("generate.py", *recipe(samples, base, "--generate.samples=3"), "--iter", "0")
    arguments = (f"{samples}/iter0/generated", "--out", f"{pairs}")
    output = run_script("miniature/dynamic_target.py", *arguments)
    rows = [json.loads(line) for line in open(pairs)]
    assert f"{len(rows)} pairs; {49 - len(rows)} ties dropped" in output and 0 < len(rows) < 49
    written = [json.loads(line) for line in open(samples / "iter0/generated/part-00000-of-00001.jsonl")]
    for row in rows:
        right = by_rule(row["real"][0]["content"])
        assert row["real"][1]["content"] == right != row["generated"][1]["content"]
        own = [each["generated"] for each in written if each["real"][0] == row["real"][0]]
        assert row["real"] in own and row["generated"] in own

    train = recipe(tmp_path / "run", base, f"--data.pairs={pairs}", "--data.num_prompts=0")
    assert f"iter0: {len(rows)} examples" in run_script("train.py", *train, "--iter", "0")
    assert metrics(tmp_path / "run/iter0")[0]["loss"] == pytest.approx(0.693147, abs=1e-4)

    (tmp_path / "scores.py").write_text("def equal(prompt, real, response):\n    return 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    error = run_script("miniature/dynamic_target.py", *arguments, "--score", "scores:equal", fails=True)
    assert f"error: {samples}/iter0/generated: only ties; sample more (--generate.samples=4)" in error


def test_the_real_response_competes_where_asked_and_empty_ones_never():
    prompt = ({"role": "user", "content": "x"},)
    examples = [Example(prompt, "abc", ("a", "", "ab")), Example(prompt, "abc", ("a", "b"))]

    def length(prompt, real, response):
        return len(response)

    assert [(e.real, e.generated) for e in contests(examples, length)] == [("ab", ("a",))]
    assert [(e.real, e.generated) for e in contests(examples, length, with_real=True)] == [
        ("abc", ("a",)),
        ("abc", ("a",)),
    ]
