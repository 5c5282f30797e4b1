"""Safetensors in and out: a checkpoint directory as Hugging Face lays it out."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.attention import choose_backend
from model.config import ModelConfig, read_object
from model.mistral import Mistral
from model.tokenizer import find_tokenizer

INDEX = "model.safetensors.index.json"
# Copied with the weights, if the source has them.
TOKENIZER_FILES = """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja
    generation_config.json
""".split()
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # safetensors' names
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Checkpoint:
    """The tensors of a directory: model.safetensors, or shards with their index. Opening reads the headers.

    Raises OSError or ValueError, naming the file, if files are missing or damaged. Pickled weights are never
    opened.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        single, index = self.path / "model.safetensors", self.path / INDEX
        if single.is_file() and index.is_file():
            raise ValueError(f"{index}: next to {single.name}: two checkpoints; remove one of them")
        if not single.is_file() and not index.is_file():
            remedy = "shards need their index, pickled weights a conversion to safetensors"
            raise FileNotFoundError(f"{single}: no such file, nor {INDEX}; {remedy}")
        declared = _read_index(index) if index.is_file() else {}
        self.files = [self.path / file for file in sorted(set(declared.values()))] or [single]
        self._entries: dict[str, tuple[Path, list[int], str]] = {}  # {tensor: file, shape, dtype}
        for file in self.files:
            try:  # `open` tells why a file cannot be opened; safe_open would call it absent
                with open(file, "rb"), safe_open(file, framework="pt") as handle:
                    for name in handle.keys():
                        part = handle.get_slice(name)
                        self._entries[name] = (file, part.get_shape(), part.get_dtype())
            except SafetensorError as error:
                cause = f"not a complete safetensors file ({error})"
                raise ValueError(f"{file}: {cause}; download it again") from None

    def check(self, model: Mistral) -> None:
        """Raise ValueError, naming file and tensor, unless names and shapes are exactly the model's."""
        expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        # Old files of Llama keep rotary frequencies, which follow from rope_theta.
        found = {name for name in self._entries if not name.endswith(".rotary_emb.inv_freq")}
        if model.config.tie_word_embeddings and _HEAD in found:
            expected[_HEAD] = expected[_EMBEDDING]  # some writers store the shared matrix twice
        missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
        if missing or extra:
            where = self.path if missing else self._entries[extra[0]][0]
            what = f"lacks {_some(missing)}" if missing else f"has unknown {_some(extra)}"
            raise ValueError(f"{where}: {what}; are config.json and weights of one model?")
        for name, shape in expected.items():
            file, stored, dtype = self._entries[name]
            if stored != shape:
                raise ValueError(f"{file}: {name} has shape {stored}, the configuration asks for {shape}")
            if dtype not in _DTYPES.values():
                raise ValueError(f"{file}: {name} is {dtype}, not F32, F16 or BF16")

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The given rows of one tensor, in the file's dtype; only their bytes are read."""
        # Mapped for this tensor only: a permanent map's pages would count as this process's memory.
        with safe_open(self._entries[name][0], framework="pt") as handle:
            return handle.get_slice(name)[rows]

    @torch.no_grad()
    def fill(self, model: Mistral, shard: Callable[[Tensor], tuple[Tensor, slice]] | None = None) -> None:
        """Copy every tensor into its parameter. `shard` gives a parameter's local tensor and its rows."""
        self.check(model)
        for name, parameter in model.named_parameters():
            target, rows = shard(parameter) if shard is not None else (parameter, slice(None))
            # Cast on the device: fewer bytes to move, and faster.
            target.copy_(self.read(name, rows).to(target.device))


def load_model(path: str | Path, dtype=torch.bfloat16, device="cpu", attention: str = "auto") -> Mistral:
    """The model in a directory, in eval mode. Raises OSError or ValueError, naming file and tensor."""
    with torch.device("meta"):
        model = Mistral(ModelConfig.from_pretrained(path), attention).to(dtype)
    choose_backend(attention, torch.device(device).type, dtype, model.config.head_dim)
    checkpoint = Checkpoint(path)
    checkpoint.check(model)  # before memory is allocated
    model.to_empty(device=device)
    model.tie_weights()
    checkpoint.fill(model)
    return model.eval().requires_grad_(False)


def save_model(
    model: Mistral, path: str | Path, dtype: torch.dtype, tokenizer: str | Path | None = None
) -> None:
    """Write `model` as a Hugging Face directory, with the tokenizer files found in `tokenizer`."""
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    write_checkpoint(path, model.config, shapes, parameters.__getitem__, dtype)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, path)


def write_checkpoint(
    path: str | Path,
    config: ModelConfig,
    shapes: Mapping[str, torch.Size],
    get: Callable[[str], Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * 10**9,
    write: bool = True,
) -> None:
    """Write config.json, generation_config.json and the safetensors shards; `get` returns one tensor.

    With `write` False, only calls `get` in the same order, for ranks that take part in gathering.
    """
    if not write:
        for name in shapes:
            get(name)
        return
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    headers: list[dict] = [{}]  # of each shard: {tensor: dtype, shape and place}, as safetensors lays it out
    end = 0
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        if headers[-1] and end + size > max_shard_bytes:
            headers.append({})
            end = 0
        place = [end, end + size]
        headers[-1][name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": place}
        end += size
    files = [f"model-{i:05d}-of-{len(headers):05d}.safetensors" for i in range(1, len(headers) + 1)]
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    architecture = config.to_dict(str(dtype).removeprefix("torch."))
    described = {"config.json": architecture, "generation_config.json": ends}
    if len(headers) == 1:
        files = ["model.safetensors"]
    else:
        total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        weight_map = {name: file for file, header in zip(files, headers) for name in header}
        described[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for file, values in described.items():
        (path / file).write_text(json.dumps(values, indent=2) + "\n")
    for file, header in zip(files, headers):
        text = json.dumps({"__metadata__": {"format": "pt"}} | header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the tensors
        with open(path / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in header:
                value = get(name).detach().to("cpu", dtype).contiguous()
                stream.write(value.view(torch.uint8).numpy().data)


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copy the tokenizer (`source` itself, or in it) and the TOKENIZER_FILES of `source` to a directory."""
    source, file = Path(source), find_tokenizer(source)
    shutil.copyfile(file, Path(target) / ("tokenizer.json" if file.suffix == ".json" else "tokenizer.model"))
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, Path(target) / name)


def fingerprint(path: str | Path) -> str:
    """A SHA-256 over the architecture, and every byte of the weights and of the tokenizer's files.

    Fields of the architecture equal to their default are omitted, so a new field changes no fingerprint.
    """
    config = ModelConfig.from_pretrained(path)
    changed = {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != f.default}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode())
    names = ["tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]
    if not (Path(path) / names[0]).is_file():
        names = TOKENIZER_FILES
    for file in [*Checkpoint(path).files, *filter(Path.is_file, (Path(path) / name for name in names))]:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _read_index(index: Path) -> dict[str, str]:
    """{tensor: file name} of an index. Raises ValueError if it is not one."""
    declared = read_object(index).get("weight_map")
    if not isinstance(declared, dict) or not declared:
        raise ValueError(f"{index}: not an index of safetensors files: no weight_map")
    for file in declared.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: points to {file}, not to a .safetensors file of its directory")
    return declared


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
