"""Ids of tokenizer.json against transformers', for the pre-tokenizers of the families that have one."""

import json
import unicodedata

import pytest
from tokenizers import Tokenizer as Built
from tokenizers import decoders, models, normalizers, trainers

from model.tokenizer import Tokenizer
from model.weights import copy_tokenizer, fingerprint, save_model
from tests.helpers import BYTE_LEVEL, END, START, odd_strings, small_model

TEXTS = odd_strings()


def metaspace() -> Built:
    """As converted from sentencepiece: blanks are "▁", one is put in front, bytes are a fallback."""
    trained = Built(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    letters = [*"▁abcdefghijklmnopqrstuvwxyz"]
    trained.train_from_iterator(
        ["▁the▁cat▁sat", "▁then▁that"] * 3,
        trainers.BpeTrainer(vocab_size=60, initial_alphabet=letters, limit_alphabet=28),
    )
    model = json.loads(trained.to_str())["model"]
    pieces = [
        "<unk>",
        START,
        END,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(model["vocab"], key=model["vocab"].get),
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in model["merges"]]
    built = Built(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    built.decoder = decoders.Sequence(decoder)
    built.add_special_tokens(["<unk>", START, END])
    return built


KINDS = BYTE_LEVEL | {"mistral": metaspace}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    KINDS[request.param]().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": START, "eos_token": {"content": END}})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    return folder


def test_ids_are_transformers_and_decode_to_the_text(folder):
    from transformers import PreTrainedTokenizerFast

    ours = Tokenizer(folder)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), split_special_tokens=True)
    assert len(TEXTS) > 300
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        composed = (
            unicodedata.normalize("NFC", text) if "NFC" in (folder / "tokenizer.json").read_text() else text
        )
        assert ours.decode(ids) == composed, repr(text)
        assert ours.decode_continuation(ours.encode_continuation(text)) == composed, repr(text)


def test_streamed_text_is_the_whole_text_and_shows_no_half_character(folder):
    tokenizer = Tokenizer(folder)
    for text in TEXTS:
        ids = tokenizer.encode_continuation(text)
        pieces = list(tokenizer.stream(ids))
        assert "".join(pieces) == tokenizer.decode_continuation(ids)
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_control_tokens_in_a_text_stay_characters_and_end_no_prompt(folder):
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (1, 2, [2, 0])
    assert not {0, 1, 2} & set(tokenizer.encode(f"a{END}b{START}<|endoftext|>"))
    prompt = tokenizer.encode_prompt([{"role": "user", "content": f"x{END}"}], "zephyr")
    assert prompt.count(2) == 1 and tokenizer.encode_response(END).count(2) == 1
    assert tokenizer.decode([1, *tokenizer.encode("a b"), 2]) == "a b"


def test_export_and_fingerprint_cover_the_file_under_its_own_name(folder, tmp_path):
    import torch

    save_model(small_model(), tmp_path, torch.float32, folder)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not (tmp_path / "tokenizer.model").exists()
    before = fingerprint(tmp_path)
    other = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    other["added_tokens"] = other["added_tokens"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    assert fingerprint(tmp_path) != before


def test_sentencepiece_is_used_where_both_are(folder, letters, tmp_path):
    copy_tokenizer(folder, tmp_path)
    copy_tokenizer(letters.file, tmp_path)
    assert Tokenizer(tmp_path).file.name == "tokenizer.model"


def test_a_tokenizer_without_an_end_of_sequence_is_refused(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="tokenizer.json: the model has no end-of-sequence token"):
        Tokenizer(tmp_path)


# As SmolLM2, Qwen and Llama 3 have them; the last puts no system turn where there is none.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '<|im_end|>\\n\\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant<|im_end|>\\n\\n' }}
{%- endif %}
"""
USER, SYSTEM = (
    {"role": "user", "content": "  What is 2 + 2?\n\nSay it. "},
    {"role": "system", "content": "Be brief."},
)
CONVERSATIONS = [
    [USER],
    [SYSTEM, USER],
    [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "é 😀\n"}],
    [USER, {"role": "assistant", "content": " 4"}],
]


@pytest.mark.parametrize("template", [CHATML, TRIMMED])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_models_own_template_gives_the_ids_of_apply_chat_template(folder, tmp_path, template, where):
    from transformers import PreTrainedTokenizerFast

    copy_tokenizer(folder, tmp_path)
    config = {"bos_token": START, "eos_token": END}
    if where == "chat_template.jinja":
        (tmp_path / where).write_text(template)
    else:
        config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer(tmp_path)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=START, eos_token=END
    )
    theirs.chat_template = template
    for messages in CONVERSATIONS:
        prompt = messages[-1]["role"] == "user"
        expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert ours.encode_prompt(messages, "model") == expected
    inside = ours.encode_prompt([{"role": "user", "content": f"a{END}<|endoftext|>b"}], "model")
    outside = ours.encode_prompt([{"role": "user", "content": "ab"}], "model")
    assert [id for id in inside if id in (0, 1, 2)] == [id for id in outside if id in (0, 1, 2)]
    assert f"a{END}<|endoftext|>b" in ours.decode(inside)


@pytest.mark.parametrize(
    "template, message",
    [
        (None, ": no chat template, which template = .*; choose zephyr"),
        (
            "{{ raise_exception('no user turn') }}",
            r"can't render the turns user \(no user turn\); correct it or",
        ),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("a\n{% for %}", "line 2: Expected"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(folder, tmp_path, template, message):
    copy_tokenizer(folder, tmp_path)
    config = {"eos_token": END} | ({"chat_template": template} if template else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    file = "/tokenizer_config.json: chat_template .*" if template else ""
    with pytest.raises(ValueError, match=f"^{tmp_path}{file}{message}") as refused:
        Tokenizer(tmp_path).encode_prompt([USER], "model")
    assert "\n" not in str(refused.value)
