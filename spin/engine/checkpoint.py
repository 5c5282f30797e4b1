"""Sharded checkpoints of training, written in the background; export to a Hugging Face directory."""

import logging
import pickle
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from model.config import ModelConfig
from model.mistral import Mistral
from model.weights import copy_tokenizer, write_checkpoint
from spin.config import Model, Optimization
from spin.engine.distributed import Ranks, whole
from spin.engine.files import commit, file_digest, read_json, to_json, whole_directory
from spin.engine.optimizer import state_bytes
from spin.engine.stages import RECORD

log = logging.getLogger("spin")


class Checkpoints:
    """<directory>/step-NNNNNN: parameters and optimizer state, each rank's shards, written during training.

    A checkpoint gets its name when every rank's files are on disk, with about.json: their digests, the step,
    and a digest of the iteration's inputs.json. The last `keep` are kept. It loads on any number of ranks.
    Loading executes nothing that a file contains.
    """

    def __init__(
        self, directory: Path, keep: int, model: Mistral, optimizer: torch.optim.Optimizer, ranks: Ranks
    ):
        self.directory, self.keep, self.ranks = directory, keep, ranks
        self.model, self.optimizer = model, optimizer
        self.group = ranks.new_group()  # its own, apart from training's collectives
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
                self._load(path)
                return step
            self.ranks.from_first(lambda: _put_aside(path, damaged[0]))
        return 0

    def save(self, step: int) -> None:
        """Start writing a checkpoint, after the previous one; raises OSError if that one failed."""
        self.wait()
        path = _path(self.directory, step)
        partial = path.with_name(path.name + ".partial")
        self.ranks.from_first(lambda: partial.mkdir(parents=True))
        copied = dcp.async_save(self._state()[0], checkpoint_id=partial, process_group=self.group)
        assert isinstance(copied, Future)  # as long as no stager is given
        self.pending = self.writer.submit(self._finish, copied, step, partial, path)

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in progress couldn't be written on this rank."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Wait for the checkpoint in progress. Raises OSError if it couldn't be written."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            pending.result()
        except (OSError, CheckpointException) as error:
            raise OSError(
                f"{self.directory}: the checkpoint could not be written ({_cause(error)}). Earlier ones are "
                "intact; once that is solved, the same command resumes from the last one"
            ) from error

    def _state(self) -> tuple[dict, dict]:
        """The tensors of a checkpoint, and the optimizer's other values, which follow from the settings.

        torch would store the latter as pickles.
        """
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer["state"]}, {"param_groups": optimizer["param_groups"]}

    def _load(self, path: Path) -> None:
        state, other = self._state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about torch's own deprecated storage classes
            try:
                dcp.load(state, storage_reader=_TensorReader(path), planner=_TensorPlanner())
            except CheckpointException as error:
                raise OSError(
                    f"{path}: cannot be loaded ({_cause(error)}); remove it to resume without"
                ) from error
        optimizer = {"state": state["optimizer"], **other}
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=optimizer
        )

    def _inputs(self) -> str:
        """A digest of what the iteration depends on; empty if there is no record of it."""
        file = self.directory.parent / RECORD
        return file_digest(file) if file.is_file() else ""

    def _finish(self, copied: Future, step: int, partial: Path, path: Path) -> None:
        copied.result()
        mine = {file.name: file_digest(file) for file in partial.glob(f"__{self.ranks.rank}_*")}
        digests = self.ranks.gather(mine, self.group)
        failure = None
        if self.ranks.first:
            try:
                files = {name: digest for part in digests for name, digest in part.items()}
                files[".metadata"] = file_digest(partial / ".metadata")
                about = {"step": step, "inputs": self._inputs(), "files": files}
                (partial / "about.json").write_text(to_json(about))
                commit(partial, path)
                for old in sorted(_complete(self.directory))[: -self.keep]:
                    shutil.rmtree(_path(self.directory, old))
            except OSError as error:
                failure = error
        if failure := self.ranks.gather(failure, self.group)[0]:  # no rank continues before it is complete
            raise failure

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


class _MetadataUnpickler(pickle.Unpickler):
    """torch stores a checkpoint's metadata as a pickle. This reads it without calling anything else."""

    def find_class(self, module: str, name: str):
        known = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        known = known or (module, name) in (("pathlib", "PosixPath"), ("torch.serialization", "_get_layout"))
        known = known or (module, name) == ("torch", "Size")
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which no checkpoint contains")


class _TensorReader(dcp.FileSystemReader):
    def read_metadata(self, *args, **kwargs) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorPlanner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item, value) -> None:
        """torch unpickles whatever is not a tensor; these checkpoints contain tensors only."""
        raise ValueError(f"{read_item.dest_index.fqn} is not a tensor")


def bytes_to_write(directory: Path, architecture: ModelConfig, model: Model, part: Optimization) -> int:
    """Bytes that training in `directory` and the export will write: 0 if it has been exported."""
    if (directory / "model").is_dir():
        return 0
    with torch.device("meta"):
        count = sum(weight.numel() for weight in Mistral(architecture).parameters())
    checkpoints = max(0, part.keep_checkpoints + 1 - len(_complete(directory / "checkpoints")))
    return count * (checkpoints * (4 + state_bytes(part)) + getattr(torch, model.save_dtype).itemsize)


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


def _cause(error: BaseException) -> BaseException:
    """The error of the first rank that had one."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def export(model: Mistral, path: Path, tokenizer: Path, dtype: torch.dtype, card: str, ranks: Ranks) -> None:
    """Write sharded parameters as a Hugging Face directory that is complete or absent.

    Every rank takes part in gathering, one parameter at a time; the first writes. Tokenizer files come from
    `tokenizer`, a model directory or a sentencepiece file; `card` becomes README.md.
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
