"""Haystacks with named keys, each of which is asked for in turn: passkey's filler, with a sentence for every
key that states it twice.

What all questions have in common is read once (``prefix.Reader``), so prompts are kept as ids, split where
they part.
"""

import math
import random
from dataclasses import dataclass

from endprompt.evaluation import passkey, prefix, prompts

NEEDLE = "The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}."


@dataclass(frozen=True)
class Design:
    """samples: questions; keys: of a haystack; depths: that are tested, 0 (start) to 1 (end) of the filler;
    chat: whether the model's chat template is put around a prompt."""

    samples: int
    keys: int
    depths: int
    seed: int
    chat: bool = False

    @property
    def haystacks(self) -> int:
        return math.ceil(self.samples / self.keys)

    def asked(self, number: int) -> int:
        """Questions about haystack ``number``; the last may be asked fewer."""
        return min(self.keys, self.samples - number * self.keys)


@dataclass(frozen=True)
class Key:
    """A name's five digits, at ``depth`` of the filler."""

    name: str
    key: str
    depth: float

    @property
    def needle(self) -> passkey.Needle:
        return self.depth, NEEDLE.format(name=self.name, key=self.key)

    @property
    def question(self) -> str:
        return passkey.NAMED_QUESTION.format(name=self.name)


@dataclass(frozen=True)
class Asked:
    """One question about a haystack.

    prompt: the whole text, without a chat template; ids: its tokens behind the haystack's, as it is asked;
    answer: the tokens of the right answer; digits: which of these hold a digit; first, last: where the key's
    digits stand among the haystack's tokens.
    """

    key: Key
    prompt: str
    ids: list[int]
    answer: list[int]
    digits: list[bool]
    first: int
    last: int


@dataclass(frozen=True)
class Haystack:
    """The ids that all prompts begin with, and what is asked behind them."""

    ids: list[int]
    asked: list[Asked]


def spread(design: Design, number: int) -> list[float]:
    """Depths of the keys of haystack ``number``: as many of the design's, far apart, and others in the next
    haystack, so that all are tested equally often."""
    step = design.depths / design.keys
    at = [(number + int(key * step)) % design.depths for key in range(design.keys)]
    return [place / max(1, design.depths - 1) for place in at]


def scattered(design: Design, rng: random.Random) -> list[float]:
    """Depths of the keys of a haystack: one anywhere in each of as many equal parts."""
    return [(part + rng.random()) / design.keys for part in range(design.keys)]


def draw(rng: random.Random, depths: list[float]) -> list[Key]:
    """Names and keys, all different, at ``depths``."""
    names, keys = rng.sample(passkey.NAMES, len(depths)), list[str]()
    while len(keys) < len(depths):
        if (key := f"{rng.randrange(10000, 100000)}") not in keys:
            keys.append(key)
    return [Key(*each) for each in zip(names, keys, depths, strict=True)]


def room(tokenizer, chat: bool = False) -> int:
    """The most tokens that a question and its answer take, with what a chat template puts around them."""
    questions = (passkey.NAMED_QUESTION.format(name=name) for name in passkey.NAMES)
    asked = max(_question_tokens(tokenizer, question) for question in questions)
    return asked + passkey.NEW_TOKENS + prompts.room(tokenizer, chat)


def _question_tokens(tokenizer, question: str) -> int:
    return len(tokenizer(f" {question}", add_special_tokens=False)["input_ids"])


def within(tokenizer, tokens: int, keys: list[Key], chat: bool = False) -> Haystack:
    """The longest haystack of at most ``tokens`` tokens, without questions and answers.  Raises ValueError if
    there is none, and as ``build`` does.
    """
    length = tokens + room(tokenizer, chat)
    plain = passkey.prompt([key.needle for key in keys], 0, "").strip()
    if (shortest := len(prompts.encode(tokenizer, plain))) > tokens:
        raise ValueError(f"{tokens} tokens are too few for {len(keys)} named keys, which take {shortest}")
    found = build(tokenizer, length, keys, chat)
    while (beyond := len(found.ids) - tokens) > 0:
        length -= beyond
        found = build(tokenizer, length, keys, chat)
    return found


def build(tokenizer, length: int, keys: list[Key], chat: bool = False) -> Haystack:
    """The longest haystack with ``keys`` that leaves room for each question and its answer inside ``length``.

    Raises ValueError if none fits, or the tokenizer does not write haystack, question and answer one behind
    the other.
    """
    longest = max((key.question for key in keys), key=lambda text: _question_tokens(tokenizer, text))
    text, _ = passkey.build(tokenizer, length, [key.needle for key in keys], longest, chat)
    text = text.removesuffix(f" {longest}")
    plain = [f"{text} {key.question}" for key in keys]
    whole = [prompts.render(tokenizer, prompt, chat) for prompt in plain]
    before = whole[0][: whole[0].rindex(text) + len(text)]
    ids = [prompts.encode(tokenizer, prompt) for prompt in whole]
    # Where a tokenizer joins the question to what stands before it, the haystack ends earlier.
    head = prompts.encode(tokenizer, before)
    for each in ids:
        head = head[: prefix.common(head, each)]
    asked = []
    for key, prompt, rendered, each in zip(keys, plain, whole, ids, strict=True):
        answer = _answer(tokenizer, rendered, each, key.key if chat else f" {key.key}")
        digits = [any(map(str.isdigit, tokenizer.decode([token]))) for token in answer]
        first, last = _places(tokenizer, before, len(head), key.key)
        asked.append(Asked(key, prompt, each[len(head) :], answer, digits, first, last))
    return Haystack(head, asked)


def _answer(tokenizer, prompt: str, ids: list[int], answer: str) -> list[int]:
    """The ids of ``answer`` behind ``prompt``, whose ids are given."""
    whole = prompts.encode(tokenizer, prompt + answer)
    if whole[: len(ids)] != ids or len(whole) == len(ids):
        raise ValueError("the tokenizer joins an answer to its question, so its loss cannot be told apart")
    return whole[len(ids) :]


def _places(tokenizer, text: str, tokens: int, key: str) -> tuple[int, int]:
    """The first and the last token of ``text``, which has ``tokens``, that holds a digit of ``key``."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    put_before = len(prompts.encode(tokenizer, text)) - len(spans)
    start, end = text.index(key), text.rindex(key) + len(key)
    inside = [at for at, (low, high) in enumerate(spans) if low < end and high > start]
    return min(inside[0] + put_before, tokens - 1), min(inside[-1] + put_before, tokens - 1)
