"""What the tests share: small models, reference computations, runs of the scripts, and processes."""

import contextlib
import functools
import importlib.util
import io
import json
import logging
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed
from safetensors.torch import load_file
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Built

from model.attention import choose_backend
from model.config import ModelConfig
from model.mistral import Mistral
from spin.packing import Item

ROOT = Path(__file__).parent.parent

# Models.

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


# Llama 3.1's scaling of rotary frequencies, in proportion to this model: some are kept, some divided by 4.
LLAMA3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def small_config(**changes) -> ModelConfig:
    return ModelConfig(**(SMALL | changes))


def small_model(seed: int = 0, **changes) -> Mistral:
    """Random weights, wide enough that attention is far from uniform and mistakes in it show.

    Biases and the norms of queries and keys, which a new model has as zeros and ones, are random too.
    """
    model = Mistral(small_config(initializer_range=0.2, **changes)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
    return model


# Families other than Mistral, in the small model's shape.
FAMILIES = {
    "llama 3.1": dict(model_type="llama", rope_theta=5e5, rope_scaling=LLAMA3),
    "qwen2": dict(model_type="qwen2", qkv_bias=True, tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", qk_norm=True, head_dim=16),
}


def reference(model: Mistral):
    """transformers' model of the family with the same weights, in fp32 and without any fused kernel."""
    import transformers

    name = model.config.model_type.capitalize()
    values = {k: v for k, v in model.config.to_dict("float32").items() if k != "architectures"}
    config = getattr(transformers, f"{name}Config")(**values)
    config._attn_implementation = "eager"
    other = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    other.tie_weights()
    return other


def random_ids(rng: random.Random, length: int, vocab: int = 97) -> list[int]:
    return [rng.randrange(3, vocab) for _ in range(length)]


# Reference computations.


def _ls(x):
    return torch.nn.functional.logsigmoid(x)


# Losses as their papers write them, of one prompt: log-ratios r (1,) of the real response and g (K,) of the
# generated ones, their lengths n (1 + K,), β and μ.
FORMULAS = {
    "logistic": lambda r, g, n, b, m: -_ls(b * (r - g)),
    "hinge": lambda r, g, n, b, m: torch.relu(1 - b * (r - g)),
    "exponential": lambda r, g, n, b, m: torch.exp(-b * (r - g)),
    "correlation": lambda r, g, n, b, m: 1 - b * (r - g),
    "ipo": lambda r, g, n, b, m: b**2 * (r - g - 1 / (2 * b)) ** 2,
    "per-token": lambda r, g, n, b, m: -_ls(b * (r / n[:1] - g / n[1:])),
    "sppo": lambda r, g, n, b, m: (r - (1 - 0.5) / b) ** 2 + (g - (0 - 0.5) / b) ** 2,
    "gsil": lambda r, g, n, b, m: -_ls(b * r - math.log(m)) - _ls(-b * g + math.log(m)),
    "space": lambda r, g, n, b, m: (1 + m * (-b * r).exp()).log() + m * (1 + (b * g).exp() / m).log(),
    "t-spin": lambda r, g, n, b, m: -_ls(b * (r - g[:-1])) - m * _ls(b * (g[:-1] - g[-1:])),
}


def naive_loss(part, item, logps, reference):
    """An item's loss by its formula, from the log-probs of its responses: the mean over its pairs."""
    ratios = torch.stack([*logps]) - torch.stack([*reference])
    lengths = torch.tensor([len(response) for response in item.responses])
    return FORMULAS[part.loss](ratios[:1], ratios[1:], lengths, part.beta, part.mu).mean()


def naive_logps(other, item):
    """log p of each response by transformers: separate, unpacked sequences and a full log-softmax."""
    result = []
    for response in item.responses:
        ids = torch.tensor([item.prompt + response])
        logps = other(ids).logits[0].log_softmax(-1)
        at = torch.arange(len(item.prompt) - 1, ids.shape[1] - 1)
        result.append(logps[at, ids[0, at + 1]].sum())
    return result


PART = dict(
    batch_size=4,
    epochs=2,
    lr=1e-3,
    beta=0.7,
    dtype="float32",
    token_budget=60,
    logit_chunk=5,
    checkpoint_every=100,
    max_grad_norm=0.5,
)


def pairs(count: int, responses: int = 2) -> list[Item]:
    rng = random.Random(0)
    return [
        Item(
            random_ids(rng, rng.randint(1, 15)),
            tuple(random_ids(rng, rng.randint(1, 12)) for _ in range(responses)),
        )
        for _ in range(count)
    ]


# Runs of the scripts.


def run_script(
    script: str,
    *arguments: str,
    ranks: int = 1,
    fails: bool = False,
    stderr: bool = True,
    typed: str = "",
    launch: bool = False,
) -> str:
    """Run a script with a `main(argv)`, `typed` its standard input; returns what it printed.

    Checks the exit status. One rank runs in this process, which saves the seconds that importing torch takes,
    unless `launch`.
    """
    run = _launched if launch or ranks > 1 else _called
    status, out, error = run(script, arguments, ranks, typed)
    assert bool(status) == fails, out + error
    return out + error if stderr else out


def _launched(script: str, arguments, ranks: int, typed: str) -> tuple[object, str, str]:
    done = subprocess.run(
        command(script, *arguments, ranks=ranks),
        cwd=ROOT,
        capture_output=True,
        env=environment(),
        text=True,
        errors="surrogateescape",
        input=typed,
    )
    return done.returncode, done.stdout, done.stderr


def _called(script: str, arguments, ranks: int, typed: str) -> tuple[object, str, str]:
    """As a process of its own would: one thread, no log handlers, no process group, no backend chosen yet."""
    out, error, status = io.StringIO(), io.StringIO(), 0
    root = logging.getLogger()
    handlers, level, threads, stdin = root.handlers[:], root.level, torch.get_num_threads(), sys.stdin
    columns = os.environ.get("COLUMNS")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), contextlib.chdir(ROOT):
        try:
            root.handlers[:], sys.stdin, os.environ["COLUMNS"] = [], io.StringIO(typed), "80"
            torch.set_num_threads(1)
            choose_backend.cache_clear()
            script_module(script).main(list(arguments))
        except SystemExit as exit:
            status = exit.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
        finally:
            root.handlers[:], sys.stdin = handlers, stdin
            root.setLevel(level)
            torch.set_num_threads(threads)
            os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
            if torch.distributed.is_initialized():  # after an error it is left to the end of the process
                torch.distributed.destroy_process_group()
    return status, out.getvalue(), error.getvalue()


@functools.cache
def script_module(script: str):
    """The module of a script, under a name that no package has (one is called evaluate)."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(script: str, *arguments: str, ranks: int = 1) -> list[str]:
    """A script's command line, by torchrun for several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), str(ROOT / script), *arguments]


def environment() -> dict[str, str]:
    """Of a launched script: one thread, since small models gain nothing from more."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return os.environ | threads | {"COLUMNS": "80", "PYTHONUTF8": "1"}


def metrics(directory: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in open(directory / "metrics.jsonl")]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def generated(directory: Path) -> dict[str, bytes]:
    """The files of an iteration's generate stage."""
    return {file.name: file.read_bytes() for file in (directory / "generated").iterdir()}


# Processes.


def kill_when(arguments, ready, ranks=1, only=None):
    """Start train.py, kill it and its ranks with SIGKILL once `ready()`; asserts that it was still at work.

    With `only`, that rank alone is killed, and torchrun ends the rest.
    """
    process = subprocess.Popen(
        command("train.py", *arguments, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.002)
    # torchrun's ranks have sessions of their own and would live on
    family = [process.pid, *children(process.pid)]
    for pid in family if only is None else [pid for pid in family if rank_of(pid) == only]:
        if alive(pid):  # a rank may have seen torchrun die
            os.kill(pid, signal.SIGKILL)
    assert process.wait() != 0
    while any(alive(pid) for pid in family):
        time.sleep(0.01)


def rank_of(pid):
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(text[5:]) for text in variables if text.startswith(b"RANK=")), None)


def state_and_parent(pid):
    """("S", 17), or None for a process that has gone."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return state, int(parent)


def children(pid):
    """Processes that `pid` started, theirs included."""
    every = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    parents = {other: found[1] for other in every if (found := state_and_parent(other))}
    family = {pid}
    while more := {other for other, parent in parents.items() if parent in family} - family:
        family |= more
    return sorted(family - {pid})


def alive(pid):
    """Whether a process holds its files still: also while its first thread has ended and others have not."""
    found = state_and_parent(pid)
    try:
        return found is not None and (found[0] not in "ZX" or len(os.listdir(f"/proc/{pid}/task")) > 1)
    except OSError:
        return False


def count_lines(*files):
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Texts and files.


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


AWKWARD = ["I don't", " two", "  three  ", "", "\n", "é 😀 中文", "<s></s> <unk>[INST]"]
AWKWARD += ["tab\tend", "a\n\nb ", "55%"]


def odd_strings() -> list[str]:
    """More than 300 texts: hand-picked ones, and for each alphabet thirty random ones."""
    rng = random.Random(0)

    def span(first, last):
        return [chr(code) for code in range(first, last)]

    alphabets = {
        "control characters": span(0, 32) + ["\x7f", "\x85", "\u200b", "\u2028", "\ufeff"],
        "blanks": [" ", "  ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u3000"],
        "ascii": span(32, 127),
        "latin": span(0xC0, 0x250) + [" "],
        "combining": span(0x300, 0x340) + list("aeiou "),
        "greek, cyrillic, hebrew, arabic": span(0x370, 0x530)
        + span(0x5D0, 0x5EB)
        + span(0x620, 0x64B)
        + [" "],
        "cjk": span(0x4E00, 0x9FA5) + span(0x3041, 0x30FF) + span(0xAC00, 0xD7A3),
        "emoji": span(0x1F300, 0x1F6FF) + ["\u200d", "\ufe0f", " ", "👩‍👩‍👧‍👦", "🇫🇷"],
        "compatibility": list("ﬁ①½ＡＢ㎏™…") + [" "],
        "beyond the first plane": span(0x10330, 0x1034A) + span(0x20000, 0x20100),
        "code": [*'"\t{};', "def ", "f(x)", ":\n", "    ", "return ", "0x1F", "==", "//", "\\n", "lambda"],
        "markup": ["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<|user|>", "\n", "<0x41>", "&amp;", "<b>"],
    }
    drawn = [
        "".join(rng.choice(letters) for _ in range(rng.randrange(1, 40)))
        for letters in alphabets.values()
        for _ in range(30)
    ]
    return AWKWARD + drawn + ["x" * 2000, " " * 300, "\ufffd", "e\u0301", "1234567890" * 5]


# Tokenizers.

END, START = "<|im_end|>", "<|im_start|>"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
WORDS += r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(pattern: str = "", normalizer=None) -> Built:
    """Byte-level BPE; a pattern as Llama 3 and Qwen have it, or GPT-2's (SmolLM2)."""
    built = Built(models.BPE())
    built.normalizer = normalizer
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        built.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
    built.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", START, END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = odd_strings() + ["Is it?\nA: the end.\n\nQ: "] * 9  # "?\n" and "\n\n" are tokens
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    built.train_from_iterator(texts, trainer)
    return built


BYTE_LEVEL = {
    "gpt-2": byte_level,
    "llama 3": lambda: byte_level(WORDS % r"\p{N}{1,3}"),
    "qwen": lambda: byte_level(WORDS % r"\p{N}", normalizers.NFC()),
}
