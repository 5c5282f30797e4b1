"""What a step leaves: a line of metrics.jsonl, and TensorBoard events where the recipe asks for them."""

import importlib.util
import json
from pathlib import Path

import torch

from spin.engine.files import write_whole

# Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets; the first that fits.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of this GPU's bf16 matrix units, if it is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def check_tensorboard() -> None:
    """Raise ValueError if the package is not there."""
    if not importlib.util.find_spec("tensorboard"):
        raise ValueError(
            "tensorboard = true needs the package tensorboard: pip install tensorboard, or set it to false"
        )


class Log:
    """metrics.jsonl: one object a step. Steps after `start`, which a killed run had logged, are taken off."""

    def __init__(self, directory: Path, start: int, tensorboard: bool = False):
        path = directory / "metrics.jsonl"
        write_whole(path, "".join(json.dumps(row) + "\n" for row in read_log(path) if row["step"] <= start))
        self._file = open(path, "a", buffering=1)  # a line is written as a whole
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def write(self, metrics: dict) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        if self._events:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, metrics["step"])

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def read_log(path: Path) -> list[dict]:
    """The steps of a metrics.jsonl, also of one that is being written: what follows the last line's end is
    left out.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
