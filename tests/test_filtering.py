"""prepare --filter: documents ranked by what the base gains from far context, whatever interrupts it."""

import json
import random
from itertools import count

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_main, tiny_documents, write_jsonl

from endprompt import BadInput, Failure, storage
from endprompt.bases import gain, loading, locating, model
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.rows import filtering, inspection, prepare, shards

ASKED = {"share": 0.5, "short": 64, "long": 256, "windows": 4}


def planted(rng: random.Random, filler: str) -> tuple[str, str]:
    """(a text that ends in what it began with, further back than the short context; the same with another
    end)."""
    secret, other = (" ".join(str(rng.randrange(10000, 100000)) for _ in range(7)) for _ in range(2))
    between = " ".join(filler.split()[:100])
    return f"{secret} {between} {secret}", f"{secret} {between} {other}"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Eight pairs of texts that are alike but for their ends: the odd ones repeat themselves."""
    rng = random.Random(3)
    pairs = [planted(rng, filler) for filler in tiny_documents(8, 18, seed=9)]
    return [text for repeated, other in pairs for text in (other, repeated)]


@pytest.fixture
def make(recipe_file, tmp_path, texts):
    """make("data.filter_share=0.5", out="other", workers=2, method=...) -> (shards folder, manifest)"""

    def run(*overrides, out="out", workers=1, method="short", texts=texts, part=None):
        corpus = str(write_jsonl(tmp_path / "texts.jsonl", texts))
        recipe = schema.load(recipe_file(data={"corpus": corpus, "tokens": 1024}), list(overrides))
        folder = tmp_path / out
        return folder, prepare.prepare(Experiment.of(recipe, method), folder, workers, {}, part)

    return run


HALF = "data.filter_share=0.5"


def scores(folder, name="scores.jsonl") -> list[list]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()[1:]]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# The measure


def test_losses_are_the_models_own(base, recipe_file, monkeypatch):
    """Against the full logits of the plain model, in pieces of every size."""
    experiment = Experiment.of(schema.load(recipe_file()), "short")
    ids = np.random.default_rng(0).integers(3, 800, (5, 40))
    network = loading.load_weights("x", pretrained_model_name_or_path=base, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = network(torch.from_numpy(ids)).logits[:, -8:-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(ids)[:, -7:].flatten(), reduction="none"
    )
    expected = expected.view(5, 7).mean(1).numpy()
    for tokens, held in ((2**12, 2**24), (80, 2**24), (2**12, 16)):
        monkeypatch.setitem(gain.TOKENS, "cpu", tokens)
        monkeypatch.setattr(gain, "LOGITS", held)
        np.testing.assert_allclose(gain.Reader(experiment.base).losses(ids, 7), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "length, start, far, near, ends",
    [
        (66, None, 65, 64, [65]),  # the end token is no part of the text
        (256, None, 255, 64, [255]),
        (257, None, 256, 64, [256]),
        (600, None, 256, 64, [256, 599]),
        (2001, None, 256, 64, [256, 837, 1418, 2000]),
        (258, 1, 256, 64, [257]),  # which counts the token that is put before a text
    ],
)
def test_windows_are_of_one_length_and_reach_the_end(length, start, far, near, ends):
    ids = np.arange(length)
    if start is not None:
        ids[0] = start
    long, short = filtering.windows(ids, ASKED, start)
    assert long.shape == (len(ends), far) and short.shape == (len(ends), near)
    assert [row[-1] + 1 for row in long.tolist()] == ends == [row[-1] + 1 for row in short.tolist()]
    assert np.array_equal(long[:, -32:], short[:, -32:])
    if start is not None:
        assert set(long[:, 0]) == set(short[:, 0]) == {start}


@pytest.mark.parametrize("length, start", [(1, None), (65, None), (65, 1), (2, 1)])
def test_a_text_within_the_short_context_has_no_windows(length, start):
    ids = np.arange(1, length + 1)
    assert filtering.windows(ids, ASKED, start) is None


@pytest.mark.parametrize(
    "share, kept, threshold",
    [
        (0.2, [2], 3.0),
        (0.5, [0, 2], 1.0),
        (0.6, [0, 2, 3], 1.0),
        (0.8, [0, 2, 3, 4], -1.0),
        (1.0, [*range(5)], None),
    ],
)
def test_the_top_share(share, kept, threshold):
    assert filtering.top([10, 10, 20, 10, 10], [1.0, None, 3.0, 1.0, -1.0], share) == (kept, threshold)


def test_what_repeats_itself_from_afar_is_kept(make, texts):
    folder, manifest = make("data.filter_share=0.4")
    found = scores(folder)
    assert [row[0] for row in found] == [f"texts.jsonl#{number}" for number in range(len(found))]
    repeated, others = ([row[3] for row in found[first::2]] for first in (1, 0))
    assert min(repeated) > max(others) and min(repeated) > 0.5
    kept = {name for row in shards.rows(folder, manifest) for name in row["document_ids"]}
    assert kept <= {f"texts.jsonl#{number}" for number in range(1, len(texts), 2)}
    (record,) = manifest["filtered"]
    assert (
        manifest["filter"] == {**ASKED, "share": 0.4}
        and record["documents"] == len(found)
        and not record["without_score"]
    )
    assert record["threshold"] in repeated and record["kept_tokens"] >= 0.4 * record["tokens"]
    assert record["sha256"] == storage.sha256(folder / record["scores"])


def test_the_command(recipe_file, tmp_path, texts, base):
    corpus = str(write_jsonl(tmp_path / "texts.jsonl", texts))
    recipe = recipe_file(data={"corpus": corpus, "tokens": 1024})
    code, out, err = run_main("prepare", recipe, "short", "--out", tmp_path / "out", "--filter", "0.5")
    assert code == 0 and "documents, " in out and "(scores.jsonl)" in out, err
    code, _, err = run_main("inspect", recipe, "short", "--out", tmp_path / "out")
    assert code == 2 and "filter is {" in err and "expected None" in err
    assert run_main("inspect", recipe, "short", "--out", tmp_path / "out", "--set", HALF)[0] == 0
    code, _, err = run_main("prepare", recipe, "short", "--out", tmp_path / "out")
    assert code == 2 and "of another setting" in err


def test_without_a_filter_nothing_changes(make):
    folder, manifest = make()
    assert not {"filter", "filtered"} & set(manifest) and not (folder / "scores.jsonl").exists()
    whole, ranked = make("data.filter_share=1.0", out="all")
    for shard in manifest["shards"]:
        assert (whole / shard["file"]).read_bytes() == (folder / shard["file"]).read_bytes()
    assert ranked["filtered"][0]["kept"] == ranked["filtered"][0]["documents"]


def test_no_more_is_ranked_than_rows_need(make, texts):
    _, manifest = make(HALF)
    assert manifest["filtered"][0]["documents"] < len(texts)
    assert not manifest["corpus_ended"]
    _, manifest = make(HALF, "data.packing=document", "data.tokens=256", out="documents")
    assert manifest["filtered"][0]["documents"] == 2 * (256 // 64 + 1)  # a row more than is asked for
    assert manifest["filtered"][0]["kept"] == 256 // 64 + 1
    assert manifest["rows"] == 4 and not manifest["corpus_ended"]


def test_the_same_with_several_workers(make):
    assert contents(make(HALF)[0]) == contents(make(HALF, out="three", workers=3)[0])


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_to_the_same_bytes(make, monkeypatch):
    """Killed after each score and each write in turn; no document is scored twice."""
    options = HALF, "data.rows_per_shard=5"
    whole = contents(make(*options, out="whole")[0])
    asked, add, write = [], storage.Kept.add, storage.write_atomically
    score = filtering.Ranking.score
    monkeypatch.setattr(filtering.Ranking, "score", lambda self, ids: asked.append(1) or score(self, ids))
    documents = len(whole["scores.jsonl"].splitlines()) - 1
    writes = 2 * len([name for name in whole if name.startswith("shard-")])
    for at in [*range(0, documents, 4), *range(documents, documents + writes)]:
        done, out = [], f"killed-{at}"

        def dying(function, at=at, done=done):
            def call(*given):
                if len(done) == at:
                    raise Killed
                done.append(1)
                return function(*given)

            return call

        asked.clear()
        monkeypatch.setattr(storage.Kept, "add", dying(add))
        monkeypatch.setattr(storage, "write_atomically", dying(write))
        with pytest.raises(Killed):
            make(*options, out=out)
        monkeypatch.setattr(storage.Kept, "add", add)
        monkeypatch.setattr(storage, "write_atomically", write)
        assert contents(make(*options, out=out)[0]) == whole
        assert len(asked) <= documents + 1  # the one that was killed before it was written


def begun(make, monkeypatch, scored):
    """Kills a preparation after ``scored`` scores."""
    with monkeypatch.context() as patched:
        add = storage.Kept.add
        patched.setattr(
            storage.Kept, "add", lambda self, row: add(self, row) if len(self.rows) < scored else kill()
        )
        with pytest.raises(Killed):
            make(HALF)


def kill():
    raise Killed


def test_other_settings_and_another_model_begin_anew(make, monkeypatch, tmp_path):
    begun(make, monkeypatch, 5)
    head = (tmp_path / "out/scores.jsonl").read_text().splitlines()[0]
    assert contents(make(HALF, "data.filter_short=32")[0]) == contents(
        make(HALF, "data.filter_short=32", out="fresh")[0]
    )
    assert (tmp_path / "out/scores.jsonl").read_text().splitlines()[0] != head


def test_another_model_of_a_started_preparation(make, monkeypatch, tmp_path):
    begun(make, monkeypatch, 5)
    first = scores(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(model, "fingerprint_of", lambda *given: "another")
        patched.setattr(filtering.Ranking, "score", lambda self, ids: 1.0)
        folder, manifest = make(HALF)
    assert manifest["filtered"][0]["model"] == "another"
    assert {row[3] for row in scores(folder)} == {1.0} and len(first) == 5


def test_finished_shards_of_another_models_choice(make, monkeypatch):
    _, manifest = make(HALF)
    assert make(HALF)[1] == manifest
    with monkeypatch.context() as patched:
        patched.setattr(model, "fingerprint_of", lambda *given: "another")
        with pytest.raises(BadInput, match="another base than model.name_or_path chose the text"):
            make(HALF)
        make(out="without")


def test_shards_of_other_scores_are_refused(make, monkeypatch, tmp_path):
    write = storage.write_atomically

    def dying(path, data):
        if path.name == "shard-00001.parquet":
            raise Killed
        write(path, data)

    options = HALF, "data.rows_per_shard=5"
    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_atomically", dying)
        with pytest.raises(Killed):
            make(*options)
    with monkeypatch.context() as patched:
        patched.setattr(model, "fingerprint_of", lambda *given: "another")
        with pytest.raises(BadInput, match="begun with other scores of the documents"):
            make(*options)
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_changed_corpus_is_refused(make, monkeypatch, texts):
    begun(make, monkeypatch, 5)
    other = [*texts[:2], texts[2].replace("a", "e"), *texts[3:]]
    assert len(other[2]) == len(texts[2]) and other != texts
    with pytest.raises(
        BadInput, match=r"the corpus changed since .*scores.jsonl was begun \(texts.jsonl#2 is"
    ):
        make(HALF, texts=other)


def test_scores_that_were_edited_are_refused(make, monkeypatch, tmp_path):
    begun(make, monkeypatch, 5)
    path = tmp_path / "out/scores.jsonl"
    path.write_text(path.read_text().replace("]\n", ', "more"]\n'))
    with pytest.raises(BadInput, match="scores.jsonl is not what prepare writes"):
        make(HALF)


def test_a_base_that_gives_no_numbers(make, monkeypatch):
    monkeypatch.setattr(gain.Reader, "losses", lambda self, rows, scored: np.full(len(rows), np.nan))
    with pytest.raises(Failure, match="the base's loss is no number"):
        make(HALF)


def test_what_was_chosen_from_counts_as_read(make, texts, tmp_path):
    """Of a document that was ranked and left out, too."""
    folder, manifest = make(HALF)
    assert manifest["corpus_files"][0][2] > 0
    left_out = [texts[0].replace("a", "e"), *texts[1:]]
    with pytest.raises(BadInput, match="the corpus changed since .* was made"):
        make(HALF, texts=left_out)


def test_documents_that_are_all_too_short(make, tmp_path):
    with pytest.raises(BadInput, match=r"none of 9 documents holds more than data.filter_short = 64 tokens"):
        make(HALF, texts=["Mara went to the harbour."] * 9)
    assert not (tmp_path / "out").exists()


def test_documents_too_short_for_a_score_come_last(make, texts, capsys):
    _, manifest = make(HALF, texts=[*["Mara went to the harbour."] * 3, *texts])
    assert manifest["filtered"][0]["without_score"] == 3 and manifest["filtered"][0]["threshold"] is not None
    assert "3 of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, complaint",
    [
        ("data.filter_share=0", "data.filter_share: Input should be greater than 0"),
        ("data.filter_share=1.01", "data.filter_share: Input should be less than or equal to 1"),
        ("data.filter_share=half", "data.filter_share: Input should be a valid number"),
        ("data.filter_share=[0.5]", "data.filter_share: Input should be a valid number"),
        ("data.filter_windows=0", "data.filter_windows: Input should be greater than 0"),
        ("data.filter_short=3", "data.filter_short: Input should be greater than or equal to 4"),
        (
            "data.filter_short=129",
            "data.filter_short 129 is not from 4 to 128, half the base's window of 256",
        ),
    ],
)
def test_filters_that_cannot_be(recipe_file, tmp_path, override, complaint):
    code, _, err = run_main(
        "prepare", recipe_file(), "short", "--out", tmp_path / "out", "--set", HALF, "--set", override
    )
    assert code == 2 and complaint in err and err.count("\n") == 1
    assert not (tmp_path / "out/small/short/shards").exists()


@pytest.mark.parametrize("share", ["0", "-1", "2", "half", "nan"])
def test_shares_of_the_command_that_cannot_be(recipe_file, tmp_path, share):
    code, _, err = run_main("prepare", recipe_file(), "short", "--out", tmp_path / "out", f"--filter={share}")
    assert code == 2 and "data.filter_share: Input should be" in err and err.count("\n") == 1


def test_whole_shares_are_numbers(recipe_file):
    assert schema.load(recipe_file(), ["data.filter_share=1"]).data.filter_share == 1.0


def test_parts_rank_their_own(make, tmp_path):
    for number in (2, 1):
        make(HALF, "data.tokens=512", out="parts", part=(number, 2))
    folder, manifest = make(HALF, "data.tokens=512", out="parts")
    assert [one["scores"] for one in manifest["filtered"]] == [
        f"scores-0000{number}-of-00002.jsonl" for number in (1, 2)
    ]
    odd = {row[0] for row in scores(folder, "scores-00001-of-00002.jsonl")}
    even = {row[0] for row in scores(folder, "scores-00002-of-00002.jsonl")}
    assert odd and even and not odd & even


def test_a_stream_is_read_as_far_as_it_is_ranked(recipe_file, tmp_path, monkeypatch, texts):
    """One without an end, too."""
    import datasets

    taken = []

    def load(*given, **more):
        return ({"text": texts[number % len(texts)]} for number in count() if taken.append(number) is None)

    monkeypatch.setattr(datasets, "load_dataset", load)
    recipe = schema.load(recipe_file(data={"corpus": "someone/texts", "tokens": 512}), [HALF])
    monkeypatch.setattr(filtering.Ranking, "score", lambda self, ids: float(ids.sum() % 7))
    manifest = prepare.prepare(Experiment.of(recipe, "short"), tmp_path / "out", 1, {})
    assert manifest["rows"] == 8 and manifest["corpus_files"] is None
    assert len(taken) < 3000  # a batch of texts for the tokenizer, and no more


def test_coverage_asks_no_base(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(gain.Reader, "losses", lambda *given: pytest.fail("the base was asked"))
    recipe = schema.load(recipe_file(), ["method_options.match_by=gain", "lengths.physical=64"])
    experiment = Experiment.of(recipe, "pose_matched", tmp_path)
    assert "sampled rows" in inspection.describe_coverage(experiment, 0)


def test_the_base_of_the_demo_is_the_one_that_is_asked(recipe_file):
    experiment = Experiment.of(schema.load(recipe_file()), "short")
    assert experiment.base.fingerprint == locating.fingerprint(REPOSITORY / "recipes/tiny/base")
