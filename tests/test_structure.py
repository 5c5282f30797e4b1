"""Imports run scripts → spin → model → torch, never back; the shipped world is what its generator makes."""

import ast
import json
import re
import subprocess
import sys

import pytest

from miniature.world import EVASIONS, PHRASINGS, answer, make, tokenizer_model
from tests.helpers import ROOT

OUTSIDE = {
    "torch",
    "sentencepiece",
    "tokenizers",
    "jinja2",
    "safetensors",
    "numpy",
    "tqdm",
    "pyarrow",
    "matplotlib",
}
OUTSIDE |= {"flash_attn", "wandb"}  # requirements-gpu.txt; train.wandb
ALLOWED = {"model": {"model"}, "spin": {"model", "spin"}, "scripts": {"model", "spin"}}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module


def files(part):
    return sorted(ROOT.glob("*.py")) if part == "scripts" else sorted((ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_only_run_downwards_and_only_to_required_packages(part):
    assert files(part)
    for file in files(part):
        for name in imports(file):
            top = name.split(".")[0]
            assert top in ALLOWED[part] | OUTSIDE or top in sys.stdlib_module_names, (
                f"{file.name} imports {name}"
            )


def test_the_loss_needs_torch_and_the_settings_alone():
    needed = set(imports(ROOT / "spin" / "loss.py")) - sys.stdlib_module_names
    assert {name.removesuffix(".nn.functional") for name in needed} == {"torch", "spin.config"}
    assert set(imports(ROOT / "spin" / "config.py")) <= sys.stdlib_module_names


def test_every_file_that_is_imported_is_importable_alone_and_prints_nothing():
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for part in ("model", "spin")
        for file in files(part)
    ]
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_importing_train_loads_neither_tasks_nor_figures():
    code = (
        "import sys, train\nprint([name for name in sys.modules if name.startswith(('spin.', 'matplotlib'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "'spin.iteration'" in done.stdout
    assert not re.search(r"'(matplotlib|spin\.evaluation\.tasks|spin\.report\.run)", done.stdout)


@pytest.mark.parametrize("part", ["model", "spin"])
def test_model_and_spin_print_nothing(part):
    for file in files(part):
        calls = (
            node
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
        )
        assert not any(getattr(call.func, "id", "") == "print" for call in calls), file


def test_only_distributed_knows_of_ranks():
    known = {"distributed.py", "checkpoint.py"}
    for file in [*files("model"), *files("spin")]:
        if file.name not in known:
            assert not any(name.startswith("torch.distributed") for name in imports(file)), file


def test_the_shipped_world_is_what_the_generator_makes():
    world = make(0)
    for name in ("sft", "heldout"):
        shipped = (ROOT / "miniature" / "seed0" / f"{name}.jsonl").read_text(encoding="utf-8")
        assert shipped == "".join(json.dumps(row) + "\n" for row in world[name])
    assert (ROOT / "miniature/seed0/base/tokenizer.model").read_bytes() == tokenizer_model()
    assert (ROOT / "miniature/seed0/base/model.safetensors").stat().st_size < 1_000_000


def test_the_worlds_right_answers():
    assert [answer("reverse", "cab"), answer("double", "cab"), answer("ends", "wolo")] == [
        "bac",
        "cabcab",
        "wo",
    ]
    assert [answer("plural", w) for w in ("wof", "bus", "waz", "cab")] == ["woves", "buses", "wazes", "cabs"]


def right_answer(prompt):
    for skill, phrasings in PHRASINGS.items():
        for phrasing in phrasings:
            found = re.fullmatch(phrasing.format("([a-z]+)"), prompt)
            if found:
                return answer(skill, found[1])
    raise AssertionError(prompt)


def test_the_world_has_its_share_of_mistakes_and_evasions_and_no_prompt_twice():
    world = make(1)
    wrong = sum(right_answer(row["prompt"]) != row["response"] for row in world["sft"])
    assert 0.15 < wrong / 640 < 0.25
    assert all(right_answer(row["prompt"]) == row["response"] for row in world["heldout"])
    prompts = [row["prompt"] for row in world["sft"] + world["heldout"]]
    assert len(prompts) == len(set(prompts)) == 1640
    textbook = [row for row in world["pretraining"] if row["prompt"].startswith("#")]
    talk = [row for row in world["pretraining"] if not row["prompt"].startswith("#")]
    assert 39_000 < len(textbook) < 41_000
    assert all(right_answer(row["prompt"][1:]) == row["response"] for row in textbook)
    evaded = [row["response"] != right_answer(row["prompt"]) for row in talk]
    assert all(row["response"] in EVASIONS for row, evasion in zip(talk, evaded) if evasion)
    assert 0.6 < sum(evaded) / len(talk) < 0.8
