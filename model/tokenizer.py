"""Sentencepiece and the chat templates. Text in a message never becomes a control token."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
TEMPLATES = ("zephyr", "instruction", "plain")
_ROLES = ("system", "user", "assistant")


class Tokenizer:
    """The sentencepiece model at `path` or in it. Raises FileNotFoundError, or ValueError if unusable."""

    def __init__(self, path: str | Path):
        self.file = find_tokenizer(path)
        try:
            self._model = SentencePieceProcessor(model_file=str(self.file))
        except RuntimeError as error:
            raise ValueError(f"{self.file}: not a sentencepiece model ({error})") from None
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        if self.eos_id < 0:
            raise ValueError(f"{self.file}: the model has no end-of-sequence token")
        self._newline = self._model.encode("\n")
        if self._model.decode(self._newline + self.encode_continuation("a")) != "\na":
            raise ValueError(f"{self.file}: the model does not keep line ends, which the templates need")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS; "</s>" in it is four characters."""
        try:
            return self._model.encode(text)
        except RuntimeError:  # a broken JSON escape leaves one behind
            raise ValueError(f"half a character (a lone surrogate) in the text {text!r:.200}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control tokens decode to nothing."""
        return self._model.decode(list(ids))

    # Sentencepiece puts a blank in front of a text ("I" becomes "▁I"). Text that follows other text must not
    # get one, so it is encoded and decoded after a newline, which is then removed.

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows other text."""
        return self.encode("\n" + text)[len(self._newline) :]

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """Text of ids that follow other text: a leading blank is kept."""
        return self._model.decode([*self._newline, *ids])[1:]

    @cached_property
    def lone_newlines(self) -> bool:
        """Whether "\\n" is always a token of its own, so that lines can be encoded separately."""
        pieces = map(self._model.id_to_piece, range(self.vocab_size))
        return not any("\n" in piece for piece in pieces if piece != "\n")

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
        ids: list[int] = []
        for part in render(messages, template):
            ids += [self.eos_id] if part is None else self.encode(part)
        return ids

    def encode_response(self, text: str) -> list[int]:
        """Ids of a response after its prompt, with the end-of-sequence token."""
        return [*self.encode_continuation(text), self.eos_id]


def find_tokenizer(path: str | Path) -> Path:
    """The sentencepiece model at `path` or in it. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    file = path if path.is_file() else path / "tokenizer.model"
    if file.is_file():
        return file
    for other in ("tekken.json", "tokenizer.json"):
        if (path / other).is_file():
            raise ValueError(f"{path / other}: not a sentencepiece model; only tokenizer.model is supported")
    raise FileNotFoundError(f"{file}: no such file; a sentencepiece model is needed")


def render(messages: Sequence[Message], template: str) -> list[str | None]:
    """A conversation as pieces of text, with None for each end-of-sequence token.

    zephyr: `<|user|>\\n{x}</s>\\n<|assistant|>\\n`, as HuggingFaceH4's tokenizers render it.
    instruction: `### Instruction: {x}\\n\\n### Response: `, with which the official code generates.
    plain: each message and a line end.

    Ends where the assistant's turn begins, unless the last message is the assistant's. Raises ValueError for
    an unknown template or role, or a message without content.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is not one of {', '.join(TEMPLATES)}")
    texts = [""]  # with an end-of-sequence token between two of them
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES or not isinstance(content, str):
            needed = f"a role of {', '.join(_ROLES)} and a content"
            raise ValueError(f"a message needs {needed}, got {message!r:.200}")
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
