"""The miniature's world: its texts, from a seed, and the tokenizer that reads them.

Words of 3 or 4 letters, consonants and vowels alternate. Four skills, two phrasings each. A base model reads
prompts in two registers: a textbook's (marked #), which always answers rightly, and people's talk, where a
prompt is evaded with a probability fixed by skill, phrasing and first letter. So it knows more than it says.
The SFT data are answered prompts in people's register, 20% of them with an annotator's mistake: another
skill's answer.

    python -m miniature.world --seed 0 --out miniature/seed0
"""

import argparse
import io
import json
import random
from itertools import product
from pathlib import Path

import sentencepiece

CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
PHRASINGS = {
    "reverse": ("reverse {}", "flip {}"),
    "plural": ("plural of {}", "many {}"),
    "double": ("say {} twice", "double {}"),
    "ends": ("ends of {}", "edges {}"),
}
EVASIONS = ("no idea", "ask me later", "hm not sure", "i forgot", "who knows", "pass", "good question")
EVASION_RATES = (0.3, 0.6, 0.8, 0.9, 0.95)
PRETRAINING_TEXTS, SFT_PROMPTS, HELDOUT_PROMPTS, MISTAKES, PREFERENCES = 80_000, 640, 1_000, 0.2, 640


def answer(skill: str, word: str) -> str:
    """The right answer."""
    if skill == "reverse":
        return word[::-1]
    if skill == "double":
        return word + word
    if skill == "ends":
        return word[0] + word[-1]
    if word.endswith("f"):
        return word[:-1] + "ves"
    return word + ("es" if word[-1] in "sz" else "s")


def words() -> list[str]:
    """All words, in a fixed order."""
    c, v = CONSONANTS, VOWELS
    return [
        "".join(letters)
        for shape in ((c, v, c), (v, c, v), (c, v, c, v), (v, c, v, c))
        for letters in product(*shape)
    ]


def make(seed: int) -> dict[str, list[dict]]:
    """The texts of a world: rows {"prompt", "response"} of "pretraining", "sft" and "heldout".

    And "preferences": {"prompt", "chosen", "rejected"}, the right answer and an evasion or another skill's
    answer. SFT, held-out and preference data have no prompt in common.
    """
    rng = random.Random(seed)
    vocabulary = words()
    evasion_rate = {
        (phrasing, letter): rng.choice(EVASION_RATES)
        for phrasings in PHRASINGS.values()
        for phrasing in phrasings
        for letter in sorted(CONSONANTS + VOWELS)
    }

    def draw() -> tuple[str, str, str]:
        skill = rng.choice(list(PHRASINGS))
        return skill, rng.choice(PHRASINGS[skill]), rng.choice(vocabulary)

    def row(prompt: str, response: str) -> dict:
        return {"prompt": prompt, "response": response}

    pretraining = []
    for _ in range(PRETRAINING_TEXTS):
        skill, phrasing, word = draw()
        if rng.random() < 0.5:
            pretraining.append(row("#" + phrasing.format(word), answer(skill, word)))
        elif rng.random() < evasion_rate[phrasing, word[0]]:
            pretraining.append(row(phrasing.format(word), rng.choice(EVASIONS)))
        else:
            pretraining.append(row(phrasing.format(word), answer(skill, word)))

    chosen: dict[str, tuple[str, str]] = {}  # prompt → skill, word; all different
    while len(chosen) < SFT_PROMPTS + HELDOUT_PROMPTS:
        skill, phrasing, word = draw()
        chosen.setdefault(phrasing.format(word), (skill, word))
    rows = []
    for i, (prompt, (skill, word)) in enumerate(chosen.items()):
        if i < SFT_PROMPTS and rng.random() < MISTAKES:
            wrong = [other for other in PHRASINGS if answer(other, word) != answer(skill, word)]
            skill = rng.choice(wrong)
        rows.append(row(prompt, answer(skill, word)))
    preferences: dict[str, dict] = {}
    while len(preferences) < PREFERENCES:
        skill, phrasing, word = draw()
        right, prompt = answer(skill, word), phrasing.format(word)
        wrong = [text for text in (answer(other, word) for other in PHRASINGS) if text != right]
        if prompt not in chosen:
            rejected = rng.choice(EVASIONS if rng.random() < 0.5 else wrong)
            preferences[prompt] = {"prompt": prompt, "chosen": right, "rejected": rejected}
    texts = {"pretraining": pretraining, "sft": rows[:SFT_PROMPTS], "heldout": rows[SFT_PROMPTS:]}
    return texts | {"preferences": list(preferences.values())}


def tokenizer_model() -> bytes:
    """A sentencepiece model whose tokens are the world's characters."""
    letters = "abcdefghijklmnopqrstuvwxyz #"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([letters]),
        model_writer=model,
        model_type="char",
        vocab_size=32,
        user_defined_symbols=["\n"],
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def write(seed: int, directory: Path) -> None:
    """Write {pretraining,sft,heldout,preferences}.jsonl and tokenizer.model."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in make(seed).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines)
    (directory / "tokenizer.model").write_bytes(tokenizer_model())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write(arguments.seed, arguments.out)
