"""Sentencepiece, and the chat templates. Message text never becomes a control token."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
TEMPLATES = ("zephyr", "instruction", "plain")
_ROLES = ("system", "user", "assistant")


class Tokenizer:
    """A sentencepiece model with the templates that turn messages into ids.

    Args:
        path: a sentencepiece model, or a directory that has one

    Raises FileNotFoundError, or ValueError for a file that is not a sentencepiece model, has no end of
    sequence, or does not keep line ends.
    """

    def __init__(self, path: str | Path):
        file = find_tokenizer(path)
        try:
            self._model = SentencePieceProcessor(model_file=str(file))
        except RuntimeError as error:
            raise ValueError(f"{file}: not a sentencepiece model ({error})") from None
        self.file = file
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        if self.eos_id < 0:
            raise ValueError(f"{file}: the model has no end-of-sequence token")
        self._newline = self._model.encode("\n")
        if self._model.decode(self._newline + self.encode_continuation("a")) != "\na":
            raise ValueError(f"{file}: the model does not keep line ends, which the templates need")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS; "</s>" in it is four characters.

        Raises ValueError for half a surrogate pair, which a broken JSON escape leaves behind.
        """
        try:
            return self._model.encode(text)
        except RuntimeError:
            raise ValueError(f"half a character (a lone surrogate) in the text {text!r:.200}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control tokens leave no trace."""
        return self._model.decode(list(ids))

    # A text that goes on after a line's end has no blank of sentencepiece's own in front ("I", not "▁I"), as
    # if prompt and response had been encoded in one string: hence the newline in front, and off again.

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows other text."""
        return self.encode("\n" + text)[len(self._newline) :]

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """Text of ids that follow other text: a blank in front is kept."""
        return self._model.decode([*self._newline, *ids])[1:]

    @cached_property
    def lone_newlines(self) -> bool:
        """Whether a line's end is always a token of its own, so that lines may be encoded one by one."""
        pieces = map(self._model.id_to_piece, range(self.vocab_size))
        return not any("\n" in piece for piece in pieces if piece != "\n")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `decode_continuation`, piece by piece as ids come, never a part of a character.

        A character that the model spells in bytes appears once its last byte is there.
        """
        pending: list[int] = []  # ids of bytes that may become a character
        for token in ids:
            pending.append(token)
            if self._model.is_byte(token):
                ready = self._complete(pending)
            else:
                ready = len(pending)
            if ready:
                yield self.decode_continuation(pending[:ready])
                pending = pending[ready:]
        if pending:
            yield self.decode_continuation(pending)

    def _complete(self, ids: list[int]) -> int:
        """How many ids of bytes, from the first on, no later byte can change the meaning of."""
        text = bytes(int(self._model.id_to_piece(i)[3:-1], 16) for i in ids)  # <0xE2>
        for start in range(len(text)):
            try:
                text[start:].decode()
                return len(text)
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    return start
        return len(text)

    def render(self, messages: Sequence[Message], template: str) -> str:
        """The conversation as text, end-of-sequence tokens written out, for people to read."""
        eos = self._model.id_to_piece(self.eos_id)
        return "".join(eos if part is None else part for part in render(messages, template))

    def encode_prompt(self, messages: Sequence[Message], template: str) -> list[int]:
        """Ids of a conversation up to where the assistant is to speak."""
        ids: list[int] = []
        for part in render(messages, template):
            ids += [self.eos_id] if part is None else self.encode(part)
        return ids

    def encode_response(self, text: str) -> list[int]:
        """Ids of a response after its prompt, with the end-of-sequence token."""
        return [*self.encode_continuation(text), self.eos_id]


def find_tokenizer(path: str | Path) -> Path:
    """The sentencepiece model that `path` is or has. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    if path.is_file():
        return path
    file = path / "tokenizer.model"
    if file.is_file():
        return file
    for other in ("tekken.json", "tokenizer.json"):
        if (path / other).is_file():
            raise ValueError(f"{path / other}: not a sentencepiece model; only tokenizer.model is supported")
    raise FileNotFoundError(f"{file}: no such file; a sentencepiece model is needed")


def render(messages: Sequence[Message], template: str) -> list[str | None]:
    """A conversation as pieces of text, with None where an end-of-sequence token stands.

    zephyr: `<|user|>\\n{x}</s>\\n<|assistant|>\\n`, as HuggingFaceH4's tokenizers render it.
    instruction: `### Instruction: {x}\\n\\n### Response: `, with which the official code generates.
    plain: each message and a line's end.

    Where the last message is not the assistant's, the rendering ends where the assistant is to speak. Raises
    ValueError for an unknown template, an unknown role, or a message without content.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is not one of {', '.join(TEMPLATES)}")
    parts: list[str | None] = [""]

    def text(piece: str):
        if parts[-1] is None:
            parts.append(piece)
        else:
            parts[-1] += piece

    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES or not isinstance(content, str):
            raise ValueError(
                f"a message needs a role of {', '.join(_ROLES)} and a content, got {message!r:.200}"
            )
        if template == "zephyr":
            text(f"<|{role}|>\n{content}")
            parts.append(None)
            text("\n")
        elif template == "instruction":
            if role == "assistant":
                text(content)
                parts.append(None)
            elif role == "user":
                text(f"### Instruction: {content}\n\n### Response: ")
            elif content:
                text(f"{content}\n\n")
        elif role == "assistant":
            text(content)
            parts.append(None)
        else:
            text(f"{content}\n")
    if template == "zephyr" and messages and messages[-1]["role"] != "assistant":
        text("<|assistant|>\n")
    return parts
