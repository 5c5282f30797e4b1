"""Stop and go on: sharded checkpoints of training; and the export to a Hugging Face directory."""

import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from model.mistral import Mistral
from model.weights import copy_tokenizer, write_checkpoint
from spin.distributed import Ranks, whole
from spin.files import commit, whole_directory


def latest_step(directory: Path) -> int:
    """The step of the newest complete checkpoint in `directory`; 0 if there is none."""
    return max((int(path.name.removeprefix("step-")) for path in _complete(directory)), default=0)


def save(directory: Path, step: int, model: Mistral, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Write `directory`/step-NNNNNN, each rank its shards; older checkpoints go once it is there."""
    path = directory / f"step-{step:06d}"
    partial = path.with_name(path.name + ".partial")
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    dcp.save(_state(model, optimizer), checkpoint_id=partial)
    if ranks.first:
        commit(partial, path)
        for old in _complete(directory):
            if old != path:
                shutil.rmtree(old)
    ranks.barrier()


def load(directory: Path, step: int, model: Mistral, optimizer: torch.optim.Optimizer) -> None:
    """Put the state of `directory`/step-NNNNNN, written by any number of ranks, into model and optimizer."""
    state = _state(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's notes on its own deprecated storage classes
        dcp.load(state, checkpoint_id=directory / f"step-{step:06d}")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def export(model: Mistral, path: Path, tokenizer: Path, dtype: torch.dtype, card: str, ranks: Ranks) -> None:
    """Write sharded parameters as a Hugging Face directory that transformers loads, complete or not at all.

    Every rank takes part in gathering, one parameter at a time; the first writes. Tokenizer files come from
    `tokenizer`, a model directory or a sentencepiece file; `card` becomes README.md.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    get = lambda name: whole(parameters[name].detach().to(dtype))  # noqa: E731
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


def _complete(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step-*") if path.name.removeprefix("step-").isdigit()]
