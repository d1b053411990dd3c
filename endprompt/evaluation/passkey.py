"""Passkey retrieval: a five-digit key hidden at a depth of a long filler text, asked for at its end; and the
same among several named keys.

The texts are those of Landmark Attention (Mohtashami & Jaggi, 2023), which LongLoRA and PoSE use too.  A
prompt is filled, sentence by sentence, to the largest number of tokens that leaves room for the answer inside
``length``.  Only newly generated tokens are scored: the first number in them must be the key.  ``multikey``
is ours, after RULER's niah_multikey_1: KEYS names with a key each, at different depths, one of them asked
for.  It is for models that are too small for RULER's words.
"""

import random
import re
from dataclasses import dataclass

from endprompt.evaluation import intervals, prompts

HEADER = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
KEYS = 4
NAMES = (
    "Mara",
    "Tobin",
    "Ilse",
    "Jonas",
    "Petra",
    "Edwin",
    "Nora",
    "Silas",
    "Greta",
    "Oskar",
    "Lena",
    "Hugo",
    "Amara",
    "Felix",
    "Rosa",
    "Anton",
)
NAMED_NEEDLE = "The pass key of {name} is {key}."
NAMED_QUESTION = "What is the pass key of {name}? The pass key of {name} is"
NEW_TOKENS = (
    8  # generated: any five digits, one token each, with a space before and room for a sixth digit to show
)


Needle = tuple[float, str]  # (the share of the filler before it, the sentence)


def prompt(needles: list[Needle], sentences: int, question: str = QUESTION) -> str:
    """The test text with ``sentences`` sentences of filler and the ``needles`` among them."""
    filler, placed = [FILLER[i % len(FILLER)] for i in range(sentences)], 0
    parts = [HEADER]
    for depth, needle in sorted(needles):
        before = round(depth * sentences)
        parts += [*filler[placed:before], needle]
        placed = before
    return " ".join([*parts, *filler[placed:], question])


def build(
    tokenizer, length: int, needles: list[Needle], question: str = QUESTION, chat: bool = False
) -> tuple[str, int]:
    """The longest prompt that fits into ``length`` with its answer, and its tokens; with ``chat``, the chat
    template that will be put around it counts.  Raises ValueError if none fits, or an answer is longer than
    what is generated.
    """
    if len(tokenizer(" 123456", add_special_tokens=False)["input_ids"]) > NEW_TOKENS:
        raise ValueError(
            f"the tokenizer writes a number of six digits with more than the {NEW_TOKENS} tokens that are"
            " generated"
        )
    limit = length - NEW_TOKENS

    def tokens(sentences: int) -> int:
        return len(
            prompts.encode(tokenizer, prompts.render(tokenizer, prompt(needles, sentences, question), chat))
        )

    if tokens(0) > limit:
        raise ValueError(f"{length} tokens are too few for a passkey prompt of {tokens(0)} and its answer")
    cycle = (tokens(10 * len(FILLER)) - tokens(0)) / (10 * len(FILLER))
    sentences = max(0, int((limit - tokens(0)) / cycle))
    while tokens(sentences) > limit:
        sentences -= 1
    while tokens(sentences + 1) <= limit:
        sentences += 1
    return prompt(needles, sentences, question), tokens(sentences)


def correct(continuation: str, key: str) -> bool:
    """Whether the first number of ``continuation`` (the newly generated text alone) is ``key``."""
    number = re.search(r"\d+", continuation)
    return number is not None and number[0] == key


def _key(rng: random.Random) -> str:
    return f"{rng.randrange(10000, 100000)}"


def single(rng: random.Random, depths: list[float]) -> list[tuple[str, list[Needle], str]]:
    """(key, needles, question) of a test at each of ``depths``."""
    keys = [_key(rng) for _ in depths]
    return [
        (key, [(depth, NEEDLE.format(key=key))], QUESTION) for key, depth in zip(keys, depths, strict=True)
    ]


def named(rng: random.Random, depths: list[float]) -> list[tuple[str, list[Needle], str]]:
    """As ``single``, with KEYS - 1 other names and keys at depths drawn evenly from 0 to 1."""
    found = []
    for depth in depths:
        names, keys = rng.sample(NAMES, KEYS), [_key(rng) for _ in range(KEYS)]
        while len(set(keys)) < KEYS:  # another's key would pass for the right one
            keys = [_key(rng) for _ in range(KEYS)]
        at = [depth, *(rng.random() for _ in range(KEYS - 1))]
        needles = [
            (place, NAMED_NEEDLE.format(name=name, key=key))
            for place, name, key in zip(at, names, keys, strict=True)
        ]
        found.append((keys[0], needles, NAMED_QUESTION.format(name=names[0])))
    return found


TASKS = {"passkey": single, "multikey": named}


@dataclass(frozen=True)
class Design:
    """What is tested at every length: ``samples`` keys, spread evenly over ``depths`` depths of the text from
    0 (start) to 1 (end).

    seed: of keys, names and their places.
    task: one of TASKS.
    chat: whether the model's chat template will be put around a prompt.
    """

    samples: int
    depths: int
    seed: int
    task: str = "passkey"
    chat: bool = False


def documents(tokenizer, lengths: list[int], design: Design) -> list[dict]:
    """The tests of every length.

    Each test is {"prompt": text, "key": its five digits, "depth": 0..1, "length": the length it is made for,
    "prompt_tokens": its own}.  Raises ValueError if a length is too short for the test.
    """
    found = []
    for length in lengths:
        at = [number % design.depths / max(1, design.depths - 1) for number in range(design.samples)]
        drawn = TASKS[design.task](random.Random(f"{design.seed}/{length}"), at)
        for depth, (key, needles, question) in zip(at, drawn, strict=True):
            text, tokens = build(tokenizer, length, needles, question, design.chat)
            found.append(
                {"prompt": text, "key": key, "depth": depth, "length": length, "prompt_tokens": tokens}
            )
    return found


def summary(tests: list[dict], scores: list[float]) -> dict:
    """{"metric", "score" in percent, "low", "high", "samples", "correct", "cells": [{"depth", "correct",
    "total"}], "prompt_tokens": [least, most]} of ``tests`` (rows of ``documents``) that scored 0 or 100 each.
    """
    cells: dict[float, dict] = {}
    for test, score in zip(tests, scores, strict=True):
        cell = cells.setdefault(test["depth"], {"depth": test["depth"], "correct": 0, "total": 0})
        cell["total"] += 1
        cell["correct"] += score == 100
    hits, total = sum(cell["correct"] for cell in cells.values()), len(tests)
    low, high = intervals.wilson(hits, total)
    lengths = [test["prompt_tokens"] for test in tests]
    return {
        "metric": "keys found",
        "score": 100 * hits / total,
        "low": 100 * low,
        "high": 100 * high,
        "samples": total,
        "correct": hits,
        "cells": [cells[depth] for depth in sorted(cells)],
        "prompt_tokens": [min(lengths), max(lengths)],
    }
