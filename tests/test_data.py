"""Forms of data that users have, cuts as the official code makes them, and refusals by file and line."""

import json
from collections import Counter
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest

from spin.config import Data
from spin.data import Example, choose, encode_prompts, load_examples, load_generated, tokenize
from spin.engine.rows import parse_row
from tests.helpers import ROOT, metrics, run_script, write_jsonl

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
HM = ANSWER | {"content": "hm"}
SYSTEM = {"role": "system", "content": "be kind"}
SHARED = ROOT.parent / "shared" / "data"


def load(path, pairs=False, **settings):
    return load_examples(str(path), Data(**settings), Counter(), pairs)


@pytest.mark.parametrize(
    "row, settings",
    [
        ({"messages": [USER, ANSWER, {"role": "user", "content": "more"}, ANSWER | {"content": "no"}]}, {}),
        ({"messages": [USER, ANSWER], "prompt": "hi", "prompt_id": "7"}, {}),  # UltraChat200k's columns
        ({"real": [USER, ANSWER], "generated": [USER, ANSWER | {"content": ""}]}, {}),
        ({"real": [USER, ANSWER], "generated": [USER, HM]}, {"pairs": True}),
        ({"prompt": "hi", "response": "ho"}, {}),
        (  # ultrafeedback_binarized's columns
            {"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, HM], "messages": [USER, ANSWER]},
            {"pairs": True},
        ),
        ({"prompt": "hi", "chosen": "ho", "rejected": "hm", "score_chosen": 8.5}, {"pairs": True}),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [HM]}, {"pairs": True}),  # TRL's explicit prompt
        ({"prompt": "hi", "chosen": "ho", "rejected": "hm"}, {}),
        (
            {"question": "hi", "answer": "ho", "id": 3},
            dict(prompt_column="question", response_column="answer"),
        ),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_every_form_gives_the_first_turns(tmp_path, row, settings, form):
    if form == "jsonl":
        write_jsonl(tmp_path / "d.jsonl", [row, row])
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "d.parquet")
    first, second = load(tmp_path, **settings)
    assert (first.prompt, first.real) == ((USER,), "ho")
    assert first.generated == (("hm",) if "pairs" in settings else ())  # else it isn't read
    assert second.where.endswith(f"d.{form}:2")


def test_a_system_turn_is_kept_and_an_empty_one_added_on_request(tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [{"messages": [SYSTEM, USER, ANSWER]}, {"messages": [USER, ANSWER]}])
    assert [e.prompt for e in load(tmp_path)] == [(SYSTEM, USER), (USER,)]
    empty = {"role": "system", "content": ""}
    assert [e.prompt for e in load(tmp_path, empty_system=True)] == [(SYSTEM, USER), (empty, USER)]


def test_the_last_assistant_turn_is_the_response_on_request(tmp_path):
    talk = [SYSTEM, USER, ANSWER, {"role": "user", "content": "more"}, ANSWER | {"content": "no"}]
    left_open = [*talk, {"role": "user", "content": "and?"}]  # a last question without an answer is dropped
    write_jsonl(tmp_path / "d.jsonl", [{"messages": talk}, {"messages": left_open}])
    examples = load(tmp_path, turns="last")
    assert [(e.prompt, e.real, e.question) for e in examples] == [(tuple(talk[:4]), "no", "more")] * 2
    pair = replace(examples[0], generated=("yes", "maybe"))
    write_jsonl(tmp_path / "pairs/d.jsonl", pair.to_pairs())
    rows = load(tmp_path / "pairs", pairs=True, turns="last")
    assert [(e.prompt, e.real, e.generated) for e in rows] == [
        (pair.prompt, "no", (text,)) for text in pair.generated
    ]
    (read,) = load_generated(tmp_path / "pairs", samples=2)
    assert (read.prompt, read.real, read.generated) == (pair.prompt, pair.real, pair.generated)
    assert load(tmp_path)[0].prompt == (SYSTEM, USER)


def test_preferences_compare_the_last_turns_of_a_conversation(tmp_path):
    talk = [USER, ANSWER, {"role": "user", "content": "more"}]
    write_jsonl(tmp_path / "d.jsonl", [{"chosen": [*talk, ANSWER], "rejected": [*talk, HM]}])
    (pair,) = load(tmp_path, pairs=True)
    assert (pair.prompt, pair.real, pair.generated) == (tuple(talk), "ho", ("hm",))


def test_repeated_prompts_are_counted(tmp_path):
    rows = [{"prompt": prompt, "response": "r"} for prompt in "abacaa"]
    counts = Counter()
    load_examples(write_jsonl(tmp_path / "d.jsonl", rows), Data(), counts)
    assert +counts == {"prompts of the data repeat an earlier one": 3}
    load_examples(write_jsonl(tmp_path / "e.jsonl", rows[:2]), Data(), counts)
    assert counts.total() == 3


def test_a_directory_and_a_pattern_are_read_in_the_order_of_names(tmp_path):
    for name in "cab":
        write_jsonl(tmp_path / f"part-{name}.jsonl", [{"prompt": name, "response": "r"}])
    assert [e.question for e in load(tmp_path)] == ["a", "b", "c"]
    assert [e.question for e in load(tmp_path / "part-[bc].jsonl")] == ["b", "c"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a", "response": "b"', "invalid row"),
        ('["a"]', "an object is needed, not list"),
        ('{"prompt": "  ", "response": "b"}', "empty prompt"),
        ('{"prompt": "a", "response": ""}', "empty response"),
        ('{"prompt": "a"}', "found the columns 'prompt', none of the known forms"),
        ('{"prompt": "a", "response": 3}', "'response' must be a text, not int"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "'assistant' where one of system or user"),
        ('{"messages": []}', "no user turn"),
        ('{"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}', "a turn of None"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "a turn of 'human'"),
        ('{"messages": "a"}', "must be a list"),
        (json.dumps({"messages": [SYSTEM, SYSTEM, USER, ANSWER]}), "a turn of 'system' where one of user"),
        (json.dumps({"messages": [USER, USER, ANSWER]}), "a turn of 'user' where one of assistant"),
        ('{"prompt": "a", "response": ' + "1" * 5000 + "}", "invalid row"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path, line, message):
    good = '{"prompt": "a", "response": "b"}\n'
    (tmp_path / "d.jsonl").write_text(good + line + "\n" + good)
    with pytest.raises(ValueError, match=f"d.jsonl:2.*{message}"):
        load(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"real": [USER, ANSWER], "generated": [USER, ANSWER | {"content": " "}]},
            "empty second response",
        ),
        ({"real": [USER, ANSWER], "generated": [SYSTEM, USER, ANSWER]}, "different prompts"),
        ({"chosen": [USER, ANSWER], "rejected": [SYSTEM, USER, ANSWER]}, '"rejected" answer different prom'),
        ({"chosen": "a", "rejected": "b"}, "no column 'prompt', found 'chosen', 'rejected'"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "'prompt' must be a text, not list"),
        ({"prompt": "hi", "chosen": [ANSWER], "rejected": [HM]}, '"chosen" has a turn of .assistant. where'),
        ({"prompt": [USER], "chosen": ["a"], "rejected": ["b"]}, '"chosen" has a message without role'),
        ({"prompt": [USER], "chosen": None, "rejected": [HM]}, '"chosen" must be a list'),
    ],
)
def test_a_bad_pair_is_refused_with_file_and_line(tmp_path, row, message):
    write_jsonl(tmp_path / "d.jsonl", [row])
    with pytest.raises(ValueError, match=f"d.jsonl:1.*{message}"):
        load(tmp_path / "d.jsonl", pairs=True)


def test_text_that_is_not_utf_8_is_refused_with_its_file(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "a\xff", "response": "b"}\n')
    with pytest.raises(ValueError, match="d.jsonl:.* invalid row .*utf-8"):
        load(tmp_path / "d.jsonl")


def test_half_a_character_is_refused_with_file_and_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a\\ud83d", "response": "b"}\n')
    with pytest.raises(ValueError, match="a.jsonl:2: half a character"):
        load_examples(str(file), Data(), Counter())


def test_empty_texts_can_be_dropped_and_are_counted(tmp_path):
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": "", "response": "b"},
        {"prompt": "a", "response": "\n"},
    ]
    counts = Counter()
    examples = load_examples(str(write_jsonl(tmp_path / "d.jsonl", rows)), Data(empty="drop"), counts)
    assert len(examples) == 1
    assert +counts == {"examples dropped for an empty prompt": 1, "examples dropped for an empty response": 1}


def test_missing_files_empty_files_and_missing_columns_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(ValueError, match="e.jsonl: no examples"):
        load(tmp_path / "e.jsonl")
    (tmp_path / "f.parquet").write_text("no")
    with pytest.raises(ValueError, match="f.parquet: not a readable Parquet file"):
        load(tmp_path / "f.parquet")
    write_jsonl(tmp_path / "g.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="no column 'q', found 'question', 'answer'"):
        load(tmp_path / "g.jsonl", prompt_column="q", response_column="answer")
    with pytest.raises(ValueError, match='pairs need the columns "real" and "generated"'):
        load(tmp_path / "g.jsonl", pairs=True)


def test_the_sample_is_seeded_without_repeats_and_not_larger_than_the_data(tmp_path):
    rows = [{"prompt": str(i), "response": "r"} for i in range(50)]
    examples = load(write_jsonl(tmp_path / "d.jsonl", rows))
    chosen = choose(examples, Data(num_prompts=20, seed=1))
    assert chosen == choose(examples, Data(num_prompts=20, seed=1))
    assert len({e.question for e in chosen}) == 20 and chosen != examples[:20]
    assert chosen != choose(examples, Data(num_prompts=20, seed=2))
    assert choose(examples, Data()) == choose(examples, Data(num_prompts=50)) == examples
    with pytest.raises(ValueError, match="num_prompts = 51.*50 examples"):
        choose(examples, Data(num_prompts=51, path="d"))


def test_a_sample_begins_with_every_smaller_one_as_figure_5_needs():
    # UltraChat200k has 207,865 examples, the paper's subsets 14k, 26k and 50k.
    everything = list(range(207_865))
    small, middle, large = (choose(everything, Data(num_prompts=n)) for n in (14_000, 26_000, 50_000))
    assert large[:26_000] == middle and middle[:14_000] == small


@pytest.mark.parametrize(
    "prompt, real, generated, kept",
    [
        # max_length 20, max_prompt_length 8; a prompt has a line's end, a response its end of sequence
        (10, 8, 5, (11, 9, 6)),  # 20 in all: nothing is cut
        (11, 8, 5, (8, 9, 6)),  # 21: the prompt keeps its last 8
        (4, 14, 30, (5, 12, 12)),  # a short prompt stays; responses are cut at 20 - 8
        (11, 30, 5, (8, 12, 6)),  # both
        (19, 0, 0, (8, 1, 1)),
    ],
)
def test_lengths_are_cut_as_in_the_official_code(letters, prompt, real, generated, kept):
    text = "abcdefghijklmnopqrstuvwxyz" * 2
    example = Example(({"role": "user", "content": text[:prompt]},), text[:real], (text[:generated],))
    counts = Counter()
    (item,) = tokenize([example], letters, "plain", Data(max_length=20, max_prompt_length=8), counts)
    assert (len(item.prompt), *map(len, item.responses)) == kept
    whole = letters.encode(text[:prompt] + "\n")
    assert item.prompt == whole[-kept[0] :]
    assert counts["prompts cut at the left"] == (kept[0] < prompt + 1)
    assert counts["responses cut"] == sum(n < size + 1 for n, size in zip(kept[1:], (real, generated)))
    (read,) = encode_prompts([example], letters, "plain", Data(max_length=20, max_prompt_length=8), Counter())
    assert read == whole[-8:]


def test_the_opponents_own_empty_response_is_a_pair_like_any_other(tmp_path, letters):
    rows = [{"real": [USER, ANSWER], "generated": [USER, ANSWER | {"content": ""}]}]
    write_jsonl(tmp_path / "part.jsonl", rows)
    (example,) = load_generated(tmp_path)
    assert example.to_pairs() == rows
    (item,) = tokenize([example], letters, "plain", Data(), Counter())
    assert item.responses[1] == [letters.eos_id]


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs GSM8K in ../shared/data, which is not part of the project"
)
def test_released_pairs_and_gsm8k_questions_load():
    pairs = load(SHARED / "gsm8k" / "pairs.jsonl", pairs=True)
    assert len(pairs) == 800 and all(pair.generated[0] for pair in pairs)
    columns = dict(prompt_column="question", response_column="answer")
    assert len(load(SHARED / "gsm8k" / "train.jsonl", **columns)) == 7473


def test_preference_pairs_train_like_the_same_pairs_in_the_released_form(recipe, tmp_path):
    rows = [json.loads(line) for line in open(ROOT / "miniature/seed0/sft.jsonl")][:24]
    examples = [Example(*parse_row(row, Data(), "")) for row in rows]
    pairs = [replace(e, generated=(other.real,)) for e, other in zip(examples, examples[1:] + examples[:1])]
    released = [row for pair in pairs for row in pair.to_pairs()]
    ultrafeedback = [
        {"prompt": pair.question, "chosen": row["real"], "rejected": row["generated"], "score_chosen": 9.0}
        for pair, row in zip(pairs, released)
    ]
    logs = []
    for name, data in (("released", released), ("ultrafeedback", ultrafeedback)):
        file = write_jsonl(tmp_path / f"{name}.jsonl", data)
        base = f"--model.base={ROOT}/miniature/seed0/base"
        arguments = recipe(tmp_path / name, f"--data.pairs={file}", base, "--evaluate.heldout=")
        run_script("train.py", *arguments, "--iter", "0")
        logs.append(
            [(row["loss"], row["margin"], row["grad_norm"]) for row in metrics(tmp_path / name / "iter0")]
        )
    assert logs[0] == logs[1] and len(logs[0]) == 6
    assert logs[0][0][0] == pytest.approx(0.693147, abs=1e-5)
