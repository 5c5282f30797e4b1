"""metrics.jsonl, stages.jsonl; TensorBoard events, a Weights & Biases run where the recipe asks for them."""

import importlib.util
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from spin.config import Optimization
from spin.engine.files import no_link, read_jsonl, to_jsonl, write_whole

# Dense bf16 FLOP/s, GiB and bytes/s from NVIDIA's data sheets, by a part of the device's name; the first that
# matches counts.
GPUS = {
    "H200": (989e12, 139, 4.8e12),
    "H100 PCIe": (756e12, 80, 2.0e12),
    "H100": (989e12, 80, 3.35e12),
    "A100": (312e12, 80, 2.04e12),
    "L40S": (362e12, 44, 0.86e12),
    "RTX 4090": (165e12, 24, 1.01e12),
}


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of this GPU, if it is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, (peak, *_) in GPUS.items() if part in name), None)


def check_loggers(part: Optimization) -> None:
    """Raise ValueError if the package of a requested logger is not installed."""
    for package in ("tensorboard", "wandb"):
        if getattr(part, package) and not importlib.util.find_spec(package):
            raise ValueError(f"{package} = true needs the package: pip install {package}, or set it to false")


class Log:
    """metrics.jsonl: one object per step. Steps after `start`, which a killed run had logged, are removed."""

    def __init__(self, directory: Path, start: int, part: Optimization):
        path = directory / "metrics.jsonl"
        write_whole(path, to_jsonl(row for row in read_log(path) if row["step"] <= start))
        self._file = open(path, "ab", opener=no_link)
        self._events = self._run = None
        if part.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        if part.wandb:
            import wandb

            # "auto": a run that was stopped is continued; it ignores steps that it has.
            self._run = wandb.init(dir=directory, name=str(directory), config=asdict(part), resume="auto")

    def write(self, metrics: dict, bar: tqdm) -> None:
        """Append a step's metrics, and show some of them on the progress bar."""
        self._file.write(to_jsonl([metrics]).encode())
        self._file.flush()
        if self._events:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, metrics["step"])
        if self._run:
            self._run.log(metrics, step=metrics["step"])
        shown = {name: f"{metrics[name]:.3f}" for name in ("loss", "accuracy") if name in metrics}
        bar.set_postfix(shown | {"tokens/s": f"{metrics['tokens_per_second']:.0f}"}, refresh=False)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        if self._events:
            self._events.close()
        if self._run:
            self._run.finish(exit_code=int(error[0] is not None))


def read_log(path: Path) -> list[dict]:
    """The steps of a metrics.jsonl, also while it is being written; none if it doesn't exist."""
    return [row for _, row in read_jsonl(path, whole_lines=True)] if path.is_file() else []


@contextmanager
def timed(directory: Path, stage: str, first: bool):
    """Log a stage's start and, also after an error, its seconds to <directory>/stages.jsonl."""

    def log(**row) -> None:
        if first:
            with open(directory / "stages.jsonl", "ab", opener=no_link) as file:
                file.write(to_jsonl([{"stage": stage} | row]).encode())

    began = time.perf_counter()
    log(started=time.time())
    try:
        yield
    finally:
        log(seconds=time.perf_counter() - began)


def stage_seconds(directory: Path) -> dict[str, tuple[float, int]]:
    """{stage: (seconds, number of starts that have no end)} from what `timed` logged."""
    file = directory / "stages.jsonl"
    spent: dict[str, tuple[float, int]] = {}
    for _, row in read_jsonl(file, whole_lines=True) if file.is_file() else ():
        seconds, unfinished = spent.get(row["stage"], (0.0, 0))
        spent[row["stage"]] = seconds + row.get("seconds", 0.0), unfinished + (-1 if "seconds" in row else 1)
    return spent
