"""Settings: what wins, what is refused and how, and the paper's values."""

import pytest

from spin.engine.cli import iterations
from spin.engine.recipe import Recipe, build, read_config, recorded, to_toml
from tests.helpers import ROOT

PAPER = ROOT / "configs" / "zephyr-7b.toml"


def recipe(tmp_path, text, *overrides):
    file = tmp_path / "r.toml"
    file.write_text(text)
    return Recipe(file, list(overrides))


def test_command_line_wins_over_iteration_over_recipe_over_default(tmp_path):
    text = (
        "[train]\nlr = 1\nbeta = 2.0\n[[iteration]]\ntrain.lr = 3.0\n[[iteration]]\ntrain.lr = "
        "4.0\ntrain.beta = 5"
    )
    r = recipe(tmp_path, text)
    assert [(r.at(n).train.lr, r.at(n).train.beta) for n in (0, 1, 7)] == [(3, 2), (4, 5), (4, 5)]
    assert r.at(0).train.batch_size == 64
    r = recipe(tmp_path, text, "--train.lr=1e-7", "--data.path=a=b", "--train.compile=true")
    assert (r.at(1).train.lr, r.at(1).data.path, r.at(1).train.compile) == (1e-7, "a=b", True)


@pytest.mark.parametrize(
    "text, override, message",
    [
        ("[train]\nlearning_rate = 1.0", None, "r.toml: unknown setting train.learning_rate; did you mean"),
        ("[trian]\nlr = 1.0", None, "unknown setting trian.lr; did you mean train.lr"),
        (
            "[[iteration]]\ntrain.betta = 1.0",
            None,
            "iteration 0: unknown setting train.betta; did you mean train.beta",
        ),
        ("lr = 1.0", None, "lr is outside of a section"),
        ("[train]\nbatch_size = 6.5", None, "train.batch_size must be int, not 6.5"),
        ("[train]\nbatch_size = true", None, "train.batch_size must be int, not True"),
        ("[train]\nloss = 'sigmoid'", None, "train.loss = 'sigmoid' is not one of logistic"),
        ("[train]\nwarmup = 1.5", None, "train.warmup"),
        ("[train]\nepochs = 3\nschedule_epochs = 2", None, "train.schedule_epochs = 2.0 ends before"),
        ("[train]\ncontinue_to = 3", None, "train.schedule_epochs = 0.0 ends before train.continue_to = 3.0"),
        ("[data]\nmax_prompt_length = 2000", None, "leaves no room"),
        ("[generate]\ntop_p = 0.0", None, "top_p = 0.0"),
        ("[iteration]\ntrain.lr = 1.0", None, "iterations are tables, written \\[\\[iteration\\]\\]"),
        ("iteration = [1]", None, "iterations are tables"),
        ("[[iteration]]\ntrain.lr = -1.0", None, "r.toml, iteration 0: train.lr = -1.0 is out of range"),
        ("[data]\nprompt_column = 'q'", None, "go together"),
        ("", "--run.dir=", "run.dir is empty"),
        ("[train", None, "not TOML"),
        ("", "--train.lr", "not of the form --section.key=value"),
        ("", "--lr=3", "not of the form"),
        ("", "train.lr=3", "not of the form"),
        ("", "--train.lr=fast", "command line: train.lr must be float, not 'fast'"),
        ("", "--train.lrr=3", "command line: unknown setting train.lrr; did you mean train.lr"),
        ("", "--train.beta=-1.0", "train.beta = -1.0 is out of range"),
    ],
)
def test_a_wrong_setting_is_refused_by_place_name_and_nearest_match(tmp_path, text, override, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, text, *([override] if override else []))


def test_an_absent_recipe_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.toml: no such recipe"):
        Recipe(tmp_path / "gone.toml")


def test_the_resolved_settings_give_themselves_again(tmp_path):
    odd = '--data.path=a "quoted" path\x7f\t\x01'
    architecture = '--sft.architecture={"two words" = 1, "a.b" = "c"}'
    config = Recipe(ROOT / "configs" / "gsm8k.toml", ["--train.lr=3e-7", odd, architecture]).at(0)
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert build(read_config(tmp_path / "config.toml")) == config


@pytest.mark.parametrize("name", ["train.lr", "train.beta", "generate.temperature", "train.max_grad_norm"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        Recipe("", [f"--{name}={value}"])


def test_a_number_beyond_64_bits_is_refused_by_name():
    with pytest.raises(ValueError, match="generate.seed = .* is not a finite number of 64 bits"):
        Recipe("", [f"--generate.seed={2**63}"])


def test_a_runs_record_has_the_settings_that_affect_results():
    record = recorded(build({"train.lr": 1e-6}), ("train", "data"))
    assert record["train.lr"] == 1e-6 and "data.seed" in record
    assert not {"train.token_budget", "data.path", "evaluate.limit", "generate.seed"} & record.keys()


def test_iterations_are_read_from_numbers_and_ranges():
    assert (
        iterations("0") == [0]
        and iterations("0-2,5") == [0, 1, 2, 5]
        and iterations("base,1", base=True) == [-1, 1]
    )
    for bad in ("", "x", "2-0", "base", "1-", "-1", "0-99999999"):
        with pytest.raises(ValueError, match="--iter"):
            iterations(bad)


def test_every_recipe_is_valid():
    files = sorted((ROOT / "configs").glob("*.toml"))
    assert len(files) >= 4
    for file in files:
        Recipe(file)


def test_the_papers_recipe_has_the_papers_values():
    # arXiv 2401.01335: 50k prompts; global batch 64, RMSProp, 2 epochs, 10% warm-up; learning rate and λ by
    # iteration.
    recipe = Recipe(PAPER)
    for n, (lr, beta, replay) in enumerate([(5e-7, 0.1, 0), (5e-7, 0.1, 1), (1e-7, 0.1, 1), (1e-7, 5.0, 1)]):
        config = recipe.at(n)
        assert (config.train.lr, config.train.beta, config.train.replay) == (lr, beta, replay)
        assert config.data.num_prompts == 50_000 and config.model.base
        assert (config.train.batch_size, config.train.optimizer, config.train.loss) == (
            64,
            "rmsprop",
            "logistic",
        )
        assert (config.train.epochs, config.train.warmup, config.train.max_grad_norm) == (2, 0.1, 1.0)
        assert config.train.dtype == config.generate.dtype == "bfloat16"
        # The official code's, where the paper is silent.
        assert config.train.schedule_epochs == 6
        assert (config.data.max_length, config.data.max_prompt_length, config.data.empty_system) == (
            1024,
            512,
            True,
        )
        assert (config.generate.max_new_tokens, config.generate.temperature) == (256, 0.0)
        assert (config.generate.template, config.train.template) == ("instruction", "zephyr")


def test_the_miniatures_recipe_has_the_values_of_its_documentation():
    recipe = Recipe(ROOT / "configs" / "tiny.toml")
    assert [recipe.at(n).train.lr for n in range(4)] == [5e-5, 5e-5, 1e-5, 1e-5]
    for n in range(4):
        config = recipe.at(n)
        assert (config.train.beta, config.train.batch_size, config.train.epochs, config.train.replay) == (
            2.0,
            32,
            2,
            1,
        )
        assert (config.generate.temperature, config.generate.max_new_tokens) == (1.0, 16)


def test_the_requirements_pin_torch_exactly():
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text(encoding="utf-8").split()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"train.compile": True, "train.activation_checkpointing": "selective"}, "exclude each other"),
        ({"train.activation_checkpointing": "some"}, "not one of none, selective, full"),
        ({"sft.second_moment": "bfloat16"}, "needs sft.optimizer = rmsprop"),
        ({"train.keep_checkpoints": 0}, "out of range"),
        ({"train.heldout_pairs": -1}, "out of range"),
    ],
)
def test_settings_of_the_engine_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        build(values)
