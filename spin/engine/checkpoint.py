"""Sharded checkpoints of training, written in the background; export to a Hugging Face directory."""

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.mistral import Mistral
from model.weights import copy_tokenizer, write_checkpoint
from spin.config import Model, Optimization
from spin.engine.distributed import TIMEOUT, Ranks, local, shard_rows, whole
from spin.engine.files import commit, file_digest, read_json, to_json, whole_directory
from spin.engine.optimizer import state_bytes
from spin.engine.stages import RECORD

log = logging.getLogger("spin")


class Checkpoints:
    """<directory>/step-NNNNNN: parameters and optimizer state, each rank's shards, written during training.

    A checkpoint gets its name when every rank's file and about.json are on disk: the files' digests, the
    step, and a digest of the iteration's inputs.json. The last `keep` remain. Any number of ranks loads it.
    """

    def __init__(
        self, directory: Path, keep: int, model: Mistral, optimizer: torch.optim.Optimizer, ranks: Ranks
    ):
        self.directory, self.keep, self.ranks = directory, keep, ranks
        self.parameters, self.optimizer = dict(model.named_parameters()), optimizer
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)  # apart from training's collectives
        self.writer = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def close(self) -> None:
        """Finish the write in progress, and free the thread and the process group."""
        self.writer.shutdown()
        dist.destroy_process_group(self.group)

    def restore(self) -> int:
        """Load the newest intact checkpoint. Returns its step; 0 if there is none.

        One that is incomplete, damaged, or of another step or iteration is renamed step-NNNNNN.damaged.
        """
        self.ranks.from_first(self._clear)
        for step in self.ranks.from_first(lambda: sorted(_complete(self.directory), reverse=True)):
            path = _path(self.directory, step)
            damaged = [name for names in self.ranks.gather(self._damaged(path, step)) for name in names]
            if not damaged:
                try:
                    self._load(path)
                except (SafetensorError, IndexError, KeyError, RuntimeError, ValueError) as error:
                    raise OSError(
                        f"{path}: cannot be loaded ({error}); remove it to resume without"
                    ) from None
                return step
            self.ranks.from_first(lambda: _put_aside(path, damaged[0]))
        return 0

    def save(self, step: int) -> None:
        """Start writing a checkpoint, after the previous one; raises OSError if that one failed."""
        self.wait()
        path = _path(self.directory, step)
        partial = path.with_name(path.name + ".partial")
        self.ranks.from_first(lambda: partial.mkdir(parents=True))
        tensors = {}  # copies, which training doesn't change
        for name, parameter in self.parameters.items():
            for key, value in {"": parameter, **self.optimizer.state[parameter]}.items():
                tensors[f"{name}/{key}"] = local(value).detach().to("cpu", copy=True)
        self.pending = self.writer.submit(self._write, tensors, step, partial, path)

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in progress couldn't be written on this rank."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Wait for the checkpoint in progress. Raises OSError if it couldn't be written."""
        pending, self.pending = self.pending, None
        try:
            if pending:
                pending.result()
        except OSError as error:
            raise OSError(
                f"{self.directory}: the checkpoint could not be written ({error}). Earlier ones are intact; "
                "once that is solved, the same command resumes from the last one"
            ) from error

    def _write(self, tensors: dict[str, Tensor], step: int, partial: Path, path: Path) -> None:
        """Write this rank's file; the first rank then completes the checkpoint. All ranks raise the same."""
        file = partial / f"rank{self.ranks.rank:05d}.safetensors"
        written: dict[str, str] = {}
        failure: OSError | None = None
        try:
            if self.ranks.rank < self.ranks.mesh["shards"].size():  # the first replica
                save_file(tensors, file)
                written = {file.name: file_digest(file)}
        except (OSError, SafetensorError) as error:
            failure = OSError(f"{file}: {error}")
        of_ranks = self.ranks.gather((written, failure), self.group)
        failure = next((error for _, error in of_ranks if error), None)
        if self.ranks.first and not failure:
            try:
                files = {name: digest for digests, _ in of_ranks for name, digest in digests.items()}
                about = {"step": step, "inputs": self._inputs(), "files": files}
                (partial / "about.json").write_text(to_json(about))
                commit(partial, path)
                for old in sorted(_complete(self.directory))[: -self.keep]:
                    shutil.rmtree(_path(self.directory, old))
            except OSError as error:
                failure = error
        if failure := self.ranks.gather(failure, self.group)[0]:  # no rank continues before it is complete
            raise failure

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        """Read this rank's rows. Concatenated in the order of ranks, the files have all rows of a tensor."""
        with ExitStack() as opened:
            files = [opened.enter_context(safe_open(f, "pt")) for f in sorted(path.glob("*.safetensors"))]
            for entry in files[0].keys():
                name, key = entry.rsplit("/", 1)
                parameter, parts = self.parameters[name], [file.get_slice(entry) for file in files]
                if not parts[0].get_shape():  # AdamW's step
                    self.optimizer.state[parameter][key] = files[0].get_tensor(entry)
                    continue
                rows, first, values = shard_rows(parameter), 0, []
                for part in parts:
                    size = part.get_shape()[0]
                    begin, end = (min(max(row - first, 0), size) for row in (rows.start, rows.stop))
                    values.append(part[begin:end])
                    first += size
                value = torch.cat(values)
                if key:
                    self.optimizer.state[parameter][key] = torch.empty_like(parameter, dtype=value.dtype)
                local(self.optimizer.state[parameter][key] if key else parameter).copy_(value)

    def _inputs(self) -> str:
        """A digest of what the iteration depends on; empty if there is no record of it."""
        file = self.directory.parent / RECORD
        return file_digest(file) if file.is_file() else ""

    def _damaged(self, path: Path, step: int) -> list[str]:
        """What is wrong with a checkpoint: this rank's share of the files is compared with the digests."""
        try:
            about = read_json(path / "about.json")
            digests = dict(about["files"])
            if (about["step"], about["inputs"]) != (step, self._inputs()):
                return ["of another step or iteration"]
        except (OSError, ValueError, KeyError, TypeError):
            return ["about.json"]
        names = sorted(digests)[self.ranks.rank :: self.ranks.world_size]
        files = {name: path / name for name in names}
        return [
            name for name, file in files.items() if not file.is_file() or file_digest(file) != digests[name]
        ]

    def _clear(self) -> None:
        """Remove what a killed run was writing."""
        for partial in self.directory.glob("step-*.partial"):
            shutil.rmtree(partial)


def exports(part: Optimization) -> dict[str, float]:
    """An iteration's models, in order, with the epochs after which each is exported."""
    last, every = max(part.epochs, part.continue_to), part.export_every
    ends = {round(i * every, 6) for i in range(1, int(last / every + 1e-6) + 1)} if every else set()
    ends |= {part.epochs, last}
    return {"model" if end == part.epochs else f"epoch{end:g}/model": end for end in sorted(ends)}


def to_export(part: Optimization, directory: Path) -> dict[str, float]:
    """Those of `exports` that `directory` lacks. Training has passed one if a later one exists."""
    models = exports(part)
    existing = [place for place, name in enumerate(models) if (directory / name).is_dir()]
    return dict([*models.items()][max(existing, default=-1) + 1 :])


def bytes_to_write(directory: Path, architecture: ModelConfig, model: Model, part: Optimization) -> int:
    """Bytes that training in `directory` and the exports will write: 0 if all have been exported."""
    missing = len(to_export(part, directory))
    if not missing:
        return 0
    with torch.device("meta"):
        count = sum(weight.numel() for weight in Mistral(architecture).parameters())
    checkpoints = max(0, part.keep_checkpoints + 1 - len(_complete(directory / "checkpoints")))
    exported = missing * getattr(torch, model.save_dtype).itemsize
    return count * (checkpoints * (4 + state_bytes(part)) + exported)


def check_room(directory: Path, needed: int) -> None:
    """Raise OSError unless the disk of `directory` has room for so many bytes."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{directory}: checkpoints and exported models need {needed / 1e9:.3f} GB, and the disk has "
            f"{free / 1e9:.3f}; make room, lower train.keep_checkpoints, or run fewer iterations at a time"
        )


def _put_aside(path: Path, why: str) -> None:
    log.warning("%s: damaged (%s): renamed *.damaged, resuming from the one before it", path, why)
    aside = path.with_suffix(".damaged")
    shutil.rmtree(aside, ignore_errors=True)  # an earlier one of this step
    path.rename(aside)


def _path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def _complete(directory: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    names = (path.name.removeprefix("step-") for path in directory.glob("step-*"))
    return [int(name) for name in names if name.isdigit()]


def export(model: Mistral, path: Path, tokenizer: Path, dtype: torch.dtype, card: str, ranks: Ranks) -> None:
    """Write sharded parameters as a Hugging Face directory that is complete or absent.

    Every rank takes part in gathering, one parameter at a time; the first writes. Tokenizer files come from
    `tokenizer`, a model directory or a tokenizer file; `card` becomes README.md.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}

    def get(name):
        return whole(parameters[name].detach().to(dtype))

    if ranks.first:
        with whole_directory(path) as new:
            write_checkpoint(new, model.config, shapes, get, dtype)
            copy_tokenizer(tokenizer, new)
            (new / "README.md").write_text(card, encoding="utf-8")
    else:
        write_checkpoint(path, model.config, shapes, get, dtype, write=False)
    ranks.barrier()
