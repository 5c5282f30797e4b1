"""The miniature's figures: what is run for each, and means over the seeds by hand. Targets that move."""

import json
import re
import sys

import pytest

from miniature import paper, variants
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
    arguments = f"paper --seeds 2 --out {tmp_path} --figures 2 4 -- --train.beta=1"
    monkeypatch.setattr(sys, "argv", arguments.split())
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


def test_variants_are_tuned_on_two_seeds_and_the_best_is_run_on_all(tmp_path, monkeypatch):
    commands = []

    def run(*arguments):  # in place of training: right answers by λ, the more seeds the fewer
        commands.append(arguments)
        options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        beta, seed = float(options["--train.beta"]), int(options["--train.seed"])
        heldout = dict.fromkeys(variants.METRICS, {0.5: 0.3, 1.0: 0.7, 2.0: 0.6}.get(beta, 0.4) - seed / 10)
        for n in range(4):
            path = tmp_path / options["--run.dir"] / f"iter{n}/evaluation/summary.json"
            write_jsonl(path, [{"tasks": {"heldout": heldout}}])

    monkeypatch.setattr(variants, "script", run)
    monkeypatch.setattr(
        variants, "run_seed", lambda seed, folder, *_: run(f"--run.dir={folder}/run/control", *seeded(seed))
    )
    arguments = ["variants", "--seeds", "3", "--out", str(tmp_path), "--only", "fictitious play"]
    monkeypatch.setattr(sys, "argv", arguments)
    variants.main()
    made = {path.parent.name + "/" + path.name for path in tmp_path.glob("seed*/*") if "-" in path.name}
    betas = ("0.5", "1", "2", "4")
    names = ("SPIN", "fictitiousplay")
    tuned = {f"seed{seed}/{name}-{beta}" for seed in (0, 1) for name in names for beta in betas}
    assert made == tuned | {f"seed2/{name}-1" for name in names}
    assert all(
        f"seed{s}/SPIN-" in " ".join(c) for c in commands for s in range(3) if f"seed{s}/fict" in " ".join(c)
    )
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    cell = "**0.600, 0.600, 0.600, 0.600 ± 0.100**"  # 0.7, 0.6 and 0.5
    assert f"| fictitious play | 1 | 3 | {cell} | {cell} | {cell} | **+0.000 ± 0.000** |" in report
    assert "| SPIN | 2 | 2 | 0.550, 0.550, 0.550, 0.550 ± 0.071 |" in report
    assert "| continued SFT |  | 3 | **0.300," in report
    assert (tmp_path / "variants.png").stat().st_size > 1000


def seeded(seed: int) -> list[str]:
    """The options of a control, which has no λ: as with λ = 8."""
    return [f"--train.seed={seed}", "--train.beta=8"]


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
