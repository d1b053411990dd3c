"""Passkey retrieval: a five-digit key hidden at a depth of a long filler text, asked for at its end.

The texts are those of Landmark Attention (Mohtashami & Jaggi, 2023), which LongLoRA and PoSE use too.  A prompt is filled,
sentence by sentence, to the largest number of tokens that leaves room for the answer inside ``length``.  Only newly generated
tokens are scored: the first number in them must be the key.
"""

import random
import re

from endprompt.eval import intervals

HEADER = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
          "I will quiz you about the important information there.")
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
NEW_TOKENS = 8  # generated: any five digits, one token each, with a space before and room for a sixth digit to show


def prompt(key: str, sentences: int, depth: float) -> str:
    """The test text with ``sentences`` sentences of filler, of which the share ``depth`` stands before the needle."""
    filler = [FILLER[i % len(FILLER)] for i in range(sentences)]
    before = round(depth * sentences)
    return " ".join([HEADER, *filler[:before], NEEDLE.format(key=key), *filler[before:], QUESTION])


def build(tokenizer, length: int, depth: float, key: str) -> tuple[str, int]:
    """The longest prompt that fits into ``length`` with its answer, and its tokens.  Raises ValueError if none does, or an answer is longer
    than what is generated."""
    if len(tokenizer(" 123456", add_special_tokens=False)["input_ids"]) > NEW_TOKENS:
        raise ValueError(f"the tokenizer writes a number of six digits with more than the {NEW_TOKENS} tokens that are generated")
    limit = length - NEW_TOKENS

    def tokens(sentences: int) -> int:
        return len(tokenizer(prompt(key, sentences, depth))["input_ids"])

    if tokens(0) > limit:
        raise ValueError(f"{length} tokens are too few for a passkey prompt of {tokens(0)} and its answer")
    cycle = (tokens(10 * len(FILLER)) - tokens(0)) / (10 * len(FILLER))
    sentences = max(0, int((limit - tokens(0)) / cycle))
    while tokens(sentences) > limit:
        sentences -= 1
    while tokens(sentences + 1) <= limit:
        sentences += 1
    return prompt(key, sentences, depth), tokens(sentences)


def correct(continuation: str, key: str) -> bool:
    """Whether the first number of ``continuation`` (the newly generated text alone) is ``key``."""
    number = re.search(r"\d+", continuation)
    return bool(number) and number[0] == key


def documents(tokenizer, lengths: list[int], samples: int, depths: int, seed: int) -> list[dict]:
    """The tests: for each length ``samples`` keys, spread evenly over ``depths`` depths from 0 (start) to 1 (end) of the text.

    Each is {"prompt": text, "key": its five digits, "depth": 0..1, "length": the length it is made for, "prompt_tokens": its own}.
    Raises ValueError if a length is too short for the test.
    """
    found = []
    for length in lengths:
        rng = random.Random(f"{seed}/{length}")
        keys = [f"{rng.randrange(10000, 100000)}" for _ in range(samples)]
        for number, key in enumerate(keys):
            depth = number % depths / max(1, depths - 1)
            text, tokens = build(tokenizer, length, depth, key)
            found.append({"prompt": text, "key": key, "depth": depth, "length": length, "prompt_tokens": tokens})
    return found


def summary(tests: list[dict], scores: list[float]) -> dict:
    """{"metric", "score" in percent, "low", "high", "samples", "correct", "cells": [{"depth", "correct", "total"}], "prompt_tokens": [least, most]}
    of ``tests`` (rows of ``documents``) that scored 0 or 100 each."""
    cells: dict[float, dict] = {}
    for test, score in zip(tests, scores, strict=True):
        cell = cells.setdefault(test["depth"], {"depth": test["depth"], "correct": 0, "total": 0})
        cell["total"] += 1
        cell["correct"] += score == 100
    hits, total = sum(cell["correct"] for cell in cells.values()), len(tests)
    low, high = intervals.wilson(hits, total)
    lengths = [test["prompt_tokens"] for test in tests]
    return {"metric": "keys found", "score": 100 * hits / total, "low": 100 * low, "high": 100 * high, "samples": total, "correct": hits,
            "cells": [cells[depth] for depth in sorted(cells)], "prompt_tokens": [min(lengths), max(lengths)]}
