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
MAX_SHARD_BYTES = 5 * 10**9
# What travels with the weights, where the source has it.
TOKENIZER_FILES = """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja
    generation_config.json
""".split()
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors names them
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Checkpoint:
    """The tensors of a directory: model.safetensors, or shards with their index.

    Opening reads the headers and no data. Raises FileNotFoundError or ValueError, naming file and tensor, for
    a missing shard, a damaged file, an index that does not agree with its shards, or an index next to a
    single file. Pickled weights are never opened.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        single, index = self.path / "model.safetensors", self.path / INDEX
        if single.is_file() and index.is_file():
            raise ValueError(f"{index}: stands beside {single.name}: two checkpoints; remove one of them")
        if not single.is_file() and not index.is_file():
            remedy = "shards need their index, pickled weights a conversion to safetensors"
            raise FileNotFoundError(f"{single}: no such file, nor {INDEX}; {remedy}")
        declared = _read_index(index) if index.is_file() else {}
        self.files = [self.path / file for file in sorted(set(declared.values()))] or [single]
        self._entries: dict[str, tuple[Path, list[int], str]] = {}  # {tensor: file, shape, dtype}
        stored = set()  # (tensor, file name)
        for file in self.files:
            if not file.is_file():
                tensor = next(tensor for tensor, owner in declared.items() if owner == file.name)
                raise FileNotFoundError(f"{file}: no such file, where {INDEX} has {tensor}; fetch it again")
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():
                        stored.add((name, file.name))
                        part = handle.get_slice(name)
                        # old files of Llama keep frequencies, which follow from rope_theta
                        if not name.endswith(".rotary_emb.inv_freq"):
                            self._entries[name] = (file, part.get_shape(), part.get_dtype())
            except SafetensorError as error:
                cause = f"not a complete safetensors file ({error})"
                raise ValueError(f"{file}: {cause}; fetch it again") from None
        wrong = sorted({name for name, _ in stored ^ set(declared.items())})
        if declared and wrong:
            raise ValueError(f"{index}: does not agree with the shards about {_some(wrong)}")

    def check(self, model: Mistral) -> None:
        """Raise ValueError, naming file and tensor, unless names and shapes are exactly the model's."""
        expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        found = set(self._entries)
        if model.config.tie_word_embeddings and _HEAD in found:
            # Some writers store the shared matrix twice; `fill` compares the two.
            expected[_HEAD] = expected[_EMBEDDING]
        missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
        if missing or extra:
            parts = [f"lacks {_some(missing)}"] * bool(missing)
            if extra:
                parts.append(f"has unknown {_some(extra)} in {self._entries[extra[0]][0].name}")
            raise ValueError(f"{self.path}: {' and '.join(parts)}; are config.json and weights of one model?")
        for name, shape in expected.items():
            file, stored, dtype = self._entries[name]
            if stored != shape:
                raise ValueError(f"{file}: {name} has shape {stored}, the configuration asks for {shape}")
            if dtype not in _DTYPES.values():
                raise ValueError(f"{file}: {name} is {dtype}, not F32, F16 or BF16")

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The given rows of one tensor, in the dtype of the file; no other byte is read.

        The file is mapped for this one tensor only: pages of a map that stays count as this process's memory.
        """
        with safe_open(self._entries[name][0], framework="pt") as handle:
            return handle.get_slice(name)[rows]

    @torch.no_grad()
    def fill(self, model: Mistral, shard: Callable[[Tensor], tuple[Tensor, slice]] | None = None) -> None:
        """Copy every tensor into its parameter, each exactly once; raises as `check` does.

        `shard` gives a parameter's local tensor and the rows that it holds, where it is sharded.
        """
        self.check(model)
        for name, parameter in model.named_parameters():
            target, rows = shard(parameter) if shard is not None else (parameter, slice(None))
            values = self.read(name, rows)
            target.copy_(values.to(target.device))  # cast there: fewer bytes to move, and faster
            if name == _EMBEDDING and model.config.tie_word_embeddings and _HEAD in self._entries:
                if not torch.equal(values, self.read(_HEAD, rows)):
                    file = self._entries[_HEAD][0]
                    raise ValueError(f"{file}: {_HEAD} is not the embedding's matrix (tie_word_embeddings)")


def load_model(
    path: str | Path, dtype: torch.dtype = torch.bfloat16, device="cpu", attention: str = "auto"
) -> Mistral:
    """The model in a checkpoint directory, in eval mode. Raises ValueError or OSError naming file and tensor.

    `attention` is a backend of model/attention.py; an unavailable one raises ValueError at once.
    """
    with torch.device("meta"):
        model = Mistral(ModelConfig.from_pretrained(path), attention).to(dtype)
    choose_backend(attention, torch.device(device).type, dtype, model.config.head_dim)
    checkpoint = Checkpoint(path)
    checkpoint.check(model)  # before memory is taken
    model.to_empty(device=device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.get_parameter(_EMBEDDING)
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
    max_shard_bytes: int = MAX_SHARD_BYTES,
    write: bool = True,
) -> None:
    """Write config.json, generation_config.json and the safetensors shards; `get` gives one tensor at a time.

    Raises FileExistsError if there are weights already: those that remain would be read as part of the new
    ones. With `write` False, only calls `get` in the same order: for ranks that take part in gathering.
    """
    if not write:
        for tensor in shapes:
            get(tensor)
        return
    path = Path(path)
    shards: list[list[str]] = [[]]
    used = 0
    for tensor, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        used += size
        if shards[-1] and used > max_shard_bytes:
            shards.append([])
            used = size
        shards[-1].append(tensor)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    path.mkdir(parents=True, exist_ok=True)
    old = sorted(path.glob("*.safetensors*"))
    if old:
        raise FileExistsError(f"{old[0]}: there are weights already; choose another directory, or remove it")
    described = {"config.json": config.to_dict(str(dtype).removeprefix("torch."))}
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    described["generation_config.json"] = ends
    if len(shards) > 1:
        total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        described[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, values in described.items():
        (path / name).write_text(json.dumps(values, indent=2) + "\n")
    for name, shard in zip(names, shards):
        with open(path / name, "wb") as file:
            file.write(_header({tensor: shapes[tensor] for tensor in shard}, dtype))
            for tensor in shard:
                value = get(tensor).detach().to("cpu", dtype).contiguous()
                file.write(value.view(torch.uint8).numpy().data)


def _header(shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file whose tensors follow in this order: its length in 8 bytes, and JSON."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    return len(text).to_bytes(8, "little") + text


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copy the tokenizer's files and generation_config.json from a directory, or the file tokenizer.model."""
    source = Path(source)
    shutil.copyfile(find_tokenizer(source), Path(target) / "tokenizer.model")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, Path(target) / name)


def fingerprint(path: str | Path) -> str:
    """A SHA-256 over the architecture, every byte of the weights, and tokenizer.model where there is one.

    Fields of the architecture equal to their default are omitted, so a new field changes no fingerprint.
    """
    config = ModelConfig.from_pretrained(path)
    changed = {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != f.default}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode())
    tokenizer = Path(path) / "tokenizer.model"
    for file in [*Checkpoint(path).files, *[tokenizer] * tokenizer.is_file()]:
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
            raise ValueError(f"{index}: points to {file}, not to a .safetensors file of its folder")
    return declared


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
