"""Keys asked for from afar, several keys behind one reading, the worth of far context: that caches change no
answer, that a blind model is seen to be blind, and that a killed evaluation goes on.
"""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY, run_main, tiny_documents, write_jsonl
from lm_eval.api.instance import Instance
from matplotlib import image
from networks import configuration, network, saved, scheme

from endprompt import BadInput
from endprompt.bases import model
from endprompt.evaluation import (
    distance,
    distance_figures,
    engine,
    far_gain,
    haystacks,
    named_keys,
    passkey,
    perplexity,
    piecewise,
    prefix,
    progress,
    prompts,
    question,
    run,
)
from endprompt.positions import plans, rope
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.reports import distance_tables, distances, markdown
from endprompt.rows import shards

TARGET = 2048
FIRST = ("linear", "yarn", "longrope")  # the others among the slow tests
SCALINGS = [
    kind if kind in FIRST else pytest.param(kind, marks=pytest.mark.slow) for kind in (None, *rope.TYPES)
]
TEMPLATE = "{% for m in messages %}The end. {{ m['content'] }} {% endfor %}Here we go."


@pytest.fixture(scope="module")
def scaled(base, tmp_path_factory):
    """scaled(type) -> the tiny base under a scaling to TARGET, float32; each is built once."""
    text = {"model": {"name_or_path": str(base)}, "lengths": {"physical": 256, "target": TARGET}}
    path = tmp_path_factory.mktemp("scaled") / "tiny.yaml"
    path.write_text(json.dumps(text | {"data": {"corpus": "none", "tokens": 1}}))
    found = model.Base(schema.load(path))
    built: dict = {}

    def build(kind):
        if kind not in built:
            scaling = scheme(kind, found.original_length, TARGET, 32)
            built[kind] = model.build(found, scaling, torch.float32, False).eval()
        return built[kind]

    return build


def reader(net, tokenizer):
    return prefix.Reader(net, engine.ends(net.generation_config, tokenizer), passkey.NEW_TOKENS)


@torch.no_grad()
def one_by_one(net, tokenizer, ids, asked):
    """(text, loss a token of the answer) of one question, without any cache: the whole is read for every
    token of the answer."""
    places = [*range(len(ids)), *range(asked.start, asked.start + len(asked.ids) + 2 * passkey.NEW_TOKENS)]

    def logits(tokens):
        positions = torch.tensor([places[: len(tokens)]])
        row, mask = torch.tensor([tokens]), torch.ones(1, len(tokens), dtype=torch.long)
        return net(row, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]

    right, before = [*ids, *asked.ids, *asked.answer], len(ids) + len(asked.ids)
    nats = torch.nn.functional.cross_entropy(
        logits(right)[before - 1 : -1], torch.tensor(asked.answer), reduction="none"
    )
    said = [*ids, *asked.ids]
    while len(said) < before + passkey.NEW_TOKENS:
        said.append(int(logits(said)[-1].argmax()))
        if said[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(said[before:], skip_special_tokens=True), nats


# Answers behind a cache


@pytest.mark.parametrize("kind", SCALINGS)
def test_answers_behind_a_cache_are_those_without(scaled, tokenizer, kind, monkeypatch):
    """Near and far, questions of several lengths together; and whatever is asked together."""
    net, keys = scaled(kind), distance.drawn(haystacks.Design(3, 3, 1, 7), 0)
    found = haystacks.within(tokenizer, 120, keys)
    questions = [
        prefix.Question(asked.ids, asked.answer, len(found.ids) + far)
        for far in (0, 77, 1500)
        for asked in found.asked
    ]
    questions.append(prefix.Question(questions[0].ids[1:], questions[0].answer, 140))  # of another length
    wanted = [one_by_one(net, tokenizer, found.ids, each) for each in questions]
    for mask in (10**8, 1, 30000):
        monkeypatch.setattr(prefix, "MASK", mask)
        replies = reader(net, tokenizer).ask(found.ids, questions)
        for reply, (text, nats) in zip(replies, wanted, strict=True):
            assert tokenizer.decode(reply.ids, skip_special_tokens=True) == text
            assert torch.allclose(torch.tensor(reply.nats), nats, atol=1e-4)
    # The twin: a position further on gives another loss, so that a wrong one would be seen.
    moved = [prefix.Question(each.ids, each.answer, each.start + 1) for each in questions]
    others = reader(net, tokenizer).ask(found.ids, moved)
    assert (
        max(
            abs(a - b)
            for one, other in zip(replies, others, strict=True)
            for a, b in zip(one.nats, other.nats, strict=True)
        )
        > 1e-3
    )


def test_what_was_read_serves_as_far_as_it_is_the_same(scaled, tokenizer, monkeypatch):
    net = scaled("linear")
    monkeypatch.setattr(prefix, "PIECE", 16)
    kept, read, forward = reader(net, tokenizer), [], net.forward
    monkeypatch.setattr(
        net, "forward", lambda ids, **options: read.append(ids.shape[1]) or forward(ids, **options)
    )
    one = list(range(3, 103))
    for ids, counts in (
        (one, [100]),
        (one, []),
        (one[:60], []),
        ([*one[:60], *one[:40]], [16, 16, 8]),
        ([5, *one], [101]),
    ):
        read.clear()
        cache = kept.read(ids)
        assert read == counts and cache.get_seq_length() == len(ids)
        alone = reader(net, tokenizer).read(ids)
        for layer, other in zip(cache.layers, alone.layers, strict=True):
            assert torch.allclose(layer.keys, other.keys, atol=1e-4)
            assert torch.allclose(layer.values, other.values, atol=1e-4)


def requests_of(texts):
    options = {"max_gen_toks": passkey.NEW_TOKENS, "do_sample": False, "until": []}
    return [Instance("generate_until", {}, (text, options), number) for number, text in enumerate(texts)]


@pytest.mark.parametrize("kind", SCALINGS)
def test_passkeys_of_shared_prefixes_are_answered_as_before(scaled, tokenizer, kind, monkeypatch):
    """The prompts have several lengths, so that rows are padded where they are answered together."""
    net = scaled(kind)
    design = passkey.Design(12, 4, 42)
    texts = [test["prompt"] for test in passkey.documents(tokenizer, [160, 200], design)]
    before = engine.LongLM(net, tokenizer).generate_until(requests_of(texts), disable_tqdm=True)
    read, forward = [], net.forward
    monkeypatch.setattr(
        net,
        "forward",
        lambda ids=None, **options: (
            read.append((ids if ids is not None else options["input_ids"]).numel())
            or forward(ids if ids is not None else options.pop("input_ids"), **options)
        ),
    )
    lm = prefix.SharedLM(net, tokenizer)
    for at_once in (10**5, 500):
        read.clear()
        monkeypatch.setattr(engine, "TOKENS_AT_ONCE", at_once)
        assert lm.generate_until(requests_of(texts), disable_tqdm=True) == before
        if kind == "longrope":  # whose frequencies are those of the longest row: each is read whole
            assert not engine.shares_cache(net)
            continue
        whole = sum(len(tokenizer(text)["input_ids"]) for text in texts)
        assert sum(read) < 0.8 * whole + len(texts) * passkey.NEW_TOKENS
        assert not lm.prompts and not lm.cached_tokens


def test_prompts_that_share_little_are_read_as_ever(scaled, tokenizer, monkeypatch):
    lm = prefix.SharedLM(scaled(None), tokenizer)
    texts = [f"{name} went to the harbour with the lamp of {name}." for name in passkey.NAMES[:4]]
    seen = []
    monkeypatch.setattr(engine.LongLM, "_batches", lambda self, groups: seen.append(groups) or [])
    lm.generate_until(requests_of(texts), disable_tqdm=True)
    assert len(seen) == 1 and prefix.saved(sorted(map(lm.tok_encode, texts))) < prefix.WORTH
    monkeypatch.undo()
    assert lm.generate_until(requests_of(texts), disable_tqdm=True) == engine.LongLM(
        scaled(None), tokenizer
    ).generate_until(requests_of(texts), disable_tqdm=True)


@pytest.mark.parametrize(
    "one, other, alike", [([1, 2], [1, 2, 3], 2), ([], [1], 0), ([4, 5, 6], [4, 9, 6], 1)]
)
def test_common(one, other, alike):
    assert prefix.common(one, other) == prefix.common(other, one) == alike


@pytest.mark.parametrize("kind, chat", [(None, False), ("yarn", True)])
def test_named_keys_are_answered_as_the_harness_asks_them_one_by_one(
    scaled, tokenizer, base, tmp_path, kind, chat
):
    net, design = scaled(kind), haystacks.Design(7, 3, 4, 42, chat)
    folder = str(base)
    if chat:
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(tmp_path)
        folder = str(tmp_path)
    try:
        asked = {
            "tokenizer": folder,
            "samples": 7,
            "named_keys": 3,
            "depths": 4,
            "max_seq_lengths": [180],
            "chat_template": chat,
        }
        samples = engine.run(
            engine.LongLM(net, tokenizer), "endprompt_named_keys", asked, chat_template=chat
        )["endprompt_named_keys"]
        task = named_keys.NamedKeys(reader(net, tokenizer), tokenizer, design, 180)
        rows = [row for number in range(task.total) for row in task.rows(number)]
    finally:
        tokenizer.chat_template = None
    assert [row["pred"] for row in rows] == [sample["filtered_resps"][0] for sample in samples]
    assert [row["key"] for row in rows] == [sample["doc"]["key"] for sample in samples]
    assert [row["prompt_tokens"] for row in rows] == [sample["doc"]["prompt_tokens"] for sample in samples]
    found = task.summary(rows)
    assert found["score"] == pytest.approx(sum(sample["score"] for sample in samples) / 7)
    assert found["samples"] == 7 and found["haystacks"] == 3 and max(found["prompt_tokens"]) <= 172


# Haystacks


@pytest.mark.parametrize("tokens", [90, 128, 1000])
def test_a_haystack_is_as_long_as_may_be(tokenizer, tokens):
    keys = distance.drawn(haystacks.Design(2, 2, 1, 3), 0)
    found = haystacks.within(tokenizer, tokens, keys)
    assert tokens - 8 < len(found.ids) <= tokens
    text = tokenizer.decode(found.ids, skip_special_tokens=True)
    for asked in found.asked:
        assert text.count(asked.key.key) == 2 and asked.key.name in asked.prompt.rpartition("What is")[2]
        held = tokenizer.decode(found.ids[asked.first : asked.last + 1])
        assert held.count(asked.key.key) == 2 and held.strip().startswith(asked.key.key[0])
        assert sum(asked.digits) == len(
            [token for token in asked.answer if any(c.isdigit() for c in tokenizer.decode([token]))]
        )
        assert tokenizer.decode(asked.answer).strip() == asked.key.key
        # Tokens as they are where nobody splits them.
        whole = prompts.encode(tokenizer, f"{asked.prompt} {asked.key.key}")
        assert [*found.ids, *asked.ids, *asked.answer] == whole


def test_more_samples_are_the_same_and_others(tokenizer):
    few, many = haystacks.Design(5, 2, 4, 42), haystacks.Design(9, 2, 4, 42)
    assert few.haystacks == 3 and [few.asked(number) for number in range(3)] == [2, 2, 1]
    few_docs, many_docs = (named_keys.documents(tokenizer, [200], design) for design in (few, many))
    assert few_docs[:4] == many_docs[:4] and len(few_docs) == 5 and len(many_docs) == 9
    assert distance.drawn(few, 1) == distance.drawn(many, 1) != distance.drawn(many, 2)
    other = haystacks.Design(9, 2, 4, 43)
    assert named_keys.documents(tokenizer, [200], other)[0]["key"] != many_docs[0]["key"]


def test_the_last_haystack_holds_as_many_keys_as_the_others(tokenizer):
    """Fewer of them are asked for; with fewer in it, these would be easier to find."""
    design, whole = haystacks.Design(5, 3, 4, 42), haystacks.Design(6, 3, 4, 42)
    last, full = (named_keys.haystack(tokenizer, 200, each, 1) for each in (design, whole))
    assert last.ids == full.ids and last.asked == full.asked[:2] and len(full.asked) == 3

    class Reader:
        """Notes what it is asked, and knows nothing."""

        def ask(self, ids, questions):
            self.ids, self.questions = ids, questions
            return [prefix.Reply([], [1.0] * len(question.answer)) for question in questions]

        def forget(self):
            pass

    stretch, readers = distance.Stretch(128, 512, 60), [Reader(), Reader()]
    rows = [
        distance.Distance(reader, tokenizer, each, stretch, [0, 100]).rows(1)
        for reader, each in zip(readers, (design, whole), strict=True)
    ]
    assert readers[0].ids == readers[1].ids and [len(each) for each in rows] == [4, 6]
    assert [row for row in rows[1] if row["name"] in {row["name"] for row in rows[0]}] == rows[0]


@pytest.mark.parametrize("keys, depths", [(1, 1), (2, 5), (3, 10), (4, 10), (7, 7), (4, 6)])
def test_depths_are_tested_equally_often(keys, depths):
    design = haystacks.Design(keys * depths, keys, depths, 0)
    found = [haystacks.spread(design, number) for number in range(design.haystacks)]
    assert all(len(set(each)) == keys for each in found)
    counts = {depth: sum(each.count(depth) for each in found) for each in found for depth in each}
    assert set(counts.values()) == {keys} and len(counts) == depths and max(counts) <= 1


def test_distances(tokenizer):
    stretch = distance.Stretch(100, 1000, 50)
    spread = stretch.distances(None)
    assert len(spread) == distance.POINTS and spread[0] == 0 and spread[-1] == 850 == stretch.most
    assert stretch.distances([850, 0, 850]) == [0, 850]
    assert distance.Stretch(100, 155, 50).distances(None) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"at 851 a haystack of 100 .* 850 is the greatest that fits"):
        stretch.distances([0, 851])
    with pytest.raises(ValueError, match="does not fit into lengths.target 149; lower it to 99"):
        distance.Stretch(100, 149, 50).distances(None)
    room = haystacks.room(tokenizer)
    for name in passkey.NAMES:
        asked = len(
            tokenizer(" " + passkey.NAMED_QUESTION.format(name=name), add_special_tokens=False)["input_ids"]
        )
        assert asked + passkey.NEW_TOKENS <= room


# What is found


def test_a_model_that_is_blind_beyond_its_window_finds_nothing_there(recipe_file, tmp_path):
    """The tiny base under its own RoPE, window 256; every question lies inside the target."""
    path = recipe_file(
        lengths={"target": TARGET},
        eval={"tasks": ["distance"], "samples": 40, "distance_haystack": 128, "distance_keys": 2},
    )
    code, out, error = run_main("evaluate", path, "base", "--out", tmp_path)
    assert code == 0 and out.split()[:3] == ["base", "distance", "2048"], error
    result = json.loads((tmp_path / "small/base/eval/distance/2048.json").read_text())
    cells = result["scores"]["cells"]
    assert len(cells) == distance.POINTS and all(cell["total"] == 40 for cell in cells)
    for cell in cells:
        if cell["between"][1] < 256:
            assert cell["score"] >= 60 and cell["nats"] < 0.5
        if cell["between"][0] >= 300:
            assert cell["score"] == 0 and cell["nats"] > 1.8 and cell["high"] < 10
    assert cells[0]["between"][1] < 256 and cells[-1]["between"][1] < TARGET
    assert result["scores"]["coverage"] == {"source": "base trains nothing", "supervised": None, "gap": None}
    predictions = [
        json.loads(line)
        for line in (tmp_path / "small/base/eval/distance/2048.jsonl").read_text().splitlines()
    ]
    assert len(predictions) == 40 * distance.POINTS
    for cell in cells:
        here = [row for row in predictions if row["distance"] == cell["distance"]]
        assert cell["correct"] == sum(passkey.correct(row["pred"], row["key"]) for row in here)
        assert cell["nats"] == pytest.approx(sum(row["nats"] for row in here) / 40)
        assert all(
            cell["between"][0] <= low <= high <= cell["between"][1]
            for low, high in (r["between"] for r in here)
        )
    assert result["scores"]["score"] == pytest.approx(sum(cell["score"] for cell in cells) / len(cells))
    pixels = image.imread(tmp_path / "small/base/eval/distance.png")
    assert pixels.shape[0] > 300 and pixels.std() > 0.05


def test_interpolation_without_training_is_seen_by_distance(recipe_file, tmp_path):
    """All positions are ones that the model knows, squeezed: what it finds does not end at its window."""
    path = recipe_file(
        lengths={"target": 512},
        eval={"tasks": ["distance"], "samples": 6, "distance_haystack": 100, "distances": [0, 350, 350]},
    )
    code, _, error = run_main("evaluate", path, "interpolation", "--out", tmp_path)
    assert code == 0, error
    cells = json.loads((tmp_path / "small/interpolation/eval/distance/512.json").read_text())["scores"][
        "cells"
    ]
    assert [cell["distance"] for cell in cells] == [0, 350] and all(cell["nats"] < 3.5 for cell in cells)


def test_shading_is_that_of_counted_distances(recipe_file, tmp_path, tokenizer, scaled):
    path = recipe_file(data={"tokens": 1024, "end_prompts": ["EP_1"]}, lengths={"target": 512})
    assert run_main("prepare", path, "endprompt", "--out", tmp_path)[0] == 0
    experiment = Experiment.of(schema.load(path), "endprompt", tmp_path)
    counts, source = piecewise.supervised(experiment, None)
    folder = experiment.run / "shards"
    rows = list(shards.position_ids(folder, shards.read_manifest(folder)))
    seen = [0] * 512
    for row in rows:
        for query in range(len(row)):
            for key in range(query + 1):
                seen[row[query] - row[key]] += 1
    assert counts.tolist() == seen and source == f"{len(rows)} rows of shards/"
    task = distance.Distance(
        reader(scaled(None), tokenizer),
        tokenizer,
        haystacks.Design(2, 2, 1, 42),
        distance.Stretch(96, 512, haystacks.room(tokenizer)),
        [0, 200, 380],
    )
    task.counts, task.reason = counts, source
    found = task.summary(task.rows(0))
    spans = found["coverage"]
    for distance_, count in enumerate(seen):
        inside = any(low <= distance_ <= high for low, high in spans["supervised"])
        assert inside is (count > 0) is not any(low <= distance_ <= high for low, high in spans["gap"])
    for cell in found["cells"]:
        low, high = cell["between"]
        part = seen[low : high + 1]
        assert cell["supervised"] == pytest.approx(sum(count > 0 for count in part) / len(part))
        assert cell["pairs"] == pytest.approx(sum(part) / len(part))
    assert found["cells"][1]["supervised"] == 0 < found["cells"][0]["supervised"]
    assert [plans.segments(row)[0][0] for row in rows][0] == 0

    assert piecewise.supervised(experiment, "other") == (None, "another model than the run's own was scored")
    for shard in folder.glob("*.parquet"):
        shard.write_bytes(b"damaged")
    none, why = piecewise.supervised(experiment, None)
    assert none is None and "shard" in why
    other = Experiment.of(schema.load(path, ["data.seed=9"]), "endprompt", tmp_path)
    assert piecewise.supervised(other, None)[0] is None


# Piece by piece


@pytest.fixture
def keys_recipe(recipe_file):
    """A recipe whose three tasks take a second each."""

    def write(**options):
        held = recipe_file("unused").parent / "held.jsonl"
        if not held.exists():
            write_jsonl(held, tiny_documents(3, 60))
        settings = {
            "tasks": ["distance", "named_keys", "far_gain"],
            "lengths": [200, 320],
            "samples": 8,
            "depths": 4,
            "distance_haystack": 96,
            "distances": [0, 300],
            "perplexity_corpus": str(held),
            "far_gain_tokens": 48,
            "far_gain_texts": 5,
        }
        return recipe_file(eval={**settings, **options}, lengths={"target": 512})

    return write


def outcomes(folder):
    return {
        str(path.relative_to(folder)): json.loads(path.read_text())["scores"]
        for path in sorted(folder.glob("*/*.json"))
    }


PAIRS = ["distance/512.json", "far_gain/320.json", "named_keys/200.json", "named_keys/320.json"]
MAKERS = {"distance": distance.Distance, "named_keys": named_keys.NamedKeys, "far_gain": far_gain.FarGain}


@pytest.mark.parametrize("task", MAKERS)
def test_a_killed_evaluation_goes_on_within_a_pair(keys_recipe, tmp_path, monkeypatch, task):
    """Killed in its third piece, half of a line written: the first two are not made again, and the result is
    that of an evaluation that nobody disturbed."""
    path, made = keys_recipe(tasks=[task]), MAKERS[task]
    assert run_main("evaluate", path, "base", "--out", tmp_path / "calm")[0] == 0
    rows, numbers = made.rows, []

    def killed(self, number):
        if number == 1:
            raise KeyboardInterrupt
        return rows(self, number)

    monkeypatch.setattr(made, "rows", killed)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(Experiment.of(schema.load(path), "base", tmp_path / "run"))
    folder = tmp_path / "run/small/base/eval"
    (part,) = folder.glob("*/*.part.jsonl")
    assert len(part.read_bytes().splitlines()) == 2 and not list(folder.glob("*/*.json"))
    part.write_bytes(part.read_bytes() + b'[{"distance"')
    monkeypatch.setattr(made, "rows", lambda self, number: numbers.append(number) or rows(self, number))
    code, _, error = run_main("evaluate", path, "base", "--out", tmp_path / "run")
    assert code == 0 and numbers[0] == 1 and "again" not in error
    assert outcomes(folder) == outcomes(tmp_path / "calm/small/base/eval")
    assert not list(folder.glob("*/*.part.jsonl"))
    for lines in folder.glob("*/*.jsonl"):
        assert (
            lines.read_bytes() == (tmp_path / "calm/small/base/eval" / lines.relative_to(folder)).read_bytes()
        )


def test_pieces_of_another_question_are_not_used(tmp_path):
    path = tmp_path / "distance/512.part.jsonl"
    kept = progress.Kept(path, {"task": "distance", "seed": 1})
    kept.add([{"a": 1}])
    kept.add([{"a": 2.5}, {"b": "ä"}])
    assert progress.Kept(path, {"task": "distance", "seed": 1}).rows == [[{"a": 1}], [{"a": 2.5}, {"b": "ä"}]]
    whole = path.read_bytes()
    for torn, count in ((whole[:-1], 1), (whole[:-20], 1), (whole + b"{}\n", 2), (whole + b"\xff\n", 2)):
        path.write_bytes(torn)
        found = progress.Kept(path, {"task": "distance", "seed": 1})
        assert len(found.rows) == count
        found.add([{"c": 3}])
        assert progress.Kept(path, {"task": "distance", "seed": 1}).rows[count:] == [[{"c": 3}]]
    assert progress.Kept(path, {"task": "distance", "seed": 2}).rows == []
    assert progress.Kept(path, {"task": "distance", "seed": 1}).rows == []  # what was there is gone
    for other in (b"", b"\xff\xfe", b"[1]\n[2]\n"):
        path.write_bytes(other)
        assert progress.Kept(path, {"task": "distance", "seed": 1}).rows == []


class Three:
    noun, total = "haystacks", 3

    def __init__(self, clock=None):
        self.clock, self.made = clock, []

    def rows(self, number):
        self.made.append(number)
        if self.clock is not None:
            self.clock[0] += 10
        return [{"number": number}]


def test_a_budget_ends_an_evaluation_within_a_pair(tmp_path, monkeypatch):
    """Pieces take 10 s each, of 25; the next command makes the third and all that is left."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    three, path = Three(clock), tmp_path / "x/1.part.jsonl"
    with pytest.raises(progress.Unfinished, match="2 of 3 haystacks"):
        progress.collect(three, progress.Kept(path, {}), lambda: 25 - clock[0], "x at 1")
    assert three.made == [0, 1]
    assert progress.collect(three, progress.Kept(path, {}), lambda: math.inf, "x at 1") == [
        {"number": number} for number in range(3)
    ]
    assert three.made == [0, 1, 2]


def test_the_command_says_how_far_a_pair_has_come(keys_recipe, tmp_path, monkeypatch):
    path, clock, rows = keys_recipe(), [0.0], named_keys.NamedKeys.rows
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])

    def slow(self, number):
        clock[0] += 20
        return rows(self, number)

    monkeypatch.setattr(named_keys.NamedKeys, "rows", slow)
    command = ("evaluate", path, "base", "--out", tmp_path, "--only", "named_keys:200", "--budget", 30)
    code, out, error = run_main(*command)
    assert code == 0, error
    assert out.splitlines() == [
        "evaluate: 0 of 1 pairs are scored, and 1 of 2 haystacks of named_keys at 200, and of 30 s 10 are"
        " left; the same command goes on"
    ]
    code, out, error = run_main(*command)
    assert code == 0 and out.split()[:3] == ["base", "named_keys", "200"], error


def test_time_left_is_shown_where_somebody_looks(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        progress.collect(
            Three(), progress.Kept(tmp_path / f"{shown}/1.part.jsonl", {}), lambda: math.inf, "x"
        )
        assert ("x: 100%" in stream.getvalue() and "<" in stream.getvalue()) is shown


def test_all_three_are_scored_once(keys_recipe, tmp_path, monkeypatch):
    """Pairs are those that make sense, results stay, and only what a key is read by is scored again."""
    path = keys_recipe()
    code, out, _ = run_main("evaluate", path, "base", "--list")
    assert out.split() == ["distance:512", "named_keys:200", "named_keys:320", "far_gain:320"]
    code, out, error = run_main("evaluate", path, "base", "--out", tmp_path)
    assert code == 0 and out.count("\n") == 4, error
    folder = tmp_path / "small/base/eval"
    found = outcomes(folder)
    assert list(found) == PAIRS
    assert all((folder / f"{task}.png").stat().st_size > 5000 for task in MAKERS)
    made = {file: file.stat().st_mtime_ns for file in folder.rglob("*.json*")}
    code, again, error = run_main("evaluate", path, "base", "--out", tmp_path)
    assert code == 0 and again == out and made == {file: file.stat().st_mtime_ns for file in made}
    code, again, error = run_main(
        "evaluate", path, "base", "--out", tmp_path, "--set", "eval.distances=[0,310]"
    )
    assert error.count("scoring again") == 1 and "distance/512.json" in error


def test_what_each_task_is_read_by(keys_recipe, tokenizer):
    path = keys_recipe()

    def asked(*overrides):
        recipe = schema.load(path, overrides)
        asks = question.Questions(recipe, tokenizer)
        return {task: asks(task, 320, {}) for task in ("passkey", *MAKERS)}

    before = asked()
    for override, changed in (
        ("eval.short_text_samples=3", set()),
        ("eval.distances=[0,310]", {"distance"}),
        ("eval.distance_keys=3", {"distance"}),
        ("eval.distance_haystack=100", {"distance"}),
        ("eval.named_keys=2", {"named_keys"}),
        ("eval.far_gain_texts=4", {"far_gain"}),
        ("eval.far_gain_tokens=40", {"far_gain"}),
        ("eval.lengths=[200,400]", {"far_gain"}),
        ("model.original_length=128", {"far_gain"}),
        ("eval.samples=6", {"passkey", "distance", "named_keys"}),
        ("eval.depths=5", {"passkey", "named_keys"}),
        ("lengths.target=640", {"distance"}),
        ("eval.seed=3", {"passkey", "distance", "named_keys", "far_gain"}),
    ):
        after = asked(override)
        assert {task for task in before if before[task] != after[task]} == changed, override


def test_keys_of_the_new_tasks_are_nothing_to_the_old(base, tokenizer, recipe_file):
    """A result of before they were there stays good."""
    recipe = schema.load(recipe_file())
    new = {
        "distance_haystack",
        "distance_keys",
        "distances",
        "named_keys",
        "far_gain_tokens",
        "far_gain_texts",
    }
    assert new <= set(schema.EvalSection.model_fields)
    for task in ("passkey", "multikey", "hellaswag"):
        assert not new & set(question.Questions(recipe, tokenizer)(task, 64, {}))
    asked = question.Questions(recipe, tokenizer)
    assert {"distances", "distance_keys", "distance_haystack", "samples"} <= set(asked("distance", 512, {}))
    assert asked("named_keys", 64, {})["named_keys"] == 4


def test_the_code_that_a_task_is_scored_by(tmp_path, monkeypatch):
    """passkey's answers do not depend on how prefixes are shared: its results of before stand."""
    copy = shutil.copytree(question.HERE, tmp_path / "code", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(question, "HERE", copy)
    monkeypatch.setattr(engine, "TASKS", copy / "tasks")
    tasks = ("passkey", "perplexity", *MAKERS)

    def codes():
        question.code.cache_clear()
        return {task: question.code(task) for task in tasks}

    before = codes()
    for name, old, new, changed in (
        ("prefix.py", "PIECE = 1024", "PIECE = 1025", {"distance", "named_keys"}),
        ("haystacks.py", "Remember it.", "Keep it.", {"distance", "named_keys"}),
        ("distance.py", "POINTS = 13", "POINTS = 14", {"distance"}),
        ("far_gain.py", "near - far", "far - near", {"far_gain"}),
        ("tasks/named_keys/named_keys.yaml", "version: 1.0", "version: 1.1", {"named_keys"}),
        ("tasks/far_gain/utils.py", '"far": far', '"far": near', {"far_gain"}),
        ("piecewise.py", "def refuse", "def refuses", set()),
    ):
        text = (copy / name).read_text()
        assert old in text, name
        (copy / name).write_text(text.replace(old, new))
        after = codes()
        assert {task for task in tasks if after[task] != before[task]} == changed, name
        (copy / name).write_text(text)
    question.code.cache_clear()


# Far context


def texts_of(tokenizer, count=3, sentences=90):
    return [perplexity.Text(text, tokenizer) for text in tiny_documents(count, sentences)]


def test_the_same_words_are_scored_at_every_length_and_in_both_contexts(tokenizer):
    found = texts_of(tokenizer)
    limits = far_gain.Limits(128, 400, 48, 7)
    short, long = (far_gain.pieces(found, length, limits, 1) for length in (256, 400))
    assert [piece["document"] for piece in long] == [0, 1, 2, 0, 1, 2, 0]
    assert [piece["continuation"] for piece in short] == [piece["continuation"] for piece in long]
    for one, other in zip(short, long, strict=True):
        assert one["near"] == other["near"] and one["far"].endswith(one["near"])
        assert other["far"].endswith(one["far"]) and len(other["far"]) > len(one["far"]) > len(one["near"])
        count = len(tokenizer(other["far"] + other["continuation"])["input_ids"])
        assert 400 - 20 < count <= 400 and abs(other["tokens"] - 48) < 16
        assert len(tokenizer(one["near"] + one["continuation"])["input_ids"]) <= 128
    whole = [text.text for text in found]
    places = [whole[piece["document"]].index(piece["far"]) for piece in long]
    ends = [
        place + len(piece["far"] + piece["continuation"]) for place, piece in zip(places, long, strict=True)
    ]
    for number, piece in enumerate(long):
        before = [ends[at] for at in range(number) if long[at]["document"] == piece["document"]]
        assert all(places[number] >= end - 8 for end in before)  # texts of one document do not overlap
    assert len(far_gain.pieces(found, 400, far_gain.Limits(128, 400, 48, 2), 1)) == 2
    with pytest.raises(ValueError, match="no held-out document holds 4000 tokens"):
        far_gain.pieces(found, 4000, far_gain.Limits(128, 4000, 48, 2), 1)
    with pytest.raises(BadInput, match="far_gain_tokens 127 leave no context in the base's window of 128"):
        far_gain.pieces(found, 400, far_gain.Limits(128, 400, 127, 2), 1)


def test_far_gain_is_the_harness_own(scaled, tokenizer, base, tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", tiny_documents(3, 60))
    asked = {
        "tokenizer": str(base),
        "max_seq_lengths": [320],
        "original_length": 128,
        "perplexity_corpus": str(held),
        "far_gain_tokens": 48,
        "far_gain_texts": 4,
    }
    lm = engine.LongLM(scaled("linear"), tokenizer)
    samples = engine.run(lm, "endprompt_far_gain", asked)["endprompt_far_gain"]
    limits = far_gain.Limits(128, 320, 48, 4)
    found = far_gain.documents(str(held), tokenizer, 320, 4)
    task = far_gain.FarGain(lm, far_gain.pieces(found, 320, limits, len(prompts.frame(tokenizer)[0])))
    rows = [row for number in range(task.total) for row in task.rows(number)]
    assert len(rows) == len(samples) == 4
    for row, sample in zip(rows, samples, strict=True):
        assert row["far"] == pytest.approx(sample["far_gain"]["far"], abs=1e-3)
        assert row["near"] == pytest.approx(sample["far_gain"]["near"], abs=1e-3)
        ids, more = lm._encode_pair(sample["doc"]["far"], sample["doc"]["continuation"])
        assert len(more) == row["tokens"] == sample["doc"]["tokens"]
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(more), reduction="sum").item()
        assert row["far"] == pytest.approx(loss, abs=1e-3)
    whole = task.summary(rows)
    assert whole["score"] == pytest.approx(
        far_gain.summary([s["far_gain"] for s in samples])["score"], abs=1e-4
    )
    assert whole["near"] - whole["far"] == pytest.approx(whole["score"]) and whole["documents"] == 3


def test_the_interval_of_a_gain_is_over_documents():
    """Texts of one document are alike: ten of them say no more than one."""
    rows = [
        {"far": 10.0, "near": 10.0 + gain, "tokens": 10, "document": document}
        for document, gain in enumerate((1.0, 2.0, 3.0, 4.0))
        for _ in range(10)
    ]
    found = far_gain.summary(rows)
    assert found["score"] == pytest.approx(0.25) and found["documents"] == 4 and found["samples"] == 40
    by_texts = far_gain.summary([{**row, "document": number} for number, row in enumerate(rows)])
    assert found["low"] < by_texts["low"] < 0.25 < by_texts["high"] < found["high"]
    alone = far_gain.summary([{**row, "document": 0} for row in rows])
    assert (alone["low"], alone["high"]) == (by_texts["low"], by_texts["high"]) and alone["documents"] == 1


# Bad input


@pytest.mark.parametrize(
    "options, says",
    [
        (["eval.distances=[]"], "eval.distances: List should have at least 1 item"),
        (["eval.distances=[-1]"], "-1 is no distance"),
        (["eval.distances=[1.5]"], "eval.distances.0: Input should be a valid integer"),
        (["eval.distances=near"], "eval.distances: Input should be a valid list"),
        (
            ["eval.distances=[500]"],
            "a distance of 500: no position is left for a question below lengths.target",
        ),
        (["eval.distances=[410]"], "at 410 a haystack of 96 tokens, the question and its answer"),
        (["eval.distance_haystack=512"], "no position is left for a question below lengths.target 512"),
        (["eval.distance_haystack=500", "eval.distances=null"], "does not fit into lengths.target 512"),
        (["eval.distance_haystack=20"], "eval.distance_haystack: 20 tokens are too few for 2 named keys"),
        (["eval.distance_haystack=0"], "eval.distance_haystack: Input should be greater than 0"),
        (["eval.distance_keys=0"], "eval.distance_keys: Input should be greater than 0"),
        (["eval.distance_keys=17"], "less than or equal to 16"),
        (["eval.named_keys=17"], "less than or equal to 16"),
        (["eval.named_keys=5"], "eval.named_keys 5 do not fit at eval.depths 4"),
        (["eval.lengths=[200,1024]"], "named_keys at 1024 is beyond lengths.target 512"),
        (["eval.tasks=[far_gain]", "eval.lengths=[1024]"], "far_gain at 1024 is beyond lengths.target 512"),
        (["eval.lengths=[40]", "eval.tasks=[named_keys]"], "named_keys at 40: 40 tokens are too few"),
        (
            ["eval.tasks=[far_gain]", "eval.lengths=[128,256]"],
            "far_gain: no length of eval.lengths is beyond",
        ),
        (["eval.far_gain_tokens=256"], "leave no context in the base's window of 256"),
        (["eval.far_gain_tokens=0"], "eval.far_gain_tokens: Input should be greater than 0"),
        (["eval.perplexity_corpus=null"], "eval.perplexity_corpus is missing"),
        (["eval.perplexity_corpus=no/such/file.jsonl"], "eval.perplexity_corpus"),
        (["eval.perplexity_column=words"], "eval.perplexity_column"),
        (["eval.backend=vllm"], "distance asks at positions that it chooses, and vLLM takes none"),
        (["eval.backend=vllm", "eval.tasks=[named_keys]"], "named_keys reads the loss of an answer"),
        (["eval.backend=vllm", "eval.tasks=[far_gain]"], "far_gain was not tried with vLLM"),
        (
            ["eval.tasks=[distanse]"],
            "there is no task 'distanse'; use passkey, multikey, perplexity, distance",
        ),
        (["eval.distanses=[1]"], "unknown key eval.distanses"),
    ],
)
def test_bad_input_is_one_line(keys_recipe, tmp_path, options, says):
    overrides = [part for option in options for part in ("--set", option)]
    code, out, error = run_main("evaluate", keys_recipe(), "base", "--out", tmp_path / "run", *overrides)
    assert code == 2 and says in error and error.count("\n") == 1 and "Traceback" not in error, error
    assert not list((tmp_path / "run").rglob("*.json"))


def test_documents_that_are_too_short_are_said(keys_recipe, tmp_path):
    held = write_jsonl(tmp_path / "short.jsonl", tiny_documents(2, 5))
    code, _, error = run_main(
        "evaluate",
        keys_recipe(tasks=["far_gain"], perplexity_corpus=str(held)),
        "base",
        "--out",
        tmp_path / "run",
    )
    assert code == 2 and "far_gain at 320: no held-out document holds 320 tokens" in error
    assert error.count("\n") == 1


def test_what_the_base_window_leaves_out_is_skipped_beside_other_lengths(keys_recipe, tmp_path):
    code, out, error = run_main(
        "evaluate",
        keys_recipe(tasks=["named_keys", "far_gain"], lengths=[200]),
        "base",
        "--out",
        tmp_path,
    )
    assert code == 0 and out.count("\n") == 1 and "far_gain: no length of eval.lengths is beyond" in error


@pytest.mark.parametrize("task", ["distance", "named_keys"])
def test_a_model_whose_rows_share_no_cache_is_refused(keys_recipe, base, tmp_path, task):
    """Frequencies of the longest row; a model with a table of positions."""
    dynamic = saved(
        tmp_path / "dynamic",
        base,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500000.0},
    )
    code, _, error = run_main(
        "evaluate",
        keys_recipe(tasks=[task]),
        "endprompt",
        "--out",
        tmp_path / "run",
        "--model",
        dynamic,
    )
    assert code == 2 and f"{task} asks many questions behind one reading" in error and error.count("\n") == 1
    assert engine.shares_cache(network(configuration())) and not list((tmp_path / "run").rglob("*.json*"))


def test_a_tokenizer_that_joins_answer_and_question_is_refused(tokenizer, monkeypatch):
    encode = prompts.encode
    monkeypatch.setattr(
        prompts, "encode", lambda known, text: encode(known, text.replace("Mara is 12345", "Mara 12345"))
    )
    with pytest.raises(ValueError, match="joins an answer to its question"):
        haystacks._answer(tokenizer, "The key of Mara is", encode(tokenizer, "The key of Mara is"), " 12345")
    monkeypatch.undo()
    asked = "The key of Mara is"
    assert (
        tokenizer.decode(haystacks._answer(tokenizer, asked, encode(tokenizer, asked), " 12345")) == "12345"
    )


def test_predictions_are_scored_by_the_script_too(keys_recipe, tmp_path):
    from endprompt.evaluation import score

    assert run_main("evaluate", keys_recipe(tasks=["named_keys"]), "base", "--out", tmp_path)[0] == 0
    for length in (200, 320):
        path = tmp_path / f"small/base/eval/named_keys/{length}"
        number = score.score("passkey", "named_keys", path.with_suffix(".jsonl"))
        assert number == round(json.loads(path.with_suffix(".json").read_text())["scores"]["score"], 2)


# Several runs side by side


def scored_run(folder, score, supervised=None, task="distance", nats=1.0):
    """A run's folder with one result, of two distances or of a length."""
    cell = {
        "distance": 0,
        "between": [20, 90],
        "correct": 5,
        "total": 10,
        "score": score,
        "low": score / 2,
        "high": 100.0,
        "nats": nats,
        "nats_low": nats / 2,
        "nats_high": 2 * nats,
        "supervised": supervised,
        "pairs": None,
    }
    scores = {"length": 512, "metric": "m", "samples": 10, **cell}
    known = supervised is not None
    scores["coverage"] = {
        "source": "rows",
        "supervised": [[0, 100]] if known else None,
        "gap": [[101, 511]] if known else None,
    }
    scores["cells"] = [cell, cell | {"distance": 300, "between": [320, 390], "supervised": known and 0.0}]
    path = folder / f"eval/{task}/512.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = {"task": task, "model": {"name_or_path": "x", "fingerprint": "f"}}
    path.write_text(json.dumps({"question": asked, "date": "2026-01-01", "scores": scores}))
    return folder


def test_runs_side_by_side(tmp_path, capsys):
    """Seeds of an arm are one row, with an interval over them; distances that rows showed are marked."""
    one, two, three = (
        scored_run(tmp_path / f"seed{seed}/r/pose", 40.0 + 20 * seed, 1.0) for seed in range(3)
    )
    alone = scored_run(tmp_path / "seed0/r/base", 10.0, nats=2.0)
    for task in ("named_keys", "far_gain"):
        scored_run(one, 30.0, task=task)
    out = tmp_path / "out"
    distances.main([f"pose={one}", f"pose={two}", str(alone), "--out", str(out), "--title", "T"])
    text = (out / "distances.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip() and text.startswith("# T\n")
    found = next(line for line in text.splitlines() if line.startswith("| pose |"))
    assert found == "| pose | 50 [20, 100] `*` | 50 [20, 100] |"  # from half of 40 to the upper end of 60
    assert "| base | 10 [5, 100] | 10 [5, 100] |" in text and "| base | 2.00 | 2.00 |" in text
    assert "| pose | 30 [15, 100], 1.00 nats |" in text and "| pose | +30.000 [+15.000, +100.000] |" in text
    assert image.imread(out / "distances-512.png").std() > 0.05
    assert set(json.loads((out / "distances.json").read_text())["arms"]) == {"pose", "base"}
    every = [distances.entry(run)["results"]["distance:512"] for run in (one, two, three)]
    half = 4.3027 * 20 / math.sqrt(3)
    joined = distance_tables.joined(every)
    assert (joined["score"], joined["low"]) == (60.0, pytest.approx(60 - half, abs=0.01))
    assert set(distances.named([str(one), str(alone)])) == {"pose", "base"}
    assert set(distances.named([str(one), str(two)])) == {"seed0/r/pose", "seed1/r/pose"}


def test_results_of_an_earlier_code_stand_beside_new_ones(tmp_path, capsys):
    """Where the keys divide the samples, the haystacks of before are those of now."""
    runs = [scored_run(tmp_path / name, 40.0) for name in ("before", "now")]
    for folder in runs:
        path = folder / "eval/distance/512.json"
        file = json.loads(path.read_text())
        file["question"]["code"] = folder.name
        path.write_text(json.dumps(file))
    distances.main([*(f"{folder.name}={folder}" for folder in runs), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "| before | 40" in said and "| now | 40" in said


def asked(folder, **changes):
    """The run, asked otherwise."""
    path = folder / "eval/distance/512.json"
    file = json.loads(path.read_text())
    file["question"] |= changes
    path.write_text(json.dumps(file))
    return folder


def test_arms_are_asked_alike(tmp_path, capsys):
    """Two arms may have other numbers of questions, the seeds of one may not; the haystack is the same."""
    one, two, other = (scored_run(tmp_path / name, 40.0) for name in ("one", "two", "other"))
    for folder in (one, two, other):
        asked(folder, samples=200, distance_haystack=1024)

    def said(*given):
        with pytest.raises(SystemExit) as ended:
            distances.main([*given, "--out", str(tmp_path / "out")])
        out, error = capsys.readouterr()
        assert (ended.value.code, out, error.count("\n")) == (2, "", 1) and not (tmp_path / "out").exists()
        return error

    assert "one stands twice in an arm" in said(f"a={one}", f"a={tmp_path}/two/../one")
    asked(other, samples=64)
    assert "were asked different questions (distance: samples)" in said(f"a={one}", f"a={other}")
    asked(two, distance_haystack=512)
    assert "(distance: distance_haystack)" in said(f"a={one}", f"b={two}")
    distances.main([f"a={one}", f"b={other}", "--out", str(tmp_path / "out")])
    assert "| b | 40" in capsys.readouterr().out


def test_tasks_of_short_text_alone_stand_beside_the_training(tmp_path):
    run = scored_run(tmp_path / "run", 40.0)
    for task, length in (("passkey", 256), ("passkey", 512), ("hellaswag", None)):
        path = run / f"eval/{task}/{length or 'any'}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = json.loads((run / "eval/distance/512.json").read_text())
        file["scores"]["length"] = length
        file["scores"]["cells"] = [{"depth": 0.0, "correct": 1, "total": 2}]
        path.write_text(json.dumps(file))
    table = distance_tables.inside({"a": [distances.entry(run)]})
    assert "hellaswag" in table and "passkey" not in table


def test_a_gain_of_other_words_stands_in_no_table(tmp_path, capsys):
    runs = [scored_run(tmp_path / name, 1.0, task="far_gain") for name in ("one", "two")]
    for number, folder in enumerate(runs):
        path = folder / "eval/far_gain/512.json"
        file = json.loads(path.read_text())
        file["question"] |= {"longest": 512 << number, "data": str(number)}
        path.write_text(json.dumps(file))
    with pytest.raises(SystemExit) as ended:
        distances.main([*map(str, runs), "--out", str(tmp_path / "out")])
    out, error = capsys.readouterr()
    assert (ended.value.code, out, error.count("\n")) == (2, "", 1) and not (tmp_path / "out").exists()
    assert "far_gain is not of the same words everywhere" in error


def test_what_any_seed_showed_is_shaded(tmp_path):
    seeds = []
    for number, spans in enumerate(([[0, 100]], [[50, 120], [200, 210]])):
        folder = scored_run(tmp_path / f"seed{number}", 40.0, 1.0)
        seeds.append(json.loads((folder / "eval/distance/512.json").read_text())["scores"])
        seeds[-1]["coverage"]["supervised"] = spans
    seeds[1]["score"] = 60.0
    joined = distance_tables.joined(seeds)
    assert (joined["score"], joined["low"], joined["high"]) == (50.0, 20.0, 100.0)
    assert joined["coverage"] == {
        "supervised": [(0, 120), (200, 210)],
        "gap": [(121, 199), (211, 511)],
    }
    unknown = json.loads(json.dumps(seeds[:1]))
    unknown[0]["coverage"] = {"source": "trains nothing", "supervised": None, "gap": None}
    assert distance_tables.joined(unknown)["coverage"]["supervised"] is None


def trained_run(folder, score, supervised=None, last=2.0):
    scored_run(folder, score, supervised, nats=1.0 + (100 - score) / 100)
    steps = [{"step": step, "text_loss": last + 0.5 - step / 10} for step in range(8)]
    steps[7]["end_prompt_loss"] = 0.5
    (folder / "train.json").write_text(
        json.dumps({"tokens": 99, "steps": 8, "seconds": 1.0, "history": steps})
    )
    recipe = {"method": "pose", "data": {"corpus": "/a/machine/path"}, "train": {"bf16": True}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    scored_run(folder, 30.0, task="perplexity")
    return folder


def test_a_page_comes_from_the_numbers_without_the_runs(tmp_path, capsys):
    """Tables and pictures of distances.json are those of the runs, and new runs stand in the place of old."""
    short, far = trained_run(tmp_path / "short", 20.0, 1.0), trained_run(tmp_path / "far", 50.0, 1.0, 3.0)
    one, two, page = tmp_path / "one", tmp_path / "two", tmp_path / "page.md"
    options = ["--picture", "which=far,short", "--page", str(page)]
    places = ("which", "brief-which", "found-512", "filled-in-512", "perplexity", "inside", "prompt-loss")
    page.write_text("Above\n" + "".join(f"<!-- {place} -->\n<!-- /{place} -->\n" for place in places))
    distances.main([f"short={short}", f"far={far}", "--out", str(one), *options])
    text = page.read_text()
    assert "| far | 50 [25, 100] `*` | 50 [25, 100] |" in text
    # Rows showed 0 to 100; the question at 320 to 390 is 255 positions from them.
    assert "| far, less short | +30 points, -0.30 nats (1) | +30 points, -0.30 nats (1) | - | - | - |" in text
    # The last six of eight: 2.5 less 0.2 to 0.7 on average.
    assert "| short | 99 | 2.050 |" in text and "| far | 99 | 3.050 |" in text
    assert "| short | 30.00 [15.00, 100.00] |" in text
    assert (
        "| keys found, % | all distances | +0 | +300 |\n|---|---|---|---|\n| far | 50 [25, 100] | 50" in text
    )
    assert "| arm, step | 7 |\n|---|---|\n| short | 0.500 |" in text
    shown = capsys.readouterr().out
    distances.main([str(one / "distances.json"), "--out", str(two), *options])
    assert page.read_text() == text and capsys.readouterr().out == shown
    assert not (two / "distances.json").exists()
    for name in ("which.png", "distances-512.png"):
        assert (image.imread(one / name) == image.imread(two / name)).all()
    record = json.loads((one / "distances.json").read_text())["arms"]["far"][0]
    assert record["training"]["end_prompt_loss"] == {"7": 0.5} and record["run"].endswith("/far")
    settings = record["training"]["settings"]
    assert settings["train"] == {"bf16": True} and settings["rope"]["sharpen_heads"] is False
    assert "/a/machine/path" not in (one / "distances.json").read_text()
    trained_run(tmp_path / "far", 60.0, 1.0)
    distances.main([str(one / "distances.json"), f"far={far}", "--out", str(two), *options])
    assert "| far | 60 [30, 100] `*` |" in page.read_text() and (two / "distances.json").exists()


def seeds_of(name, scores):
    """An arm's entries: keys found at each distance, and nats of a twentieth of what is missed, a seed."""
    return [
        {
            "run": f"{name}/seed{seed}/r/pose",
            "results": {
                "distance:512": {
                    "cells": [
                        {"distance": 100 * place, "score": score, "nats": 5 - score / 20}
                        for place, score in enumerate(cells)
                    ]
                }
            },
        }
        for seed, cells in scores.items()
    ]


def test_differences_are_paired_by_seed():
    """In whatever order the seeds come; over two seeds nothing is said, and where all agree no interval."""
    arms = {
        "short": seeds_of("a", {0: [40.0, 10.0], 1: [60.0, 20.0], 2: [20.0, 0.0]}),
        "far": seeds_of("b", {2: [20.0, 12.0], 1: [60.0, 28.0], 0: [40.0, 20.0]}),
        "few": seeds_of("c", {0: [0.0, 0.0], 1: [0.0, 0.0], 7: [9.0, 9.0]}),
    }
    half = 4.3027 * 2 / math.sqrt(3)  # of 8, 10 and 12 points
    table = distance_tables.paired(arms, 512, {"far": "short", "few": "short"})
    assert table.splitlines()[0] == "| arm | all distances | +0 | +100 |"
    (row,) = table.splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "far, less short (3 seeds)" and cells[2] == "+0 points, +0.00 nats"
    nats = half / 20
    assert cells[3] == (
        f"+10 [+{10 - half:.0f}, +{10 + half:.0f}] points, -0.50 [{-0.5 - nats:.2f}, {-0.5 + nats:.2f}] nats"
    )
    assert cells[1].startswith("+5 [+3, +7] points")
    assert distance_tables.paired(arms, 512, {"few": "short"}) is None
    for entry in arms["far"]:
        for cell in entry["results"]["distance:512"]["cells"]:
            cell["distance"] += 7
    assert distance_tables.paired(arms, 512, {"far": "short"}) is None  # nothing was asked of both


def test_answers_that_hold_a_digit_are_counted(tmp_path):
    """The mean over the seeds whose answers are there; of an arm without any, no row."""
    runs = [trained_run(tmp_path / name, 50.0) for name in ("one", "two", "old")]
    answers = {0: ["12345", "a 1", " a church", " the key"], 300: ["no"] * 4}
    for folder, more in zip(runs[:2], ([], ["7"] * 4), strict=True):
        rows = [(place, pred) for place, preds in answers.items() for pred in [*preds, *more]]
        lines = [json.dumps({"distance": place, "pred": pred}) for place, pred in rows]
        (folder / "eval/distance/512.jsonl").write_text("\n".join(lines) + "\n")
    arms = {"new": [distances.entry(run) for run in runs[:2]], "old": [distances.entry(runs[2])]}
    assert [cell["numbered"] for cell in arms["new"][1]["results"]["distance:512"]["cells"]] == [75.0, 50.0]
    shown = {
        name: distance_tables.joined(distance_tables.by_length(arm, "distance")[512])
        for name, arm in arms.items()
    }
    table = distance_tables.distances(shown)
    assert table.endswith(
        "Answers that hold a digit, in %.\n\n| arm | +0 | +300 |\n|---|---|---|\n| new | 62 | 25 |"
    )
    assert "Answers" not in distance_tables.distances({"old": shown["old"]})
    (runs[2] / "eval/distance/512.jsonl").write_text('{"distance": 0, "pred": "1"}\n{"distance": 0}\n')
    with pytest.raises(BadInput, match="512.jsonl line 2 is no answer of distance; delete"):
        distances.entry(runs[2])


def test_a_table_for_little_room():
    """The first distance and the last four; a distance that an arm lacks is said to be."""
    cells = [
        {"distance": place, "score": float(place), "low": 0.0, "high": 100.0} for place in range(0, 130, 10)
    ]
    whole = {"score": 60.0, "low": 50.0, "high": 70.0}
    shown = {"a": {"cells": cells, **whole}, "b": {"cells": cells[:1], **whole}}
    assert distance_tables.brief(shown).splitlines() == [
        "| keys found, % | all distances | +0 | +90 | +100 | +110 | +120 |",
        "|---|---|---|---|---|---|---|",
        "| a | 60 [50, 70] | 0 [0, 100] | 90 [0, 100] | 100 [0, 100] | 110 [0, 100] | 120 [0, 100] |",
        "| b | 60 [50, 70] | 0 [0, 100] | not run | not run | not run | not run |",
    ]


def test_the_prompt_s_loss_is_that_of_the_steps_that_were_logged():
    """At the first and the last step, and at powers of two between; without one there is no table."""
    losses = {str(step): 8.0 / step for step in (1, 2, 3, 4, 6, 8, 10)}
    arms = {
        "a": [{"training": {"end_prompt_loss": losses}}, {"training": {"end_prompt_loss": {"2": 2.0}}}],
        "b": [{"training": {"end_prompt_loss": {}}}, {"training": None}],
    }
    assert distance_tables.prompt_loss(arms).splitlines() == [
        "| arm, step | 1 | 2 | 4 | 8 | 10 |",
        "|---|---|---|---|---|---|",
        "| a | 8.000 | 3.000 | 2.000 | 1.000 | 0.800 |",
    ]
    assert distance_tables.prompt_loss({"b": arms["b"]}) is None


def test_strips_show_what_rows_showed(tmp_path):
    trained_run(tmp_path / "a", 20.0, 1.0)
    scored_run(tmp_path / "b", 10.0)
    arms = distances.gathered([f"{name}={tmp_path / name}" for name in "ab"])
    _, drawn = distances.tables(arms, ["short"], {"both": ["a", "b"], "untrained": ["b"]})
    pictures = {}
    for name in ("both", "untrained"):
        distance_figures.overlay(drawn[name], tmp_path / f"{name}.png")
        pictures[name] = image.imread(tmp_path / f"{name}.png")
        assert pictures[name].std() > 0.05
    assert pictures["both"].shape[0] > pictures["untrained"].shape[0]
    table = distance_tables.filled_in(drawn["both"], {"a": "b"})
    assert table.splitlines()[0].startswith("| arm | shown |") and "| a, less b | " in table
    assert distance_tables.filled_in(drawn["both"], {}) is None
    assert distance_tables.filled_in(drawn["untrained"], {"b": "a"}) is None


def test_an_arm_is_compared_with_what_has_its_rope():
    def arm(rope):
        return [{"training": {"settings": {"rope": {"type": rope}}} if rope else None}]

    arms = {"short": arm("yarn"), "theta-short": arm("theta"), "base": arm(None)}
    arms |= {"pose": arm("yarn"), "theta-pose": arm("theta"), "linear-pose": arm("linear")}
    controls = ["short", "theta-short", "none"]
    assert distances.compared(arms, controls) == {"pose": "short", "theta-pose": "theta-short"}
    assert distances.compared(arms, ["short"]) == {"pose": "short"}


@pytest.mark.parametrize(
    ("method", "given", "kind"),
    [("short", None, "linear"), ("pose_sharp", None, "yarn"), ("short", "theta", "theta")],
)
def test_an_arm_has_its_methods_rope_where_the_recipe_names_none(tmp_path, recipe_file, method, given, kind):
    overrides = [] if given is None else [f"rope.type={given}"]
    recipe = Experiment.of(schema.load(recipe_file(), overrides), method).dump()
    for path, text in {"recipe.yaml": recipe, "train.json": '{"tokens": 8, "seconds": 1.0}'}.items():
        (tmp_path / path).write_text(text)
    training = distances._training(tmp_path)
    assert training is not None and training["settings"]["rope"]["type"] == kind


def test_the_page_and_the_readme_hold_the_committed_numbers():
    """By the command that the page names."""
    page, readme = REPOSITORY / "docs/realmodel.md", REPOSITORY / "README.md"
    text = page.read_text()
    arms = distances.read(REPOSITORY / "docs/findings/realmodel.json")
    pictures = distances.chosen(re.findall(r"--picture (\S+)", text), arms)
    controls = re.findall(r"--control (\S+)", text)
    tables, _ = distances.tables(arms, controls, pictures)
    assert pictures and markdown.filled(page, tables) == text, f"run the command of {page}"
    assert markdown.filled(readme, tables) == readme.read_text(), f"run the command of {page}"
    marks = set(re.findall(r"<!-- /([\w-]+) -->", text))
    assert marks <= set(tables) and set(pictures) <= marks


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (None, [], "none.json is no distances.json"),
        ("[]", [], "is no distances.json"),
        ('{"arms": {"a": [{"results": 1}]}}', [], "a run has no results"),
        ('{"entries": []}', [], "no 'arms'"),
        ("good", ["--picture", "x=nobody"], "there is no arm nobody; write NAME=ARM,ARM with a"),
        ("good", ["--picture", "x"], "there is no arm named"),
        ("good", ["--page", "missing.md"], "missing.md: it cannot be read"),
    ],
)
def test_bad_numbers_for_a_page(tmp_path, capsys, content, options, says):
    source = tmp_path / "none.json"
    if content == "good":
        distances.main([f"a={scored_run(tmp_path / 'a', 10.0)}", "--out", str(tmp_path)])
        source = tmp_path / "distances.json"
    elif content is not None:
        source.write_text(content)
    with pytest.raises(SystemExit) as ended:
        distances.main([str(source), "--out", str(tmp_path / "out"), *options])
    assert ended.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_many_arms_go_into_one_picture(tmp_path):
    runs = [str(scored_run(tmp_path / f"arm{arm}", 40.0, 1.0)) for arm in range(6)]
    distances.main([*runs, "--out", str(tmp_path / "out")])
    assert image.imread(tmp_path / "out/distances-512.png").shape[0] > 900


def test_what_cannot_be_put_side_by_side(tmp_path, capsys):
    empty, one = tmp_path / "empty", scored_run(tmp_path / "one", 40.0)
    other = scored_run(tmp_path / "two", 40.0)
    path = other / "eval/distance/512.json"
    path.write_text(path.read_text().replace('"distance": 300', '"distance": 301'))
    (tmp_path / "none/eval").mkdir(parents=True)
    for given, says in (
        ([str(empty)], "holds no results; name a run's folder that was evaluated"),
        ([f"x={empty}"], "holds no results"),
        ([f"a={one}", f"a={other}"], "the seeds of an arm were scored at different distances"),
        ([str(tmp_path / "none")], "none of the runs has results of distance, named_keys, far_gain"),
    ):
        with pytest.raises(SystemExit) as ended:
            distances.main([*given, "--out", str(tmp_path / "out")])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and says in said and said.count("\n") == 1
        assert not (tmp_path / "out").exists()


# The whole way


@pytest.mark.slow
def test_from_a_corpus_to_a_picture(recipe_file, tmp_path):
    """Two methods are trained for a few steps and asked from afar; one evaluation is killed on the way; the
    picture has both, each over its own rows' distances.
    """
    path = recipe_file(
        lengths={"target": 1024},
        data={"tokens": 64 * 64},
        train={"deepspeed": None},
        eval={"tasks": ["distance"], "samples": 24, "distance_haystack": 96},
    )
    command = [sys.executable, "-m", "endprompt"]
    options = [str(path), "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    runs = [tmp_path / "small" / method for method in ("endprompt", "pose")]
    for method, folder in zip(("endprompt", "pose"), runs, strict=True):
        for what in ("prepare", "train"):
            given = [*command, what, options[0], method, *options[1:]]
            subprocess.run(given, check=True, env=environment, cwd=tmp_path, capture_output=True)
        given = [*command, "evaluate", options[0], method, *options[1:]]
        process = subprocess.Popen(given, env=environment, cwd=tmp_path)
        part = folder / "eval/distance/1024.part.jsonl"
        while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") > 2):
            time.sleep(0.02)
        process.kill()
        process.wait()
        done = part.read_bytes().count(b"\n") - 1
        assert done > 0 and not part.with_name("1024.json").exists()
        said = subprocess.run(
            given, check=True, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert "distance" in said.stdout and not part.exists()
        scores = json.loads((folder / "eval/distance/1024.json").read_text())["scores"]
        assert scores["samples"] == 24 and len(scores["cells"]) == distance.POINTS
        assert scores["coverage"]["supervised"][0][0] == 0 and scores["cells"][0]["supervised"] > 0
    showed = [
        json.loads((folder / "eval/distance/1024.json").read_text())["scores"]["coverage"]["supervised"]
        for folder in runs
    ]
    assert showed[0] != showed[1]
    distances.main([*map(str, runs), "--out", str(tmp_path / "out")])
    assert image.imread(tmp_path / "out/distances-1024.png").std() > 0.05
    arms = json.loads((tmp_path / "out/distances.json").read_text())["arms"]
    assert arms["pose"][0]["training"]["settings"]["rope"]["type"] == "linear"
