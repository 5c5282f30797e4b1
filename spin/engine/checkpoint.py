"""Stop and go on: sharded checkpoints of training; and the export to a Hugging Face directory."""

import logging
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from model.mistral import Mistral
from model.weights import copy_tokenizer, write_checkpoint
from spin.engine.distributed import Ranks, whole
from spin.engine.files import commit, file_digest, read_json, to_json, whole_directory

log = logging.getLogger("spin")


class Checkpoints:
    """<directory>/step-NNNNNN: parameters and optimizer, each rank its shards, written beside the training
    that goes on.

    A checkpoint appears under its name when every rank's files are on disk and their digests with them, and
    the last `keep` stay. It can be loaded on any number of ranks.
    """

    def __init__(
        self, directory: Path, keep: int, model: Mistral, optimizer: torch.optim.Optimizer, ranks: Ranks
    ):
        self.directory, self.keep, self.model, self.optimizer, self.ranks = (
            directory,
            keep,
            model,
            optimizer,
            ranks,
        )
        # its own: what is written meanwhile must not meet training's collectives
        self.group = ranks.new_group()
        self.writer = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def restore(self) -> int:
        """Load the newest checkpoint that is whole; returns its step, 0 if there is none.

        One with files that are missing or differ from their digests is put aside as step-NNNNNN.damaged,
        saying so.
        """
        self.ranks.from_first(self._clear)
        for step in self.ranks.from_first(lambda: sorted(_complete(self.directory), reverse=True)):
            path = _path(self.directory, step)
            damaged = [name for names in self.ranks.gather(self._damaged(path)) for name in names]
            if not damaged:
                state = _state(self.model, self.optimizer)
                with warnings.catch_warnings():
                    # torch's notes on its own deprecated storage classes
                    warnings.simplefilter("ignore", UserWarning)
                    try:
                        dcp.load(state, checkpoint_id=path)
                    except CheckpointException as error:
                        raise OSError(
                            f"{path}: cannot be loaded ({_cause(error)}); remove it to go on without"
                        ) from error
                set_state_dict(
                    self.model,
                    self.optimizer,
                    model_state_dict=state["model"],
                    optim_state_dict=state["optimizer"],
                )
                return step
            self.ranks.from_first(lambda: _put_aside(path, damaged[0]))
        return 0

    def save(self, step: int) -> None:
        """Begin to write a checkpoint, once the one before is there. Raises OSError if that one could not be
        written.
        """
        self.wait()
        path = _path(self.directory, step)
        partial = path.with_name(path.name + ".partial")
        self.ranks.from_first(lambda: partial.mkdir(parents=True))
        copied = dcp.async_save(
            _state(self.model, self.optimizer), checkpoint_id=partial, process_group=self.group
        )
        assert isinstance(copied, Future)  # what a stager of one's own would change
        self.pending = self.writer.submit(self._finish, copied, partial, path)

    @property
    def failed(self) -> bool:
        """Whether what was being written could not be, on this rank."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Wait until what is being written is there. Raises OSError if it could not be written."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            pending.result()
        except (OSError, CheckpointException) as error:
            raise OSError(
                f"{self.directory}: the checkpoint could not be written ({_cause(error)}); the ones before "
                "it are intact. Mend that, and the same command goes on from the last one"
            ) from error

    def _finish(self, copied: Future, partial: Path, path: Path) -> None:
        copied.result()
        mine = {file.name: file_digest(file) for file in partial.glob(f"__{self.ranks.rank}_*")}
        digests = self.ranks.gather(mine, self.group)
        failure = None
        if self.ranks.first:
            try:
                everything = {name: digest for part in digests for name, digest in part.items()}
                everything[".metadata"] = file_digest(partial / ".metadata")
                (partial / "digests.json").write_text(to_json(everything))
                commit(partial, path)
                for step in sorted(_complete(self.directory))[: -self.keep]:
                    shutil.rmtree(_path(self.directory, step))
            except OSError as error:
                failure = error
        if failure := self.ranks.gather(failure, self.group)[0]:  # no rank goes on before it is there
            raise failure

    def _damaged(self, path: Path) -> list[str]:
        """Of this rank's share of the files, those that are not what was written."""
        try:
            digests = read_json(path / "digests.json")
        except (OSError, ValueError):
            return ["digests.json"]
        names = sorted(digests)[self.ranks.rank :: self.ranks.world_size]
        return [
            name for name in names if not (path / name).is_file() or file_digest(path / name) != digests[name]
        ]

    def _clear(self) -> None:
        """Remove what a killed run was writing."""
        for partial in self.directory.glob("step-*.partial"):
            shutil.rmtree(partial)


def room_needed(directory: Path, size: int, keep: int) -> int:
    """Bytes that `keep` + 1 checkpoints of `size` bytes take in addition to those in `directory`."""
    return size * max(0, keep + 1 - len(_complete(directory)))


def check_room(directory: Path, needed: int) -> None:
    """Raise OSError unless the disk of `directory` has room for so many bytes."""
    there = directory
    while not there.is_dir():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            f"{directory}: checkpoints and exported models will take {needed / 1e9:.3f} GB, and the disk has "
            f"{free / 1e9:.3f}; make room, lower train.keep_checkpoints, or run fewer iterations at a time"
        )


def _put_aside(path: Path, why: str) -> None:
    log.warning("%s: damaged (%s): put aside as *.damaged, going on from the one before it", path, why)
    aside = path.with_suffix(".damaged")
    shutil.rmtree(aside, ignore_errors=True)  # an earlier one of this step
    path.rename(aside)


def _path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def _complete(directory: Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    names = (path.name.removeprefix("step-") for path in directory.glob("step-*"))
    return [int(name) for name in names if name.isdigit()]


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank on which it did."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def export(model: Mistral, path: Path, tokenizer: Path, dtype: torch.dtype, card: str, ranks: Ranks) -> None:
    """Write sharded parameters as a Hugging Face directory that transformers loads, complete or not at all.

    Every rank takes part in gathering, one parameter at a time; the first writes. Tokenizer files come from
    `tokenizer`, a model directory or a sentencepiece file; `card` becomes README.md.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}

    def get(name):
        return whole(parameters[name].detach().to(dtype))

    if ranks.first:
        with whole_directory(path) as partial:
            write_checkpoint(partial, model.config, shapes, get, dtype)
            copy_tokenizer(tokenizer, partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
    else:
        write_checkpoint(path, model.config, shapes, get, dtype, write=False)
    ranks.barrier()


def _state(model: Mistral, optimizer: torch.optim.Optimizer) -> dict:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}
