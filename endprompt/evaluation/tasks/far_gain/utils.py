"""The harness' hooks of the task far_gain; what a text is stands in endprompt/evaluation/far_gain.py."""

import datasets
from transformers import AutoTokenizer

from endprompt.evaluation import far_gain, prompts


def texts(
    tokenizer=None,
    pretrained=None,
    model=None,
    max_seq_lengths=(16384,),
    original_length=4096,
    perplexity_corpus=None,
    **options,
):
    """``perplexity_corpus``, ``perplexity_column``, ``far_gain_tokens``, ``far_gain_texts``: as in a recipe's
    eval section.
    """
    known = AutoTokenizer.from_pretrained(tokenizer or pretrained or model, trust_remote_code=False)
    limits = far_gain.Limits(
        original_length,
        options.get("longest") or max(max_seq_lengths),
        options.get("far_gain_tokens", 256),
        options.get("far_gain_texts", 64),
        tuple(length for length in max_seq_lengths if length > original_length),
    )
    column = options.get("perplexity_column", "text")
    found = far_gain.documents(perplexity_corpus, known, limits.longest, limits.texts, column)
    special = len(prompts.frame(known)[0])
    made = [piece for length in max_seq_lengths for piece in far_gain.pieces(found, length, limits, special)]
    return {"test": datasets.Dataset.from_list(made)}


def first(doc):
    """A number in the place of a text tells the harness that the choices are contexts."""
    return 0


def contexts(doc):
    return [doc["far"], doc["near"]]


def score(doc, results):
    far, near = (-log_likelihood for log_likelihood, _ in results)
    return {"far_gain": {"far": far, "near": near, "tokens": doc["tokens"], "document": doc["document"]}}


def gain(rows):
    return far_gain.summary(rows)["score"]
