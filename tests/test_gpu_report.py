"""The report of benchmarks/gpu.py: what was measured next to its floor, what was not marked as predicted."""

import json
import subprocess
import sys

import pytest

from benchmarks.gpu import ASSUMED, SHAPES, bill, decoding_rate, figures, parts, report, ultrachat_like
from spin.engine.batches import flops
from tests.helpers import ROOT

pytestmark = pytest.mark.slow


def test_what_was_not_measured_is_predicted_from_the_floors():
    shape = SHAPES["7b"]
    text = report(shape, {})
    assert "assumed, nothing was measured" in text and "not measured" in text
    lines = [
        line
        for line in text.splitlines()
        if line.startswith(("| train", "| score", "| generate,", "| evaluate"))
    ]
    assert len(lines) == 9 + 1 + 4 + 6 and all(line.count("predicted") == 2 for line in lines)
    items = ultrachat_like(shape, 256)
    score = next(figure for figure in figures(shape, {}) if figure.what == "score")
    assert score.ceiling == pytest.approx(
        ASSUMED["matmul"] * 256 / sum(flops(shape.config, item) for item in items)
    )
    allowed = json.loads((ROOT / "benchmarks/results/roofline-7b.json").read_text(encoding="utf-8"))["score"][
        "share"
    ]
    assert f"| score | {0.9 * allowed * score.ceiling:.2f} pairs/s, predicted |" in text


def test_what_was_measured_stands_with_its_share_and_in_the_bill():
    shape = SHAPES["7b"]
    results = {"ceilings": {"device": "a chip", "torch": "2.13", "matmul": 800e12, "copy": 4e12}}
    results |= {name: {"pairs/s": 20.0} for name in parts(shape) if name.startswith("train ")}
    results |= {
        "score": {"pairs/s": 60.0},
        "generate": {"ratio": 25.0, "by slots": {"512": {"tokens/s": 20000}}},
    }
    text = report(shape, results)
    share = 20.0 / figures(shape, results)[0].ceiling
    line = next(line for line in text.splitlines() if line.startswith("| train full 8192 |"))
    assert line.startswith(f"| train full 8192 | 20.00 pairs/s | {20 / share:.2f} | {share:.0%} | ")
    assert "generate, 64 slots" in text and "25.0 times" in text
    hours = bill(shape, results)[1]
    assert hours[1:4] == pytest.approx(
        (50_000 * 180 / 20_000 / 3600, 100_000 / 60 / 3600, 200_000 / 20 / 3600)
    )


def test_decoding_is_bound_by_bytes_with_few_slots_and_by_arithmetic_with_many():
    shape = SHAPES["7b"]
    few, many = (decoding_rate(shape, slots, 1e30, 4e12) for slots in (1, 2))
    assert 1.9 < many / few < 2  # the weights are read once for both
    assert decoding_rate(shape, 512, 1e12, 1e30) == pytest.approx(
        decoding_rate(shape, 64, 1e12, 1e30), rel=1e-6
    )
    halves = decoding_rate(shape, 64, 8e14, 4e12, share=(0.5, 0.5))
    assert halves == pytest.approx(decoding_rate(shape, 64, 8e14, 4e12) / 2)


def test_a_part_that_fails_is_said_and_one_that_is_there_is_kept(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps({"score": {"pairs/s": 1.0}}))
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--shape",
        "tiny",
        "--parts",
        "ceilings,score",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run([*command, "--limit", "0"], cwd=ROOT, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    assert results["score"] == {"pairs/s": 1.0} and "longer than the limit" in results["ceilings"]["failed"]
    assert "did not end well" in (tmp_path / "tiny.md").read_text(encoding="utf-8")
    assert json.loads(done.stdout.splitlines()[-1])["ended"] == {"ceilings": "longer than the limit"}
