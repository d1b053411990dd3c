"""The harness' hooks of the perplexity task; what a window is stands in
endprompt/evaluation/perplexity.py.
"""

import datasets
from transformers import AutoTokenizer

from endprompt.evaluation import perplexity, prompts


def windows(
    tokenizer=None,
    pretrained=None,
    model=None,
    max_seq_lengths=(4096,),
    perplexity_corpus=None,
    stride=256,
    scored_tokens=65536,
    longest=None,
    lengths=None,
    perplexity_column="text",
    **_,
):
    """``perplexity_corpus``, ``perplexity_column``: as in a recipe's eval section; ``longest``: where scoring
    starts, the greatest length unless given; ``lengths``: all at which the same words are scored, these
    lengths unless given.
    """
    tokens = AutoTokenizer.from_pretrained(tokenizer or pretrained or model, trust_remote_code=False)
    longest = longest or max(max_seq_lengths)
    texts = perplexity.held_out(perplexity_corpus, tokens, longest, stride, scored_tokens, perplexity_column)
    asked = perplexity.Scored(longest, stride, scored_tokens, tuple(lengths or max_seq_lengths))
    special = len(prompts.frame(tokens)[0])
    found = [
        window for length in max_seq_lengths for window in perplexity.windows(texts, length, asked, special)
    ]
    return {"test": datasets.Dataset.from_list(found)}


def score(doc, results):
    ((log_likelihood, _),) = results
    return {"perplexity": (log_likelihood, doc["tokens"])}
