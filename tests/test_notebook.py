"""docs/notebook.md: its code runs, runs again after an error, and runs in a thread."""

import re
import threading

import pytest
import torch.distributed

from spin.engine.distributed import ranks
from tests.helpers import ROOT, metrics

CODE, RECIPE = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/notebook.md").read_text(encoding="utf-8"), re.S
)


@pytest.fixture
def cell(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return CODE.replace("runs/notebook", str(tmp_path / "out"))


def test_the_pages_code_trains_an_iteration(cell, tmp_path, capsys):
    names = {}
    exec(cell, names)
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    margins = [row["margin"] for row in metrics(tmp_path / "out")]
    assert margins[-1] + margins[-2] > margins[0] + margins[1]
    assert capsys.readouterr().out.strip()
    assert names["logps"].shape == (4, 2)
    exec(cell, {})  # resumes: nothing is left to train
    assert len(metrics(tmp_path / "out")) == 8


def test_the_pages_second_code_runs_an_iteration_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(RECIPE.replace("runs/mine", str(tmp_path / "mine")), {})
    assert (tmp_path / "mine/base/model/model.safetensors").is_file()


def test_it_runs_again_after_an_error(cell, tmp_path):
    broken = cell.replace("opponent=logps)", "opponent=logps + 9 * torch.eye(4, 2))")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="policy and opponent differ"):
            exec(broken, {})
    assert not torch.distributed.is_initialized()
    exec(cell, {})
    assert len(metrics(tmp_path / "out")) == 8


def test_it_runs_in_a_thread(cell, tmp_path):
    thread = threading.Thread(target=exec, args=(cell, {}))
    thread.start()
    thread.join()
    assert len(metrics(tmp_path / "out")) == 8


def test_a_group_of_one_is_left_after_an_error():
    for _ in range(2):
        with pytest.raises(KeyError), ranks():
            raise KeyError
