"""Rows and shards: exact tokens, exact positions, the same bytes however the work was done, and nothing
damaged gets through.
"""

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import count, islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, run_main, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from endprompt import BadInput, methods, storage
from endprompt.methods import base as methods_base
from endprompt.methods.end_prompt import END_PROMPTS, EndPromptRows
from endprompt.methods.matched import MatchedRows
from endprompt.methods.plain import PlainRows
from endprompt.methods.recall import RecallRows, repeated
from endprompt.positions import plans
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.rows import parts, prepare, shards, tokenizing
from endprompt.rows import stream as row_stream

TRAINED = [method.name for method in methods.METHODS.values() if method.trained]


def builds(name: str, kind: type) -> bool:
    """Whether a method's rows are of that kind."""
    return issubclass(methods.get(name).Rows, kind)


IN_ORDER = [name for name in TRAINED if not builds(name, MatchedRows)]
# One plan for every row; the others draw theirs.
PLAIN = [name for name in TRAINED if builds(name, PlainRows) or methods.get(name).Rows is EndPromptRows]
PROMPTS = {"EP_1": END_PROMPTS["EP_1"], "EP_3": "End.", "So it ends here.": "So it ends here."}


@pytest.fixture
def make(recipe_file, tokenizer, tmp_path):
    """make("endprompt", ["data.seed=1"], out="other", workers=2, texts=[...]) -> (shards folder, manifest)"""

    def run(
        method="endprompt", overrides=(), out="out", workers=1, tokenizer=tokenizer, texts=None, **sections
    ):
        if texts is not None:
            sections["data"] = {
                **sections.get("data", {}),
                "corpus": str(write_jsonl(tmp_path / "texts.jsonl", texts)),
            }
        recipe = schema.load(recipe_file(**sections), list(overrides))
        experiment, folder = Experiment.of(recipe, method), tmp_path / out
        known = experiment.base.config  # a model that has an embedding for each token
        known.vocab_size = max(known.vocab_size, len(tokenizer))
        return folder, prepare.prepare(experiment, folder, workers, {}, tokenizer=tokenizer)

    return run


def rows(made):
    return list(shards.rows(*made))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def text_stream(made):
    return [token for row in rows(made) for token in row["input_ids"][: row["text_length"]]]


def without_bos(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def expected_stream(texts, tokenizer):
    """(ids, document number of each id) as the Hugging Face tokenizer writes the documents, each ended by
    EOS.
    """
    ids, source = [], []
    for number, text in enumerate(texts):
        document = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        ids += document
        source += [number] * len(document)
    return ids, source


@pytest.mark.parametrize("method", IN_ORDER)
def test_rows(make, method, tokenizer, tiny_text):
    made = make(method)
    manifest, recall, found = made[1], builds(method, RecallRows), rows(made)
    length = 512 if methods.get(method).fills == "target" else 64
    prompt = without_bos(tokenizer, END_PROMPTS["EP_1"]) if builds(method, EndPromptRows) else []
    b = 20 if recall else len(prompt)  # one span in a quarter of 64
    a = length - b
    assert len(found) == manifest["rows"] == 4096 // length
    assert (manifest["tokens"], manifest["text_tokens"], manifest["prompt_tokens"]) == (
        4096,
        a * len(found),
        b * len(found),
    )
    ids, source = expected_stream(tiny_text, tokenizer)
    for number, row in enumerate(found):
        part = slice(number * a, (number + 1) * a)
        assert (row["text_length"], row["prompt_length"], row["prompt_name"]) == (
            a,
            b,
            "recall" if recall else "EP_1" if b else "",
        )
        assert row["input_ids"][:a] == ids[part] and (recall or row["input_ids"][a:] == prompt)
        if method in PLAIN:
            assert row["position_ids"] == [*range(a), *range(512 - b, 512)]
        plans.check(np.array(row["position_ids"]), 512)
        assert row["loss_weights"] == [0.0] + [1.0] * (a - 1) + (
            [0.0] * 4 + [1.0] * 16 if recall else [float(np.float32(0.1))] * b
        )
        assert row["document_ids"] == [f"corpus.jsonl#{document}" for document in sorted(set(source[part]))]
    assert ids[0] == tokenizer.bos_token_id  # as this tokenizer adds it
    assert manifest["documents"] == len(set(source[: a * len(found)]))


def test_short_and_full_length_are_the_same_text(make):
    assert text_stream(make("short", out="short")) == text_stream(make("full_length", out="full"))


def text_hash(made, tokens):
    return hashlib.sha256(np.array(text_stream(made)[:tokens], np.int32).tobytes()).hexdigest()


def test_all_methods_of_one_setting_see_the_same_text(make):
    """In the same order: the streams differ in nothing but where they end, as end prompts take room within
    the token budget.
    """
    options = [f"data.end_prompts={json.dumps(list(PROMPTS))}"]
    made = {method: make(method, options, out=method) for method in IN_ORDER}
    common = min(len(text_stream(one)) for one in made.values())
    assert common > 2000
    assert len({text_hash(one, common) for one in made.values()}) == 1
    assert text_hash(make("pose", [*options, "data.seed=1"], out="other"), common) == text_hash(
        made["pose"], common
    )
    assert text_hash(made["pose"], common - 1) != text_hash(made["pose"], common)


@pytest.mark.parametrize("together", [2, 4])
def test_matched_rows(make, tokenizer, tiny_text, together):
    """Each stretch of eight rows holds the text of the short rows, cut into pieces that stay whole and in
    order, with what shares n-grams together.
    """
    made = make("pose_matched", [f"data.match_pieces={together}", "data.match_tokens=3"])
    ids, source = expected_stream(tiny_text, tokenizer)
    found, size, apart = rows(made), 64 // together, 0
    assert len(found) == made[1]["rows"] == 64 and made[1]["tokens"] == 4096
    for first in range(0, 64, 8):
        start, taken = first * 64, []
        pieces = [ids[at : at + size] for at in range(start, start + 512, size)]
        for row in found[first : first + 8]:
            chosen = []
            for at in range(0, 64, size):
                chosen.append(
                    next(
                        number
                        for number in range(len(pieces))
                        if pieces[number] == row["input_ids"][at : at + size] and number not in taken + chosen
                    )
                )
            assert chosen == sorted(chosen)
            taken += chosen
            apart += chosen[-1] - chosen[0] >= together
            assert row["document_ids"] == [
                f"corpus.jsonl#{one}"
                for one in dict.fromkeys(
                    source[start + number * size + at] for number in chosen for at in range(size)
                )
            ]
            position_ids = np.array(row["position_ids"])
            plans.check(position_ids, 512)
            assert (
                all((np.diff(position_ids[at : at + size]) == 1).all() for at in range(0, 64, size))
                and position_ids[0] == 0
            )
            assert row["loss_weights"] == [0.0] + [1.0] * 63 and (
                row["text_length"],
                row["prompt_length"],
                row["prompt_name"],
            ) == (64, 0, "")
        assert sorted(taken) == list(range(len(pieces)))
    assert apart > 48  # of 64

    def shared(texts):
        grams = [
            [{tuple(text[at + i : at + i + 3]) for i in range(size - 2)} for at in range(0, 64, size)]
            for text in texts
        ]
        return sum(
            len(one & other) for row in grams for number, one in enumerate(row) for other in row[:number]
        )

    assert shared([row["input_ids"] for row in found]) > 2 * shared(
        [ids[at : at + 64] for at in range(0, 4096, 64)]
    )


@pytest.mark.parametrize(
    "overrides, complaint",
    [
        (
            ["data.packing=document"],
            r"data\.packing: pose_matched takes stretches of 512 tokens .* set data\.packing=cut",
        ),
        (
            ["data.match_pieces=128"],
            (
                r"method_options\.match_pieces: rows of 64 tokens \(lengths\.physical\) cannot be cut"
                r" into 128 equal pieces"
            ),
        ),
    ],
)
def test_rows_that_cannot_be_matched(make, tmp_path, overrides, complaint):
    with pytest.raises(BadInput, match=complaint):
        make("pose_matched", overrides)
    assert not list(tmp_path.glob("out/*"))


def test_too_little_text_for_a_stretch(make, tmp_path, tiny_text):
    with pytest.raises(
        BadInput, match="fewer tokens than the 8 rows that pose_matched makes of one stretch, of 64"
    ):
        make("pose_matched", texts=[" ".join(tiny_text)[:800]])
    assert not (tmp_path / "out").exists()


DRAWN = [method for method in TRAINED if method not in PLAIN]


@pytest.mark.parametrize(
    "options",
    [[], ["data.packing=document", "data.pose_text=later_span", "data.pose_chunks=3"]],
    ids=["default", "later span"],
)
@pytest.mark.parametrize("method", DRAWN)
def test_drawn_positions_are_reproducible(make, monkeypatch, method, options):
    if builds(method, MatchedRows):
        options = []
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 3000)
    options = [
        *options,
        f"data.end_prompts={json.dumps(list(PROMPTS))}",
        "data.rows_per_shard=20",
        "data.tokens=3000",
    ]
    one, two = (make(method, options, out=f"out{workers}", workers=workers) for workers in (1, 2))
    assert contents(one[0]) == contents(two[0]) and len(contents(one[0])) > 2
    drawn = [row["position_ids"] for row in rows(one)]
    # Not by shard, and not the same for every row or seed.
    assert drawn == [
        row["position_ids"]
        for row in rows(make(method, [*options, "data.rows_per_shard=3"], out="small shards"))
    ]
    assert len(set(map(tuple, drawn))) > len(drawn) // 2
    assert drawn != [row["position_ids"] for row in rows(make(method, [*options, "data.seed=1"], out="seed"))]


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("method", ["pose", "endprompt_pose"])
def test_chunked_rows(make, method, chunks):
    made = make(method, [f"data.pose_chunks={chunks}"])
    assert (made[1]["pose_chunks"], made[1]["pose_text"]) == (chunks, "contiguous")
    found = rows(made)
    parts = [len(plans.segments(np.array(row["position_ids"][: row["text_length"]]))) for row in found]
    assert max(parts) == chunks and np.mean(parts) > 0.9 * chunks
    assert all(
        row["position_ids"][row["text_length"] :] == list(range(512 - row["prompt_length"], 512))
        for row in found
    )


@pytest.mark.parametrize("method", ["pose", "endprompt_pose"])
def test_text_of_a_later_span(make, method, tokenizer, tiny_text):
    """Chunks of one document in order, the first from its start, within its first 512 tokens; positions as
    with contiguous text.
    """
    long = " ".join(tiny_text[5:10])
    texts, document = ["Short.", *tiny_text[:5], long, "End."], "data.packing=document"
    plain, later = (
        make(method, [document, f"data.pose_text={text}"], texts=texts, out=text)
        for text in ("contiguous", "later_span")
    )
    assert later[1]["pose_text"] == "later_span"
    moved = 0
    for row, other, text in zip(rows(later), rows(plain), texts, strict=True):
        assert all(row[key] == other[key] for key in row if key != "input_ids")
        a, whole = row["text_length"], (tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])[:512]
        ids, prompt = row["input_ids"][:a], row["input_ids"][a:]
        assert prompt == other["input_ids"][a:]
        first = [
            (cut, skip)
            for cut in range(1, (a + 1) // 2 + 1)
            for skip in range(len(whole) - a + 1)
            if whole[:cut] + whole[cut + skip : a + skip] == ids
        ]
        assert first, "not two chunks of the document"
        parts = plans.segments(np.array(row["position_ids"][:a]))
        if len(parts) == 2:  # where the positions jump, the text does
            assert any(cut == parts[0][1] + 1 for cut, _ in first)
        moved += ids != other["input_ids"][:a]
    assert moved >= 5


def test_later_text_reaches_to_the_target_length(make, tokenizer, tiny_text):
    texts = [" ".join(tiny_text[number : number + 4]) for number in range(40)]
    options = [
        "data.packing=document",
        "data.pose_text=later_span",
        "data.tokens=50000",
        "lengths.physical=508",
    ]
    reached = set()
    for row, text in zip(rows(make("pose", options, texts=texts)), texts, strict=True):
        whole = tokenizer(text)["input_ids"]
        assert len(whole) > 600
        reached |= {skip for skip in range(9) if row["input_ids"][-30:] == whole[478 + skip : 508 + skip]}
    assert reached == {0, 1, 2, 3, 4}


def test_chunks_of_documents_too_short_for_them(make):
    found = rows(
        make(
            "pose",
            ["data.packing=document", "data.pose_chunks=9", "data.pose_text=later_span"],
            texts=["", "a", "a b", "a b c d"],
        )
    )
    assert len(found) == 3
    for row in found:
        plans.check(np.array(row["position_ids"]), 512)


def places(text, span):
    return {at for at in range(len(text) - len(span) + 1) if text[at : at + len(span)] == span}


@pytest.mark.parametrize(
    "options, count, cue, answer",
    [
        ([], 3, 4, 16),
        (["data.recall_share=0.5"], 6, 4, 16),
        (["data.recall_cue=1", "data.recall_tokens=2"], 21, 1, 2),
        (["data.recall_share=0.01", "data.recall_tokens=124"], 1, 4, 124),
    ],
)
def test_rows_end_in_spans_of_their_own_text(make, options, count, cue, answer):
    """A quarter of 256 tokens; every span stands in the text, its cue has no weight, and its positions are
    apart from the rest.
    """
    made, span = make("pose_recall", ["lengths.physical=256", "data.tokens=16384", *options]), cue + answer
    found, starts, apart = rows(made), set(), 0
    assert len(found) == 64
    for row in found:
        a, ids, at = row["text_length"], row["input_ids"], row["position_ids"]
        assert (a, row["prompt_length"], row["prompt_name"], len(ids)) == (
            256 - count * span,
            count * span,
            "recall",
            256,
        )
        assert row["loss_weights"][a:] == ([0.0] * cue + [1.0] * answer) * count
        for first in range(a, 256, span):
            there = places(ids[:a], ids[first : first + span])
            assert there and at[first + span - 1] - at[first] == span - 1
            starts |= there
            apart += at[first] > at[first - 1] + 1
    assert min(starts) < 0.1 * a and max(starts) >= 0.8 * (a - span) and apart > 0.8 * 64 * count
    assert made[1]["recall_cue"] == cue and made[1]["prompt_tokens"] == 64 * count * span


@given(
    a=st.integers(1, 60),
    sizes=st.lists(st.integers(1, 60), max_size=4),
    cue=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_recall(a, sizes, cue, seed):
    text, spans = (
        np.arange(100, 100 + a, dtype=np.int32),
        np.array([min(a, size) for size in sizes], np.int64),
    )
    if not len(spans):
        return
    ids, weights = repeated(text, spans, cue, np.random.default_rng(seed))
    assert ids.dtype == np.int32 and weights.dtype == np.float32 and len(ids) == len(weights) == spans.sum()
    for part, weight in zip(
        np.split(ids, np.cumsum(spans)), np.split(weights, np.cumsum(spans)), strict=True
    ):
        assert np.all(np.diff(part) == 1) and np.all((part >= 100) & (part < 100 + a))
        assert weight.tolist() == [0.0] * min(cue, len(part)) + [1.0] * max(0, len(part) - cue)


def test_documents_too_short_for_a_span_have_none(make):
    found = rows(make("pose_recall", ["data.packing=document"], texts=["One.", " ".join(["word"] * 80)]))
    assert [(row["prompt_length"], row["prompt_name"]) for row in found] == [(0, ""), (20, "recall")]
    assert len(found[0]["input_ids"]) == found[0]["text_length"] == len(found[0]["loss_weights"]) < 20


def test_rows_too_short_to_repeat_are_refused(make, recipe_file, tmp_path):
    with pytest.raises(
        BadInput, match=r"rows of 64 tokens leave too little text beside 1 repeated spans of 33 tokens"
    ):
        make("pose_recall", ["data.recall_tokens=29"])
    make("pose_recall", ["data.recall_tokens=28"])
    code, out, err = run_main(
        "prepare", recipe_file(), "pose_recall", "--out", tmp_path / "o", "--set", "data.recall_cue=40"
    )
    assert code == 2 and not out and err.count("\n") == 1 and "lengths.physical" in err


def test_options_bind_the_methods_that_use_them(make):
    make("pose", out="pose")
    with pytest.raises(BadInput, match="pose_chunks is 2, expected 3"):
        make("pose", ["data.pose_chunks=3"], out="pose")
    assert "pose_chunks" not in make("short", out="short")[1]
    assert make("short", ["data.pose_chunks=3"], out="short")[1]["rows"] == 64
    make("pose_recall", out="recall")
    with pytest.raises(BadInput, match="recall_tokens is 16, expected 8"):
        make("pose_recall", ["data.recall_tokens=8"], out="recall")
    document = ["data.packing=document"]
    make("endprompt_pose", document, out="document")
    with pytest.raises(BadInput, match="pose_text is 'contiguous', expected 'later_span'"):
        make("endprompt_pose", [*document, "data.pose_text=later_span"], out="document")


def test_training_refuses_shards_of_other_options(recipe_file, tmp_path):
    path = recipe_file()
    assert run_main("prepare", path, "pose", "--out", tmp_path / "o", "--workers", 1)[0] == 0
    code, _, err = run_main("train", path, "pose", "--out", tmp_path / "o", "--set", "data.pose_chunks=3")
    assert code == 2 and "pose_chunks is 2, expected 3" in err


@pytest.fixture
def ninth():
    """A method that is in the table because it was registered, and for no other reason."""

    class EveryOther(methods_base.Rows):
        def build(self, cursor, rng):
            if (taken := self.take(cursor, self.length)) is None:
                return None
            text, documents = taken
            return self.row(text, np.arange(len(text)) * 2 + rng.integers(2), documents)

    class Ninth(methods_base.Method):
        name = "ninth"
        summary = "every other position"
        Rows = EveryOther

    yield methods_base.register(Ninth)
    del methods.METHODS["ninth"]


@pytest.mark.slow
def test_a_method_is_one_registration(recipe_file, tmp_path, ninth):
    path, out = recipe_file(), tmp_path / "o"
    assert "method: ninth" in run_main("prepare", path, "ninth", "--dry-run")[1]
    code, told, err = run_main("prepare", path, "ninth", "--out", out, "--workers", 2)
    assert (code, err) == (0, "") and "64 rows, 4096 tokens" in told
    found = rows((out / "small/ninth/shards", shards.read_manifest(out / "small/ninth/shards")))
    assert {row["position_ids"][0] for row in found} == {0, 1} and all(
        row["position_ids"][1] - row["position_ids"][0] == 2 for row in found
    )
    code, told, err = run_main("inspect", path, "ninth", "--out", out)
    assert (code, err) == (0, "") and "64 of 512 supervised" in told
    code, told, err = run_main("inspect", path, "ninth", "--coverage", "--out", out)
    assert (
        (code, err) == (0, "") and "64 prepared rows" in told and "never seen: 448 of the distances" in told
    )
    assert (out / "small/ninth/coverage.png").stat().st_size > 0


def test_a_document_of_one_token_makes_no_row():
    """Nothing is foretold in it, and a step of such rows alone would divide by 0."""
    stream = [(str(number), np.arange(count)) for number, count in enumerate((1, 9, 1, 1, 5, 1))]
    cursor = row_stream.Cursor(iter(stream), 0, 0)
    taken = [cursor.take_document(6) for _ in range(2)]
    assert [(len(ids), names) for ids, names in taken] == [(6, ["1"]), (5, ["4"])]
    assert cursor.take_document(6) is None and cursor.document == 6


@pytest.mark.parametrize("method", ["endprompt", "full_length"])
def test_packing_by_document(make, method, tokenizer, tiny_text):
    texts = ["Short.", *tiny_text[:5], "End."]
    found = rows(make(method, ["data.packing=document"], texts=texts))
    prompt = without_bos(tokenizer, END_PROMPTS["EP_1"]) if builds(method, EndPromptRows) else []
    room = (512 if methods.get(method).fills == "target" else 64) - len(prompt)
    for number, (row, text) in enumerate(zip(found, texts, strict=True)):
        whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        a = row["text_length"]
        assert row["input_ids"] == whole[:room] + prompt
        assert row["position_ids"] == [*range(a), *range(512 - len(prompt), 512)]
        assert row["document_ids"] == [f"texts.jsonl#{number}"]
    assert found[0]["text_length"] < room


def test_rows_that_end_with_their_documents_say_so(make, tiny_text, capsys):
    made = make("short", ["data.packing=document"], texts=["Short."] * 70)
    tokens, err = made[1]["tokens"], capsys.readouterr().err
    assert made[1]["rows"] == 64 and tokens < 1024
    assert f"64 of them hold {tokens} tokens, {tokens / 4096:.0%} of what data.tokens counts" in err
    make("short", out="cut")
    assert "data.packing" not in capsys.readouterr().err


def test_blank_documents_keep_their_number(make, tokenizer):
    found = rows(
        make("short", ["data.packing=document", "data.rows_per_shard=1"], texts=["one", " ", "three"])
    )
    assert [row["document_ids"] for row in found] == [["texts.jsonl#0"], ["texts.jsonl#2"]]


def test_tokenizers_differ_in_what_they_add(make, tokenizer, tiny_text):
    from tokenizers.processors import TemplateProcessing

    bare, both, cutting = (copy.deepcopy(tokenizer) for _ in range(3))
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    both.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)],
    )
    cutting.backend_tokenizer.enable_truncation(8)
    as_it_is = text_stream(make("short", out="as_it_is"))
    # EOS is not doubled, and a tokenizer that was saved while cutting its input still reads whole documents.
    assert text_stream(make("short", out="both", tokenizer=both)) == as_it_is
    assert text_stream(make("short", out="cutting", tokenizer=cutting)) == as_it_is
    assert tokenizer.bos_token_id not in text_stream(make("short", out="bare", tokenizer=bare))
    # Prompts are written without such tokens.
    ends = {
        tuple(rows(make(out=f"{name}-prompt", tokenizer=kind))[0]["input_ids"][-5:])
        for name, kind in (("bare", bare), ("both", both), ("plain", tokenizer))
    }
    assert ends == {tuple(without_bos(tokenizer, END_PROMPTS["EP_1"])[-5:])}


def test_prompts_are_sampled_by_seed_and_row(make, tokenizer):
    options = [f"data.end_prompts={json.dumps(list(PROMPTS))}", "data.prompt_loss_weight=0.25"]
    made = make(overrides=options, out="one")
    found = rows(made)
    for row in found:
        b = row["prompt_length"]
        prompt = next(
            text
            for name, text in PROMPTS.items()
            if row["prompt_name"] == (name if name in END_PROMPTS else "custom")
        )
        assert row["input_ids"][-b:] == without_bos(tokenizer, prompt)
        assert len(row["input_ids"]) == 64 == row["text_length"] + b
        assert row["position_ids"][-b:] == list(range(512 - b, 512))
        assert row["loss_weights"][-b:] == [0.25] * b
    names = [row["prompt_name"] for row in found]
    assert set(names) == {"EP_1", "EP_3", "custom"}
    assert [prompt["text"] for prompt in made[1]["end_prompts"]] == list(PROMPTS.values())
    # Which rows were made before, in which shard or run, does not matter.
    again = make(overrides=[*options, "data.rows_per_shard=3"], out="two")
    assert [row["prompt_name"] for row in rows(again)] == names
    other = make(overrides=[*options, "data.seed=1"], out="three")
    assert [row["prompt_name"] for row in rows(other)] != names
    # Cut rows take the text in order, whatever their prompts leave room for.
    shortest = min(len(text_stream(made)), len(text_stream(other)))
    assert text_stream(made)[:shortest] == text_stream(other)[:shortest]


def test_special_token_as_prompt(make, tokenizer):
    with pytest.raises(BadInput, match=r"no special token <\|eot_id\|>"):
        make(overrides=["data.end_prompts=[EP_2]"])
    knowing = copy.deepcopy(tokenizer)
    knowing.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    row = rows(make(overrides=["data.end_prompts=[EP_2]"], tokenizer=knowing))[0]
    assert row["prompt_length"] == 1 and row["input_ids"][-1] == knowing.convert_tokens_to_ids("<|eot_id|>")
    assert row["position_ids"][-2:] == [62, 511]


@pytest.mark.parametrize("packing", ["cut", "document"])
def test_bytes_do_not_depend_on_workers(make, monkeypatch, packing):
    # Batches of a few documents: enough of them for every worker.
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 3000)
    options = [
        f"data.end_prompts={json.dumps(list(PROMPTS))}",
        "data.rows_per_shard=20",
        f"data.packing={packing}",
        "data.tokens=3000",
    ]
    one, two, three = (
        make(overrides=options, out=f"out{workers}", workers=workers)[0] for workers in (1, 2, 3)
    )
    assert contents(one) == contents(two) == contents(three)
    assert len(contents(one)) > 2


def test_documents_are_read_as_they_are_needed(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 10)
    taken = []
    endless = ((taken.append(number) or str(number), "some words of text") for number in count())
    stream = tokenizing.tokenized(endless, tokenizer, 2)
    assert [name for name, _ in islice(stream, 6)] == [str(number) for number in range(6)]
    stream.close()
    assert len(taken) <= 6 + 2 * 2 + 1


def test_other_seed_other_rows_same_text(make):
    options = [f"data.end_prompts={json.dumps(list(PROMPTS))}"]
    zero, one, again = (
        contents(make(overrides=[*options, f"data.seed={seed}"], out=out)[0])
        for seed, out in ((0, "a"), (1, "b"), (0, "c"))
    )
    assert zero == again
    assert zero["shard-00000.parquet"] != one["shard-00000.parquet"]


@given(
    lengths=st.lists(st.integers(1, 9), max_size=12),
    takes=st.lists(st.integers(1, 12), max_size=12),
    by_document=st.booleans(),
    data=st.data(),
)
def test_a_cursor_goes_on_where_another_stood(lengths, takes, by_document, data):
    documents = [
        (str(number), np.arange(length, dtype=np.int32) + 100 * number)
        for number, length in enumerate(lengths)
    ]

    def taken(cursor, counts):
        function = cursor.take_document if by_document else cursor.take
        return [None if part is None else (part[0].tolist(), part[1]) for part in map(function, counts)]

    whole = taken(row_stream.Cursor(iter(documents), 0, 0), takes)
    cut = data.draw(st.integers(0, len([part for part in whole if part])))
    first = row_stream.Cursor(iter(documents), 0, 0)
    head = taken(first, takes[:cut])
    second = row_stream.Cursor(iter(documents[first.document :]), first.document, first.offset)
    assert head + taken(second, takes[cut:]) == whole
    if not by_document:
        flat = [int(token) for _, ids in documents for token in ids]
        assert [token for part in whole if part for token in part[0]] == flat[
            : sum(size for size, part in zip(takes, whole, strict=True) if part)
        ]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "method, packing", [("endprompt", "cut"), ("endprompt", "document"), ("pose_matched", "cut")]
)
def test_resumes_from_every_write(make, monkeypatch, method, packing):
    """Killed before, in the middle of, and right after each write in turn, the run ends in the same bytes."""
    options = [
        f"data.end_prompts={json.dumps(list(PROMPTS))}",
        "data.rows_per_shard=9",
        "data.tokens=2000",
        f"data.packing={packing}",
    ]
    whole = contents(make(method, overrides=options, out="whole")[0])
    write, writes = storage.write_atomically, 0

    def dying(path, data):
        nonlocal writes
        writes += 1
        if writes == at and moment == "after":
            write(path, data)
        if writes == at:
            if moment == "amid":
                path.with_name(f".{path.name}.1.part").write_bytes(data[: len(data) // 2])
            raise Killed
        write(path, data)

    last = 2 * len([name for name in whole if name.startswith("shard-")]) + 1
    assert last >= 9
    for at in range(1, last + 1):
        for moment in ("before", "amid", "after"):
            writes, out = 0, f"killed-{at}-{moment}"
            monkeypatch.setattr(storage, "write_atomically", dying)
            with pytest.raises(Killed):
                make(method, overrides=options, out=out)
            monkeypatch.setattr(storage, "write_atomically", write)
            folder, _ = make(method, overrides=options, out=out)
            (folder / parts.PROGRESS).unlink(missing_ok=True)  # outlives a kill right after the manifest
            assert {
                name: data for name, data in contents(folder).items() if not name.startswith(".manifest")
            } == whole


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")
@pytest.mark.slow
def test_sigkill(recipe_file, tmp_path, tiny_text):
    path = recipe_file(data={"tokens": 64 * 400, "rows_per_shard": 2})
    write_jsonl(tmp_path / "corpus.jsonl", tiny_text * 4)
    command = [
        sys.executable,
        "-m",
        "endprompt",
        "prepare",
        str(path),
        "endprompt",
        "--workers",
        "2",
        "--out",
        str(tmp_path / "killed"),
    ]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "killed/small/endprompt/shards"
    try:
        while len(list(folder.glob("shard-*.parquet"))) < 5 and process.poll() is None:
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (folder / parts.PROGRESS).exists() and not (folder / shards.MANIFEST).exists(), (
        "it was done before it was killed"
    )
    assert len(children) >= 2
    until = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, children)), "workers outlive the process that was killed"

    before = contents(folder)
    code, out, err = run_main("prepare", path, "endprompt", "--workers", 1, "--out", tmp_path / "killed")
    assert (code, err) == (0, "") and "400 rows, 25600 tokens" in out
    assert run_main("prepare", path, "endprompt", "--workers", 1, "--out", tmp_path / "whole")[0] == 0
    after = contents(folder)
    assert after == contents(tmp_path / "whole/small/endprompt/shards")
    kept = json.loads(before[parts.PROGRESS])["shards"]
    assert len(kept) >= 4 and all(after[shard["file"]] == before[shard["file"]] for shard in kept)


def test_prepared_shards_are_left_alone(recipe_file, tmp_path):
    path = recipe_file()
    assert run_main("prepare", path, "endprompt", "--out", tmp_path / "o", "--workers", 1)[0] == 0
    run = tmp_path / "o/small/endprompt"

    def state():
        return {
            file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (run / "shards").iterdir()
        }

    before, resolved = state(), (run / "recipe.yaml").read_bytes()
    assert set(before) == {"manifest.json", "shard-00000.parquet"}
    code, out, _ = run_main("prepare", path, "endprompt", "--out", tmp_path / "o", "--workers", 1)
    assert code == 0 and "64 rows" in out
    assert state() == before
    # What the shards do not depend on may change.
    assert (
        run_main(
            "prepare",
            path,
            "endprompt",
            "--out",
            tmp_path / "o",
            "--set",
            "train.learning_rate=1e-5",
            "--set",
            "eval.samples=9",
        )[0]
        == 0
    )
    assert state() == before
    resolved = (run / "recipe.yaml").read_bytes()
    for other in (
        "data.seed=1",
        "lengths.target=1024",
        "data.tokens=2048",
        "data.end_prompts=[EP_3]",
        "data.prompt_loss_weight=0.2",
    ):
        code, _, err = run_main("prepare", path, "endprompt", "--out", tmp_path / "o", "--set", other)
        assert code == 2 and "another setting" in err
    assert state() == before
    assert (run / "recipe.yaml").read_bytes() == resolved


def test_a_started_preparation_of_another_setting_is_refused(make, monkeypatch):
    write = storage.write_atomically

    def dying(path, data):
        write(path, data)
        if path.name == parts.PROGRESS:
            raise Killed

    monkeypatch.setattr(storage, "write_atomically", dying)
    with pytest.raises(Killed):
        make(overrides=["data.rows_per_shard=9"])
    monkeypatch.setattr(storage, "write_atomically", write)
    with pytest.raises(BadInput, match="started preparation of another setting .seed is 0, expected 1"):
        make(overrides=["data.rows_per_shard=9", "data.seed=1"])
    assert make(overrides=["data.rows_per_shard=9"])[1]["rows"] == 64


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped byte": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("finished", [True, False])
def test_damaged_shards_are_refused(make, monkeypatch, tmp_path, damage, finished):
    write, options = storage.write_atomically, ["data.rows_per_shard=16"]
    if not finished:

        def dying(path, data):
            if path.name == "shard-00003.parquet":
                raise Killed
            write(path, data)

        monkeypatch.setattr(storage, "write_atomically", dying)
        with pytest.raises(Killed):
            make(overrides=options, out="damaged")
        monkeypatch.setattr(storage, "write_atomically", write)
    else:
        make(overrides=options, out="damaged")
    folder = tmp_path / "damaged"
    DAMAGES[damage](folder / "shard-00001.parquet")
    before = contents(folder)
    with pytest.raises(BadInput, match="shard-00001.parquet") as caught:
        make(overrides=options, out="damaged")
    assert ("missing" if damage == "missing" else "damaged") in str(caught.value)
    assert contents(folder) == before


def test_leftovers_of_a_killed_run_are_removed(make):
    folder, _ = make(out="fresh")
    expected = contents(folder)
    stale = folder.parent / "stale"
    stale.mkdir()
    for name in (
        ".shard-00000.parquet.77.part",
        ".progress.json.77.part",
        "shard-00000.parquet",
        "shard-00007.parquet",
    ):
        (stale / name).write_bytes(b"half")
    assert make(out="stale")[0] == stale
    assert contents(stale) == expected


def test_manifest(make, tokenizer):
    folder, manifest = make(overrides=["data.rows_per_shard=25"])
    assert manifest == json.loads((folder / "manifest.json").read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [25, 25, 14]
    assert [shard["bytes"] for shard in manifest["shards"]] == [
        path.stat().st_size for path in shards.files(folder, manifest)
    ]
    assert (
        manifest["method"],
        manifest["physical_length"],
        manifest["target_length"],
        manifest["corpus_ended"],
    ) == ("endprompt", 64, 512, False)
    assert manifest["tokenizer_fingerprint"] == tokenizing.tokenizer_fingerprint(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["another"])
    assert tokenizing.tokenizer_fingerprint(other) != manifest["tokenizer_fingerprint"]
    cutting = copy.deepcopy(tokenizer)
    cutting.backend_tokenizer.enable_truncation(8)
    assert tokenizing.tokenizer_fingerprint(cutting) == manifest["tokenizer_fingerprint"]


def test_position_column_is_next_to_free(tokenizer, tmp_path, base):
    recipe = schema.load(
        REPOSITORY / "recipes/tiny.yaml",
        ["lengths.physical=8192", "lengths.target=65536", f"model.name_or_path={base}"],
    )
    prepare.prepare(Experiment.of(recipe, "endprompt"), tmp_path / "out", 1, {}, tokenizer=tokenizer)
    metadata, sizes = pq.ParquetFile(tmp_path / "out/shard-00000.parquet").metadata, {}
    for group in range(metadata.num_row_groups):
        for column in (metadata.row_group(group).column(index) for index in range(metadata.num_columns)):
            sizes[column.path_in_schema] = sizes.get(column.path_in_schema, 0) + column.total_compressed_size
            if column.path_in_schema.startswith("position_ids"):
                assert "DELTA_BINARY_PACKED" in column.encodings and "PLAIN" not in column.encodings
    share = next(size for path, size in sizes.items() if path.startswith("position_ids"))
    assert share < 0.02 * sum(sizes.values())


def test_datasets_reads_the_shards(make, tmp_path):
    import datasets

    made = make(overrides=["data.rows_per_shard=25"])
    loaded = datasets.load_dataset(
        "parquet",
        data_files=[str(path) for path in shards.files(*made)],
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert loaded.to_list() == rows(made)
    assert {
        name: str(feature.feature.dtype)
        for name, feature in loaded.features.items()
        if hasattr(feature, "feature")
    } == {"input_ids": "int32", "position_ids": "int32", "loss_weights": "float32", "document_ids": "string"}


def test_corpus_that_ends_before_the_budget(make, tokenizer, tiny_text, capsys):
    made = make("short", ["data.tokens=1e6"], texts=tiny_text[:10])
    available = len(expected_stream(tiny_text[:10], tokenizer)[0])
    assert made[1]["corpus_ended"] is True
    assert made[1]["rows"] == available // 64 == len(rows(made))
    assert f"warning: the corpus ended after {available // 64} of 15625 rows" in capsys.readouterr().err
    assert make("short", ["data.tokens=1e6"], texts=tiny_text[:10])[1] == made[1]


def test_budget_is_met_exactly_by_whole_rows(make, capsys):
    assert make("short", ["data.tokens=1000"])[1]["rows"] == 15
    assert "warning" not in capsys.readouterr().err


def test_corpus_of_less_than_a_row(make, tmp_path):
    with pytest.raises(BadInput, match="fewer tokens than one row of 64"):
        make(texts=["Too little."])
    assert not (tmp_path / "out").exists()


def test_inspect_shows_a_row(recipe_file, tmp_path, tokenizer):
    path = recipe_file()
    run_main("prepare", path, "endprompt", "--out", tmp_path / "o", "--workers", 1)
    code, out, err = run_main("inspect", path, "endprompt", "--out", tmp_path / "o", "--row", 3)
    b = len(without_bos(tokenizer, END_PROMPTS["EP_1"]))
    assert (code, err) == (0, "")
    for telling in (
        "64 rows, 4096 tokens; all checksums hold",
        f"row 3: {64 - b} text tokens + {b} of end prompt EP_1",
        f"0..{63 - b}, {512 - b}..511 of 0..511",
        f"never seen: {64 - b}..{512 - 64}",
        f"gap {64 - b}..{512 - 64}",
        END_PROMPTS["EP_1"],
    ):
        assert telling in out


def test_methods_without_training_need_no_shards(recipe_file, tmp_path):
    for method in ("base", "interpolation"):
        code, out, err = run_main("prepare", recipe_file(), method, "--out", tmp_path / "o")
        assert (code, err) == (0, "") and "needs no shards" in out
    assert not (tmp_path / "o").exists()


def test_an_edited_corpus_is_not_taken_for_the_old_one(recipe_file, tmp_path, tiny_text):
    path = recipe_file()
    arguments = ("prepare", path, "endprompt", "--out", tmp_path / "out", "--workers", 1)
    assert run_main(*arguments)[0] == 0
    write_jsonl(tmp_path / "corpus.jsonl", [*tiny_text, "one more"])
    code, _, error = run_main(*arguments)
    assert code == 2 and "the corpus changed since" in error
    (tmp_path / "corpus.jsonl").unlink()
    assert run_main(*arguments)[0] == 0, "shards must serve on a machine without their corpus"
