"""Safetensors in and out: a checkpoint directory as Hugging Face lays it out, or Mistral's own weights read
as such.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
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
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors names them
# Mistral's own names of tensors, after "layers.N." where there is one.
_MISTRAL_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class Checkpoint:
    """The tensors of a directory, under Hugging Face's names and in its layout.

    The files are, in this order of preference, Hugging Face's (model.safetensors, or shards with an index) or
    Mistral's own (consolidated.safetensors, or shards with an index). Opening reads the headers and no data.
    Raises FileNotFoundError or ValueError, naming file and tensor, for an absent shard, a damaged file, an
    index that does not agree with its shards, or an index beside a single file. Pickled weights are never
    opened.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._mistral = False
        declared = None  # {tensor: file name}, where there is an index
        for name in ("model.safetensors", "consolidated.safetensors"):
            index = self.path / f"{name}.index.json"
            if index.is_file() and (self.path / name).is_file():
                raise ValueError(f"{index}: stands beside {name}: two checkpoints; remove one of them")
            if index.is_file() or (self.path / name).is_file():
                self._mistral = name.startswith("consolidated")
                self._head_dim = ModelConfig.from_pretrained(path).head_dim if self._mistral else 0
                declared = _read_index(index) if index.is_file() else None
                break
        else:
            pickled = sorted(
                file.name for file in self.path.glob("*") if file.suffix in (".bin", ".pth", ".pt")
            )
            shards = sorted(file.name for file in self.path.glob("*.safetensors"))
            raise FileNotFoundError(
                f"{self.path / 'model.safetensors'}: no such file, nor {INDEX}, nor consolidated.safetensors"
                + (f"; {shards[0]} is there without the index of its shards" if shards else "")
                + (
                    f"; {pickled[0]} is pickled and never opened: convert it to safetensors"
                    if pickled
                    else ""
                )
            )
        self.files = (
            [self.path / file for file in sorted(set(declared.values()))] if declared else [self.path / name]
        )
        self._entries: dict[str, tuple[Path, str, list[int], str]] = {}  # file, name in it, shape, dtype
        for file in self.files:
            if declared is not None and not file.is_file():
                tensor = next(tensor for tensor, owner in declared.items() if owner == file.name)
                raise FileNotFoundError(
                    f"{file}: no such file, where {index.name} has {tensor}; fetch it again"
                )
            try:
                with safe_open(file, framework="pt") as handle:
                    for stored in handle.keys():
                        name = self._name(stored)
                        if name in self._entries:
                            raise ValueError(
                                f"{file}: tensor {stored} is also in {self._entries[name][0].name}"
                            )
                        part = handle.get_slice(stored)
                        self._entries[name] = (file, stored, part.get_shape(), part.get_dtype())
            except SafetensorError as error:
                raise ValueError(
                    f"{file}: not a complete safetensors file ({error}{_first_cut(file)}); fetch it again"
                ) from None
        if declared is not None:
            found = {stored: file.name for file, stored, _, _ in self._entries.values()}
            wrong = sorted(
                name for name in found.keys() | declared.keys() if found.get(name) != declared.get(name)
            )
            if wrong:
                raise ValueError(f"{index}: does not agree with the shards about {_some(wrong)}")
        for name in [name for name in self._entries if name.endswith(".rotary_emb.inv_freq")]:
            del self._entries[name]  # old files of Llama keep what follows from rope_theta

    def check(self, model: Mistral) -> None:
        """Raise ValueError, naming file and tensor, unless the tensors are exactly the model's, by name and
        shape.
        """
        expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        found = set(self._entries)
        if model.config.tie_word_embeddings and "lm_head.weight" in found:
            # Some writers store the shared matrix twice; `fill` compares the two.
            expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
        missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
        if missing or extra:
            parts = [f"lacks {_some(missing)}"] * bool(missing)
            if extra:
                parts.append(f"has unknown {_some(extra)} in {self._entries[extra[0]][0].name}")
            raise ValueError(
                f"{self.path}: {' and '.join(parts)}; do the configuration and the weights go together?"
            )
        for name, shape in expected.items():
            file, stored, found_shape, dtype = self._entries[name]
            if found_shape != shape:
                raise ValueError(
                    f"{file}: {stored} has shape {found_shape}, the configuration asks for {shape}"
                )
            if dtype not in _DTYPES.values():
                raise ValueError(f"{file}: {stored} is {dtype}, not F32, F16 or BF16")

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The given rows of one tensor, in the dtype of the file; no other byte is read.

        The file is mapped for this one tensor only: a map that stays would count what was read as this
        process's memory for as long as the system has no other use for it.
        """
        file, stored, shape, _ = self._entries[name]
        start, stop, _ = rows.indices(shape[0])
        with safe_open(file, framework="pt") as handle:
            values = handle.get_slice(stored)
            if not self._mistral or not name.endswith(("q_proj.weight", "k_proj.weight")):
                return values[start:stop]
            # Mistral rotates neighbouring rows of a head (2i, 2i + 1), Hugging Face halves of it (i, i +
            # D/2).
            size = self._head_dim
            first, last = start // size * size, -(-stop // size) * size  # whole heads
            heads = values[first:last].unflatten(0, (-1, size // 2, 2))
            return heads.transpose(1, 2).flatten(0, 2)[start - first : stop - first]

    @torch.no_grad()
    def fill(self, model: Mistral, shard: Callable[[Tensor], tuple[Tensor, slice]] | None = None) -> None:
        """Copy every tensor into its parameter, each exactly once; raises as `check` does.

        `shard` gives, for a parameter of which this process holds a part, the local tensor and the rows that
        it is.
        """
        self.check(model)
        unfilled = dict(model.named_parameters())
        for name, (file, stored, _, _) in self._entries.items():
            twice = name not in unfilled  # the tied matrix
            parameter = model.lm_head.weight if twice else unfilled.pop(name)
            target, rows = shard(parameter) if shard is not None else (parameter, slice(None))
            if not twice:
                # cast there: fewer bytes to move, and faster
                target.copy_(self.read(name, rows).to(target.device))
            elif not torch.equal(self.read(name, rows), self.read("model.embed_tokens.weight", rows)):
                raise ValueError(
                    f"{file}: {stored} is not the embedding's matrix, as tie_word_embeddings has it"
                )
        assert not unfilled, unfilled.keys()

    def _name(self, stored: str) -> str:
        """Hugging Face's name of a stored tensor."""
        match = re.fullmatch(r"(layers\.\d+\.)?(.+)(\.weight)", stored)
        if not self._mistral or not match or match[2] not in _MISTRAL_NAMES:
            return stored
        layer, rest, weight = match.groups(default="")
        return ("model." + layer if layer else "") + _MISTRAL_NAMES[rest] + weight


def load_model(
    path: str | Path, dtype: torch.dtype = torch.bfloat16, device="cpu", attention: str = "auto"
) -> Mistral:
    """The model in a checkpoint directory, in eval mode. Raises ValueError or OSError naming file and tensor.

    `attention` is a backend of model/attention.py; one that cannot be had is a ValueError before anything is
    read.
    """
    with torch.device("meta"):
        model = Mistral(ModelConfig.from_pretrained(path), attention).to(dtype)
    choose_backend(attention, torch.device(device).type, dtype, model.config.head_dim)
    checkpoint = Checkpoint(path)
    checkpoint.check(model)  # before memory is taken
    model.to_empty(device=device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.get_parameter("model.embed_tokens.weight")
    checkpoint.fill(model)
    return model.eval().requires_grad_(False)


def save_model(
    model: Mistral, path: str | Path, dtype: torch.dtype, tokenizer: str | Path | None = None
) -> None:
    """Write `model` as a Hugging Face directory, with the tokenizer files found in `tokenizer`."""
    parameters = dict(model.named_parameters())
    write_checkpoint(
        path, model.config, {n: p.shape for n, p in parameters.items()}, parameters.__getitem__, dtype
    )
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
    """Write config.json, generation_config.json and the safetensors shards, asking `get` for one tensor at a
    time.

    Raises FileExistsError if there are weights already: what they leave over would be taken for a part of the
    new ones.

    No more than one tensor is in memory. With `write` False, `get` is called in the same order and nothing is
    written: for processes that only take part in gathering.
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
        old = sorted(path.glob("*.safetensors*"))
        if old:
            raise FileExistsError(
                f"{old[0]}: there are weights already; choose another directory, or remove it"
            )
        text = json.dumps(config.to_dict(str(dtype).removeprefix("torch.")), indent=2)
        (path / "config.json").write_text(text + "\n")
        ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        (path / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
        if len(shards) > 1:
            total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
            weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name, shard in zip(names, shards):
        if write:
            with open(path / name, "wb") as file:
                file.write(_header({tensor: shapes[tensor] for tensor in shard}, dtype))
                for tensor in shard:
                    value = get(tensor).detach().to("cpu", dtype).contiguous()
                    file.write(value.view(torch.uint8).numpy().data)
        else:
            for tensor in shard:
                get(tensor)


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
    """Copy the tokenizer's files, and generation_config.json, where `source` has them; `source` may be the
    file.
    """
    source = Path(source)
    shutil.copyfile(find_tokenizer(source), Path(target) / "tokenizer.model")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, Path(target) / name)


def fingerprint(path: str | Path) -> str:
    """A SHA-256 over the architecture, every byte of the weights, and the sentencepiece model where there is
    one.
    """
    digest = hashlib.sha256(repr(ModelConfig.from_pretrained(path)).encode())
    for file in [*Checkpoint(path).files, *sorted(Path(path).glob("tokenizer.model*"))[:1]]:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _read_index(index: Path) -> dict[str, str]:
    """{tensor: file name} of an index. Raises ValueError if it is not one."""
    try:
        declared = read_object(index)["weight_map"]
        bad = [
            name for name in declared.values() if Path(name).name != name or not name.endswith(".safetensors")
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of safetensors files ({error!r})") from None
    if bad or not declared:
        raise ValueError(
            f"{index}: points to {bad[0] if bad else 'nothing'}, not to a .safetensors file of its folder"
        )
    return declared


def _first_cut(file: Path) -> str:
    """The tensor at which a truncated file ends, in words; nothing if the header itself is damaged."""
    with open(file, "rb") as stream:
        room = file.stat().st_size - 8
        size = int.from_bytes(stream.read(8), "little")
        if size > min(room, 10**8):
            return ""
        try:
            header = json.loads(stream.read(size))
            ends = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
            return (
                ": cut in "
                + min((start, name) for name, (start, end) in ends.items() if end > room - size)[1]
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
