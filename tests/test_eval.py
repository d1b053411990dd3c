"""Scores: the tasks themselves, what a result file carries, and that nothing is scored twice or invented."""

import importlib.metadata
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_main, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from endprompt import BadInput, config, methods, provenance
from endprompt.eval import compare, figures, passkey, perplexity, run

BASE = methods.get("base")


# Passkey: the text

@pytest.mark.parametrize("hits, total, low, high", [  # R: prop.test(x, n, correct = FALSE)$conf.int
    (50, 100, 0.4038315, 0.5961685), (0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0), (1, 1, 0.2065493, 1.0), (95, 100, 0.8882495, 0.9784563),
])
def test_wilson(hits, total, low, high):
    assert passkey.wilson(hits, total) == pytest.approx((low, high), abs=2e-6)


@given(total=st.integers(1, 1000), share=st.floats(0, 1))
def test_wilson_holds_the_share(total, share):
    hits = round(share * total)
    low, high = passkey.wilson(hits, total)
    assert 0 <= low <= hits / total + 1e-12 and hits / total - 1e-12 <= high <= 1 and high - low < 1


@pytest.mark.parametrize("continuation, expected", [
    (" 12345", True), ("12345.", True), (" 12345. Remember it.", True), (" The pass key is 12345", True), ("12345 67890", True), ("\n12345", True),
    ("", False), (" ", False), (" 123456", False), (" 1234", False), (" 1 2 3 4 5", False), (" 12,345", False), (" 54321 12345", False), ("5, then 12345", False),
    (" no number at all", False), (" 012345", False), ("-", False),
])
def test_correct(continuation, expected):
    assert passkey.correct(continuation, "12345") is expected


@pytest.mark.parametrize("filler", [passkey.FILLER, ("Go.", "The sun is yellow and the sky is blue."), ("There and back again, there and back again.", "Go.")])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_prompt_fills_its_length(tokenizer, monkeypatch, depth, filler):
    """It fits with its answer, and with one sentence more it would not."""
    monkeypatch.setattr(passkey, "FILLER", filler)
    for length in [*range(90, 130), 777, 2048]:
        ids, limit = passkey.build(tokenizer, length, depth, "48213"), length - passkey.answer_tokens(tokenizer)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        sentences = sum(text.count(sentence) for sentence in set(filler))
        assert text == passkey.prompt("48213", sentences, depth)
        assert len(ids) <= limit < len(tokenizer(passkey.prompt("48213", sentences + 1, depth))["input_ids"])


@pytest.mark.parametrize("depth", [0.0, 1 / 9, 0.5, 1.0])
def test_key_stands_at_its_depth_and_nowhere_else(tokenizer, depth):
    text = tokenizer.decode(passkey.build(tokenizer, 700, depth, "48213"), skip_special_tokens=True)
    assert re.findall(r"\d+", text) == ["48213", "48213"]
    before, after = text.split(passkey.NEEDLE.format(key="48213"))
    sentences = [sum(part.count(sentence) for sentence in set(passkey.FILLER)) for part in (before, after)]
    assert sum(sentences) > 50 and sentences[0] == round(depth * sum(sentences))
    assert before.startswith(passkey.HEADER) and after.endswith(passkey.QUESTION)


def test_too_short_a_length_is_refused(tokenizer):
    shortest = len(tokenizer(passkey.prompt("12345", 0, 0))["input_ids"]) + passkey.answer_tokens(tokenizer)
    assert len(passkey.build(tokenizer, shortest, 0.5, "12345")) == shortest - passkey.answer_tokens(tokenizer)
    with pytest.raises(ValueError, match="too few for a passkey prompt"):
        passkey.build(tokenizer, shortest - 1, 0.5, "12345")


def test_answer_has_room_for_a_sixth_digit(tokenizer):
    assert passkey.answer_tokens(tokenizer) > len(tokenizer(" 123456", add_special_tokens=False)["input_ids"])


# Passkey: the score, with models whose answers are known

class Fake:
    """A model whose generate returns its prompt and then what ``answer`` makes of the prompt's text."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.calls = tokenizer, answer, []

    def generate(self, ids, attention_mask, max_new_tokens, do_sample, pad_token_id):
        assert not do_sample and attention_mask.shape == ids.shape and attention_mask.all()
        self.calls.append(tuple(ids.shape))
        rows = [self.tokenizer(self.answer(self.tokenizer.decode(row, skip_special_tokens=True)), add_special_tokens=False)["input_ids"][:max_new_tokens]
                for row in ids]
        longest = max(map(len, rows))
        new = torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in rows], dtype=ids.dtype).reshape(len(rows), longest)
        return torch.cat([ids, new], 1)


def key_of(prompt):
    return re.search(r"pass key is (\d{5})\.", prompt)[1]


ANSWERS = {
    "oracle": (lambda prompt: f" {key_of(prompt)}. Remember it.", 1.0),
    "oracle with words": (lambda prompt: f" {key_of(prompt)}", 1.0),
    "nothing": (lambda prompt: "", 0.0),
    "echo": (lambda prompt: prompt, 0.0),
    "echo of the end": (lambda prompt: prompt[-30:], 0.0),
    "filler": (lambda prompt: " The grass is green. The sky is blue.", 0.0),
    "one digit too many": (lambda prompt: f" {key_of(prompt)}7", 0.0),
    "another key": (lambda prompt: f" {(int(key_of(prompt)) + 1) % 100000:05d}", 0.0),
    "knows only late keys": (lambda prompt: f" {key_of(prompt)}" if prompt.index(key_of(prompt)) > len(prompt) / 2 else " ?", None),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_score_of_known_answers(tokenizer, name):
    answer, expected = ANSWERS[name]
    scores = passkey.score(Fake(tokenizer, answer), tokenizer, 300, depths=5, samples=12, seed=1)
    assert scores["length"] == 300 and scores["total"] == sum(cell["total"] for cell in scores["cells"]) == 12
    assert [cell["depth"] for cell in scores["cells"]] == [0, 0.25, 0.5, 0.75, 1] and [cell["total"] for cell in scores["cells"]] == [3, 3, 2, 2, 2]
    assert scores["accuracy"] == scores["correct"] / 12 and (scores["low"], scores["high"]) == passkey.wilson(scores["correct"], 12)
    assert max(scores["prompt_tokens"]) <= 300 - passkey.answer_tokens(tokenizer)
    if expected is None:
        assert [cell["correct"] for cell in scores["cells"]][::4] == [0, 2]
    else:
        assert scores["accuracy"] == expected


def test_keys_depend_on_seed_and_length_only(tokenizer):
    def keys(length, seed):
        seen = []
        passkey.score(Fake(tokenizer, lambda prompt: seen.append(key_of(prompt)) or ""), tokenizer, length, 3, 6, seed)
        return sorted(seen)

    assert keys(200, 1) == keys(200, 1) and len(set(keys(200, 1))) > 1
    assert keys(200, 1) != keys(200, 2) and keys(200, 1) != keys(220, 1)
    assert all(10000 <= int(key) <= 99999 for key in keys(200, 1))


def test_fewer_samples_than_depths(tokenizer):
    scores = passkey.score(Fake(tokenizer, ANSWERS["oracle"][0]), tokenizer, 200, depths=10, samples=3, seed=1)
    assert [cell["total"] for cell in scores["cells"]] == [1, 1, 1] and scores["accuracy"] == 1
    assert passkey.score(Fake(tokenizer, ANSWERS["oracle"][0]), tokenizer, 200, depths=1, samples=2, seed=1)["cells"] == [{"depth": 0, "correct": 2, "total": 2}]


def test_generate_batches_equal_lengths_and_keeps_the_order(tokenizer):
    texts = ["The sky is blue.", "Here we go. The sky is blue.", "The sun is yellow."]
    fake = Fake(tokenizer, lambda prompt: " " + prompt[:6])
    found = passkey.generate(fake, tokenizer, [tokenizer(text)["input_ids"] for text in texts], 8)
    assert [text.strip() for text in found] == [text[:6].strip() for text in texts]
    assert sorted(shape[0] for shape in fake.calls) == [1, 2]
    fake.calls.clear()
    passkey.generate(fake, tokenizer, [tokenizer(texts[0])["input_ids"]] * 5, 8, tokens_at_once=2 * len(tokenizer(texts[0])["input_ids"]))
    assert [shape[0] for shape in fake.calls] == [2, 2, 1]


def test_batched_continuations_are_those_of_single_prompts(base, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    prompts = [passkey.build(tokenizer, 128, depth, key) for depth, key in ((0, "12345"), (0.5, "67890"), (1, "24680"))]
    assert passkey.generate(model, tokenizer, prompts, 6) == [passkey.generate(model, tokenizer, [ids], 6)[0] for ids in prompts]


# Perplexity

def test_windows_score_the_same_tokens_at_each_length():
    documents = [list(range(100)), list(range(1000, 1030)), list(range(2000, 2075))]
    targets = {length: [window[-count:] for window, count in perplexity.windows(documents, length, 64, 8, 10**6)] for length in (9, 16, 32, 64)}
    assert targets[9] == targets[16] == targets[32] == targets[64]
    assert targets[64][0] == list(range(56, 64)) and len(targets[64]) == 5 + 2  # the second document is too short
    flat = sum(targets[64], [])
    assert len(flat) == len(set(flat))
    assert all(len(window) == 16 and window == list(range(window[0], window[0] + 16)) for window, _ in perplexity.windows(documents, 16, 64, 8, 10**6))


def test_windows_keep_to_the_budget():
    assert len(perplexity.windows([list(range(1000))], 32, 64, 8, 40)) == 5
    assert len(perplexity.windows([list(range(1000))], 32, 64, 8, 41)) == 6


def test_windows_refuse_what_cannot_be_scored():
    for stride in (32, 33):
        with pytest.raises(ValueError, match=f"stride of {stride} leaves no context in windows of 32"):
            perplexity.windows([list(range(1000))], 32, 64, stride, 100)
    for documents in ([], [list(range(63))]):
        with pytest.raises(ValueError, match="no document holds 64 tokens"):
            perplexity.windows(documents, 32, 64, 8, 100)
    assert perplexity.windows([list(range(64))], 32, 64, 8, 100)


@torch.no_grad()
def test_perplexity_is_that_of_transformers_own_loss(base, tokenizer, tiny_text):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = tokenizer(" ".join(tiny_text[:2]))["input_ids"][:300]
    found = perplexity.score(model, [ids], 96, 128, 32, 10**6)
    nats = []
    for end in range(128, len(ids) + 1, 32):
        window = torch.tensor([ids[end - 96:end]])
        labels = window.clone()
        labels[:, :-32] = -100
        nats += [model(window, labels=labels).loss.item()] * 32
    assert found["tokens"] == len(nats) and found["length"] == 96
    assert found["nats"] == pytest.approx(sum(nats) / len(nats), rel=1e-5) and found["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)
    assert 0 < found["low"] < found["perplexity"] < found["high"]


def test_perplexity_of_one_window_has_no_spread(base):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    found = perplexity.score(model, [list(range(3, 67))], 32, 64, 8, 8)
    assert found["tokens"] == 8 and found["low"] == found["perplexity"] == found["high"]


# Results on disk

@pytest.fixture
def recipe(recipe_file, tmp_path, tiny_text):
    """recipe(**keys of the eval section) -> a checked recipe whose evaluation takes a second."""
    write_jsonl(tmp_path / "heldout.jsonl", [" ".join(tiny_text[:4])])

    def make(**options):
        settings = {"tasks": ["passkey", "perplexity"], "lengths": [96, 128], "samples": 3, "depths": 2, "perplexity_corpus": str(tmp_path / "heldout.jsonl"),
                    "perplexity_tokens": 64, "perplexity_stride": 32}
        return config.load(recipe_file(lengths={"target": 2048}, eval={**settings, **options}))

    return make


def results(folder):
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))}


def forbid(monkeypatch, module):
    def again(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(module, "score", again)


def test_results_say_where_they_come_from(recipe, base, tmp_path, capsys):
    run.evaluate(recipe(), BASE, tmp_path / "run")
    found = results(tmp_path / "run/eval")
    assert list(found) == ["passkey/128.json", "passkey/96.json", "perplexity/128.json", "perplexity/96.json"]
    for result in found.values():
        assert result["recipe"] == "small" and result["method"] == "base" and result["question"]["seed"] == 42
        assert result["question"]["model"]["name_or_path"] == str(base) and result["question"]["model"]["fingerprint"] == run.fingerprint(base)
        assert result["question"]["model"]["rope_parameters"]["rope_type"] == "default"
        assert result["versions"]["torch"] == importlib.metadata.version("torch") and result["versions"].keys() >= {"python", "transformers", "endprompt"}
        assert result["device"] == provenance.device() and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", result["date"])
        assert result["commit"] is None or re.fullmatch(r"[0-9a-f]{40,64}(\+changes)?", result["commit"])
    assert found["passkey/96.json"]["question"] | {"samples": 3, "depths": 2, "length": 96, "task": "passkey"} == found["passkey/96.json"]["question"]
    assert found["perplexity/96.json"]["question"]["longest"] == 128 and found["perplexity/96.json"]["scores"]["tokens"] == 64
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and all(line.startswith("base ") for line in printed)
    assert f"{found['passkey/96.json']['scores']['accuracy']:.1%}" in printed[0] and f"{found['perplexity/96.json']['scores']['perplexity']:.3f}" in printed[2]


def test_commit_is_the_checkouts(tmp_path, monkeypatch):
    if shutil.which("git"):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
        assert (provenance.commit() or "").removesuffix("+changes") == (head.stdout.strip() if head.returncode == 0 else "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None
    assert provenance.versions(("no-such-package",))["no-such-package"] is None


def test_heatmap_is_a_picture(recipe, tmp_path):
    run.evaluate(recipe(tasks=["passkey"]), BASE, tmp_path / "run")
    pixels = image.imread(tmp_path / "run/eval/passkey.png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 300 and pixels.std() > 0.05


def test_existing_results_are_kept(recipe, tmp_path, monkeypatch, capsys):
    run.evaluate(recipe(), BASE, tmp_path / "run")
    before, printed = results(tmp_path / "run/eval"), capsys.readouterr().out
    for module in (passkey, perplexity):
        forbid(monkeypatch, module)
    run.evaluate(recipe(), BASE, tmp_path / "run")
    out, err = capsys.readouterr()
    assert results(tmp_path / "run/eval") == before and out == printed and "again" not in err


@pytest.mark.parametrize("options, task", [({"samples": 4}, "passkey"), ({"depths": 3}, "passkey"), ({"seed": 7}, "passkey"), ({"perplexity_stride": 16}, "perplexity")])
def test_results_of_another_setting_are_replaced(recipe, tmp_path, capsys, options, task):
    run.evaluate(recipe(tasks=[task], lengths=[96]), BASE, tmp_path / "run")
    capsys.readouterr()
    run.evaluate(recipe(tasks=[task], lengths=[96], **options), BASE, tmp_path / "run")
    assert "was scored for another model or setting; scoring again" in capsys.readouterr().err
    name, value = next(iter(options.items()))
    assert value in results(tmp_path / "run/eval")[f"{task}/96.json"]["question"].values(), name


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_results_that_cannot_be_read_are_replaced(recipe, tmp_path, capsys, text):
    path = tmp_path / "run/eval/passkey/96.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    run.evaluate(recipe(tasks=["passkey"], lengths=[96]), BASE, tmp_path / "run")
    assert "cannot be read; scoring again" in capsys.readouterr().err and json.loads(path.read_text())["scores"]["length"] == 96


def test_changed_weights_are_another_model(recipe, recipe_file, base, tmp_path, capsys):
    """The same path with other weights in it: the old score must not stand for the new model."""
    folder = shutil.copytree(base, tmp_path / "model")
    checked = recipe(tasks=["passkey"], lengths=[96])
    checked = checked.model_copy(update={"model": checked.model.model_copy(update={"name_or_path": str(folder)})})
    for method in (BASE, methods.get("endprompt")):
        other = None if method is BASE else str(folder)
        run.evaluate(checked, method, tmp_path / "run", other)
        weights = load_file(folder / "model.safetensors")
        save_file({name: tensor * 0.9 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        capsys.readouterr()
        run.evaluate(checked, method, tmp_path / "run", other)
        assert "scoring again" in capsys.readouterr().err, method.name


@pytest.mark.parametrize("name, at, seen", [("model.safetensors", 0, True), ("model.safetensors", -1, True), ("model.gguf", 0, True), ("config.json", 0, True),
                                            ("README.md", 0, False)])
def test_fingerprint(tmp_path, name, at, seen):
    """Large files are told apart by their two ends."""
    data = bytearray(2**21 + 100)
    (tmp_path / name).write_bytes(data)
    before = run.fingerprint(tmp_path)
    data[at] = 1
    (tmp_path / name).write_bytes(data)
    assert (run.fingerprint(tmp_path) != before) is seen


def test_another_model_has_its_own_folder(recipe, base, tmp_path):
    checked = recipe(tasks=["passkey"], lengths=[96])
    run.evaluate(checked, methods.get("endprompt"), tmp_path / "run", str(base))
    found = results(next((tmp_path / "run").glob("eval-base-*")))["passkey/96.json"]
    assert found["question"]["model"] == {"name_or_path": str(base), "fingerprint": run.fingerprint(base), "dtype": "torch.float32", "attention": "sdpa"}
    assert not (tmp_path / "run/eval").exists() and next((tmp_path / "run").glob("eval-base-*/passkey.png"))


def test_interpolated_model_is_scored_with_its_scaling(recipe, base, tmp_path):
    run.evaluate(recipe(tasks=["perplexity"], lengths=[96]), methods.get("interpolation"), tmp_path / "run")
    original = AutoConfig.from_pretrained(base)
    assert results(tmp_path / "run/eval")["perplexity/96.json"]["question"]["model"]["rope_parameters"] == {
        **original.rope_parameters, "rope_type": "linear", "factor": 2048 / original.max_position_embeddings}


def test_models_that_cannot_be_scored(recipe, base, tmp_path):
    trained, checked = methods.get("endprompt"), recipe()

    def refuse(complaint, other):
        with pytest.raises(BadInput, match=complaint):
            run.evaluate(checked, trained, tmp_path / "run", other)

    refuse(r"run.model is missing; train endprompt first, or name a model with --model", None)
    refuse("there is no folder .*nowhere", str(tmp_path / "nowhere"))
    refuse("there is no folder nowhere", "./nowhere")
    refuse("owner/nowhere cannot be loaded", "owner/nowhere")
    (tmp_path / "empty").mkdir()
    refuse("empty cannot be loaded", str(tmp_path / "empty"))
    folder = shutil.copytree(base, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    lost = sorted(weights)[1]
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, folder / "model.safetensors", {"format": "pt"})
    refuse(rf"broken lacks \['{lost}'\]; random values would be scored", str(folder))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    refuse("broken cannot be loaded", str(folder))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options, complaint", [
    ({"lengths": [16, 128], "tasks": ["passkey"]}, r"eval\.lengths: passkey at 16: 16 tokens are too few"),
    ({"lengths": [96, 2000], "tasks": ["perplexity"]}, r"eval\.lengths: perplexity at 96: no document holds 2000 tokens"),
    ({"perplexity_stride": 128, "tasks": ["perplexity"]}, r"eval\.lengths: perplexity at 96: a stride of 128 leaves no context"),
    ({"perplexity_corpus": "./nowhere.jsonl"}, r"eval\.perplexity_corpus: there is no file or folder './nowhere\.jsonl'"),
])
def test_settings_that_cannot_be_scored(recipe, tmp_path, options, complaint):
    with pytest.raises(BadInput, match=complaint):
        run.evaluate(recipe(**options), BASE, tmp_path / "run")


def test_command_line(recipe, recipe_file, tmp_path):
    recipe(tasks=["passkey"], lengths=[96])
    path = tmp_path / "small.yaml"
    code, out, err = run_main("evaluate", path, "base", "--out", tmp_path / "runs")
    assert code == 0 and out.startswith("base ") and (tmp_path / "runs/small/base/eval/passkey/96.json").exists(), err
    code, out, err = run_main("evaluate", path, "endprompt", "--out", tmp_path / "runs", "--model", "./nowhere")
    assert code == 2 and err.splitlines()[-1] == "endprompt: --model: there is no folder nowhere"
    assert not (tmp_path / "runs/small/endprompt").exists()


# Comparison

def write_result(folder, method, task, length, date="2026-01-01T00:00:00+00:00", model="m", **scores):
    path = folder / method / "eval" / task / f"{length}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"question": {"model": model}, "date": date, "method": method, "scores": {"length": length, **scores}}))


def passkey_scores(correct, total=20):
    low, high = passkey.wilson(correct, total)
    return {"correct": correct, "total": total, "accuracy": correct / total, "low": low, "high": high,
            "cells": [{"depth": 0, "correct": correct, "total": total}]}


def cells(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


@pytest.fixture
def compared(tmp_path):
    folder = tmp_path / "tiny"
    write_result(folder, "base", "passkey", 256, **passkey_scores(20))
    write_result(folder, "base", "passkey", 2048, **passkey_scores(0))
    write_result(folder, "endprompt", "passkey", 2048, **passkey_scores(13))
    write_result(folder, "endprompt", "perplexity", 2048, perplexity=12.341, nats=2.5, low=12.0, high=13.0)
    (folder / "endprompt/train.json").write_text(json.dumps({"tokens": 524288, "seconds": 61.4, "final_text_loss": 2.25, "final_end_prompt_loss": 0.0}))
    (folder / "not_a_method/eval/passkey").mkdir(parents=True)
    return folder


def test_table_holds_the_results_and_nothing_else(compared):
    found = cells(compare.table(compared))
    assert found == {
        "base": {"passkey 256": "100% [84%, 100%]", "passkey 2048": "0% [0%, 16%]", "perplexity 2048": "not run", "trained tokens": "-", "train s": "-",
                 "text loss": "-", "end-prompt loss": "-"},
        "endprompt": {"passkey 256": "not run", "passkey 2048": "65% [43%, 82%]", "perplexity 2048": "12.34",
                      "trained tokens": "524,288", "train s": "61", "text loss": "2.250", "end-prompt loss": "0.000"}}


def test_leftovers_of_another_model_are_left_out(compared):
    """Lengths that were scored before the model was trained anew belong to no row."""
    write_result(compared, "endprompt", "passkey", 512, date="2025-12-31T00:00:00+00:00", model="old", **passkey_scores(20))
    assert "passkey 512" not in compare.table(compared)
    assert [row["scores"]["length"] for row in figures.read(compared / "endprompt/eval/passkey")] == [2048]
    assert figures.read(compared / "nowhere") == []


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
    write_result(tmp_path, "short", "perplexity", 512, perplexity=9.0, nats=2.2, low=8.0, high=10.0)
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
    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", lambda self, grid, **options: drawn.append(np.array(grid)) or draw(self, grid, **options))
    rows = [{"scores": {"length": 1, "accuracy": 1.0, "cells": [{"depth": 0, "correct": 2, "total": 2}, {"depth": 1, "correct": 0, "total": 2}]}},
            {"scores": {"length": 2, "accuracy": 0.5, "cells": [{"depth": 0, "correct": 1, "total": 2}]}}]
    figures.heatmaps({"one": rows}, tmp_path / "folder/picture.png")
    np.testing.assert_array_equal(drawn[0], [[1.0, 0.5], [0.0, np.nan]])
    assert (tmp_path / "folder/picture.png").exists()


def test_the_tiny_base_retrieves_in_its_window_and_fails_beyond_it(base):
    """Else the demo would show nothing: at least 95 % of keys at 256 tokens, hardly any at twice that."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert sum(path.stat().st_size for path in base.iterdir()) < 8e6
    assert passkey.score(model, tokenizer, 256, 10, 100, 42)["accuracy"] >= 0.95
    assert passkey.score(model, tokenizer, 512, 10, 50, 42)["accuracy"] <= 0.2
    assert passkey.score(model, tokenizer, 1024, 10, 20, 42)["accuracy"] == 0
