"""The three scripts as a user runs them: whole iterations, on one rank and two, killed and continued."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from model.sampler import generate
from model.tokenizer import Tokenizer
from model.weights import load_model, save_model
from spin.opponent import read_pairs
from spin.report.markdown import escaped
from spin.talk import side_by_side
from tests.helpers import (
    END,
    ROOT,
    byte_level,
    count_lines,
    generated,
    kill_when,
    metrics,
    random_ids,
    run_script,
    small_model,
    weights,
    write_jsonl,
)

STAGES = (
    "config.toml",
    "inputs.json",
    "generated/meta.json",
    "opponent_logps.safetensors",
    "metrics.jsonl",
    "model/config.json",
    "model/model.safetensors",
    "model/tokenizer.model",
    "evaluation/summary.json",
)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A run of iterations 0 and 1, its base trained on the way."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    output = run_script("train.py", *recipe(run), "--iter", "0-1", launch=True)
    return run, output


def test_an_iteration_leaves_every_stages_result(finished):
    run, _ = finished
    for n in (0, 1):
        for file in STAGES:
            assert (run / f"iter{n}" / file).is_file(), file
        assert not list(run.rglob("*.partial"))
    assert (run / "report.md").is_file() and (run / "training.png").is_file()
    # 49 pairs, then 98, by 8, twice
    assert len(metrics(run / "iter0")) == 14 and len(metrics(run / "iter1")) == 26


def test_the_first_loss_of_each_iteration_is_log_2(finished):
    run, _ = finished
    for n in (0, 1):
        first = metrics(run / f"iter{n}")[0]
        assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
        assert abs(first["margin"]) < 1e-3 and abs(first["reward_real"]) < 1e-3
    names = (
        "step epoch loss accuracy margin reward_real reward_generated logps_real logps_generated grad_norm "
        "lr "
        "tokens_per_second pairs_per_second memory_gb"
    ).split()
    assert set(first) == set(names)


def test_pairs_are_in_the_released_form_one_for_each_prompt(finished):
    run, _ = finished
    lines = [json.loads(line) for line in open(run / "iter0/generated/part-00000-of-00001.jsonl")]
    assert len(lines) == 49 and len({line["real"][0]["content"] for line in lines}) == 49
    for line in lines:
        assert [message["role"] for message in line["real"]] == ["user", "assistant"]
        assert line["generated"][0] == line["real"][0]
    data = {
        row["prompt"]: row["response"] for row in map(json.loads, open(ROOT / "miniature/seed0/sft.jsonl"))
    }
    assert all(data[line["real"][0]["content"]] == line["real"][1]["content"] for line in lines)


def test_the_exported_model_loads_in_transformers_with_the_same_logits(finished):
    from transformers import AutoModelForCausalLM

    from model.attention import Segments
    from model.weights import load_model

    run, _ = finished
    path = run / "iter1" / "model"
    ids = torch.tensor(random_ids(random.Random(0), 40, vocab=32))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids[None]).logits[0]
        ours = load_model(path, torch.float32)(ids, torch.arange(40), Segments.causal([40]))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_exported_model_says_what_it_is(finished):
    run, _ = finished
    card = (run / "iter1/model/README.md").read_text(encoding="utf-8")
    last = metrics(run / "iter1")[-1]
    for said in (
        "SPIN, iteration 1",
        escaped(str(run / "base/model")),
        escaped(str(run / "iter0/model")),
        "98 examples of 2 iterations",
        f"| loss | {last['loss']:.4g} |",
        "AutoModelForCausalLM.from_pretrained",
        "vllm serve",
        "Why is the sky blue?",
        "num_prompts = 49",
        json.loads((run / "iter1/inputs.json").read_text(encoding="utf-8"))["opponent"],
    ):
        assert said in card, said
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "SFT model" in (run / "base/model/README.md").read_text(encoding="utf-8")
    assert json.loads((run / "iter1/model/generation_config.json").read_text(encoding="utf-8")) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_the_attention_backend_is_named_in_the_log(finished):
    _, output = finished
    assert output.count("attention: sdpa (cpu, torch.float32, head size 16)") == 1


def test_models_along_a_run_are_those_that_shorter_runs_end_with(finished, recipe, tmp_path):
    """And a finished iteration is trained for longer without generating, scoring or changing its model."""
    base = f"--model.base={finished[0]}/base/model"
    options = (base, "--train.schedule_epochs=3", "--evaluate.limit=4", "--iter", "0")

    def run(name, *more):
        return run_script("train.py", *recipe(tmp_path / name, *more), *options)

    for epochs in (1, 2, 3):
        run(str(epochs), f"--train.epochs={epochs}")
    run("all", "--train.epochs=2", "--train.export_every=1")
    iteration = tmp_path / "all/iter0"
    before = {file: file.stat().st_mtime_ns for file in iteration.rglob("*.safetensors")}
    before = {file: time for file, time in before.items() if "checkpoints" not in file.parts}
    output = run("all", "--train.epochs=2", "--train.export_every=1", "--train.continue_to=3")
    assert "generated: finished, nothing to do" in output
    assert {file: file.stat().st_mtime_ns for file in before} == before
    for epochs, name in {1: "epoch1/model", 2: "model", 3: "epoch3/model"}.items():
        ours, plain = weights(iteration / name), weights(tmp_path / str(epochs) / "iter0/model")
        assert all(torch.equal(ours[key], plain[key]) for key in plain)
        assert (iteration / name).with_name("evaluation").joinpath("summary.json").is_file()
    losses = ([row["loss"] for row in metrics(path)] for path in (iteration, tmp_path / "3/iter0"))
    assert next(losses) == next(losses)
    late = run("2", "--train.epochs=2", "--train.export_every=1", "--train.continue_to=3")
    assert "2/iter0/epoch1/model: not exported: training has passed it" in late
    ours, plain = weights(tmp_path / "2/iter0/epoch3/model"), weights(tmp_path / "3/iter0/model")
    assert all(torch.equal(ours[key], plain[key]) for key in plain)


def test_a_second_run_says_finished_and_changes_nothing(finished, recipe):
    run, _ = finished
    before = {file: file.stat().st_mtime_ns for file in run.glob("iter*/**/*") if file.is_file()}
    output = run_script("train.py", *recipe(run), "--iter", "0-1")
    for part in ("base", "iter0", "iter1"):
        assert f"{part}: finished, nothing to do" in output
    assert {file: file.stat().st_mtime_ns for file in run.glob("iter*/**/*") if file.is_file()} == before


@pytest.mark.parametrize(
    "override", ["--train.lr=1e-7", "--generate.temperature=0.5", "--data.seed=3", "--sft.lr=3e-4"]
)
def test_a_changed_setting_that_matters_is_refused_by_name(finished, recipe, override):
    run, _ = finished
    output = run_script("train.py", *recipe(run, override), "--iter", "0", fails=True)
    assert f"made with {override[2:].split('=')[0]} = " in output
    assert "Traceback" not in output


def test_a_changed_setting_that_does_not_matter_is_accepted(finished, recipe):
    run, _ = finished
    assert "finished" in run_script("train.py", *recipe(run, "--train.token_budget=99"), "--iter", "0")


def test_results_without_the_record_of_their_inputs_are_refused(finished, recipe, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    (copy / "iter0/inputs.json").unlink()
    for script in ("train.py", "generate.py"):
        output = run_script(script, *recipe(copy, "--train.beta=9"), "--iter", "0", fails=True)
        assert re.search("iter0/inputs.json: missing, so .* is of unknown origin", output)


def test_a_lost_config_toml_does_not_switch_the_check_of_settings_off(finished, recipe, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    (copy / "iter0/config.toml").unlink()
    output = run_script("train.py", *recipe(copy, "--train.beta=9"), "--iter", "0", fails=True)
    assert "made with train.beta = 2.0, now 9.0" in output


def test_a_model_is_exported_again_where_the_log_of_its_training_was_lost(finished, recipe, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    shutil.rmtree(copy / "iter0/model")
    (copy / "iter0/metrics.jsonl").unlink()
    run_script("train.py", *recipe(copy), "--iter", "0")
    ours, theirs = weights(copy / "iter0/model"), weights(finished[0] / "iter0/model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_opponent_is_refused(finished, recipe, tmp_path):
    run, _ = finished
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", run, copy], check=True)
    subprocess.run(["rm", "-r", copy / "iter1/model", copy / "iter0/model"], check=True)
    subprocess.run(["cp", "-r", copy / "base/model", copy / "iter0/model"], check=True)
    output = run_script("train.py", *recipe(copy), "--iter", "1", fails=True)
    assert "iter1: results made with other opponent" in output


def test_other_data_under_the_same_name_is_refused_also_when_finished(finished, recipe, tmp_path):
    run, _ = finished
    subprocess.run(["cp", "-r", run, tmp_path / "copy"], check=True)
    rows = [json.loads(line) for line in open(ROOT / "miniature/seed0/sft.jsonl")]
    same = write_jsonl(tmp_path / "same.jsonl", rows)
    arguments = [*recipe(tmp_path / "copy", f"--data.path={same}"), "--iter", "0"]
    assert "iter0: finished" in run_script("train.py", *arguments)
    write_jsonl(same, [row | {"response": "x"} for row in rows])
    assert "made with other data" in run_script("train.py", *arguments, fails=True)


def test_iteration_1_replays_the_pairs_of_iteration_0(finished, recipe):
    _, output = finished
    assert "iter0: 49 examples\n" in output
    assert "iter1: 98 examples of 2 iterations" in output


def test_evaluate_gives_every_model_a_row_and_documents_in_order(finished, recipe):
    run, _ = finished
    output = run_script("evaluate.py", *recipe(run), "--iter", "base,0-1")
    for name in ("SFT model", "iteration 0", "iteration 1"):
        assert f"| {name} | 0." in output
    rows = [json.loads(line) for line in open(run / "iter1/evaluation/heldout.jsonl")]
    assert [row["doc"] for row in rows] == list(range(40))
    summary = json.loads((run / "iter1/evaluation/summary.json").read_text(encoding="utf-8"))["tasks"][
        "heldout"
    ]
    assert summary["exact_match"] == sum(row["text"].strip() == row["target"] for row in rows) / 40
    p = summary["exact_match_sampled"]
    assert summary["exact_match_sampled_stderr"] == pytest.approx((p * (1 - p) / 39) ** 0.5)


def test_any_checkpoint_can_be_evaluated_alone(finished, recipe, tmp_path):
    run, _ = finished
    output = run_script(
        "evaluate.py", *recipe(run), "--model", str(run / "iter0/model"), "--out", str(tmp_path / "out")
    )
    assert re.search(r"\| heldout \| exact_match \| 40 \|.*\| 0\.", output)
    same = (run / "iter0/evaluation/heldout.jsonl").read_bytes()
    assert (tmp_path / "out/heldout.jsonl").read_bytes() == same


@pytest.mark.slow
def test_two_ranks_give_the_run_of_one(finished, recipe, tmp_path):
    one, two = finished[0], tmp_path / "two"
    run_script("train.py", *recipe(two, f"--model.base={one}/base/model"), "--iter", "0-1", ranks=2)
    (shard,) = (name for name in generated(one / "iter0") if name.endswith(".jsonl"))
    assert generated(one / "iter0")[shard] == generated(two / "iter0")[shard]
    for n in (0, 1):
        for a, b in zip(metrics(one / f"iter{n}"), metrics(two / f"iter{n}"), strict=True):
            for key in ("loss", "margin", "grad_norm", "logps_real"):
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (n, a["step"], key)
        ours, theirs = weights(one / f"iter{n}/model"), weights(two / f"iter{n}/model")
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


TIMED = ("tokens_per_second", "pairs_per_second", "memory_gb")


def assert_same_run(one, two):
    assert generated(one) == generated(two)
    for file in ("opponent_logps.safetensors", "model/model.safetensors", "evaluation/heldout.jsonl"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file

    def timeless(rows):
        return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]

    assert timeless(metrics(one)) == timeless(metrics(two))


SLOW = ("--generate.slots=4", "--generate.fixed_slots=true", "--data.num_prompts=400", "--evaluate.limit=10")


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    """Fixed slots, so that a response's rounding does not depend on its company, and few: there is time to be
    killed.
    """
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    run_script("train.py", *recipe(run, *SLOW), "--iter", "0")
    return run / "iter0"


@pytest.mark.slow
def test_a_run_killed_while_generating_ends_as_if_undisturbed(undisturbed, recipe, tmp_path):
    arguments = [*recipe(tmp_path / "killed", *SLOW), "--iter", "0"]
    lines = tmp_path / "killed/iter0/generated.rows/rank0.jsonl"
    for wanted in (20, 90):
        kill_when(arguments, lambda: count_lines(lines) >= wanted)
        assert not (tmp_path / "killed/iter0/generated").exists()
    with open(lines, "a") as file:
        file.write('{"doc": 7, "resp')  # what a kill in the middle of a line leaves
    run_script("train.py", *arguments)
    assert_same_run(undisturbed, tmp_path / "killed/iter0")


@pytest.mark.slow
def test_a_run_killed_while_training_ends_as_if_undisturbed(undisturbed, recipe, tmp_path):
    arguments = [*recipe(tmp_path / "killed", *SLOW), "--iter", "0"]
    directory = tmp_path / "killed/iter0"
    for wanted in (6, 31):
        kill_when(arguments, lambda: count_lines(directory / "metrics.jsonl") >= wanted)
        assert not (directory / "model").exists()
    run_script("train.py", *arguments)
    assert_same_run(undisturbed, directory)


@pytest.mark.slow
def test_a_killed_rank_ends_generation_and_any_number_of_ranks_goes_on(undisturbed, recipe, tmp_path):
    base = f"--model.base={undisturbed.parent}/base/model"
    arguments = [*recipe(tmp_path / "killed", *SLOW, base), "--iter", "0"]
    partial = tmp_path / "killed/iter0/generated.rows"

    def kept():
        files = partial.glob("rank*.jsonl")
        return len({line for file in files for line in open(file) if line.endswith("\n")})

    for victim in (0, 1, None):  # a rank, the other one, both and torchrun
        before = count_lines(partial / "rank1.jsonl")
        kill_when(
            arguments, lambda: count_lines(partial / "rank1.jsonl") >= before + 10, ranks=2, only=victim
        )
        assert 10 <= kept() < 400
    left = 400 - kept()
    assert f"generated {left} responses: " in run_script("generate.py", *arguments)
    assert generated(tmp_path / "killed/iter0") == generated(undisturbed)


@pytest.mark.slow
def test_generate_alone_leaves_pairs_and_train_goes_on_from_them(undisturbed, recipe, tmp_path):
    arguments = [*recipe(tmp_path / "run", *SLOW), "--iter", "0"]
    run_script("generate.py", *arguments)
    assert generated(tmp_path / "run/iter0") == generated(undisturbed)
    assert not (tmp_path / "run/iter0/metrics.jsonl").exists()
    assert "iter0: 400 examples" in run_script("train.py", *arguments)
    assert_same_run(undisturbed, tmp_path / "run/iter0")


def test_pairs_in_the_released_form_train_without_generating(finished, recipe, tmp_path):
    run, _ = finished
    pairs = run / "iter0/generated/part-00000-of-00001.jsonl"
    arguments = recipe(
        tmp_path / "run", f"--data.pairs={pairs}", "--data.num_prompts=0", f"--model.base={run}/base/model"
    )
    output = run_script("train.py", *arguments, "--iter", "0")
    assert "iter0: 49 examples" in output and not (tmp_path / "run/iter0/generated").exists()
    assert metrics(tmp_path / "run/iter0")[0]["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_sft_and_evaluation_leave_the_generated_responses_of_pairs_alone(finished, recipe, tmp_path):
    run, _ = finished
    pairs = run / "iter0/generated/part-00000-of-00001.jsonl"
    real = [json.loads(line)["real"] for line in open(pairs)]
    rows = [{"prompt": user["content"], "response": assistant["content"]} for user, assistant in real]
    plain = write_jsonl(tmp_path / "plain.jsonl", rows)
    for name, path in (("pairs", pairs), ("plain", plain)):
        files = (f"--data.path={path}", f"--evaluate.heldout={path}")
        run_script("train.py", *recipe(tmp_path / name, *files), "--sft")
        run_script("evaluate.py", *recipe(tmp_path / name, *files), "--iter", "base")
    for file in ("model/model.safetensors", "evaluation/heldout.jsonl"):
        assert (tmp_path / "pairs/base" / file).read_bytes() == (tmp_path / "plain/base" / file).read_bytes()


def test_logps_of_other_pairs_are_refused(finished, recipe, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    shutil.rmtree(copy / "iter0/model")
    shutil.copy(copy / "iter1/opponent_logps.safetensors", copy / "iter0")
    output = run_script("train.py", *recipe(copy), "--iter", "0", fails=True)
    assert "opponent_logps.safetensors: results made with other pairs" in output
    file = copy / "iter0/opponent_logps.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    output = run_script("train.py", *recipe(copy), "--iter", "0", fails=True)
    assert "opponent_logps.safetensors: not readable" in output and "Traceback" not in output


def test_rows_that_a_killed_run_left_next_to_finished_pairs_are_removed(finished, recipe, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    (copy / "iter0/generated.rows").mkdir()
    assert "generated: finished" in run_script("generate.py", *recipe(copy), "--iter", "0")
    assert not (copy / "iter0/generated.rows").exists()


@pytest.fixture
def stage(finished, tmp_path):
    """A copy of a finished generate stage: its directory, its only shard, its record."""
    directory = shutil.copytree(finished[0] / "iter0/generated", tmp_path / "generated")
    record = json.loads((directory / "inputs.json").read_text(encoding="utf-8"))
    return directory, directory / "part-00000-of-00001.jsonl", record


@pytest.mark.parametrize(
    "old, new, edited",
    [
        ('"assistant", "content": "', '"assistant", "content": "x', True),
        ('{"real"', '{"also": 1, "real"', False),  # says the same
        (r"\A.*\n", "", True),
        (r".*\n\Z", "", True),
        (r"(.*\n)\Z", r"\1\1", True),
        (r'"generated": (.*)"content": "([^"]*)"(}]})\n\Z', r'"generated": \1"content": "other"\3\n', True),
    ],
)
def test_a_generate_stage_is_used_only_as_it_was_made(stage, old, new, edited):
    directory, shard, record = stage
    text = shard.read_text(encoding="utf-8")
    shard.write_text(re.sub(old, new, text))
    assert shard.read_text(encoding="utf-8") != text
    if not edited:
        assert len(read_pairs(directory, record)) == 49
        return
    with pytest.raises(ValueError, match="generated: the pairs were edited; remove"):
        read_pairs(directory, record)


def test_a_generate_stage_of_another_opponent_or_of_other_settings_is_refused(stage):
    directory, _, record = stage
    for key, value, message in (
        ("opponent", "0" * 64, "made with other opponent"),
        ("data", "0" * 64, "made with other data"),
        ("generate.seed", 1, "made with generate.seed = 0, now 1"),
    ):
        with pytest.raises(ValueError, match=message):
            read_pairs(directory, record | {key: value})
    older = {key: value for key, value in record.items() if key != "generate.samples"}  # it was 1
    (directory / "inputs.json").write_text(json.dumps(older))
    assert len(read_pairs(directory, record)) == 49
    (directory / "inputs.json").unlink()
    with pytest.raises(ValueError, match="inputs.json: missing"):
        read_pairs(directory, record)


def test_changed_pairs_stop_the_next_stage(finished, recipe, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    shutil.rmtree(copy / "iter0/model")
    (copy / "iter0/generated/part-00000-of-00001.jsonl").write_text("")
    for script in ("train.py", "generate.py"):
        output = run_script(script, *recipe(copy), "--iter", "0", fails=True)
        assert "the pairs were edited; remove" in output and "evaluate" not in output
    (copy / "iter0/generated/part-00000-of-00001.jsonl").write_text("no JSON\n")
    output = run_script("generate.py", *recipe(copy), "--iter", "0", fails=True)
    assert "part-00000-of-00001.jsonl:1: invalid row" in output


def test_the_closing_summary_counts_and_shows_samples(finished, recipe, tmp_path):
    run, _ = finished
    changes = ("--generate.max_new_tokens=3", "--data.max_prompt_length=12", f"--model.base={run}/base/model")
    output = run_script("generate.py", *recipe(tmp_path / "run", *changes), "--iter", "0")
    rows = [json.loads(line) for line in open(tmp_path / "run/iter0/generated/part-00000-of-00001.jsonl")]
    meta = json.loads((tmp_path / "run/iter0/generated/meta.json").read_text(encoding="utf-8"))
    assert meta["pairs"] == len(rows) == 49
    assert meta["mean tokens of responses"] <= 3 and meta["mean tokens of prompts"] <= 12
    # Cut means: three tokens, the last of which does not end the text. A token is a letter here.
    assert (
        meta["responses cut at max_new_tokens"]
        == sum(len(row["generated"][-1]["content"]) == 3 for row in rows)
        > 0
    )
    assert meta["prompts cut at the left"] == sum(len(row["real"][0]["content"]) + 1 > 12 for row in rows) > 0
    assert f"responses cut at max_new_tokens {meta['responses cut at max_new_tokens']}" in output
    assert f"prompts cut at the left {meta['prompts cut at the left']}" in output
    assert "generated 49 responses: " in output and "tokens/s" in output
    first = rows[0]
    assert (
        f"  prompt: {first['real'][0]['content']}\n  real: {first['real'][1]['content']}\n  generated:"
        in output
    )


@pytest.mark.slow
def test_fixed_slots_go_on_with_the_same_slots_only_until_all_is_generated(undisturbed, recipe, tmp_path):
    copy = shutil.copytree(undisturbed.parent, tmp_path / "copy")
    arguments = [*recipe(copy, *SLOW, "--generate.slots=5"), "--iter", "0"]
    assert "finished, nothing to do" in run_script("generate.py", *arguments)
    record = json.loads((copy / "iter0/generated/inputs.json").read_text(encoding="utf-8"))
    shutil.rmtree(copy / "iter0/generated")
    rows = copy / "iter0/generated.rows"
    write_jsonl(rows / "rank0.jsonl", [{"doc": 1, "response": "a", "tokens": 2, "ended": True}])
    for shapes, message in (
        ({"generate.slots": 4, "threads": 1}, "made with generate.slots = 4, now 5"),
        ({"generate.slots": 5, "threads": 2}, "made with threads = 2, now 1"),
    ):
        (rows / "inputs.json").write_text(json.dumps(record | shapes))
        assert message in run_script("generate.py", *arguments, fails=True)
    (rows / "inputs.json").write_text(json.dumps(record | {"generate.slots": 5, "threads": 1}))
    (rows / "rank0.jsonl").write_text('{"doc": 1}\nnot a row\n')
    assert "rank0.jsonl:2: invalid row" in run_script("generate.py", *arguments, fails=True)


def test_models_answer_a_prompt_as_the_sampler_does(finished, recipe):
    run, _ = finished

    def ask(*arguments, typed=None):
        arguments = [*recipe(run, "--generate.temperature=0"), *arguments]
        return run_script("generate.py", *arguments, stderr=False, typed=typed)

    answers = {}
    for name, path in (("base", run / "base/model"), ("iteration 1", run / "iter1/model")):
        tokenizer = Tokenizer(path)
        prompt = tokenizer.encode_prompt([{"role": "user", "content": "bab"}], "plain")
        (ids,) = generate(
            load_model(path, torch.float32), [prompt], max_new_tokens=12, eos_id=tokenizer.eos_id
        )
        answers[name] = tokenizer.decode_continuation(ids) + (
            " [cut at 12 tokens]" if ids[-1] != tokenizer.eos_id else ""
        )
    assert ask("--iter", "base", "--prompt", "bab") == answers["base"] + "\n"
    assert ask("--model", str(run / "iter1/model"), "--prompt", "bab") == answers["iteration 1"] + "\n"
    both = side_by_side(answers, 80) + "\n"
    assert ask("--iter", "base,1", "--prompt", "bab") == both
    file = run / "answers.md"
    assert ask("--iter", "base,1", "--prompt", "bab", "abba", "--markdown", str(file)).startswith(both)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("**Prompt.** bab\n\n*base:* ") and "**Prompt.** abba\n\n*base:* " in text
    # An empty line is no question, and one that can't be asked does not end the conversation.
    output = ask("--iter", "base,1", "--interactive", typed="bab\n\n" + "a" * 100_000 + "\nbab\n")
    assert output.startswith(f"> bab\n{both}> ") and output.endswith(f"> bab\n{both}")
    assert "error: the question has 100001 tokens" in output


def test_talking_refuses_what_it_cannot_answer_before_a_model_is_read(finished, recipe):
    run, _ = finished
    for arguments, message in (
        (["--iter", "base,7", "--prompt", "a"], "iter7/model/config.json: no such file"),
        (["--iter", "base", "--prompt", "a" * 100_000], "the question has 100001 tokens; base takes at most"),
        (["--model", str(run)], "--model and several --iter need --prompt"),
        (["--iter", "0,1"], "several --iter need --prompt"),
        (["--iter", "0", "--markdown", "x"], "--markdown FILE needs --prompt"),
        (["--iter", "base"], "several --iter need --prompt"),
    ):
        assert message in run_script("generate.py", *recipe(run), *arguments, fails=True)


def test_the_control_trains_on_real_responses_for_the_same_steps(finished, recipe, tmp_path):
    run, _ = finished
    arguments = recipe(tmp_path / "control", "--train.objective=sft", f"--model.base={run}/base/model")
    run_script("train.py", *arguments, "--iter", "0-1")
    for n in (0, 1):
        assert len(metrics(tmp_path / f"control/iter{n}")) == len(metrics(run / f"iter{n}"))
        assert not (tmp_path / f"control/iter{n}/generated").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--evaluate.heldout=gone.jsonl"], "gone.jsonl: no such file"),
        (["--data.path=gone.jsonl"], "gone.jsonl: no such file"),
        (["--model.base=gone"], "gone: no such directory"),
        (["--sft.init=gone"], "gone"),
        (["--sft.init="], "sft.architecture"),
        (
            [
                "--sft.init=",
                f"--sft.tokenizer={ROOT}/miniature/seed0/base",
                "--sft.architecture={hiden_size = 1}",
            ],
            "sft.architecture: hiden_size is not a field",
        ),
        (["--evaluate.answer_pattern=(a)(b)"], "must have one group"),
        (["--data.num_prompts=999"], "num_prompts = 999"),
        (["--trian.lr=1"], "did you mean train.lr"),
        (["--verbose"], "not of the form"),
        (["--train.heldout_pairs=49"], "heldout_pairs = 49 leaves none of 49 examples"),
        (["--train.epochs=1e-12"], "gives no step"),
        (["--train.template=model"], "no chat template, which template = "),
        (["--model.attention=torch-flash"], "'torch-flash' cannot be used: it needs a CUDA device, not cpu"),
    ],
)
def test_what_a_later_stage_would_trip_over_is_refused_before_the_first(recipe, tmp_path, overrides, message):
    output = run_script("train.py", *recipe(tmp_path / "run", *overrides), "--iter", "0", fails=True)
    assert message in output and "Traceback" not in output
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.jsonl"))


def test_compiling_without_a_compiler_is_refused_before_anything_runs(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    output = run_script(
        "train.py", *recipe(tmp_path / "run", "--train.compile=true"), "--iter", "0", fails=True
    )
    assert "compile = true needs a C++ compiler" in output and not (tmp_path / "run").exists()


def test_an_iteration_before_its_opponent_is_refused(recipe, tmp_path):
    output = run_script("train.py", *recipe(tmp_path / "run"), "--iter", "2", fails=True)
    assert "run --iter 1 first" in output and "Traceback" not in output


def test_a_second_process_in_a_run_is_refused(finished, recipe):
    import fcntl

    run, _ = finished
    with open(run / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        output = run_script("train.py", *recipe(run), "--iter", "0", fails=True)
    assert "another process works here" in output


def test_a_bad_line_of_data_is_refused_with_its_place(recipe, tmp_path):
    data = write_jsonl(
        tmp_path / "d.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}]
    )
    output = run_script(
        "train.py", *recipe(tmp_path / "run", f"--data.path={data}"), "--iter", "0", fails=True
    )
    assert "d.jsonl:2: empty response" in output


def chat_model(folder: Path) -> Path:
    """A model with a tokenizer.json and a chat template that refuses a system turn."""
    save_model(small_model(vocab_size=900), folder, torch.float32)
    byte_level().save(str(folder / "tokenizer.json"))
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}Q:"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": template}))
    return folder


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("tokenizer.json", None, "model: no tokenizer.model and no tokenizer.json; copy one"),
        ("tokenizer.json", '{"pre_tokenizer": {"type": "Next"}}', "tokenizer.json: tokenizers "),
        (
            "config.json",
            '{"model_type": "gemma2"}',
            "config.json: model_type = 'gemma2' is not supported, only",
        ),
        (
            "tokenizer_config.json",
            json.dumps({"eos_token": END}),
            "model: no chat template, which template =",
        ),
        (
            "chat_template.jinja",
            "{{ messages.append(1) }}",
            "chat_template.jinja can't render the turns user (access",
        ),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_by_every_script_in_a_line(
    recipe, tmp_path, file, text, message
):
    model, run = chat_model(tmp_path / "model"), tmp_path / "run"
    (model / file).unlink() if text is None else (model / file).write_text(text)
    common = recipe(run, "--train.template=model")
    for arguments in (
        ["generate.py", "--model", str(model), "--prompt", "hi", *common],
        ["evaluate.py", "--model", str(model), "--out", str(run), *common],
        ["train.py", "--iter", "0", f"--model.base={model}", *common],
    ):
        output = run_script(*arguments, fails=True)
        assert "Traceback" not in output and message in output.splitlines()[-1], output
        assert not run.exists()


def test_a_role_that_the_chat_template_refuses_is_named_with_its_line(recipe, tmp_path):
    model, turns = chat_model(tmp_path / "model"), [{"role": r, "content": r} for r in ("user", "assistant")]
    rows = [{"messages": turns}, {"messages": [{"role": "system", "content": ""}, *turns]}]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    settings = [
        f"--data.path={data}",
        "--data.num_prompts=0",
        f"--model.base={model}",
        "--train.template=model",
    ]
    output = run_script("train.py", *recipe(tmp_path / "run", *settings), "--iter", "0", fails=True)
    assert (
        "d.jsonl:2: " in output and "chat_template can't render the turns system, user (no system)" in output
    )
    assert not (tmp_path / "run").exists()
