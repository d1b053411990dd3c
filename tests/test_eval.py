"""Scores: the tasks themselves, what a result file carries, and that nothing is scored twice or invented."""

import importlib.metadata
import json
import math
import re
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_main, with_symbols, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from matplotlib import image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from endprompt import BadInput
from endprompt.evaluation import engine, figures, intervals, passkey, perplexity, question, run
from endprompt.evaluation import results as stored
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.reports import compare
from endprompt.rows import corpus
from endprompt.runs import provenance

# Passkey: the text


def one_key(key, depth):
    return [(depth, passkey.NEEDLE.format(key=key))]


@pytest.mark.parametrize(
    "hits, total, low, high",
    [  # R: prop.test(x, n, correct = FALSE)$conf.int
        (50, 100, 0.4038315, 0.5961685),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (1, 1, 0.2065493, 1.0),
        (95, 100, 0.8882495, 0.9784563),
    ],
)
def test_wilson(hits, total, low, high):
    assert intervals.wilson(hits, total) == pytest.approx((low, high), abs=2e-6)


@given(total=st.integers(1, 1000), share=st.floats(0, 1))
def test_wilson_holds_the_share(total, share):
    hits = round(share * total)
    low, high = intervals.wilson(hits, total)
    assert 0 <= low <= hits / total + 1e-12 and hits / total - 1e-12 <= high <= 1 and high - low < 1


def test_bootstrap():
    """Of many samples of a proportion it is the normal approximation; of samples without spread it does not
    claim certainty.
    """
    low, high = intervals.bootstrap([0.0, 100.0] * 500)
    assert (low, high) == pytest.approx((50 - 1.96 * 50 / 1000**0.5, 50 + 1.96 * 50 / 1000**0.5), abs=0.4)
    assert intervals.bootstrap([0.0, 100.0] * 500) == (low, high)
    assert intervals.bootstrap([100.0] * 10) == pytest.approx(
        (72.24672, 100.0), abs=1e-4
    ) and intervals.bootstrap([0.0] * 10) == pytest.approx((0.0, 27.75328), abs=1e-4)
    assert intervals.bootstrap([33.0] * 5) == (33.0, 33.0)
    heavy = intervals.bootstrap([1.0, 3.0] * 50, [9.0, 1.0] * 50)
    assert heavy[0] < 1.2 < heavy[1] < 1.5


@pytest.mark.parametrize(
    "continuation, expected",
    [
        (" 12345", True),
        ("12345.", True),
        (" 12345. Remember it.", True),
        (" The pass key is 12345", True),
        ("12345 67890", True),
        ("\n12345", True),
        ("", False),
        (" ", False),
        (" 123456", False),
        (" 1234", False),
        (" 1 2 3 4 5", False),
        (" 12,345", False),
        (" 54321 12345", False),
        ("5, then 12345", False),
        (" no number at all", False),
        (" 012345", False),
        ("-", False),
    ],
)
def test_correct(continuation, expected):
    assert passkey.correct(continuation, "12345") is expected


@pytest.mark.parametrize(
    "filler",
    [
        passkey.FILLER,
        ("Go.", "The sun is yellow and the sky is blue."),
        ("There and back again, there and back again.", "Go."),
    ],
)
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_prompt_fills_its_length(tokenizer, monkeypatch, depth, filler):
    """It fits with its answer, and with one sentence more it would not."""
    monkeypatch.setattr(passkey, "FILLER", filler)
    for length in [*range(90, 130), 777, 2048]:
        text, tokens = passkey.build(tokenizer, length, one_key("48213", depth))
        limit, sentences = length - passkey.NEW_TOKENS, sum(text.count(sentence) for sentence in set(filler))
        assert text == passkey.prompt(one_key("48213", depth), sentences) and tokens == len(
            tokenizer(text)["input_ids"]
        )
        assert (
            tokens
            <= limit
            < len(tokenizer(passkey.prompt(one_key("48213", depth), sentences + 1))["input_ids"])
        )


@pytest.mark.parametrize("depth", [0.0, 1 / 9, 0.5, 1.0])
def test_key_stands_at_its_depth_and_nowhere_else(tokenizer, depth):
    text, _ = passkey.build(tokenizer, 700, one_key("48213", depth))
    assert re.findall(r"\d+", text) == ["48213", "48213"]
    before, after = text.split(passkey.NEEDLE.format(key="48213"))
    sentences = [sum(part.count(sentence) for sentence in set(passkey.FILLER)) for part in (before, after)]
    assert sum(sentences) > 50 and sentences[0] == round(depth * sum(sentences))
    assert before.startswith(passkey.HEADER) and after.endswith(passkey.QUESTION)


def test_named_keys(tokenizer):
    """Four names and keys in the filler, each once; the question names the one whose key is the answer, at
    the depth that the test says.
    """
    tests, depths = passkey.documents(tokenizer, [400], passkey.Design(40, 5, 1, "multikey")), set()
    for test in tests:
        found = dict(re.findall(r"The pass key of (\w+) is (\d{5})\.", test["prompt"]))
        asked = re.search(r"What is the pass key of (\w+)\? The pass key of \1 is$", test["prompt"])[1]
        assert (
            len(found) == len(set(found.values())) == len(re.findall(r"\d+", test["prompt"])) == passkey.KEYS
            and found[asked] == test["key"]
        )
        before, after = (
            sum(part.count(sentence) for sentence in passkey.FILLER)
            for part in test["prompt"].split(passkey.NAMED_NEEDLE.format(name=asked, key=test["key"]))
        )
        assert (
            before == round(test["depth"] * (before + after))
            and 400 - 20 < test["prompt_tokens"] <= 400 - passkey.NEW_TOKENS
        )
        depths.add([*found].index(asked))
    assert depths == {0, 1, 2, 3}  # no habit gives the answer away
    assert (
        tests
        == passkey.documents(tokenizer, [400], passkey.Design(40, 5, 1, "multikey"))
        != passkey.documents(tokenizer, [400], passkey.Design(40, 5, 2, "multikey"))
    )
    with pytest.raises(ValueError, match="too few for a passkey prompt"):
        passkey.documents(tokenizer, [60], passkey.Design(1, 1, 1, "multikey"))


def test_too_short_a_length_is_refused(tokenizer):
    shortest = len(tokenizer(passkey.prompt(one_key("12345", 0), 0))["input_ids"]) + passkey.NEW_TOKENS
    assert passkey.build(tokenizer, shortest, one_key("12345", 0.5))[1] == shortest - passkey.NEW_TOKENS
    with pytest.raises(ValueError, match="too few for a passkey prompt"):
        passkey.build(tokenizer, shortest - 1, one_key("12345", 0.5))


def test_a_tokenizer_whose_numbers_are_too_long_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(passkey, "NEW_TOKENS", 6)
    with pytest.raises(ValueError, match="six digits with more than the 6 tokens"):
        passkey.build(tokenizer, 500, one_key("12345", 0.5))


# Passkey: the score, with models whose answers are known


class Known(LM):
    """The harness' model that answers a prompt with what ``answer`` makes of its text."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.prompts, self.options = answer, [], []

    def generate_until(self, requests, disable_tqdm=False):
        self.prompts += [request.args[0] for request in requests]
        self.options += [request.args[1] for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise AssertionError("not asked for")

    loglikelihood_rolling = loglikelihood


def key_of(prompt):
    return re.search(r"pass key is (\d{5})\.", prompt)[1]


def ask_passkey(answer, base, length=300, depths=5, samples=12, seed=1, task="endprompt_passkey"):
    """(the summary of ``answer``, the model that gave it) through the harness."""
    known = Known(answer)
    found = engine.run(
        known,
        task,
        {
            "tokenizer": str(base),
            "max_seq_lengths": [length],
            "samples": samples,
            "depths": depths,
            "seed": seed,
        },
    )[task]
    return passkey.summary([sample["doc"] for sample in found], [sample["score"] for sample in found]), known


ANSWERS = {
    "oracle": (lambda prompt: f" {key_of(prompt)}. Remember it.", 100),
    "oracle with words": (lambda prompt: f" {key_of(prompt)}", 100),
    "nothing": (lambda prompt: "", 0),
    "echo": (lambda prompt: prompt, 0),
    "echo, then the key": (lambda prompt: f"{prompt} {key_of(prompt)}", 100),
    "echo of the end": (lambda prompt: prompt[-30:], 0),
    "filler": (lambda prompt: " The grass is green. The sky is blue.", 0),
    "one digit too many": (lambda prompt: f" {key_of(prompt)}7", 0),
    "another key": (lambda prompt: f" {(int(key_of(prompt)) + 1) % 100000:05d}", 0),
    "knows only late keys": (
        lambda prompt: f" {key_of(prompt)}" if prompt.index(key_of(prompt)) > len(prompt) / 2 else " ?",
        None,
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_score_of_known_answers(base, name):
    answer, expected = ANSWERS[name]
    scores, known = ask_passkey(answer, base)
    assert scores["samples"] == sum(cell["total"] for cell in scores["cells"]) == 12
    assert [cell["depth"] for cell in scores["cells"]] == [0, 0.25, 0.5, 0.75, 1] and [
        cell["total"] for cell in scores["cells"]
    ] == [3, 3, 2, 2, 2]
    low, high = intervals.wilson(scores["correct"], 12)
    assert scores["score"] == 100 * scores["correct"] / 12 and (scores["low"], scores["high"]) == (
        100 * low,
        100 * high,
    )
    assert max(scores["prompt_tokens"]) <= 300 - passkey.NEW_TOKENS
    assert all(
        options["do_sample"] is False and options["max_gen_toks"] == passkey.NEW_TOKENS
        for options in known.options
    )
    if expected is None:
        assert [cell["correct"] for cell in scores["cells"]][::4] == [0, 2]
    else:
        assert scores["score"] == expected


@pytest.mark.parametrize("which, expected", [("asked", 100), ("first", None), ("nothing", 0)])
def test_score_among_named_keys(base, which, expected):
    def answer(prompt):
        found = re.findall(r"The pass key of (\w+) is (\d{5})\.", prompt)
        return {"asked": f" {dict(found)[prompt.split()[-2]]}.", "first": f" {found[0][1]}", "nothing": ""}[
            which
        ]

    scores, known = ask_passkey(answer, base, task="endprompt_multikey", samples=40)
    assert (
        scores["samples"] == 40
        and known.prompts[0].endswith(" is")
        and all(options["max_gen_toks"] == passkey.NEW_TOKENS for options in known.options)
    )
    assert scores["score"] == expected if expected is not None else 5 <= scores["score"] <= 60


def test_the_model_is_asked_the_prompt_itself(base, tokenizer):
    """Nothing is stripped from it, added, or put in another order."""
    _, known = ask_passkey(lambda prompt: "", base)
    assert known.prompts == [
        test["prompt"] for test in passkey.documents(tokenizer, [300], passkey.Design(12, 5, 1))
    ]


def test_keys_depend_on_seed_and_length_only(tokenizer):
    def keys(length, seed):
        return [test["key"] for test in passkey.documents(tokenizer, [length], passkey.Design(6, 3, seed))]

    assert keys(200, 1) == keys(200, 1) and len(set(keys(200, 1))) > 1
    assert keys(200, 1) != keys(200, 2) and keys(200, 1) != keys(220, 1)
    assert all(10000 <= int(key) <= 99999 for key in keys(200, 1))
    assert [
        test["key"] for test in passkey.documents(tokenizer, [200, 220], passkey.Design(6, 3, 1))
    ] == keys(200, 1) + keys(220, 1)


def test_fewer_samples_than_depths(base):
    scores, _ = ask_passkey(ANSWERS["oracle"][0], base, 200, 10, 3)
    assert [cell["total"] for cell in scores["cells"]] == [1, 1, 1] and scores["score"] == 100
    assert ask_passkey(ANSWERS["oracle"][0], base, 200, 1, 2)[0]["cells"] == [
        {"depth": 0, "correct": 2, "total": 2}
    ]


# The engine: the harness' model, grouped and refused


@pytest.fixture(scope="module")
def lm(base, tokenizer):
    return engine.LongLM(AutoModelForCausalLM.from_pretrained(base).eval(), tokenizer)


def requests_of(prompts, **options):
    return [
        Instance(
            "generate_until",
            {},
            (prompt, {"max_gen_toks": 6, "do_sample": False, "until": [], **options}),
            number,
        )
        for number, prompt in enumerate(prompts)
    ]


def test_continuations_are_those_of_transformers_alone(lm, tokenizer, monkeypatch):
    """Prompts of different lengths, in their order, without padding: what generate gives for each."""
    prompts = [
        passkey.build(tokenizer, length, one_key(key, depth))[0]
        for length, depth, key in (
            (128, 0, "12345"),
            (150, 0.5, "67890"),
            (128, 1, "24680"),
            (128, 0.5, "97531"),
        )
    ]
    shapes, generate = [], lm.model.generate
    monkeypatch.setattr(
        lm.model,
        "generate",
        lambda **options: shapes.append(tuple(options["input_ids"].shape)) or generate(**options),
    )
    found = lm.generate_until(requests_of(prompts), disable_tqdm=True)
    assert sorted(shape[0] for shape in shapes) == [1, 3] or sum(shape[0] for shape in shapes) == 4
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        alone = generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[
            0, ids["input_ids"].shape[1] :
        ]
        assert text == tokenizer.decode(alone, skip_special_tokens=True)


def test_batches_hold_so_many_tokens(lm, tokenizer, monkeypatch):
    prompt = passkey.build(tokenizer, 128, one_key("12345", 0))[0]
    tokens = len(tokenizer(prompt)["input_ids"])
    monkeypatch.setattr(engine, "TOKENS_AT_ONCE", 2 * tokens)
    shapes, generate = [], lm.model.generate
    monkeypatch.setattr(
        lm.model,
        "generate",
        lambda **options: shapes.append(tuple(options["input_ids"].shape)) or generate(**options),
    )
    lm.generate_until(requests_of([prompt] * 5), disable_tqdm=True)
    assert shapes == [(2, tokens), (2, tokens), (1, tokens)]


def test_a_prompt_beyond_the_window_is_not_cut(lm, tokenizer, monkeypatch):
    """The harness would cut it to the config's window of 256 from the left, without failing."""
    prompt, tokens = passkey.build(tokenizer, 400, one_key("12345", 0))
    assert tokens > lm.model.config.max_position_embeddings
    seen, generate = [], lm.model.generate
    monkeypatch.setattr(
        lm.model, "generate", lambda **options: seen.append(options["input_ids"]) or generate(**options)
    )
    lm.generate_until(requests_of([prompt]), disable_tqdm=True)
    assert seen[0][0].tolist() == tokenizer(prompt)["input_ids"]


def test_likelihood_without_all_logits_is_the_harness_own(lm, tiny_text, monkeypatch):
    pairs = [(text[:400], text[400:700]) for text in tiny_text[:3]] + [
        (tiny_text[3][:50], tiny_text[3][50:60])
    ]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    whole = lm.loglikelihood(requests, disable_tqdm=True)
    monkeypatch.setattr(engine, "LOGIT_BYTES", 1)
    asked, forward = [], lm.model.forward
    monkeypatch.setattr(
        lm.model,
        "forward",
        lambda *ids, **options: asked.append(options["logits_to_keep"]) or forward(*ids, **options),
    )
    lean = lm.loglikelihood(requests, disable_tqdm=True)
    assert [found[0] for found in lean] == pytest.approx([found[0] for found in whole], rel=1e-5) and [
        found[1] for found in lean
    ] == [found[1] for found in whole]
    assert len(asked) == 4 and max(asked) < 200


def test_scores_do_not_depend_on_what_was_scored_before(base, tokenizer, tiny_text):
    """transformers' dynamic RoPE keeps the frequencies of the longest row it has met."""
    dynamic = AutoConfig.from_pretrained(base)
    dynamic.rope_parameters = {**dynamic.rope_parameters, "rope_type": "dynamic", "factor": 4.0}
    model = engine.LongLM(AutoModelForCausalLM.from_pretrained(base, config=dynamic).eval(), tokenizer)
    long = [Instance("loglikelihood", {}, (" ".join(tiny_text[:6]), " The sky is blue."), 0)]
    short = [Instance("loglikelihood", {}, (" ".join(tiny_text[:2])[:1400], " The sky is blue."), 0)]
    length = len(tokenizer(short[0].args[0])["input_ids"])
    assert dynamic.max_position_embeddings < length < len(tokenizer(long[0].args[0])["input_ids"]) - 200
    before = model.loglikelihood(short, disable_tqdm=True)
    model.loglikelihood(long, disable_tqdm=True)
    assert model.loglikelihood(short, disable_tqdm=True) == before
    model.loglikelihood(long, disable_tqdm=True)
    prompt = requests_of([short[0].args[0]])
    text = model.generate_until(prompt, disable_tqdm=True)
    model.loglikelihood(long, disable_tqdm=True)
    assert model.generate_until(prompt, disable_tqdm=True) == text


# Perplexity


def texts_of(tokenizer, *documents):
    return [perplexity.Text(document, tokenizer) for document in documents]


def test_windows_score_the_same_words_at_each_length(tokenizer, tiny_text):
    texts = texts_of(tokenizer, *tiny_text[:2], "Too short.", tiny_text[2])
    found = {
        length: perplexity.windows(texts, length, perplexity.Scored(128, 16, 10**6), special=1)
        for length in (32, 64, 128)
    }
    pieces = {length: [window["continuation"] for window in windows] for length, windows in found.items()}
    assert pieces[32] == pieces[64] == pieces[128] and len(pieces[32]) > 10
    assert all(piece.startswith(" ") and not piece.endswith(" ") for piece in pieces[32])
    for length, windows in found.items():
        for window in windows:
            whole = tokenizer(window["context"] + window["continuation"])["input_ids"]
            context = tokenizer(window["context"])["input_ids"]
            # The harness splits the pair by these two: the words fall into the same tokens, and as many as
            # are counted.
            assert whole[: len(context)] == context and len(whole) - len(context) == window["tokens"]
            assert length - 12 <= len(whole) <= length
    # One after the other the pieces are the text: nothing is scored twice or left out.
    joined = "".join(pieces[128])
    assert sum(document.count(joined[:200]) for document in tiny_text) == 1


def test_words_are_the_same_where_a_short_window_cannot_be_cut(tokenizer, tiny_text):
    texts, lengths = texts_of(tokenizer, with_symbols(tiny_text[:3])), (32, 64, 128)
    assert not texts[0].between_tokens

    def words(*shared):
        return [
            [
                one["continuation"]
                for one in perplexity.windows(texts, length, perplexity.Scored(128, 16, 300, shared), 1)
            ]
            for length in lengths
        ]

    short, middle, long = words(*lengths)
    assert short == middle == long and len(short) > 5
    # The twin: each length by itself leaves out what it cannot cut, and fills the budget with later words.
    short, middle, long = words()
    assert short != long


def test_windows_keep_to_the_budget(tokenizer, tiny_text):
    texts = texts_of(tokenizer, " ".join(tiny_text[:4]))
    windows = perplexity.windows(texts, 32, perplexity.Scored(64, 8, 40))
    assert 40 <= sum(window["tokens"] for window in windows) < 40 + 16


def test_windows_refuse_what_cannot_be_scored(tokenizer, tiny_text):
    texts = texts_of(tokenizer, tiny_text[0])
    for stride in (31, 32, 33):
        with pytest.raises(ValueError, match=f"stride of {stride} leaves no context in windows of 32"):
            perplexity.windows(texts, 32, perplexity.Scored(64, stride, 100))
    for few in ([], texts_of(tokenizer, "The sky is blue.")):
        with pytest.raises(ValueError, match="no document holds 64 tokens"):
            perplexity.windows(few, 32, perplexity.Scored(64, 8, 100))


@torch.no_grad()
def test_perplexity_is_that_of_transformers_own_loss(lm, base, tokenizer, tmp_path, tiny_text):
    write_jsonl(tmp_path / "text.jsonl", [" ".join(tiny_text[:2])])
    asked = {
        "tokenizer": str(base),
        "max_seq_lengths": [96],
        "longest": 128,
        "stride": 32,
        "scored_tokens": 10**6,
        "perplexity_corpus": str(tmp_path / "text.jsonl"),
    }
    samples = engine.run(lm, "endprompt_perplexity", asked)["endprompt_perplexity"]
    documents = [sample["doc"] for sample in samples]
    found = perplexity.summary(documents, [-sample["filtered_resps"][0][0] for sample in samples])
    losses = []
    for document in documents:
        window = tokenizer(document["context"] + document["continuation"], return_tensors="pt")["input_ids"]
        labels = window.clone()
        labels[:, : -document["tokens"]] = -100
        losses += [lm.model(window, labels=labels).loss.item()] * document["tokens"]
    assert found["tokens"] == len(losses) and found["samples"] == len(documents) > 5
    assert found["nats"] == pytest.approx(sum(losses) / len(losses), rel=1e-5) and found[
        "score"
    ] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert 0 < found["low"] < found["score"] < found["high"]


# Short text: the harness' own tasks, at the shots and by the metric that are stated

SHORT = REPOSITORY.parent / "shared/data/short_text"


@pytest.fixture
def local_sets(monkeypatch):
    """The data sets of the harness' tasks from local files, in the place of the hub."""
    if not SHORT.is_dir():
        pytest.skip(f"{SHORT} is not on this machine")

    def rows(name):
        return [row for _, row in corpus.jsonl(SHORT / f"{name}.jsonl.zst")]

    def load(path, name=None, **_):
        if path.endswith("hellaswag"):
            found = {
                "train": rows("hellaswag.validation")[100:120],
                "validation": rows("hellaswag.validation")[:6],
            }
        elif path.endswith("gsm8k"):
            found = {"train": rows("gsm8k.train")[:20], "test": rows("gsm8k.test")[:6]}
        else:
            found = {
                "dev": [row for row in rows("mmlu.dev") if row["subject"] == name],
                "test": [row for row in rows("mmlu.test") if row["subject"] == name][:2],
            }
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(found) for split, found in found.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)


class Chooser(Known):
    """Picks the ending that ``likes``; also generates."""

    def __init__(self, answer, likes):
        super().__init__(answer)
        self.likes = likes

    def loglikelihood(self, requests, disable_tqdm=False):
        self.prompts += [request.args[0] for request in requests]
        return [(0.0 if self.likes(request.doc, request.args[1]) else -1000.0, False) for request in requests]


@pytest.mark.slow
def test_hellaswag_is_ten_shot_and_normalised(local_sets):
    right = Chooser(None, lambda doc, ending: doc["choices"][int(doc["label"])] == ending.strip())
    found = run.short_text(right, "hellaswag", None, False, False)
    assert (
        found["score"] == 100
        and found["samples"] == 6
        and found["metric"] == "acc_norm,none"
        and found["few_shots"] == 10
        and found["low"] < 100
    )
    assert all(prompt.count("\n\n") == 10 for prompt in right.prompts)
    assert (
        run.short_text(
            Chooser(None, lambda doc, ending: doc["choices"][int(doc["label"]) - 1] == ending.strip()),
            "hellaswag",
            4,
            False,
            False,
        )["score"]
        == 0
    )


def test_gsm8k_is_five_shot_and_strict(local_sets):
    answers = {row["question"]: row["answer"] for _, row in corpus.jsonl(SHORT / "gsm8k.test.jsonl.zst")}

    def solve(prompt):
        return answers[prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:")]

    oracle = Known(solve)
    found = run.short_text(oracle, "gsm8k", None, False, False)
    assert (
        found["score"] == 100
        and found["samples"] == 6
        and found["few_shots"] == 5
        and all(prompt.count("Question: ") == 6 for prompt in oracle.prompts)
    )
    zero = Known(solve)
    found = run.short_text(zero, "gsm8k", None, False, False, shots=0)
    assert found["score"] == 100 and found["few_shots"] == 0
    assert all(prompt.count("Question: ") == 1 for prompt in zero.prompts)
    loose = Known(lambda prompt: "It is " + solve(prompt).rpartition("#### ")[2])
    assert (
        run.short_text(loose, "gsm8k", None, False, False)["score"] == 0
    )  # right, but not in the form that strict-match wants


@pytest.mark.slow
def test_mmlu_is_five_shot_over_all_subjects(local_sets):
    right = Chooser(None, lambda doc, ending: "ABCD"[doc["answer"]] == ending.strip())
    found = run.short_text(right, "mmlu", 1, False, False)
    assert found["score"] == 100 and found["samples"] == 57 and found["few_shots"] == 5
    assert all(prompt.count("\nAnswer:") == 6 for prompt in right.prompts)


def test_vllm_needs_a_saved_model_and_vllm(recipe, base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(BadInput, match="vllm reads a saved model, and base has none"):
        run.evaluate(Experiment.of(recipe(backend="vllm"), "base", tmp_path / "run"))
    with pytest.raises(BadInput, match=r"eval\.backend: vllm cannot be imported .* or use eval\.backend=hf"):
        run.evaluate(Experiment.of(recipe(backend="vllm"), "endprompt", tmp_path / "run"), str(base))
    assert not (tmp_path / "run").exists()


def test_code_of_a_model_is_not_run_unasked(recipe, tmp_path):
    with pytest.raises(
        BadInput,
        match="humaneval runs code that the model writes, on this machine; set eval.run_unsafe_code=true",
    ):
        run.evaluate(Experiment.of(recipe(tasks=["humaneval"]), "base", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# Results on disk


@pytest.fixture
def recipe(recipe_file, tmp_path, tiny_text):
    """recipe(**keys of the eval section) -> a checked recipe whose evaluation takes a second."""
    write_jsonl(tmp_path / "heldout.jsonl", [" ".join(tiny_text[:4])])

    def make(**options):
        settings = {
            "tasks": ["passkey", "perplexity"],
            "lengths": [96, 128],
            "samples": 3,
            "depths": 2,
            "perplexity_corpus": str(tmp_path / "heldout.jsonl"),
            "perplexity_tokens": 64,
            "perplexity_stride": 32,
        }
        return schema.load(recipe_file(lengths={"target": 2048}, eval={**settings, **options}))

    return make


def results(folder):
    return {
        str(path.relative_to(folder)): json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))
    }


def forbid(monkeypatch):
    def again(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(run.Scorer, "score", again)


def test_results_say_where_they_come_from(recipe, base, tmp_path, capsys):
    run.evaluate(Experiment.of(recipe(), "base", tmp_path / "run"))
    found = results(tmp_path / "run/small/base/eval")
    assert list(found) == ["passkey/128.json", "passkey/96.json", "perplexity/128.json", "perplexity/96.json"]
    for result in found.values():
        assert result["recipe"] == "small" and result["method"] == "base" and result["question"]["seed"] == 42
        assert result["question"]["model"]["name_or_path"] == str(base) and result["question"]["model"][
            "fingerprint"
        ] == question.fingerprint(base)
        assert result["question"]["model"]["rope_parameters"]["rope_type"] == "default"
        assert result["versions"]["torch"] == importlib.metadata.version("torch") and result[
            "versions"
        ].keys() >= {"python", "transformers", "endprompt"}
        assert result["device"] == provenance.device() and re.fullmatch(
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", result["date"]
        )
        assert result["commit"] is None or re.fullmatch(r"[0-9a-f]{40,64}(\+changes)?", result["commit"])
    assert (
        found["passkey/96.json"]["question"] | {"samples": 3, "depths": 2, "length": 96, "task": "passkey"}
        == found["passkey/96.json"]["question"]
    )
    assert (
        found["perplexity/96.json"]["question"]["longest"] == 128
        and 64 <= found["perplexity/96.json"]["scores"]["tokens"] < 110
    )
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and all(line.startswith("base ") for line in printed)
    assert (
        f"{found['passkey/96.json']['scores']['score']:.2f}%" in printed[0]
        and f"{found['perplexity/96.json']['scores']['score']:.3f}" in printed[2]
    )
    answers = [
        json.loads(line)
        for line in (tmp_path / "run/small/base/eval/passkey/96.jsonl").read_text().splitlines()
    ]
    assert [row.keys() for row in answers] == [{"key", "depth", "pred"}] * 3
    assert (
        sum(passkey.correct(row["pred"], row["key"]) for row in answers)
        == found["passkey/96.json"]["scores"]["correct"]
    )


def test_commit_is_the_checkouts(tmp_path, monkeypatch):
    if shutil.which("git"):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
        assert (provenance.commit() or "").removesuffix("+changes") == (
            head.stdout.strip() if head.returncode == 0 else ""
        )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None
    assert provenance.versions(("no-such-package",))["no-such-package"] is None


def test_heatmap_is_a_picture(recipe, tmp_path):
    run.evaluate(Experiment.of(recipe(tasks=["passkey"]), "base", tmp_path / "run"))
    pixels = image.imread(tmp_path / "run/small/base/eval/passkey.png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 300 and pixels.std() > 0.05


def test_existing_results_are_kept(recipe, tmp_path, monkeypatch, capsys):
    run.evaluate(Experiment.of(recipe(), "base", tmp_path / "run"))
    before, printed = results(tmp_path / "run/small/base/eval"), capsys.readouterr().out
    forbid(monkeypatch)
    run.evaluate(Experiment.of(recipe(), "base", tmp_path / "run"))
    out, err = capsys.readouterr()
    assert results(tmp_path / "run/small/base/eval") == before and out == printed and "again" not in err


@pytest.mark.parametrize(
    "options, task",
    [
        ({"samples": 4}, "passkey"),
        ({"depths": 3}, "passkey"),
        ({"seed": 7}, "passkey"),
        ({"perplexity_stride": 16}, "perplexity"),
    ],
)
def test_results_of_another_setting_are_replaced(recipe, tmp_path, capsys, options, task):
    run.evaluate(Experiment.of(recipe(tasks=[task], lengths=[96]), "base", tmp_path / "run"))
    capsys.readouterr()
    run.evaluate(Experiment.of(recipe(tasks=[task], lengths=[96], **options), "base", tmp_path / "run"))
    assert "was scored for another model or setting; scoring again" in capsys.readouterr().err
    name, value = next(iter(options.items()))
    assert value in results(tmp_path / "run/small/base/eval")[f"{task}/96.json"]["question"].values(), name


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_results_that_cannot_be_read_are_replaced(recipe, tmp_path, capsys, text):
    path = tmp_path / "run/small/base/eval/passkey/96.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    run.evaluate(Experiment.of(recipe(tasks=["passkey"], lengths=[96]), "base", tmp_path / "run"))
    assert (
        "cannot be read; scoring again" in capsys.readouterr().err
        and json.loads(path.read_text())["scores"]["length"] == 96
    )


@pytest.mark.parametrize("text", ["{", "[]", "", '{"question": {"model": "m"}, "scores": {}}'])
def test_a_damaged_result_beside_those_that_are_scored_is_a_warning(recipe, tmp_path, capsys, text):
    path = tmp_path / "run/small/base/eval/passkey/512.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    run.evaluate(Experiment.of(recipe(lengths=[96]), "base", tmp_path / "run"))
    out, err = capsys.readouterr()
    assert out.count("96") == 2 and path.read_text() == text
    assert f"warning: the picture of passkey is not drawn anew: {path} is no result file" in err
    assert "delete it and evaluate again" in err and err.count("warning") == 1


def test_a_result_without_its_scores_is_scored_again(recipe, tmp_path, capsys):
    asked = recipe(tasks=["passkey"], lengths=[96])
    run.evaluate(Experiment.of(asked, "base", tmp_path / "run"))
    path = tmp_path / "run/small/base/eval/passkey/96.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"scores": {"length": 96}}))
    run.evaluate(Experiment.of(asked, "base", tmp_path / "run"))
    assert "cannot be read; scoring again" in capsys.readouterr().err
    assert json.loads(path.read_text())["scores"] == whole["scores"]


def test_changed_weights_are_another_model(recipe, recipe_file, base, tmp_path, capsys):
    """The same path with other weights in it: the old score must not stand for the new model."""
    folder = shutil.copytree(base, tmp_path / "model")
    checked = recipe(tasks=["passkey"], lengths=[96])
    checked = checked.model_copy(
        update={"model": checked.model.model_copy(update={"name_or_path": str(folder)})}
    )
    for method in ("base", "endprompt"):
        other = None if method == "base" else str(folder)
        run.evaluate(Experiment.of(checked, method, tmp_path / "run"), other)
        weights = load_file(folder / "model.safetensors")
        save_file(
            {name: tensor * 0.9 for name, tensor in weights.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        capsys.readouterr()
        run.evaluate(Experiment.of(checked, method, tmp_path / "run"), other)
        assert "scoring again" in capsys.readouterr().err, method


def test_another_model_has_its_own_folder(recipe, base, tmp_path):
    checked = recipe(tasks=["passkey"], lengths=[96])
    experiment = Experiment.of(checked, "endprompt", tmp_path / "run")
    run.evaluate(experiment, str(base))
    found = results(next(experiment.run.glob("eval-base-*")))["passkey/96.json"]
    assert found["question"]["model"] == {
        "name_or_path": str(base),
        "fingerprint": question.fingerprint(base),
        "ends": [2],
        "dtype": "torch.float32",
        "attention": "sdpa",
    }
    assert not (experiment.run / "eval").exists() and next(experiment.run.glob("eval-base-*/passkey.png"))


def test_interpolated_model_is_scored_with_its_scaling(recipe, base, tmp_path):
    checked = recipe(tasks=["perplexity"], lengths=[96])
    experiment = Experiment.of(checked, "interpolation", tmp_path / "run")
    run.evaluate(experiment)
    original = AutoConfig.from_pretrained(base)
    assert results(experiment.run / "eval")["perplexity/96.json"]["question"]["model"]["rope_parameters"] == {
        **original.rope_parameters,
        "rope_type": "linear",
        "factor": 2048 / original.max_position_embeddings,
    }


def test_models_that_cannot_be_scored(recipe, base, tmp_path):
    experiment = Experiment.of(recipe(), "endprompt", tmp_path / "run")

    def refuse(complaint, other):
        with pytest.raises(BadInput, match=complaint):
            run.evaluate(experiment, other)

    refuse(r"run.small.endprompt.model is missing; train endprompt first, or name a model with --model", None)
    refuse("there is no folder .*nowhere", str(tmp_path / "nowhere"))
    refuse("there is no folder nowhere", "./nowhere")
    refuse("owner/nowhere cannot be loaded", "owner/nowhere")
    (tmp_path / "empty").mkdir()
    refuse("empty cannot be loaded", str(tmp_path / "empty"))
    folder = shutil.copytree(base, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    lost = sorted(weights)[1]
    save_file(
        {name: tensor for name, tensor in weights.items() if name != lost},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    refuse(rf"broken lack \['{lost}'\]; random values would stand in their place", str(folder))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    refuse("broken cannot be loaded", str(folder))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, complaint",
    [
        (
            {"lengths": [16, 128], "tasks": ["passkey"]},
            r"eval\.lengths: passkey at 16: 16 tokens are too few",
        ),
        (
            {"lengths": [96, 2000], "tasks": ["perplexity"]},
            r"eval\.lengths: perplexity at 96: no document holds 2000 tokens",
        ),
        (
            {"perplexity_stride": 128, "tasks": ["perplexity"]},
            r"eval\.lengths: perplexity at 96: a stride of 128 leaves no context",
        ),
        (
            {"perplexity_corpus": "./nowhere.jsonl"},
            r"eval\.perplexity_corpus: there is no file or folder './nowhere\.jsonl'",
        ),
    ],
)
def test_settings_that_cannot_be_scored(recipe, tmp_path, options, complaint):
    with pytest.raises(BadInput, match=complaint):
        run.evaluate(Experiment.of(recipe(**options), "base", tmp_path / "run"))


def test_command_line(recipe, recipe_file, tmp_path):
    recipe(tasks=["passkey"], lengths=[96])
    path = tmp_path / "small.yaml"
    code, out, err = run_main("evaluate", path, "base", "--out", tmp_path / "runs")
    assert (
        code == 0 and out.startswith("base ") and (tmp_path / "runs/small/base/eval/passkey/96.json").exists()
    ), err
    code, out, err = run_main(
        "evaluate", path, "endprompt", "--out", tmp_path / "runs", "--model", "./nowhere"
    )
    assert code == 2 and err.splitlines()[-1] == "endprompt: --model: there is no folder nowhere"
    assert not (tmp_path / "runs/small/endprompt").exists()


def test_secrets_of_the_environment_are_not_written(recipe, base, tmp_path, monkeypatch):
    secrets = {
        name: f"marked-{number}-7f3a"
        for number, name in enumerate(
            ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY")
        )
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    recipe()
    path, runs, printed = tmp_path / "small.yaml", tmp_path / "runs", ""
    for command in (
        ["prepare", path, "endprompt", "--workers", 2],
        ["inspect", path, "endprompt"],
        ["inspect", path, "endprompt", "--coverage"],
        ["evaluate", path, "endprompt", "--model", base],
        ["evaluate", path, "endprompt"],
        ["train", path, "endprompt", "--dry-run"],
    ):
        code, out, err = run_main(*command, "--out", runs)
        assert code == (2 if command == ["evaluate", path, "endprompt"] else 0), err
        printed += out + err
    written = [file for file in runs.rglob("*") if file.is_file()]
    assert {"manifest.json", "96.json", "96.jsonl", "coverage.png", "recipe.yaml"} <= {
        file.name for file in written
    }
    for value in secrets.values():
        assert value not in printed
        assert not [file for file in written if value.encode() in file.read_bytes()]


# Comparison


def write_result(folder, method, task, length, date="2026-01-01T00:00:00+00:00", model="m", **scores):
    path = folder / method / "eval" / task / f"{length}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "question": {"model": model},
                "date": date,
                "method": method,
                "scores": {"length": length, "samples": 20, **scores},
            }
        )
    )


def passkey_scores(correct, total=20):
    low, high = intervals.wilson(correct, total)
    return {
        "correct": correct,
        "samples": total,
        "score": 100 * correct / total,
        "low": 100 * low,
        "high": 100 * high,
        "cells": [{"depth": 0, "correct": correct, "total": total}],
    }


def cells(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


@pytest.fixture
def compared(tmp_path):
    folder = tmp_path / "tiny"
    write_result(folder, "base", "passkey", 256, **passkey_scores(20))
    write_result(folder, "base", "passkey", 2048, **passkey_scores(0))
    write_result(folder, "endprompt", "passkey", 2048, **passkey_scores(13))
    write_result(folder, "endprompt", "perplexity", 2048, score=12.341, nats=2.5, low=12.0, high=13.0)
    (folder / "endprompt/train.json").write_text(
        json.dumps({"tokens": 524288, "seconds": 61.4, "final_text_loss": 2.25, "final_end_prompt_loss": 0.0})
    )
    (folder / "not_a_method/eval/passkey").mkdir(parents=True)
    return folder


def test_table_holds_the_results_and_nothing_else(compared):
    found = cells(compare.table(compared))
    assert found == {
        "base": {
            "passkey 256": "100% [84%, 100%]",
            "passkey 2048": "0% [0%, 16%]",
            "perplexity 2048": "not run",
            "trained tokens": "-",
            "train s": "-",
            "text loss": "-",
            "end-prompt loss": "-",
        },
        "endprompt": {
            "passkey 256": "not run",
            "passkey 2048": "65% [43%, 82%]",
            "perplexity 2048": "12.34",
            "trained tokens": "524,288",
            "train s": "61",
            "text loss": "2.250",
            "end-prompt loss": "0.000",
        },
    }


def test_leftovers_of_another_model_are_left_out(compared):
    """Lengths that were scored before the model was trained anew belong to no row."""
    write_result(
        compared,
        "endprompt",
        "passkey",
        512,
        date="2025-12-31T00:00:00+00:00",
        model="old",
        **passkey_scores(20),
    )
    assert "passkey 512" not in compare.table(compared)
    assert stored.read(compared / "endprompt/eval").lengths("passkey") == [2048]


def test_a_row_is_of_one_model_whatever_the_task(compared):
    """perplexity of one model and passkey of a later one are no row together."""
    later = {"date": "2026-02-01T00:00:00+00:00", "model": {"fingerprint": "new", "dtype": "torch.bfloat16"}}
    write_result(compared, "endprompt", "passkey", 512, **later, **passkey_scores(20))
    row = cells(compare.table(compared))["endprompt"]
    assert row["passkey 512"].startswith("100%") and "perplexity 2048" not in row
    assert row["passkey 2048"] == "not run"
    assert stored.read(compared / "endprompt/eval").lengths("perplexity") == []
    # What differs by the machine alone is one model.
    same = later | {"model": {"fingerprint": "new", "dtype": "torch.float32", "name_or_path": "elsewhere"}}
    write_result(compared, "endprompt", "perplexity", 512, **same, score=3.5, low=3.0, high=4.0)
    row = cells(compare.table(compared))["endprompt"]
    assert (row["perplexity 512"], row["passkey 512"][:4]) == ("3.50", "100%")


@pytest.mark.parametrize(
    "spoil",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"question": {"model": "m"}}',
        b"\xff\xfe",
        {"cells": None},
        {"cells": []},
        {"cells": [{"depth": 0, "correct": "many", "total": 2}]},
        {"cells": [{"depth": 0, "correct": 0, "total": 0}]},
        {"score": None},
        {"length": None},
    ],
)
def test_a_damaged_result_is_one_line_of_the_comparison(compared, monkeypatch, capsys, spoil):
    path = compared / "endprompt/eval/passkey/2048.json"
    if isinstance(spoil, dict):
        file = json.loads(path.read_text())
        file["scores"] |= spoil
        spoil = json.dumps(file)
    path.write_bytes(spoil if isinstance(spoil, bytes) else spoil.encode())
    code, out, err = run_compare(monkeypatch, capsys, compared)
    assert (code, out, err.count("\n")) == (2, "", 1) and str(path) in err and "evaluate again" in err
    assert not (compared / "comparison.md").exists()


def run_compare(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
    code = 0
    try:
        compare.main()
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def test_comparison_writes_table_and_picture(compared, monkeypatch, capsys):
    code, out, err = run_compare(monkeypatch, capsys, compared, "--title", "tiny")
    assert code == 0 and not err and compare.table(compared) in out
    assert (compared / "comparison.md").read_text() == compare.table(compared) + "\n"
    pixels = image.imread(compared / "comparison.png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600 and pixels.std() > 0.05


def test_comparison_of_perplexities_alone(tmp_path, monkeypatch, capsys):
    write_result(tmp_path, "short", "perplexity", 512, score=9.0, nats=2.2, low=8.0, high=10.0)
    code, out, _ = run_compare(monkeypatch, capsys, tmp_path)
    assert code == 0 and "9.00" in out and not (tmp_path / "comparison.png").exists()


def test_comparison_of_nothing(tmp_path, monkeypatch, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        code, out, err = run_compare(monkeypatch, capsys, folder)
        assert code == 2 and not out and "holds no evaluated method" in err


def test_heatmap_shows_a_missing_cell_as_missing(tmp_path, monkeypatch):
    """A depth that one length did not test is no failure to find the key."""
    import matplotlib.axes

    drawn = []
    draw = matplotlib.axes.Axes.imshow
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "imshow",
        lambda self, grid, **options: drawn.append(np.array(grid)) or draw(self, grid, **options),
    )
    rows = [
        {
            "scores": {
                "length": 1,
                "score": 100.0,
                "cells": [{"depth": 0, "correct": 2, "total": 2}, {"depth": 1, "correct": 0, "total": 2}],
            }
        },
        {"scores": {"length": 2, "score": 50.0, "cells": [{"depth": 0, "correct": 1, "total": 2}]}},
    ]
    figures.heatmaps({"one": rows}, tmp_path / "folder/picture.png")
    np.testing.assert_array_equal(drawn[0], [[1.0, 0.5], [0.0, np.nan]])
    assert (tmp_path / "folder/picture.png").exists()


def test_the_tiny_base_retrieves_in_its_window_and_fails_beyond_it(base, lm):
    """Else the demo would show nothing: at least 95 % of keys at 256 tokens, hardly any at twice that."""

    def found(length, samples):
        tests = engine.run(
            lm,
            "endprompt_passkey",
            {
                "tokenizer": str(base),
                "max_seq_lengths": [length],
                "samples": samples,
                "depths": 10,
                "seed": 42,
            },
        )["endprompt_passkey"]
        return passkey.summary([test["doc"] for test in tests], [test["score"] for test in tests])["score"]

    assert sum(path.stat().st_size for path in base.iterdir()) < 8e6
    assert found(256, 100) >= 95 and found(512, 50) <= 20 and found(1024, 20) == 0


def test_pairs_that_are_scored_apart_are_those_of_all_together(recipe_file, tmp_path):
    """As the tasks of a Slurm array do: each asks the recipe's whole question, and the run over all finds
    nothing left.
    """
    path = recipe_file(
        eval={
            "tasks": ["passkey", "perplexity"],
            "perplexity_corpus": str(tmp_path / "corpus.jsonl"),
            "perplexity_tokens": 64,
            "perplexity_stride": 32,
            "lengths": [96, 128],
        }
    )
    code, out, _ = run_main("evaluate", path, "base", "--out", tmp_path / "apart", "--list")
    pairs = out.split()
    assert (
        code == 0
        and pairs == ["passkey:96", "passkey:128", "perplexity:96", "perplexity:128"]
        and not (tmp_path / "apart").exists()
    )
    for pair in reversed(pairs):
        code, out, error = run_main("evaluate", path, "base", "--out", tmp_path / "apart", "--only", pair)
        assert code == 0 and out.count("\n") == 1, error
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "apart").rglob("*.json")}
    assert len(made) == 4
    code, out, error = run_main("evaluate", path, "base", "--out", tmp_path / "apart")
    assert (
        code == 0
        and out.count("\n") == 4
        and "scoring again" not in error
        and made == {file: file.stat().st_mtime_ns for file in made}
    )
    assert run_main("evaluate", path, "base", "--out", tmp_path / "together")[0] == 0
    for file in made:
        one, two = (
            json.loads((tmp_path / name / file.relative_to(tmp_path / "apart")).read_text())
            for name in ("apart", "together")
        )
        assert (one["question"], one["scores"]) == (two["question"], two["scores"])
    # So does --lengths where it names some of the recipe's own.
    for length in (96, 128):
        given = ["evaluate", path, "base", "--out", tmp_path / "narrowed", "--lengths", length]
        assert run_main(*given, "--list")[1].split() == [f"passkey:{length}", f"perplexity:{length}"]
        code, out, error = run_main(*given)
        assert code == 0 and out.count("\n") == 2, error
    for file in made:
        narrowed = tmp_path / "narrowed" / file.relative_to(tmp_path / "apart")
        one, two = (json.loads(path.read_text()) for path in (file, narrowed))
        assert (one["question"], one["scores"]) == (two["question"], two["scores"])
    code, _, error = run_main("evaluate", path, "base", "--out", tmp_path / "apart", "--only", "passkey:64")
    assert (
        code == 2
        and "--only passkey:64: the recipe has no such pair; it has passkey:96, passkey:128" in error
    )


def test_prompts_answered_together_from_one_cache_are_answered_as_alone(lm, tokenizer, monkeypatch):
    """What a GPU does: each prompt read without padding, then all of a batch answered together."""
    prompts = [
        passkey.build(tokenizer, length, one_key(key, depth))[0]
        for length, depth, key in (
            (128, 0, "12345"),
            (150, 0.5, "67890"),
            (128, 1, "24680"),
            (96, 0.5, "97531"),
        )
    ]
    alone = lm.generate_until(requests_of(prompts, max_gen_toks=9), disable_tqdm=True)
    read, generated, forward, generate = [], [], lm.model.forward, lm.model.generate
    monkeypatch.setattr(lm, "cached_tokens", 3 * 150)
    monkeypatch.setattr(
        lm.model,
        "forward",
        lambda *ids, **options: (
            read.append((ids or [options["input_ids"]])[0].shape) or forward(*ids, **options)
        ),
    )
    monkeypatch.setattr(
        lm.model,
        "generate",
        lambda **options: generated.append(tuple(options["input_ids"].shape)) or generate(**options),
    )
    assert lm.generate_until(requests_of(prompts, max_gen_toks=9), disable_tqdm=True) == alone
    assert [shape[0] for shape in generated] == [3, 1] and {shape[1] for shape in read if shape[0] == 3} == {
        1
    }
    assert sorted(shape[1] for shape in read if shape[1] > 1) == sorted(
        len(tokenizer(prompt)["input_ids"]) - 1 for prompt in prompts
    )


def test_a_budget_ends_an_evaluation_between_two_pairs(recipe_file, tmp_path, monkeypatch):
    """The first pair takes all of it; the same command goes on with the others, and asks nothing again."""
    path = recipe_file(eval={"lengths": [96, 128, 160]})
    clock, score = [0.0], run.Scorer.score
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        run.Scorer, "score", lambda *asked: clock.__setitem__(0, clock[0] + 20) or score(*asked)
    )
    command = (
        "evaluate",
        path,
        "base",
        "--out",
        tmp_path,
        "--budget",
        30,
        "--only",
        "passkey:160",
        "--only",
        "passkey:96",
        "--only",
        "passkey:128",
    )
    code, out, error = run_main(*command)
    assert code == 0 and out.splitlines()[0].split()[:3] == ["base", "passkey", "160"], error
    assert out.splitlines()[1:] == [
        "evaluate: 1 of 3 pairs are scored, and of 30 s 10 are left; the same command goes on"
    ]
    assert [path.name for path in (tmp_path / "small/base/eval/passkey").glob("*.json")] == ["160.json"]
    code, out, error = run_main(*command)
    assert (
        code == 0
        and [line.split()[2] for line in out.splitlines()[:2]] == ["160", "96"]
        and "2 of 3" in out
        and "again" not in error
    )
    assert json.loads((tmp_path / "small/base/eval/passkey/160.json").read_text())["seconds"] == 20
    for budget in ("0", "-1", "nan"):
        code, _, error = run_main("evaluate", path, "base", "--out", tmp_path, "--budget", budget)
        assert code == 2 and "name a positive number of seconds" in error and error.count("\n") == 1


def test_no_call_of_the_harness_lists_all_packages(recipe_file, tmp_path, monkeypatch):
    """Which takes seconds a pair of task and length, for what no result holds."""
    from lm_eval import evaluator

    asked = evaluator.add_env_info
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: pytest.fail("asked pip"))
    path = recipe_file(eval={"lengths": [96]})
    code, _, error = run_main("evaluate", path, "base", "--out", tmp_path / "out")
    assert code == 0, error
    assert evaluator.add_env_info is asked
