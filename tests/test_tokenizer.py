"""Ids against mistral-common's, templates against transformers'; text never becomes a control token."""

import json
import random
from pathlib import Path

import pytest

from model.tokenizer import Tokenizer, render
from model.weights import copy_tokenizer
from tests.helpers import AWKWARD, odd_strings

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""  # as HuggingFaceH4/zephyr-7b-beta publishes it

CONVERSATIONS = [
    [{"role": "user", "content": "In Southampton, what is popular?"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "two\nlines  and  blanks "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n\nc"},
        {"role": "user", "content": "d"},
    ],
    [{"role": "user", "content": "é 😀"}, {"role": "assistant", "content": " leading blank"}],
]


def rendered(messages, template) -> str:
    """The conversation as text, with end-of-sequence tokens spelled out."""
    return "".join("</s>" if part is None else part for part in render(messages, template))


MISTRALS = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
}


@pytest.mark.parametrize("version", MISTRALS)
def test_ids_are_mistral_commons_and_decode_to_the_text(version):
    mistral_common = pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    file = Path(mistral_common.__file__).parent / "data" / MISTRALS[version]
    ours, theirs = Tokenizer(file), SentencePieceTokenizer(file)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (theirs.n_words, theirs.bos_id, theirs.eos_id)
    texts = odd_strings()
    assert len(texts) > 300
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, bos=False, eos=False), repr(text)
        assert ours.decode(ids) == text
        assert ours.decode_continuation(ours.encode_continuation(text)) == text


def test_sentencepieces_own_mark_for_a_blank_is_the_one_character_that_comes_back_as_another(
    mistral_tokenizer,
):
    assert mistral_tokenizer.decode(mistral_tokenizer.encode("a▁b")) == "a b"


@pytest.mark.parametrize("version", MISTRALS)
def test_streamed_text_is_the_whole_text_and_shows_no_half_character(version):
    mistral_common = pytest.importorskip("mistral_common")
    tokenizer = Tokenizer(Path(mistral_common.__file__).parent / "data" / MISTRALS[version])
    for text in odd_strings():
        ids = tokenizer.encode_response(text)
        shown, pieces = "", list(tokenizer.stream(ids))
        for piece in pieces:
            shown += piece
            # hence never a replacement for a character whose bytes are still to come
            assert text.startswith(shown)
        assert shown == text
        assert len(pieces) <= len(ids)


def test_streamed_ids_that_spell_no_valid_text_come_out_as_all_at_once(mistral_tokenizer):
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.choice([rng.randrange(3, 259), rng.randrange(32000)]) for _ in range(rng.randrange(1, 12))]
        assert "".join(mistral_tokenizer.stream(ids)) == mistral_tokenizer.decode_continuation(ids)


def test_a_streamed_character_appears_with_its_last_byte(mistral_tokenizer):
    ids = mistral_tokenizer.encode_continuation("a🦜b")
    assert len(ids) == 6  # the parrot is not in the vocabulary: four bytes
    assert list(mistral_tokenizer.stream(iter(ids))) == ["a", "🦜", "b"]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_zephyr_text_is_transformers_own_rendering(messages):
    from transformers.utils.chat_template_utils import render_jinja_template

    open_ended = messages[-1]["role"] != "assistant"
    (expected,), _ = render_jinja_template(
        conversations=[messages], chat_template=ZEPHYR, add_generation_prompt=open_ended, eos_token="</s>"
    )
    assert rendered(messages, "zephyr") == expected


def test_zephyr_prompt_with_the_papers_empty_system_turn():
    text = rendered([{"role": "system", "content": ""}, {"role": "user", "content": "{x}"}], "zephyr")
    assert text == "<|system|>\n</s>\n<|user|>\n{x}</s>\n<|assistant|>\n"


def test_instruction_prompt_is_the_official_generators():
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Why?"}]
    assert rendered(messages, "instruction") == "### Instruction: Why?\n\n### Response: "


def test_plain_prompt_is_the_message_and_a_line_end():
    assert rendered([{"role": "user", "content": "Why?"}], "plain") == "Why?\n"


@pytest.mark.parametrize("text", AWKWARD)
def test_prompt_and_response_are_one_strings_tokens(mistral_tokenizer, text):
    # After the last control token, zephyr's prompt and response are one text; encoded whole, it must be the
    # same.
    messages = [{"role": "user", "content": "x"}]
    prompt = mistral_tokenizer.encode_prompt(messages, "zephyr")
    whole = mistral_tokenizer.encode("\n<|assistant|>\n" + text)
    ids = prompt + mistral_tokenizer.encode_response(text)
    assert ids[-1] == mistral_tokenizer.eos_id
    assert ids[:-1] == mistral_tokenizer.encode("<|user|>\nx") + [mistral_tokenizer.eos_id] + whole


@pytest.mark.parametrize("template", ["zephyr", "instruction", "plain"])
def test_control_markers_in_a_message_stay_characters(mistral_tokenizer, template):
    markers = "<s> </s> <unk> [INST]"
    inside = mistral_tokenizer.encode_prompt([{"role": "user", "content": markers}], template)
    outside = mistral_tokenizer.encode_prompt([{"role": "user", "content": "x"}], template)

    def control(ids):
        return [i for i in ids if i in (0, mistral_tokenizer.bos_id, mistral_tokenizer.eos_id)]

    assert control(inside) == control(outside)
    assert markers in mistral_tokenizer.decode(inside)
    assert control(mistral_tokenizer.encode_response(markers)) == [mistral_tokenizer.eos_id]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_zephyrs_own_template_gives_the_ids_of_the_built_in_one(mistral_tokenizer, tmp_path, messages):
    copy_tokenizer(mistral_tokenizer.file, tmp_path)
    config = {"chat_template": ZEPHYR, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode_prompt(messages, "model") == tokenizer.encode_prompt(messages, "zephyr")


def test_an_unknown_template_is_refused():
    with pytest.raises(ValueError, match="'chatml' is not one of zephyr, instruction, plain"):
        render([{"role": "user", "content": "x"}], "chatml")


def test_a_model_that_loses_line_ends_is_refused(tmp_path):
    import sentencepiece

    # sentencepiece's default normaliser turns a line's end into a blank
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox"]),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="char",
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="tokenizer.model: the model does not keep line ends"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Next"}}'])
def test_a_tokenizer_json_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json: tokenizers .* can't read it .*; copy it again, or"):
        Tokenizer(tmp_path)


def test_a_file_that_is_no_sentencepiece_model_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.model and no tokenizer.json; copy one"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.model: not a sentencepiece model"):
        Tokenizer(tmp_path)
