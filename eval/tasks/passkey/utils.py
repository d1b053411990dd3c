"""The harness' hooks of the passkey task; the texts and rules are in endprompt/eval/passkey.py."""

import datasets
from transformers import AutoTokenizer

from endprompt.eval import answers, passkey


def tests(tokenizer=None, pretrained=None, model=None, max_seq_lengths=(4096,), samples=100, depths=10, seed=42, **_):
    found = passkey.documents(AutoTokenizer.from_pretrained(tokenizer or pretrained or model, trust_remote_code=False), max_seq_lengths, samples, depths, seed)
    return {"test": datasets.Dataset.from_list(found)}


def score(doc, results):
    return {"score": 100.0 * passkey.correct(answers.strip_prompt(doc["prompt"], results[0]), doc["key"])}
