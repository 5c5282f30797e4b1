"""Ask models questions: one model's answer as it is sampled, those of several side by side or as Markdown."""

import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from model.sampler import generate_tokens
from model.tokenizer import Tokenizer
from model.weights import load_model
from spin.config import Config
from spin.engine.distributed import this_device
from spin.engine.files import write_whole
from spin.engine.prepare import open_model
from spin.engine.recipe import Recipe
from spin.report.markdown import escaped

NARROWEST = 24  # characters; narrower columns are replaced by answers one below the other


class Speaker:
    """A model that answers questions in the recipe's training format."""

    def __init__(self, name: str, path: Path, config: Config):
        self.name, self.config = name, config
        self.tokenizer = Tokenizer(path)
        dtype = getattr(torch, config.generate.dtype)
        self.model = load_model(path, dtype, this_device(), config.model.attention)

    def answer(self, question: str) -> Iterator[str]:
        """The answer's text in pieces. Questions are independent of each other, as in the training data."""
        settings, template = self.config.generate, self.config.train.template
        system = [{"role": "system", "content": ""}] * self.config.data.empty_system
        prompt = self.tokenizer.encode_prompt([*system, {"role": "user", "content": question}], template)
        most = self.model.config.max_position_embeddings - settings.max_new_tokens
        if len(prompt) > most:
            raise ValueError(f"the question has {len(prompt)} tokens; {self.name} takes at most {most}")
        tokens = generate_tokens(
            self.model,
            [prompt],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed,
            eos_id=self.tokenizer.eos_ids,
            slots=1,
            vocab_limit=self.tokenizer.vocab_size,
        )
        ids: list[int] = []

        def sampled() -> Iterator[int]:
            for token in tokens:
                ids.append(token.id)
                yield token.id

        yield from self.tokenizer.stream(sampled())
        if ids[-1] not in self.tokenizer.eos_ids:
            yield f" [cut at {settings.max_new_tokens} tokens]"


def models(
    recipe: Recipe, iterations: Sequence[int], paths: Sequence[Path]
) -> list[tuple[str, Path, Config]]:
    """Name, directory and settings of each model. Raises ValueError or OSError if one can't be loaded."""
    found = [(str(path), path, recipe.at(0)) for path in paths]
    for n in iterations:
        config = recipe.at(n)
        found.append(("base" if n < 0 else f"iteration {n}", config.model_dir(n), config))
    for _, path, config in found:
        _, tokenizer = open_model(path)
        tokenizer.encode_prompt([{"role": "user", "content": "Hi"}], config.train.template)
    return found


def ask(found: Sequence[tuple[str, Path, Config]], questions: Sequence[str], file: Path | None) -> None:
    """Answer questions, with one model in memory at a time; with `file`, into a Markdown file."""
    answers: dict[str, dict[str, str]] = {question: {} for question in questions}
    for model in found:
        speaker = Speaker(*model)
        if len(found) == 1 and not file:
            for question in questions:
                _respond([speaker], question)
            return
        for question, texts in answers.items():
            texts[speaker.name] = "".join(speaker.answer(question))
        del speaker  # frees its model before the next one is loaded
    if file:
        write_whole(file, as_markdown(answers))
    width = shutil.get_terminal_size().columns
    sys.stdout.write("\n\n".join(side_by_side(texts, width) for texts in answers.values()) + "\n")


def interact(found: Sequence[tuple[str, Path, Config]]) -> None:
    """Answer each line of standard input."""
    speakers = [Speaker(*model) for model in found]
    prompt = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing and history for input()

        prompt = "> "
        sys.stdout.write("One question per line; Ctrl-D ends.\n")
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            continue
        if not prompt:
            sys.stdout.write(f"> {line}\n")  # shows which answer belongs to which question
        try:
            _respond(speakers, line)
        except ValueError as error:
            sys.stdout.write(f"error: {error}\n")


def _respond(speakers: Sequence[Speaker], question: str) -> None:
    """Print one model's answer as it comes, those of several side by side, as wide as the terminal."""
    if len(speakers) > 1:
        answers = {speaker.name: "".join(speaker.answer(question)) for speaker in speakers}
        sys.stdout.write(side_by_side(answers, shutil.get_terminal_size().columns) + "\n")
        return
    for piece in speakers[0].answer(question):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def side_by_side(texts: dict[str, str], width: int) -> str:
    """Texts in columns under their names, or one below the other if `width` characters are too few."""
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    if column < NARROWEST:
        return "\n\n".join(f"{name}\n{'-' * len(name)}\n{text}" for name, text in texts.items())
    columns = []
    for name, text in texts.items():
        lines = [piece for line in text.split("\n") for piece in textwrap.wrap(line, column) or [""]]
        columns.append([*textwrap.wrap(name, column)[:1], "-" * column, *lines])
    height = max(map(len, columns))
    padded = [[*lines, *[""] * (height - len(lines))] for lines in columns]
    return "\n".join(" | ".join(piece.ljust(column) for piece in row).rstrip() for row in zip(*padded))


def as_markdown(answers: dict[str, dict[str, str]]) -> str:
    """{question: {model: its answer}}, with the words that differ from the answer above in bold."""
    parts = []
    for question, texts in answers.items():
        parts.append(f"**Prompt.** {marked(question, question)}")
        before = next(iter(texts.values()))
        for name, text in texts.items():
            parts.append(f"*{escaped(name)}:* {marked(before, text)}")
            before = text
        parts.append("---")
    return "\n\n".join([*parts, "Bold: words that differ from the answer above."]) + "\n"


def marked(before: str, text: str) -> str:
    """`text` as one escaped paragraph, its lines kept, with the words that differ from `before` in bold."""
    old, new = (re.findall(r"\S+|\n+", side.strip()) for side in (before, text))
    parts = []
    for what, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words = " ".join("<br>" if word.isspace() else escaped(word) for word in new[start:end])
        if words:
            parts.append(words if what == "equal" else f"**{words}**")
    return " ".join(parts)
