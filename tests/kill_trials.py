"""Kill -9 at random moments of a tiny run's training: while it steps, saves a checkpoint, or exports.
Minutes; by hand.

    python -m tests.kill_trials --ranks 1 --trials 30

Each trial kills the process and its ranks, runs the command again, and compares weights and log with the
undisturbed run's. The first checkpoint comes after the first step and each step has one.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.helpers import ROOT, alive, children, command, environment, metrics

RECIPE = f"""
[model]
save_dtype = "float32"
[data]
path = "{ROOT}/miniature/seed0/sft.jsonl"
num_prompts = 120
[generate]
max_new_tokens = 12
dtype = "float32"
[train]
batch_size = 8
lr = 5e-5
beta = 2.0
epochs = 4
dtype = "float32"
checkpoint_every = 1
[sft]
init = "{ROOT}/miniature/seed0/base"
lr = 1e-4
dtype = "float32"
"""


def run(arguments: list[str], ranks: int = 1) -> None:
    done = subprocess.run(
        command("train.py", *arguments, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def kill_somewhere(process: subprocess.Popen, iteration: Path, aim: int, rng: random.Random) -> str:
    """Kill the process and its ranks: at any time (aim 0), while saving (1), while exporting (2). Returns
    what it was at.
    """
    while process.poll() is None and not (iteration / "metrics.jsonl").exists():
        time.sleep(0.002)

    def saving():
        return list((iteration / "checkpoints").glob("*.partial"))

    time.sleep(rng.random() * (3, 1.5, 0)[aim])
    while process.poll() is None and not (True, saving(), (iteration / "model.partial").exists())[aim]:
        time.sleep(0.0005)
    time.sleep(rng.random() * (0, 0.02, 0.05)[aim])
    family = [process.pid, *children(process.pid)]
    at = (
        "ended"
        if (iteration / "model").exists()
        else "exporting"
        if (iteration / "model.partial").exists()
        else ""
    )
    at = at or ("saving" if saving() else "stepping")
    for pid in family:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(alive(pid) for pid in family):
        time.sleep(0.01)
    return at


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--ranks", type=int, default=1)
    arguments.add_argument("--trials", type=int, default=30)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, rng, killed = Path(folder), random.Random(options.ranks), Counter()
        (work / "recipe.toml").write_text(RECIPE)
        recipe = ["--config", str(work / "recipe.toml")]
        whole = work / "whole/iter0"
        run([*recipe, f"--run.dir={work}/whole", "--sft"])

        def again(name):
            return [
                *recipe,
                f"--run.dir={work}/{name}",
                f"--model.base={work}/whole/base/model",
                "--iter",
                "0",
            ]

        run(again("whole"), options.ranks)
        for trial in range(options.trials):
            iteration = work / f"run{trial}/iter0"
            iteration.mkdir(parents=True)
            for name in ("config.toml", "inputs.json", "opponent_logps.safetensors"):
                shutil.copy(whole / name, iteration)
            shutil.copytree(whole / "generated", iteration / "generated")
            process = subprocess.Popen(
                command("train.py", *again(f"run{trial}"), ranks=options.ranks),
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            at = kill_somewhere(process, iteration, trial % 3, rng)
            run(again(f"run{trial}"), options.ranks)
            weights = [
                (directory / "model/model.safetensors").read_bytes() for directory in (iteration, whole)
            ]
            logs = [
                [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(d)]
                for d in (iteration, whole)
            ]
            if weights[0] != weights[1] or logs[0] != logs[1]:
                raise SystemExit(f"trial {trial}, killed while {at}: not the undisturbed run")
            killed[at] += 1
            print(f"trial {trial}: killed while {at}, ended as the undisturbed run", flush=True)
            shutil.rmtree(iteration.parent)
        print(dict(killed))


if __name__ == "__main__":
    main()
