"""Checkpoints: written next to training, whole or not used, the last few kept."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save

from model.weights import save_model
from spin.config import Model, Train
from spin.engine.checkpoint import Checkpoints, bytes_to_write, check_room
from spin.engine.distributed import ranks, sharded_model
from spin.engine.files import file_digest
from spin.engine.metrics import Log
from spin.engine.optimizer import RMSprop
from spin.engine.signals import Stopped
from spin.reference import score
from spin.trainer import train
from tests.helpers import PART, ROOT, metrics, pairs, small_config, small_model


@pytest.fixture(scope="module")
def group():
    with ranks() as group:
        yield group


@pytest.fixture
def opponent(tmp_path):
    save_model(small_model(), tmp_path / "m", torch.float32)
    return tmp_path / "m"


def run(opponent, group, directory, **changes):
    """Six steps, a checkpoint after each; returns the weights."""
    part, items = Train(**PART | dict(checkpoint_every=1) | changes), pairs(10)
    model = sharded_model(opponent, group, torch.float32)
    frozen = sharded_model(opponent, group, torch.float32)
    train(part, model, items, score(frozen, items, 60, 5, group), directory, group)
    return {name: weight.full_tensor().clone() for name, weight in model.named_parameters()}


def steps(directory):
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_few_are_kept(opponent, group, tmp_path, keep):
    run(opponent, group, tmp_path / "run", keep_checkpoints=keep)
    assert steps(tmp_path / "run") == [f"step-{step:06d}" for step in range(7 - keep, 7)]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path / "rank00000.safetensors"),
        lambda path: (path / "rank00000.safetensors").unlink(),
        lambda path: (path / "about.json").unlink(),
        lambda path: (path / "about.json").write_text("{"),
    ],
    ids=[
        "a bit of a shard",
        "a shard is missing",
        "no record",
        "half of the record",
    ],
)
def test_of_a_damaged_checkpoint_the_one_before_is_used(opponent, group, tmp_path, caplog, damage):
    undisturbed = run(opponent, group, tmp_path / "run")
    log = metrics(tmp_path / "run")
    damage(tmp_path / "run/checkpoints/step-000006")
    (tmp_path / "run/checkpoints/step-000007.partial").mkdir()  # of a run killed while it wrote
    assert same(run(opponent, group, tmp_path / "run"), undisturbed)
    assert "step-000006: damaged" in caplog.text and "resuming from the one before it" in caplog.text
    assert steps(tmp_path / "run") == ["step-000005", "step-000006", "step-000006.damaged"]
    again = metrics(tmp_path / "run")
    assert [row["loss"] for row in again] == [row["loss"] for row in log]
    assert again[:5] == log[:5]  # times included: the sixth step alone was taken again


@pytest.mark.parametrize("what", ["step", "iteration"])
def test_a_checkpoint_of_another_step_or_iteration_is_not_used(opponent, group, tmp_path, caplog, what):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/inputs.json").write_text('{"opponent": "a"}')
    undisturbed = run(opponent, group, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    if what == "step":  # the fifth under the name of the sixth
        shutil.rmtree(checkpoints / "step-000006")
        shutil.copytree(checkpoints / "step-000005", checkpoints / "step-000006")
    else:
        (tmp_path / "run/inputs.json").write_text('{"opponent": "b"}')
    assert same(run(opponent, group, tmp_path / "run"), undisturbed)
    assert "step-000006: damaged (of another step or iteration)" in caplog.text


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_nothing_in_a_checkpoint_is_executed(opponent, group, tmp_path):
    """With a digest that fits: it lies next to the file, so whoever changes one changes both."""
    undisturbed = run(opponent, group, tmp_path / "run")
    path, traces = tmp_path / "run/checkpoints/step-000006", tmp_path / "executed"
    assert sorted(file.name for file in path.iterdir()) == ["about.json", "rank00000.safetensors"]
    file = path / "rank00000.safetensors"
    for content in (pickle.dumps(Payload(traces)), save({"no/parameter": torch.zeros(2)})):
        traces.unlink(missing_ok=True)
        file.write_bytes(content)
        about = {"step": 6, "inputs": "", "files": {file.name: file_digest(file)}}
        (path / "about.json").write_text(json.dumps(about))
        with pytest.raises(OSError, match="step-000006: cannot be loaded .*; remove it"):
            run(opponent, group, tmp_path / "run")
        assert not traces.exists()
    shutil.rmtree(path)
    assert same(run(opponent, group, tmp_path / "run"), undisturbed)


def test_when_all_are_damaged_training_begins_anew(opponent, group, tmp_path):
    undisturbed = run(opponent, group, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").iterdir():
        flip(path / "rank00000.safetensors")
    assert same(run(opponent, group, tmp_path / "run"), undisturbed)


@pytest.mark.parametrize("second_moment", [torch.float32, torch.bfloat16])
def test_what_is_written_is_the_state_at_the_call(opponent, group, tmp_path, second_moment):
    model = sharded_model(opponent, group, torch.float32)
    optimizer = RMSprop(model.parameters(), lr=0.1, second_moment=second_moment)
    sum(weight.full_tensor().sum() for weight in model.parameters()).backward()
    optimizer.step()
    wanted = [weight.full_tensor().clone() for weight in model.parameters()]
    moments = [optimizer.state[weight]["square_avg"].full_tensor().clone() for weight in model.parameters()]
    checkpoints = Checkpoints(tmp_path / "c", 1, model, optimizer, group)
    checkpoints.save(1)
    for _ in range(3):
        optimizer.step()  # training continues at once
    checkpoints.wait()
    assert checkpoints.restore() == 1
    assert all(torch.equal(a, b.full_tensor()) for a, b in zip(wanted, model.parameters()))
    again = [optimizer.state[weight]["square_avg"].full_tensor() for weight in model.parameters()]
    assert all(torch.equal(a, b) and b.dtype == second_moment for a, b in zip(moments, again))


@pytest.mark.parametrize(
    "changes",
    [
        {"second_moment": "bfloat16"},
        {"optimizer": "adamw"},
        {"unsharded_gradients": True},
        {"heldout_pairs": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_run_that_goes_on_ends_with_the_same_bits(opponent, group, tmp_path, changes):
    undisturbed = run(opponent, group, tmp_path / "run", **changes)
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    (_, last) = steps(tmp_path / "run")
    flip(tmp_path / "run/checkpoints" / last / "rank00000.safetensors")
    assert same(run(opponent, group, tmp_path / "run", **changes), undisturbed)
    assert [row["loss"] for row in metrics(tmp_path / "run")] == losses
    # once more: the one put aside before makes way
    flip(tmp_path / "run/checkpoints" / last / "rank00000.safetensors")
    assert same(run(opponent, group, tmp_path / "run", **changes), undisturbed)


def test_a_disk_without_room_is_refused(tmp_path):
    check_room(tmp_path / "not/there/yet", 10)
    with pytest.raises(OSError, match="need 1000000.000 GB, and the disk has .*; make room"):
        check_room(tmp_path / "not/there/yet", 10**15)
    (tmp_path / "checkpoints/step-000007").mkdir(parents=True)
    architecture = small_config()
    count = sum(weight.numel() for weight in small_model().parameters())
    for keep, existing in ((1, 1), (2, 1)):  # RMSProp: 8 bytes per parameter, and 2 of the export
        needed = bytes_to_write(tmp_path, architecture, Model(), Train(keep_checkpoints=keep))
        assert needed == count * (8 * (keep + 1 - existing) + 2)
    (tmp_path / "model").mkdir()
    assert bytes_to_write(tmp_path, architecture, Model(), Train()) == 0


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_stops_training_and_leaves_the_last_one(
    opponent, group, tmp_path
):
    undisturbed = run(opponent, group, tmp_path / "run")
    lines = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from spin.engine.checkpoint import Checkpoints
        from spin.engine.distributed import ranks
        from tests.test_checkpoint import run
        save = Checkpoints.save
        def limited(self, step):
            if step == 4:  # from here on no file may be longer than a checkpoint's: as on a disk that is full
                self.wait()
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
            save(self, step)
        Checkpoints.save = limited
        with ranks() as group:
            run(Path({str(opponent)!r}), group, Path({str(tmp_path / "full")!r}))
    """
    script = "\n".join(line[8:] for line in lines.splitlines())
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # a condition of equal bits
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | threads
    )
    assert done.returncode == 1
    error = "checkpoint could not be written .*File too large.*Earlier ones are intact"
    assert re.search(error, done.stderr), done.stderr[-2000:]
    assert "step-000003" in steps(tmp_path / "full") and "step-000004" not in steps(tmp_path / "full")
    assert same(run(opponent, group, tmp_path / "full"), undisturbed)  # with room again, it resumes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint_of_the_last_step(opponent, group, tmp_path, number):
    undisturbed = run(opponent, group, tmp_path / "whole", checkpoint_every=100)
    inherited = signal.signal(number, before := lambda *_: None)  # a background job's tests ignore SIGINT
    write = Log.write

    def write_and_stop(self, row, bar):
        write(self, row, bar)
        if row["step"] == 3:
            for _ in range(2):  # torchrun and SLURM may each send one
                signal.raise_signal(number)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Log, "write", write_and_stop)
            with pytest.raises(Stopped, match="stopped after step 4 of 6"):
                run(opponent, group, tmp_path / "run", checkpoint_every=100)
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, inherited)
    assert steps(tmp_path / "run") == ["step-000004"] and len(metrics(tmp_path / "run")) == 4
    assert same(run(opponent, group, tmp_path / "run", checkpoint_every=100), undisturbed)
