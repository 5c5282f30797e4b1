"""How stages claim directories, keep rows, and write files that are complete or absent."""

import json
import os

import pytest

from spin.config import Train
from spin.engine.distributed import ranks
from spin.engine.files import only_process, read_jsonl, read_toml, whole_directory, write_whole
from spin.engine.metrics import Log
from spin.engine.stages import Rows, check_claim, claim
from tests.helpers import write_jsonl


@pytest.fixture(scope="module")
def group():
    with ranks() as group:
        yield group


RECORD = {"train.lr": 5e-7, "opponent": "a" * 64, "replayed": []}


def test_a_claim_is_recorded_once_and_refused_by_what_differs(tmp_path):
    assert not check_claim(tmp_path / "iter0", RECORD)
    claim(tmp_path / "iter0", RECORD)
    claim(tmp_path / "iter0", RECORD)
    assert check_claim(tmp_path / "iter0", {"train.lr": 5e-7})  # only what is asked is compared
    with pytest.raises(ValueError, match="iter0: results made with train.lr = 5e-07, now 1e-07;"):
        claim(tmp_path / "iter0", RECORD | {"train.lr": 1e-7})
    with pytest.raises(ValueError, match="made with other opponent;"):
        claim(tmp_path / "iter0", RECORD | {"opponent": "b" * 64})


def test_a_setting_that_is_newer_than_a_record_had_its_default_there(tmp_path):
    claim(tmp_path, RECORD)
    claim(tmp_path, RECORD | {"train.new": 3}, defaults={"train.new": 3})
    with pytest.raises(ValueError, match="made with train.new = 3, now 4"):
        claim(tmp_path, RECORD | {"train.new": 4}, defaults={"train.new": 3})


def test_results_without_a_record_are_refused(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "config.toml").touch()
    claim(tmp_path, RECORD)
    (tmp_path / "inputs.json").unlink()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="inputs.json: missing, so metrics.jsonl is of unknown origin"):
        claim(tmp_path, RECORD)


@pytest.mark.parametrize("content", ["{", "[1]", "3", b"\xff"])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "inputs.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="inputs.json: not"):
        claim(tmp_path, RECORD)


def test_rows_resume_after_a_torn_line_on_any_rank(tmp_path, group):
    rows = Rows(tmp_path / "rows", RECORD, group)
    rows.append({"doc": i, "text": "é"} for i in (2, 0))
    with open(tmp_path / "rows/rank0.jsonl", "a") as file:
        file.write('{"doc": 1, "te')
    write_jsonl(tmp_path / "rows/rank7.jsonl", [{"doc": 0, "text": "later"}, {"doc": 9}])
    rows = Rows(tmp_path / "rows", RECORD, group)
    assert rows.done == {0, 2, 9}
    with pytest.raises(ValueError, match="rows: 1 of 3 rows are missing; run the command again"):
        rows.complete(3)
    rows.append([{"doc": 1, "text": "z"}])
    assert [row["text"] for row in rows.complete(3)] == ["é", "z", "é"]  # the first of two counts


@pytest.mark.parametrize("line", ["null", "[1]", "{"])
def test_a_row_that_cannot_be_used_is_named(tmp_path, group, line):
    Rows(tmp_path, RECORD, group)
    (tmp_path / "rank0.jsonl").write_text('{"doc": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="rank0.jsonl:2: "):
        Rows(tmp_path, RECORD, group)


def test_a_planted_link_is_not_followed(tmp_path, group):
    """Every file that a run opens for writing under a name that somebody could have planted."""
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.write_text("precious")
    run.mkdir()
    claim(run / "rows", RECORD)
    for name in (".lock", "metrics.jsonl", "report.md.partial", "rows/rank0.jsonl"):
        (run / name).symlink_to(outside)
    with pytest.raises(OSError, match=r"\.lock"), only_process(run):
        pass
    with pytest.raises(OSError, match="report.md.partial"):
        write_whole(run / "report.md", b"x")
    with pytest.raises(OSError, match="rank0.jsonl"):
        Rows(run / "rows", RECORD, group)
    Log(run, 0, Train()).write({"step": 1, "loss": 1.0, "tokens_per_second": 1.0}, group.progress(1, "", ""))
    assert not (run / "metrics.jsonl").is_symlink()  # replaced, as a whole
    assert outside.read_text() == "precious"


def test_a_directory_is_complete_or_absent(tmp_path):
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial/left-over").touch()
    with pytest.raises(KeyError), whole_directory(tmp_path / "model") as new:
        (new / "half").touch()
        raise KeyError
    assert not (tmp_path / "model").exists()
    with whole_directory(tmp_path / "model") as new:
        (new / "file").touch()
    assert os.listdir(tmp_path / "model") == ["file"] and os.listdir(tmp_path) == ["model"]


def test_readers_name_file_and_line(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfx = 1\n")
    assert read_toml(tmp_path / "a") == {"x": 1}  # with a byte-order mark
    (tmp_path / "b").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="b: not TOML .*utf-8"):
        read_toml(tmp_path / "b")
    (tmp_path / "c").write_text("[x")
    with pytest.raises(ValueError, match="c: not TOML"):
        read_toml(tmp_path / "c")
    (tmp_path / "d.jsonl").write_text(json.dumps({"a": 1}) + '\n{"a"')
    assert [row for _, row in read_jsonl(tmp_path / "d.jsonl", whole_lines=True)] == [{"a": 1}]
    with pytest.raises(ValueError, match="d.jsonl:2: invalid row"):
        list(read_jsonl(tmp_path / "d.jsonl"))
