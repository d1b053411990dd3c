"""The harness' hooks of the passkey tasks; the texts and rules are in endprompt/evaluation/passkey.py."""

import functools

import datasets
from transformers import AutoTokenizer

from endprompt.evaluation import answers, passkey


def tests(
    task="passkey",
    tokenizer=None,
    pretrained=None,
    model=None,
    max_seq_lengths=(4096,),
    samples=100,
    depths=10,
    seed=42,
    chat_template=False,
    **_,
):
    """``chat_template``: whether the harness is told to apply it, which it does after the prompt is made."""
    known = AutoTokenizer.from_pretrained(tokenizer or pretrained or model, trust_remote_code=False)
    design = passkey.Design(samples, depths, seed, task, chat_template)
    return {"test": datasets.Dataset.from_list(passkey.documents(known, max_seq_lengths, design))}


named = functools.partial(tests, "multikey")


def score(doc, results):
    return {"score": 100.0 * passkey.correct(answers.strip_prompt(doc["prompt"], results[0]), doc["key"])}
