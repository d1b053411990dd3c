"""The harness' hooks of the task named_keys; the texts are in endprompt/evaluation/named_keys.py."""

import datasets
from transformers import AutoTokenizer

from endprompt.evaluation import answers, haystacks, named_keys, passkey


def questions(
    tokenizer=None,
    pretrained=None,
    model=None,
    max_seq_lengths=(4096,),
    samples=100,
    depths=10,
    seed=42,
    chat_template=False,
    **options,
):
    """``chat_template``: whether the harness is told to apply it: then a document's text is the message
    alone."""
    known = AutoTokenizer.from_pretrained(tokenizer or pretrained or model, trust_remote_code=False)
    design = haystacks.Design(samples, options.get("named_keys", 4), depths, seed, chat_template)
    return {"test": datasets.Dataset.from_list(named_keys.documents(known, max_seq_lengths, design))}


def score(doc, results):
    return {"score": 100.0 * passkey.correct(answers.strip_prompt(doc["prompt"], results[0]), doc["key"])}
