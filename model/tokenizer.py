"""Text to ids and back, by sentencepiece or tokenizer.json, and the chat templates.

Text in a message never becomes a control token.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor

from model.config import read_object

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
BUILT_IN = ("zephyr", "instruction", "plain")
TEMPLATES = ("model", *BUILT_IN)  # model: the model's own chat template
MASK = "\ufdd0"  # a noncharacter; marks the name of a control token that occurs in a message


class SentencePiece:
    """A sentencepiece model."""

    def __init__(self, file: Path):
        try:
            self.model = SentencePieceProcessor(model_file=str(file))
        except RuntimeError as error:
            raise ValueError(f"{file}: not a sentencepiece model ({error})") from None
        self.vocab_size = self.model.vocab_size()
        self.bos_id, self.eos_ids = self.model.bos_id(), [self.model.eos_id()]
        control = filter(self.model.is_control, range(self.vocab_size))
        self.special = {self.model.id_to_piece(id): id for id in control}
        pieces = map(self.model.id_to_piece, range(self.vocab_size))
        self.lone_newlines = not any("\n" in piece for piece in pieces if piece != "\n")
        config = file.parent / "tokenizer_config.json"
        self.adds_bos = not config.is_file() or read_object(config).get("add_bos_token") is not False

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids))


class HuggingFace:
    """A tokenizer.json; tokenizer_config.json and generation_config.json name its special tokens."""

    lone_newlines = False  # byte-level BPE has tokens such as "?\n" and "\n\n"

    def __init__(self, file: Path):
        try:
            self.model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises nothing narrower
            version = tokenizers.__version__
            remedy = "copy it again, or install a newer tokenizers"
            raise ValueError(f"{file}: tokenizers {version} can't read it ({error}); {remedy}") from None
        self.model.encode_special_tokens = True  # "<|im_end|>" in a text is text
        self.model.no_truncation()
        self.model.no_padding()
        self.vocab_size = 1 + max(self.model.get_vocab().values())
        names = _object(file.parent / "tokenizer_config.json")
        texts = (_text_of(names.get(f"{kind}_token")) for kind in ("bos", "eos"))
        ids = [self.model.token_to_id(text) if text else None for text in texts]
        bos, eos = (-1 if id is None else id for id in ids)
        ends = _object(file.parent / "generation_config.json").get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        self.bos_id = bos
        self.eos_ids = [id for id in dict.fromkeys([eos, *ends]) if isinstance(id, int) and id >= 0] or [-1]
        self.adds_bos = bos >= 0 and self.model.encode("a").ids[:1] == [bos]
        added = self.model.get_added_tokens_decoder().items()
        self.special = {token.content: id for id, token in added if token.special}

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids))


def _object(file: Path) -> dict:
    return read_object(file) if file.is_file() else {}


def _text_of(token) -> str | None:
    """A special token, which tokenizer_config.json has as text or with its flags."""
    return token["content"] if isinstance(token, dict) else token


class Tokenizer:
    """The tokenizer at `path` or in it: tokenizer.model if there is one, else tokenizer.json.

    eos_id ends a response in training; a response that is sampled ends with any of eos_ids. Raises
    FileNotFoundError, or ValueError if the tokenizer is unusable.
    """

    def __init__(self, path: str | Path):
        self.file = find_tokenizer(path)
        self._model = HuggingFace(self.file) if self.file.suffix == ".json" else SentencePiece(self.file)
        self.vocab_size, self.adds_bos = self._model.vocab_size, self._model.adds_bos
        self.special = self._model.special  # text and id of each control token
        # Whether "\n" is always a token of its own, so that lines can be encoded separately.
        self.lone_newlines = self._model.lone_newlines
        self.bos_id, self.eos_ids = self._model.bos_id, self._model.eos_ids
        self.eos_id = self.eos_ids[0]
        if self.eos_id < 0:
            raise ValueError(f"{self.file}: the model has no end-of-sequence token")
        self._newline = self.encode("\n")
        # Whether a text may get a blank in front ("I" becomes "▁I"), as in sentencepiece models.
        self._adds_blank = isinstance(self._model, SentencePiece)
        self._adds_blank |= self.encode("\na")[len(self._newline) :] != self.encode("a")
        if self.decode(self.encode("\na")) != "\na":
            raise ValueError(f"{self.file}: the model does not keep line ends, which the templates need")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS; "</s>" in it is four characters."""
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control tokens decode to nothing."""
        return self._model.decode(ids)

    # Text that follows other text must not get a blank in front, so it is encoded and decoded after a
    # newline, which is then removed. Where no blank is added, the text is encoded alone: byte-level BPE might
    # merge the newline with it.

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows other text."""
        return self.encode("\n" + text)[len(self._newline) :] if self._adds_blank else self.encode(text)

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """Text of ids that follow other text: a leading blank is kept."""
        return self.decode([*self._newline, *ids])[1:] if self._adds_blank else self.decode(ids)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `decode_continuation` in pieces, as ids arrive; each piece has complete characters."""
        pending: list[int] = []
        for token in ids:
            pending.append(token)
            text = self.decode_continuation(pending)
            if not text.endswith("\ufffd"):  # incomplete or invalid UTF-8
                yield text
                pending = []
        if pending:
            yield self.decode_continuation(pending)

    def encode_prompt(self, messages: Sequence[Message], template: str) -> list[int]:
        """Ids of a conversation, ending where the assistant's turn begins."""
        if template == "model":
            return self._encode_chat(messages)
        ids: list[int] = []
        for part in render(messages, template):
            ids += [self.eos_id] if part is None else self.encode(part)
        return ids

    def _encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids by the model's own template. Names of control tokens in a message are encoded as text."""
        special, longest_first = self.special, sorted(self.special, key=len, reverse=True)
        masks = {text: MASK + chr(0xE000 + i) for i, text in enumerate(longest_first)}
        masked = [dict(message, content=_replace(message["content"], masks)) for message in messages]
        rendered, unmask = render_chat(self.file.parent, masked), {mask: text for text, mask in masks.items()}
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", rendered):
            ids += [special[part]] if part in special else self.encode(_replace(part, unmask)) if part else []
        return ids

    def encode_response(self, text: str) -> list[int]:
        """Ids of a response after its prompt, with the end-of-sequence token."""
        return [*self.encode_continuation(text), self.eos_id]


def find_tokenizer(path: str | Path) -> Path:
    """The tokenizer file at `path` or in it. Raises FileNotFoundError.

    Of a directory with both, tokenizer.model is used: sentencepiece is the implementation that such models
    were trained with, and mistral-common's ids are its.
    """
    path = Path(path)
    for file in (path, path / "tokenizer.model", path / "tokenizer.json"):
        if file.is_file():
            return file
    remedy = "copy one from the model's page, or write one by transformers' save_pretrained"
    raise FileNotFoundError(f"{path}: no tokenizer.model and no tokenizer.json; {remedy}")


def _replace(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def render_chat(folder: Path, messages: Sequence[Message]) -> str:
    """A conversation by the chat template of a model directory, ending where the assistant's turn begins.

    The template runs in jinja2's sandbox, as in transformers, but without the date: a prompt must not depend
    on the day. Raises ValueError if there is no template, or for what it refuses.
    """
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str):
        raise TemplateError(message)

    file, config = folder / "chat_template.jinja", _object(folder / "tokenizer_config.json")
    where = str(file) if file.is_file() else f"{folder / 'tokenizer_config.json'}: chat_template"
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # of several by name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if not isinstance(template, str):
        raise ValueError(
            f'{folder}: no chat template, which template = "model" needs, neither chat_template.jinja nor '
            f"chat_template in tokenizer_config.json; choose {', '.join(BUILT_IN)}"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    tokens = {name: _text_of(token) for name, token in config.items() if name.endswith("_token")}
    roles = [message["role"] for message in messages]
    settings = {"messages": messages, "add_generation_prompt": roles[-1:] != ["assistant"]}
    try:
        return environment.from_string(template).render(**settings, **tokens)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
        what = f"the turns {', '.join(roles)} ({line}{' '.join(str(error).split())})"
        remedy = f"correct it or the data, or choose another template: {', '.join(BUILT_IN)}"
        raise ValueError(f"{where} can't render {what}; {remedy}") from None


def render(messages: Sequence[Message], template: str) -> list[str | None]:
    """A conversation as pieces of text, with None for each end-of-sequence token.

    zephyr: `<|user|>\\n{x}</s>\\n<|assistant|>\\n`, as HuggingFaceH4's tokenizers render it.
    instruction: `### Instruction: {x}\\n\\n### Response: `, with which the official code generates.
    plain: each message and a line end.

    Ends where the assistant's turn begins, unless the last message is the assistant's. Raises ValueError for
    an unknown template.
    """
    if template not in BUILT_IN:
        raise ValueError(f"template {template!r} is not one of {', '.join(BUILT_IN)}")
    texts = [""]  # with an end-of-sequence token between two of them
    for message in messages:
        role, content = message["role"], message["content"]
        if template == "zephyr":
            texts[-1] += f"<|{role}|>\n{content}"
            texts.append("\n")
        elif role == "assistant":
            texts[-1] += content
            texts.append("")
        elif template == "plain":
            texts[-1] += f"{content}\n"
        elif role == "user":
            texts[-1] += f"### Instruction: {content}\n\n### Response: "
        elif content:
            texts[-1] += f"{content}\n\n"
    if template == "zephyr" and messages and messages[-1]["role"] != "assistant":
        texts[-1] += "<|assistant|>\n"
    return [part for text in texts for part in (text, None)][:-1]
