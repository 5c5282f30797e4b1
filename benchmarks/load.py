"""Loading a sharded checkpoint on two ranks next to a plain read of the same bytes: time, and peak memory.

    python -m benchmarks.load [--gigabytes 1.3] [--repeats 5]

Writes a checkpoint of bf16 weights (random, Hugging Face shards of at most 500 MB) to a temporary folder, and
starts two ranks. Each reads its rows into its fp32 FSDP2 shards (`spin.engine.distributed.sharded_model`: the
policy; twice the bytes are written that are read), and the whole into a bf16 replica
(`model.weights.load_model`: the opponent); and in turn with each, as many bytes of the files into fresh
memory with nothing but readinto. All with the system's page cache emptied of the files first ("cold") and
with it filled ("warm"). What was loaded is compared with the written tensors first. Memory is what a rank's
process grows to over its size before, resident file pages included; the floor is its shard. The loaded model
is exported once, too: how much the writing process grows, and whether the tensors come back as they were.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.model import memory_status
from model.config import ModelConfig
from model.mistral import Mistral
from model.weights import Checkpoint, load_model, write_checkpoint
from spin.engine.distributed import ranks, shard_rows, sharded_model, whole


def write(path: Path, gigabytes: float) -> None:
    """A checkpoint of about that size in bf16: a layer has 54.5M parameters, embedding and head have 131M."""
    layers = max(1, round((gigabytes * 1e9 / 2 - 131e6) / 54.5e6))
    config = ModelConfig(32000, 2048, 7168, layers, 16, 4, 128)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Mistral(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)

    def draw(name):
        return torch.randn(shapes[name], generator=generator)

    write_checkpoint(path, config, shapes, draw, torch.bfloat16, max_shard_bytes=500 * 10**6)


def forget(files: list[Path]) -> None:
    """Empty the page cache of the files, so that the next read comes from the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_read(files: list[Path], rank: int = 0, world_size: int = 1) -> list[torch.Tensor]:
    """A rank's share of every file's bytes, in fresh memory."""
    kept = []
    for file in files:
        share = file.stat().st_size // world_size
        buffer = torch.empty(share, dtype=torch.uint8)
        with open(file, "rb", buffering=0) as stream:
            stream.seek(rank * share)
            view, done = memoryview(buffer.numpy()), 0
            while done < share:
                done += stream.readinto(view[done:])
        kept.append(buffer)
    return kept


def work(path: Path, repeats: int) -> None:
    """What each rank does; the first prints the result."""
    with ranks() as group:
        files = Checkpoint(path).files
        before = memory_status("VmRSS")
        model = sharded_model(path, group, torch.bfloat16)
        peak = memory_status("VmHWM") - before
        shard = sum(parameter.to_local().nbytes for parameter in model.parameters()) / 1e9
        largest = max(parameter.numel() for parameter in model.parameters()) * 2 / 1e9  # in the file: bf16
        checkpoint = Checkpoint(path)
        for name, parameter in model.named_parameters():
            if not torch.equal(parameter.to_local(), checkpoint.read(name, shard_rows(parameter)).float()):
                raise SystemExit(f"{name} was not loaded as it was written")
        before = memory_status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

        def get(name, model=model):
            return whole(model.get_parameter(name).detach().bfloat16())

        write_checkpoint(path.with_name("copy"), model.config, shapes, get, torch.bfloat16, write=group.first)
        export_peak = memory_status("VmHWM") - before
        group.barrier()
        copy = Checkpoint(path.with_name("copy"))
        if not all(torch.equal(copy.read(name), checkpoint.read(name)) for name in shapes):
            raise SystemExit("what was exported is not what was loaded")
        del model, parameter
        group.release_memory()

        seconds: dict[str, list[float]] = {}
        for _ in range(repeats):
            for cache in ("cold", "warm"):
                for name, read in (
                    ("shards", lambda: sharded_model(path, group, torch.bfloat16)),
                    ("plain read of half", lambda: plain_read(files, group.rank, group.world_size)),
                    ("replica", lambda: load_model(path)),
                    ("plain read of all", lambda: plain_read(files)),
                ):
                    if cache == "cold" and group.first:
                        forget(files)
                    group.barrier()
                    began = time.perf_counter()
                    result = read()
                    group.barrier()
                    seconds.setdefault(f"{name}, {cache}", []).append(time.perf_counter() - began)
                    del result
                    group.release_memory()
        if group.first:
            size = sum(file.stat().st_size for file in files) / 1e9
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            ratios = {
                f"{ours}, {cache}": round(
                    medians[f"plain read of {part}, {cache}"] / medians[f"{ours}, {cache}"], 2
                )
                for ours, part in (("shards", "half"), ("replica", "all"))
                for cache in ("cold", "warm")
            }
            for name, value in medians.items():
                print(f"{name}: {value:.2f} s")
            print(
                f"peak memory of rank 0: {peak:.2f} GB; its shard {shard:.2f}, the largest tensor "
                f"{largest:.2f}"
            )
            print(f"growth while exporting: {export_peak:.2f} GB")
            print(
                json.dumps(
                    {
                        "name": "load",
                        "ratio": ratios["shards, cold"],
                        "ratios": ratios,
                        "checkpoint_gb": round(size, 2),
                        "ranks": dist.get_world_size(),
                        "seconds": {name: round(value, 3) for name, value in medians.items()},
                        "peak_memory_gb": {
                            "ours": round(peak, 3),
                            "shard plus largest tensor": round(shard + largest, 3),
                            "growth while exporting": round(export_peak, 3),
                        },
                        "agreed": "every row of every tensor",
                    }
                )
            )


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--gigabytes", type=float, default=1.3)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--path", type=Path, help=argparse.SUPPRESS)  # given to the ranks
    options = arguments.parse_args()
    if options.path:
        work(options.path, options.repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "model", options.gigabytes)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        again = ["-m", "benchmarks.load", f"--path={folder}/model", f"--repeats={options.repeats}"]
        subprocess.run([*launch, *again], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
