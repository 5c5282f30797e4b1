"""The miniature's figures: what is run for each, and means over the seeds by hand."""

import sys

import pytest

from miniature import paper
from tests.helpers import write_jsonl


@pytest.fixture
def seeds(tmp_path):
    """Two seeds in which every model of every figure has been evaluated."""
    folders = [tmp_path / "seed0", tmp_path / "seed1"]
    for folder, value in zip(folders, (0.4, 0.6)):
        for _, curves in paper.FIGURES.values():
            for points in curves.values():
                for path in points.values():
                    control = 0.1 * ("control" in path)
                    metrics = {name: value - control * value for name in paper.METRICS}
                    write_jsonl(folder / path / "evaluation/summary.json", [{"tasks": {"heldout": metrics}}])
    return folders


def test_tables_have_means_and_deviations_over_the_seeds_and_leads_seed_by_seed(seeds):
    text = paper.table(seeds, paper.FIGURES["2"][1])
    assert "| SPIN | iteration 3 | 0.500 ± 0.141 | 0.500 ± 0.141 |" in text
    assert "| continued SFT | iteration 3 | 0.450 ± 0.127 |" in text
    assert "| SPIN − continued SFT | iteration 3 | +0.050 ± 0.014 |" in text


def test_one_command_runs_what_its_figures_need_and_writes_where_it_is_told(seeds, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(paper, "_script", lambda *arguments: commands.append(arguments))
    monkeypatch.setattr(paper.world, "write", lambda seed, folder: None)
    arguments = ["paper", "--seeds", "2", "--out", str(tmp_path), "--figures", "2,4", "--", "--train.beta=1"]
    monkeypatch.setattr(sys, "argv", arguments)
    paper.main()
    runs = {part for command in commands for part in command if part.startswith("--run.dir")}
    assert {run.rsplit("seed1/")[1] for run in runs if "seed1" in run} == {
        "pretraining",
        "run",
        "run/control",
        "epochs",
    }
    trained = [command for command in commands if "--iter" in command]
    assert trained and all(command[-1] == "--train.beta=1" for command in trained)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in ("2", "4"):
        assert f"figure{name}.png" in report and (tmp_path / f"figure{name}.png").stat().st_size > 1000
