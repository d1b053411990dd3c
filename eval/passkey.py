"""Passkey retrieval: a five-digit key hidden at a depth of a long filler text, asked for at its end.

The texts are those of Landmark Attention (Mohtashami & Jaggi, 2023), which LongLoRA and PoSE use too.  A prompt is filled,
sentence by sentence, to the largest number of tokens that leaves room for the answer inside ``length``.  Only newly generated
tokens are scored: the first number in them must be the key.
"""

import math
import random
import re

import torch

HEADER = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
          "I will quiz you about the important information there.")
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


def prompt(key: str, sentences: int, depth: float) -> str:
    """The test text with ``sentences`` sentences of filler, of which the share ``depth`` stands before the needle."""
    filler = [FILLER[i % len(FILLER)] for i in range(sentences)]
    before = round(depth * sentences)
    return " ".join([HEADER, *filler[:before], NEEDLE.format(key=key), *filler[before:], QUESTION])


def answer_tokens(tokenizer) -> int:
    """Tokens to generate: any five-digit number with two to spare, so that a sixth digit would show."""
    return max(len(tokenizer(f" {key}", add_special_tokens=False)["input_ids"]) for key in ("71432", "10101", "99999")) + 2


def build(tokenizer, length: int, depth: float, key: str) -> list[int]:
    """Token ids of the longest prompt that fits into ``length`` with its answer.  Raises ValueError if none does."""
    limit = length - answer_tokens(tokenizer)

    def ids(sentences: int) -> list[int]:
        return tokenizer(prompt(key, sentences, depth))["input_ids"]

    if len(ids(0)) > limit:
        raise ValueError(f"{length} tokens are too few for a passkey prompt of {len(ids(0))} and its answer")
    cycle = (len(ids(10 * len(FILLER))) - len(ids(0))) / (10 * len(FILLER))
    sentences = max(0, int((limit - len(ids(0))) / cycle))
    while len(ids(sentences)) > limit:
        sentences -= 1
    while len(ids(sentences + 1)) <= limit:
        sentences += 1
    return ids(sentences)


def correct(continuation: str, key: str) -> bool:
    """Whether the first number of ``continuation`` (the newly generated text alone) is ``key``."""
    number = re.search(r"\d+", continuation)
    return bool(number) and number[0] == key


def wilson(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson, 1927), as (low, high)."""
    share, spread = hits / total, z * z / total
    middle, half = share + spread / 2, z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


@torch.no_grad()
def generate(model, tokenizer, prompts: list[list[int]], new_tokens: int, tokens_at_once: int = 16384) -> list[str]:
    """Greedy continuations of ``prompts``, in order; prompts of equal length share a batch, so that nothing is padded."""
    results: list[str | None] = [None] * len(prompts)
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(index)
    for length, indices in by_length.items():
        size = max(1, tokens_at_once // length)
        for start in range(0, len(indices), size):
            part = indices[start:start + size]
            ids = torch.tensor([prompts[index] for index in part], device=model.device)
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                                    pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
            for index, text in zip(part, tokenizer.batch_decode(output[:, length:], skip_special_tokens=True), strict=True):
                results[index] = text
    return results


def score(model, tokenizer, length: int, depths: int, samples: int, seed: int) -> dict:
    """Retrieval at one length: ``samples`` keys spread evenly over ``depths`` depths from 0 (start) to 1 (end).

    Returns {"length", "correct", "total", "accuracy", "low", "high", "cells": [{"depth", "correct", "total"}], "prompt_tokens"}.
    Raises ValueError if the length is too short for the test.
    """
    rng = random.Random(f"{seed}/{length}")
    cells = [{"depth": i / max(1, depths - 1), "correct": 0, "total": 0} for i in range(depths)]
    keys = [f"{rng.randrange(10000, 100000)}" for _ in range(samples)]
    prompts = [build(tokenizer, length, cells[i % depths]["depth"], key) for i, key in enumerate(keys)]
    texts = generate(model, tokenizer, prompts, answer_tokens(tokenizer))
    for i, (key, text) in enumerate(zip(keys, texts, strict=True)):
        cells[i % depths]["total"] += 1
        cells[i % depths]["correct"] += correct(text, key)
    cells = [cell for cell in cells if cell["total"]]
    hits = sum(cell["correct"] for cell in cells)
    low, high = wilson(hits, samples)
    return {"length": length, "correct": hits, "total": samples, "accuracy": hits / samples, "low": low, "high": high, "cells": cells,
            "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))]}
