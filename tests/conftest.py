"""Small models, tokenizers and runs that the tests share. Everything is made here: no network, no GPU."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miniature.world import tokenizer_model
from model.config import ModelConfig
from model.mistral import Mistral
from model.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)


def small_config(**changes) -> ModelConfig:
    return ModelConfig(**(SMALL | changes))


def small_model(seed: int = 0, **changes) -> Mistral:
    """Random weights, wide enough that attention is far from uniform and mistakes in it show."""
    return Mistral(small_config(initializer_range=0.2, **changes)).init_weights(seed)


def reference(model: Mistral):
    """transformers' Mistral with the same weights, in fp32 and without any fused kernel."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        **{k: v for k, v in model.config.to_dict("float32").items() if k != "architectures"}
    )
    config._attn_implementation = "eager"
    other = MistralForCausalLM(config).eval()
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    other.tie_weights()
    return other


def random_ids(rng: random.Random, length: int, vocab: int = 97) -> list[int]:
    return [rng.randrange(3, vocab) for _ in range(length)]


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


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(script: str, *arguments: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
    return [*launcher, str(ROOT / script), *arguments]


def run_script(
    script: str,
    *arguments: str,
    ranks: int = 1,
    fails: bool = False,
    stderr: bool = True,
    typed: str | None = None,
) -> str:
    """Run one of the three scripts in the project's root; returns what it printed. Checks the exit status."""
    done = subprocess.run(
        command(script, *arguments, ranks=ranks),
        cwd=ROOT,
        capture_output=True,
        env=environment(),
        text=True,
        errors="surrogateescape",
        input=typed,
    )
    output = done.stdout + done.stderr
    assert bool(done.returncode) == fails, output
    return output if stderr else done.stdout


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONUTF8": "1"}


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


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")
