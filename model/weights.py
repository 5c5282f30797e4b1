"""Safetensors in and out: a checkpoint directory as Hugging Face lays it out."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.mistral import Mistral

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
# What travels with the weights, where the source has it.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Checkpoint:
    """The tensors of a directory: one model.safetensors, or shards with an index.

    Opening reads the headers and no data. Raises FileNotFoundError or ValueError, naming the file, for an absent
    shard, a damaged file, or an index that does not agree with its shards.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        index = self.path / INDEX
        if index.is_file():
            try:
                declared = json.loads(index.read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(f"{index}: not a safetensors index ({error!r})") from None
            self.files = [self.path / name for name in sorted(set(declared.values()))]
        else:
            declared = None
            self.files = [self.path / "model.safetensors"]
        self._handles, self._owner = {}, {}
        for file in self.files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file}: no such file; weights are model.safetensors, or shards with {INDEX} "
                    "(pickled .bin and .pth files are never opened: convert them to safetensors)"
                )
            try:
                handle = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file}: not a complete safetensors file ({error}); fetch it again") from None
            self._handles[file] = handle
            for name in handle.keys():
                if name in self._owner:
                    raise ValueError(f"{file}: tensor {name} is also in {self._owner[name].name}")
                self._owner[name] = file
        if declared is not None:
            found = {name: file.name for name, file in self._owner.items()}
            wrong = sorted(name for name in found.keys() | declared.keys() if found.get(name) != declared.get(name))
            if wrong:
                raise ValueError(f"{index}: does not agree with the shards about {_some(wrong)}")

    def check(self, model: Mistral) -> None:
        """Raise ValueError unless the tensors are exactly the model's, by name and shape."""
        expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        found = set(self._owner)
        if model.config.tie_word_embeddings:
            found.discard("lm_head.weight")  # some writers store the shared matrix twice
        missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
        if missing or extra:
            parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has unknown {_some(extra)}"] * bool(extra)
            raise ValueError(f"{self.path}: {' and '.join(parts)}; do config.json and weights belong together?")
        for name, shape in expected.items():
            stored = self._handles[self._owner[name]].get_slice(name)
            if stored.get_shape() != shape:
                raise ValueError(
                    f"{self._owner[name]}: {name} has shape {stored.get_shape()}, config.json asks for {shape}"
                )
            if stored.get_dtype() not in ("F32", "F16", "BF16"):
                raise ValueError(f"{self._owner[name]}: {name} is {stored.get_dtype()}, not a float tensor")

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The given rows of one tensor, in the dtype of the file; nothing else is read."""
        return self._handles[self._owner[name]].get_slice(name)[rows]


def load_model(path: str | Path, dtype: torch.dtype = torch.bfloat16, device="cpu") -> Mistral:
    """The model in a Hugging Face directory, in eval mode. Raises ValueError or OSError naming file and tensor."""
    with torch.device("meta"):
        model = Mistral(ModelConfig.from_pretrained(path))
    checkpoint = Checkpoint(path)
    checkpoint.check(model)
    state = {name: checkpoint.read(name).to(device, dtype) for name, _ in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)  # strict: check() has compared the names
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight
    return model.eval().requires_grad_(False)


def save_model(model: Mistral, path: str | Path, dtype: torch.dtype, tokenizer: str | Path | None = None) -> None:
    """Write `model` as a Hugging Face directory, with the tokenizer files found in `tokenizer`."""
    parameters = dict(model.named_parameters())
    write_checkpoint(path, model.config, {n: p.shape for n, p in parameters.items()}, parameters.__getitem__, dtype)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, path)


def write_checkpoint(
    path: str | Path,
    config: ModelConfig,
    shapes: Mapping[str, torch.Size],
    get: Callable[[str], Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    write: bool = True,
) -> None:
    """Write config.json and the safetensors shards, asking `get` for one tensor at a time.

    At most one shard is in memory. With `write` False, `get` is called in the same order and nothing is written:
    for processes that only take part in gathering.
    """
    path = Path(path)
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    if write:
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config.to_dict(str(dtype).removeprefix("torch.")), indent=2)
        (path / "config.json").write_text(text + "\n")
        if len(shards) > 1:
            total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
            weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name, shard in zip(names, shards):
        tensors = {}
        for tensor in shard:
            value = get(tensor).detach()
            if write:
                tensors[tensor] = value.to("cpu", dtype).contiguous()
        if write:
            save_file(tensors, path / name, metadata={"format": "pt"})


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copy the tokenizer's files, and generation_config.json, where `source` has them; `source` may be the file."""
    source = Path(source)
    if source.is_file():
        shutil.copyfile(source, Path(target) / "tokenizer.model")
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, Path(target) / name)


def fingerprint(path: str | Path) -> str:
    """A SHA-256 over the architecture, every byte of the weights, and the sentencepiece model where there is one."""
    digest = hashlib.sha256(repr(ModelConfig.from_pretrained(path)).encode())
    tokenizer = Path(path) / "tokenizer.model"
    for file in [*Checkpoint(path).files, *([tokenizer] if tokenizer.is_file() else [])]:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
