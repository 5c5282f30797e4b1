"""Self-play variants as a user runs them: forks of one run of two iterations, on one rank and two."""

import functools
import json
import math
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from model.tokenizer import Tokenizer
from spin.config import Config, Data, Train
from spin.data import Example, tokenize
from spin.engine.files import file_digest
from spin.engine.schedule import Schedule
from spin.iteration import training_examples
from spin.opponent import read_pairs
from tests.helpers import (
    count_lines,
    generated,
    kill_when,
    metrics,
    naive_logps,
    run_script,
    weights,
    write_jsonl,
)

QUICK = ("--evaluate.heldout=", "--train.epochs=1")
RANKS = [1, pytest.param(2, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def source(recipe, tmp_path_factory):
    """Iterations 0 and 1 of the small recipe: 49 prompts, β = 2."""
    run = tmp_path_factory.mktemp("variants") / "source"
    run_script("train.py", *recipe(run, *QUICK), "--iter", "0-1")
    return run


@pytest.fixture(scope="module")
def variant(source, recipe, tmp_path_factory):
    """variant("--train.beta=1") forks the source, once for the same settings: its directory and its log."""

    def contents():
        return {file: (file_digest(file), file.stat().st_mtime_ns) for file in source.rglob("*.*")}

    before = contents()

    @functools.cache
    def made(changes, iterations, ranks):
        run = tmp_path_factory.mktemp("variants") / "run"
        arguments = [*recipe(run, *QUICK, *changes), "--from", str(source), "--iter", iterations]
        output = run_script("train.py", *arguments, ranks=ranks)
        assert contents() == before
        return run, output

    return lambda *changes, iterations="1", ranks=1: made(changes, iterations, ranks)


def logps(file):
    return load_file(file)["logps"]


def texts(run, n):
    """The generated responses of an iteration, in the order of the prompts."""
    return [example.generated for example in read_pairs(run / f"iter{n}/generated", {})]


def softplus(values):
    return torch.log1p(torch.exp(-values))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("reference", ["opponent", "base", "mixture", "none"])
def test_the_first_loss_follows_from_the_reference(source, variant, reference, ranks):
    run, _ = variant(f"--train.reference={reference}", "--train.alpha=0.75", ranks=ranks)
    policy = logps(source / "iter1/opponent_logps.safetensors")  # which starts as the opponent
    base_file, opponent_file = (run / f"iter1/{name}_logps.safetensors" for name in ("base", "opponent"))
    assert base_file.exists() == (reference in ("base", "mixture"))
    assert opponent_file.exists() == (reference in ("opponent", "mixture"))
    base = logps(base_file) if base_file.exists() else 0 * policy
    subtracted = {"opponent": policy, "mixture": 0.75 * policy + 0.25 * base}.get(reference, base)
    ratios = (policy - subtracted)[Schedule(Train(batch_size=8, epochs=1), 98).batch(0)]
    margins = ratios[:, 0] - ratios[:, 1]
    first = metrics(run / "iter1")[0]
    assert first["loss"] == pytest.approx(softplus(2 * margins).mean().item(), rel=1e-4)
    assert first["margin"] == pytest.approx(margins.mean().item(), rel=1e-3, abs=1e-4)
    assert first["reward_real"] == pytest.approx(2 * ratios[:, 0].mean().item(), rel=1e-3, abs=1e-4)
    assert (abs(first["loss"] - math.log(2)) < 1e-4) == (reference == "opponent")


def test_log_probs_of_the_base_are_transformers_on_the_replayed_pairs_and_the_new_ones(source, variant):
    from transformers import AutoModelForCausalLM

    run, _ = variant("--train.reference=base", "--train.alpha=0.75")
    stored, path = logps(run / "iter1/base_logps.safetensors"), source / "base/model"
    pairs = [pair for n in (0, 1) for pair in read_pairs(source / f"iter{n}/generated", {})]
    items = tokenize(pairs, Tokenizer(path), "plain", Data(), Counter())
    other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)
    assert stored.shape == (98, 2)
    for i in (0, 30, 49, 97):
        torch.testing.assert_close(stored[i], torch.stack(naive_logps(other, items[i])), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", RANKS)
def test_several_samples_of_a_prompt_are_rows_that_differ_and_all_are_trained_on(variant, source, ranks):
    run, _ = variant("--generate.samples=2", iterations="0", ranks=ranks)
    (shard,) = (run / "iter0/generated").glob("*.jsonl")
    rows = [json.loads(line) for line in open(shard)]
    assert len(rows) == json.loads((run / "iter0/generated/meta.json").read_text())["pairs"] == 98
    assert [row["real"] for row in rows[::2]] == [row["real"] for row in rows[1::2]]
    assert len({row["real"][0]["content"] for row in rows}) == 49
    assert sum(first != second for first, second in texts(run, 0)) > 25
    if ranks == 1:
        assert logps(run / "iter0/opponent_logps.safetensors").shape == (49, 3)
        assert metrics(run / "iter0")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert len(metrics(run / "iter0")) == len(metrics(source / "iter0")) == 7
    else:
        one, _ = variant("--generate.samples=2", iterations="0")
        assert generated(one / "iter0") == generated(run / "iter0")
        for a, b in zip(metrics(one / "iter0"), metrics(run / "iter0"), strict=True):
            assert [a["loss"], a["grad_norm"]] == pytest.approx([b["loss"], b["grad_norm"]], rel=1e-3)


def test_replayed_pairs_with_other_samples_are_refused_before_generating(source, recipe, tmp_path):
    arguments = recipe(tmp_path / "run", *QUICK, "--generate.samples=2")
    output = run_script("train.py", *arguments, "--from", str(source), "--iter", "1", fails=True)
    assert "another generate.samples; set train.replay = 0" in output and "generate: up to" not in output


@pytest.mark.parametrize("changed", ["--data.seed=1", "--generate.samples=2"])
def test_a_share_of_other_prompts_or_samples_is_refused(source, recipe, tmp_path, changed):
    changes = ("--generate.share=0.5", "--train.replay=0", changed)
    arguments = [*recipe(tmp_path / "run", *QUICK, *changes), "--from", str(source), "--iter", "1"]
    output = run_script("train.py", *arguments, fails=True)
    assert "needs the prompts and generate.samples of the iteration before" in output


@pytest.mark.slow
def test_several_samples_resume_on_any_number_of_ranks_after_a_kill(source, recipe, tmp_path):
    slow = ("--generate.slots=4", "--generate.fixed_slots=true", f"--model.base={source}/base/model", *QUICK)
    slow += ("--data.num_prompts=200", "--generate.samples=2")
    run_script("generate.py", *recipe(tmp_path / "whole", *slow), "--iter", "0")
    arguments = [*recipe(tmp_path / "killed", *slow), "--iter", "0"]
    lines = tmp_path / "killed/iter0/generated.rows/rank1.jsonl"
    kill_when(arguments, lambda: count_lines(lines) >= 20, ranks=2)
    assert not (tmp_path / "killed/iter0/generated").exists()
    run_script("generate.py", *arguments)
    assert generated(tmp_path / "killed/iter0") == generated(tmp_path / "whole/iter0")


def test_equal_shares_ask_each_prompt_once_and_every_opponent_in_turn():
    asked = []
    for n in (2, 3, 4):
        iterations = [
            [Example(({"role": "user", "content": str(i)},), "real", (f"of {k}",)) for i in range(10)]
            for k in range(3)
        ]
        config = Config(train=Train(replay=2, replay_share="equal"))
        examples = training_examples(SimpleNamespace(n=n, spin=True, config=config), iterations)
        asked.append({example.question: example.generated[0] for example in examples})
        assert len(examples) == len(asked[-1]) == 10
        assert sorted(Counter(asked[-1].values()).values()) == [3, 3, 4]
    assert all(len({answers[question] for answers in asked}) == 3 for question in asked[0])


@pytest.mark.slow
def test_equal_shares_keep_the_steps_of_one_iteration(source, variant):
    run, output = variant("--train.replay=2", "--train.replay_share=equal", iterations="2")
    assert "iter2: 49 examples of 3 iterations" in output
    assert len(metrics(run / "iter2")) == len(metrics(source / "iter0")) < len(metrics(source / "iter1"))


@pytest.mark.slow
def test_t_spins_third_response_is_that_of_iteration_0(source, variant):
    changes = ("--train.loss=t-spin", "--train.mu=0.5")
    run, _ = variant(*changes)
    stored = logps(run / "iter1/opponent_logps.safetensors")
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(stored[:, :2], logps(source / "iter1/opponent_logps.safetensors"))
    close(stored[:, 2], stored[:49, 1].repeat(2))  # the first 49 are the replayed pairs of iteration 0
    assert metrics(run / "iter1")[0]["loss"] == pytest.approx(1.5 * math.log(2), abs=1e-4)

    run, _ = variant(*changes, "--train.reference=none")
    real, new, base = stored[Schedule(Train(batch_size=8, epochs=1), 98).batch(0)].T
    expected = softplus(2 * (real - new)) + 0.5 * softplus(2 * (new - base))
    assert metrics(run / "iter1")[0]["loss"] == pytest.approx(expected.mean().item(), rel=1e-4)

    run, _ = variant(*changes, iterations="0")  # where the opponent is the base
    assert metrics(run / "iter0")[0]["loss"] == pytest.approx(1.5 * math.log(2), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_share_of_the_prompts_is_answered_afresh_in_rotation(source, variant, ranks):
    run, _ = variant("--generate.share=0.5", iterations="1-2", ranks=ranks)
    answers = [texts(run, n) for n in (0, 1, 2)]
    assert answers[0] == texts(source, 0)
    changed = [{i for i in range(49) if answers[n][i] != answers[n - 1][i]} for n in (1, 2)]
    for n in (1, 2):  # a fresh answer may be the old one by chance
        meta = json.loads((run / f"iter{n}/generated/meta.json").read_text())
        assert meta["kept from the iteration before"] == 24 and meta["pairs"] == 49
        assert 10 <= len(changed[n - 1]) <= 25
    assert len(changed[0] & changed[1]) <= 1  # 25 and 24 of 49, and one that begins the next round
    if ranks == 2:
        one, _ = variant("--generate.share=0.5", iterations="1-2")
        assert generated(one / "iter1") == generated(run / "iter1")


@pytest.mark.slow
def test_a_share_resumes_with_the_rows_that_exist(variant, recipe, tmp_path):
    whole, _ = variant("--generate.share=0.5", iterations="1-2")
    run = shutil.copytree(whole, tmp_path / "run")
    before, after = texts(run, 0), texts(run, 1)
    fresh = next(i for i in range(49) if before[i] != after[i])
    shutil.rmtree(run / "iter2")
    shutil.move(run / "iter1", tmp_path / "iter1")
    rows = run / "iter1/generated.rows"
    kept = [{"doc": fresh, "response": "kept", "tokens": 5, "ended": True}]
    write_jsonl(rows / "rank1.jsonl", kept)
    shutil.copy(tmp_path / "iter1/generated/inputs.json", rows)
    shutil.copy(tmp_path / "iter1/inputs.json", run / "iter1")
    output = run_script("generate.py", *recipe(run, *QUICK, "--generate.share=0.5"), "--iter", "1")
    assert "generated 24 responses: " in output
    assert texts(run, 1) == [("kept",) if i == fresh else answer for i, answer in enumerate(after)]


@pytest.mark.parametrize(
    "changed, generates, scores, ranks",
    [
        ("--train.beta=2.0", False, False, 1),  # as in the source
        pytest.param("--train.beta=2.0", False, False, 2, marks=pytest.mark.slow),
        ("--train.beta=1.0", False, False, 1),
        pytest.param("--train.template=zephyr", True, True, 1, marks=pytest.mark.slow),
        pytest.param("--generate.temperature=0.7", True, True, 1, marks=pytest.mark.slow),
    ],
)
def test_a_fork_takes_what_has_equal_settings(source, variant, recipe, changed, generates, scores, ranks):
    run, output = variant(changed, ranks=ranks)
    for name in ("base", "iter0"):
        file = f"{name}/model/model.safetensors"
        assert (run / file).samefile(source / file)
    assert ("iter1/generated: taken from " in output) != generates
    assert generates or generated(run / "iter1") == generated(source / "iter1")
    stages = [json.loads(line)["stage"] for line in open(run / "iter1/stages.jsonl")]
    assert ("score" in stages) == scores and "train" in stages
    file = "iter1/opponent_logps.safetensors"
    assert ((run / file).read_bytes() == (source / file).read_bytes()) != scores
    ours, theirs = weights(run / "iter1/model"), weights(source / "iter1/model")
    if changed == "--train.beta=2.0":
        for name in ours:
            limit = 0 if ranks == 1 else 1e-4
            torch.testing.assert_close(ours[name], theirs[name], rtol=10 * limit, atol=limit)
    else:
        assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    if ranks == 1:  # the new run stands alone
        again = run_script("train.py", *recipe(run, *QUICK, changed), "--iter", "1")
        assert "iter1: finished, nothing to do" in again


def test_a_fork_of_a_run_that_is_missing_is_refused(recipe, tmp_path):
    arguments = [*recipe(tmp_path / "run", *QUICK), "--from", str(tmp_path / "gone"), "--iter", "1"]
    output = run_script("train.py", *arguments, fails=True)
    assert output.endswith(
        f"error: {tmp_path}/gone/iter0: no such directory, so there is nothing to start from\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_fork_of_a_run_whose_base_is_elsewhere_needs_that_base(recipe, tmp_path):
    (tmp_path / "source").mkdir()
    arguments = [*recipe(tmp_path / "run", *QUICK), "--from", str(tmp_path / "source"), "--iter", "0"]
    output = run_script("train.py", *arguments, fails=True)
    assert "source: no base/model in it; give the --model.base that it started from" in output
    assert not (tmp_path / "run").exists()  # no other base was trained
