"""Several ranks and several agents: signals, deaths, restarts, two "nodes" on one host, the SLURM script."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import (
    ROOT,
    children,
    command,
    count_lines,
    environment,
    free_port,
    metrics,
    rank_of,
    run_script,
)

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """(arguments of train.py, the undisturbed run): 140 steps on given pairs, two ranks."""
    folder = tmp_path_factory.mktemp("nodes")
    run_script("train.py", *recipe(folder / "base"), "--sft")
    base = f"--model.base={folder}/base/base/model"
    run_script("generate.py", *recipe(folder / "pairs", base), "--iter", "0")
    pairs = f"--data.pairs={folder}/pairs/iter0/generated"

    def arguments(run, *more):
        longer = (
            "--data.num_prompts=0",
            "--train.epochs=20",
            "--evaluate.heldout=",
            "--train.checkpoint_every=25",
        )
        return [*recipe(run, base, pairs, *longer, *more), "--iter", "0"]

    run_script("train.py", *arguments(folder / "whole"), ranks=2)
    return arguments, folder / "whole/iter0"


def start(arguments, **options):
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment() | options,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process, ready, seconds=600):
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


def assert_same(one, two, exactly=True):
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (one, two))
    for name in theirs:
        close = (ours[name] - theirs[name]).norm() <= (0 if exactly else 1e-3) * theirs[name].norm()
        assert close, name
    assert [row["step"] for row in metrics(one)] == [row["step"] for row in metrics(two)]


def test_sigterm_to_torchrun_leaves_a_checkpoint_and_another_number_of_ranks_goes_on_up_to_rounding(
    trained, tmp_path
):
    arguments, whole = trained
    run = tmp_path / "run/iter0"
    for ranks, until in ((2, 40), (1, 90)):
        process = start(command("train.py", *arguments(tmp_path / "run"), ranks=ranks))
        wait_for(process, lambda: count_lines(run / "metrics.jsonl") >= until)
        process.send_signal(signal.SIGTERM)
        output = process.communicate()[0]
        last = max(int(path.name[5:]) for path in (run / "checkpoints").iterdir())
        assert process.returncode
        assert f"stopped after step {last} of 140; run the same command to resume" in output
        assert until <= len(metrics(run)) == last < 140
    run_script("train.py", *arguments(tmp_path / "run"), ranks=4)
    assert_same(run, whole, exactly=False)


def test_a_killed_rank_is_named_and_with_restarts_the_run_ends_as_if_undisturbed(trained, tmp_path):
    arguments, whole = trained
    run = tmp_path / "run/iter0"
    launch = command("train.py", *arguments(tmp_path / "run"), ranks=2)

    def kill_rank_1(process, lines):
        wait_for(process, lambda: count_lines(run / "metrics.jsonl") >= lines)
        (victim,) = (pid for pid in children(process.pid) if rank_of(pid) == 1)
        os.kill(victim, signal.SIGKILL)

    process = start(launch)
    kill_rank_1(process, 30)
    output = process.communicate(timeout=900)[0]  # where a collective waits for hours
    assert process.returncode
    assert "Signal 9 (SIGKILL)" in output and "rank      : 1" in output.split("Root Cause")[-1]
    assert "RuntimeError" not in output  # no traceback of the other rank pushes itself in front

    launch.insert(launch.index("--standalone"), "--max-restarts=2")
    process = start(launch)
    kill_rank_1(process, 80)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert_same(run, whole)


def test_a_rank_with_an_error_of_its_own_ends_the_job_with_it(trained, tmp_path):
    arguments, _ = trained
    code = (
        "import os, runpy, sys, spin.trainer as trainer\n"
        "original = trainer.clip_gradient\n"
        "def failing(model, limit, count=[0]):\n"
        "    count[0] += 1\n"
        "    if os.environ['RANK'] == '1' and count[0] == 9: raise ValueError('this is the cause')\n"
        "    return original(model, limit)\n"
        "trainer.clip_gradient = failing\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    (tmp_path / "failing.py").write_text(code)
    launch = command("train.py", *arguments(tmp_path / "run"), ranks=2)
    launch[launch.index(str(ROOT / "train.py"))] = str(tmp_path / "failing.py")
    process = start(launch, PYTHONPATH=str(ROOT))
    output = process.communicate(timeout=900)[0]
    assert process.returncode
    assert "error (rank 1): this is the cause" in output and "rank      : 1" in output.split("Root Cause")[-1]


def test_a_shard_size_that_does_not_divide_the_ranks_is_refused(trained, tmp_path):
    arguments, _ = trained
    output = run_script("train.py", *arguments(tmp_path / "run", "--run.shard_size=2"), fails=True)
    assert "run.shard_size = 2 does not divide the number of ranks, 1" in output


FAKES = {
    "scontrol": 'case $1 in show) echo localhost; echo localhost;; requeue) echo "queued again: $2";; esac',
    "srun": 'while [[ $1 == --* ]]; do shift; done; for n in 0 1; do "$@" & echo $! >> $AGENTS; done; s=0; '
    "for p in $(cat $AGENTS); do wait $p || s=$?; done; exit $s",
    "scancel": "kill -TERM $(cat $AGENTS)",
}


def test_the_slurm_script_leaves_a_checkpoint_when_time_is_up_and_is_queued_again(trained, tmp_path):
    """Two agents, and as the script asks for shards of a node's size, a copy of the model on each (HSDP)."""
    arguments, whole = trained
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "run/iter0"
    settings = dict(
        PATH=f"{tmp_path}:{BIN}:{os.environ['PATH']}",
        AGENTS=str(tmp_path / "agents"),
        GPUS="1",
        PORT=str(free_port()),
        SLURM_JOB_NODELIST="n[1-2]",
        SLURM_NNODES="2",
        SLURM_JOB_ID="77",
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    process = start(["bash", str(ROOT / "configs/slurm.sh"), *arguments(tmp_path / "run")], **settings)
    wait_for(process, lambda: count_lines(run / "metrics.jsonl") >= 30)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate()[0]
    assert "queued again: 77" in output and "stopped after step" in output
    assert not (run / "model").exists()
    (tmp_path / "agents").unlink()
    process = start(
        ["bash", str(ROOT / "configs/slurm.sh"), *arguments(tmp_path / "run")],
        SLURM_RESTART_COUNT="1",
        **settings,
    )
    output = process.communicate()[0]
    assert process.returncode == 0 and "queued again" not in output, output
    assert_same(run, whole, exactly=False)
