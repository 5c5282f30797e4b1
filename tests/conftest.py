"""Fixtures that the tests share. Everything is made here: no network, no GPU."""

import os
from pathlib import Path

import pytest
import torch

from miniature.world import tokenizer_model
from model.tokenizer import Tokenizer
from tests.helpers import ROOT

# Workers that run side by side share the cores, unless OMP_NUM_THREADS says how many threads each has.
if "OMP_NUM_THREADS" not in os.environ:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, cores // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))


def pytest_configure(config):
    """Tests are about a CPU, but for those marked gpu; and none is a rank of the shell's own job."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker ends long after the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def letters(tmp_path_factory) -> Tokenizer:
    """The miniature's tokenizer: a character, a token."""
    file = tmp_path_factory.mktemp("letters") / "tokenizer.model"
    file.write_bytes(tokenizer_model())
    return Tokenizer(file)


@pytest.fixture(scope="session")
def mistral_tokenizer() -> Tokenizer:
    """Mistral-7B-v0.1's sentencepiece model, which mistral-common carries."""
    mistral_common = pytest.importorskip("mistral_common")
    return Tokenizer(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """A recipe of seconds: `recipe(run_dir, "--train.lr=…")` gives the arguments of train.py."""
    folder = tmp_path_factory.mktemp("recipe")
    file = folder / "recipe.toml"
    file.write_text(
        f"""
        [model]
        save_dtype = "float32"
        [data]
        path = "{ROOT}/miniature/seed0/sft.jsonl"
        num_prompts = 49  # the last step of an epoch has one pair: with two ranks, one has nothing to do
        [generate]
        max_new_tokens = 12
        dtype = "float32"
        [train]
        batch_size = 8
        lr = 5e-5
        beta = 2.0
        epochs = 2
        dtype = "float32"
        checkpoint_every = 4
        [sft]
        init = "{ROOT}/miniature/seed0/base"
        lr = 1e-4
        dtype = "float32"
        [evaluate]
        heldout = "{ROOT}/miniature/seed0/heldout.jsonl"
        limit = 40
        max_new_tokens = 12
        dtype = "float32"
        """
    )
    return lambda run, *overrides: ["--config", str(file), f"--run.dir={run}", *overrides]
