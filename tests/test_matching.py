"""Pieces that are brought together: by hand, against sets, and what always holds."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from endprompt import BadInput, storage
from endprompt.bases import gain, model
from endprompt.methods import matched, matching
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.rows import prepare, shards


def rng():
    return np.random.default_rng(0)


def test_by_hand():
    """0 and 3 share 1 2 3, 1 and 2 share 7 8; of 4 and 5, which share nothing, each is the other's only one
    left.
    """
    pieces = np.array(
        [[1, 2, 3, 40], [7, 8, 50, 51], [60, 61, 7, 8], [70, 1, 2, 3], [80, 81, 82, 83], [90, 91, 92, 93]]
    )
    assert matching.groups(pieces, 2, 2, rng()) == [[0, 3], [1, 2], [4, 5]]
    assert matching.grams(pieces, 2).sum(axis=0).tolist() == [2, 1, 1, 2, 0, 0]
    assert matching.grams(pieces, 3).sum(axis=0).tolist() == [1, 0, 0, 1, 0, 0]
    assert matching.grams(pieces, 9).shape == (
        0,
        6,
    )  # longer than a piece: whole pieces, of which no two are alike


def test_pairs_of_pairs():
    """{0, 2} and {1, 3} are joined by 5 6, which 2 and 3 hold; so are the others by what they do not share
    with them.
    """
    pieces = np.array(
        [
            [1, 2, 9, 10],
            [3, 4, 11, 12],
            [1, 2, 5, 6],
            [3, 4, 5, 6],
            [20, 21, 22, 23],
            [20, 21, 24, 25],
            [26, 27, 28, 29],
            [26, 27, 24, 25],
        ]
    )
    assert matching.groups(pieces, 4, 2, rng()) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@given(
    arrays(np.int32, st.tuples(st.integers(2, 8), st.integers(1, 12)), elements=st.integers(0, 5)),
    st.integers(1, 6),
)
def test_grams_are_those_of_sets(pieces, n):
    n_of = min(n, pieces.shape[1])
    sets = [{tuple(piece[at : at + n_of]) for at in range(len(piece) - n_of + 1)} for piece in pieces]
    held = matching.grams(pieces, n).toarray().astype(int)
    assert [[int(value) for value in row] for row in held.T @ held] == [
        [len({gram for gram in one & other if sum(gram in found for found in sets) > 1}) for other in sets]
        for one in sets
    ]


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_every_piece_is_in_one_group_and_in_order(power, count, size, seed):
    together = 2**power
    pieces = np.random.default_rng(seed).integers(0, 4, (count * together, size))
    found = matching.groups(pieces, together, 3, np.random.default_rng(seed))
    assert (
        sorted(number for group in found for number in group) == list(range(len(pieces)))
        and len(found) == count
    )
    assert all(group == sorted(group) for group in found) and found == sorted(found)
    assert found == matching.groups(pieces, together, 3, np.random.default_rng(seed))


@pytest.mark.parametrize("count, together", [(4, 3), (6, 4), (4, 0), (5, 2)])
def test_groups_that_do_not_come_out_even(count, together):
    with pytest.raises(ValueError, match=f"{count} pieces do not make groups of {together}"):
        matching.groups(np.zeros((count, 4), int), together, 2, rng())


def test_large_ids_are_told_apart():
    """Neighbouring ids of a large vocabulary, in another order, are other n-grams."""
    pieces = np.array([[128000, 128001, 1], [128001, 128000, 2], [128000, 128001, 3], [5, 6, 7]])
    assert matching.grams(pieces, 2).sum(axis=0).tolist() == [1, 0, 1, 0]


# By what the base gains


def fixed(gains: dict[tuple[int, int], float]):
    def gain(pieces, shared):
        found = np.zeros((len(pieces), len(pieces)))
        for pair, value in gains.items():
            found[pair] = value
        return found

    return gain


def test_gains_come_before_shared_grams():
    """0 and 1 share most, but 0 and 3 gain; what loses comes last."""
    pieces = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [20, 21, 22, 23], [1, 2, 30, 31]])
    assert matching.groups(pieces, 2, 2, rng()) == [[0, 1], [2, 3]]
    assert matching.groups(pieces, 2, 2, rng(), fixed({(0, 3): 0.2})) == [[0, 3], [1, 2]]
    assert matching.groups(pieces, 2, 2, rng(), fixed({(0, 1): -0.2})) != [[0, 1], [2, 3]]
    assert matching.groups(pieces, 2, 2, rng(), fixed({})) == [[0, 1], [2, 3]]


def test_groups_gain_what_their_pieces_do():
    """{0, 1} and {2, 3} have 0.3 between them in two halves, {0, 1} and {4, 5} have 0.25 in one."""
    pieces = np.arange(32).reshape(8, 4)
    pairs = {(0, 1): 9.0, (2, 3): 8.0, (4, 5): 7.0, (6, 7): 6.0}
    gain = fixed({**pairs, (0, 2): 0.15, (1, 3): 0.15, (0, 4): 0.25})
    assert matching.groups(pieces, 4, 2, rng(), gain) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_what_the_base_is_asked_about():
    shared = np.array([[9, 3, 0, 2], [3, 9, 0, 2], [0, 0, 9, 0], [2, 2, 0, 9]])
    earlier, later = matched.candidates(shared, 1)
    assert list(zip(earlier, later, strict=True)) == [(0, 1), (1, 3)]  # of equals the nearest
    earlier, later = matched.candidates(shared, 5)
    assert list(zip(earlier, later, strict=True)) == [(0, 1), (1, 3), (0, 3)]
    assert matched.unrelated(shared).tolist() == [2, 2, 0, 2]
    assert len(matched.candidates(np.eye(3), 5)[0]) == 0


@pytest.fixture
def setting(recipe_file):
    recipe = schema.load(recipe_file(), ["method_options.match_by=gain"])
    return Experiment.of(recipe, "pose_matched").rows(for_text=True).setting


def test_gains_of_the_base(setting, tokenizer):
    """A piece gains from one that says the same, and not from one that shares a phrase with it alone."""
    rng = np.random.default_rng(0)
    first, other, last = (rng.integers(10, 800, 48) for _ in range(3))
    last[:3] = first[:3]
    pieces = np.stack([first, other, first, last])
    shared = np.array([[46, 0, 46, 1], [0, 46, 0, 0], [46, 0, 46, 1], [1, 0, 1, 46]])
    gains = matched.Gains(gain.Reader(setting.base), 3, setting)(pieces, shared)
    assert gains[0, 2] > 1 and abs(gains[0, 3]) < gains[0, 2] / 2
    asked = {(0, 2), (0, 3), (2, 3)}
    assert {(i, j) for i, j in zip(*np.nonzero(gains), strict=True)} <= asked


def test_nothing_is_asked_about_pieces_that_share_nothing(setting, monkeypatch):
    reader = gain.Reader(setting.base)
    monkeypatch.setattr(reader, "losses", lambda *given: pytest.fail("the base was asked"))
    assert not matched.Gains(reader, 3, setting)(np.arange(8).reshape(4, 2), np.eye(4)).any()


def prepared(recipe_file, folder, *overrides):
    experiment = Experiment.of(schema.load(recipe_file(), ["data.tokens=1024", *overrides]), "pose_matched")
    return prepare.prepare(experiment, folder, 1, {})


def test_rows_by_gain(recipe_file, tmp_path):
    """The same text in other rows; the manifest says so, and other shards are refused for it."""
    by_gain = prepared(recipe_file, tmp_path / "gain", "method_options.match_by=gain")
    assert by_gain["match_by"] == "gain" and by_gain["match_candidates"] == 3
    by_grams = prepared(recipe_file, tmp_path / "grams")
    assert "match_by" not in by_grams and by_grams["match_pieces"] == 4
    texts = [
        [row["input_ids"] for row in shards.rows(tmp_path / name, manifest)]
        for name, manifest in (("gain", by_gain), ("grams", by_grams))
    ]
    assert texts[0] != texts[1]
    assert sorted(sum(texts[0], [])) == sorted(sum(texts[1], []))
    with pytest.raises(BadInput, match="match_by is 'gain', expected None"):
        prepared(recipe_file, tmp_path / "gain")
    with pytest.raises(BadInput, match="match_by is None, expected 'gain'"):
        prepared(recipe_file, tmp_path / "grams", "method_options.match_by=gain")
    again = prepared(recipe_file, tmp_path / "again", "method_options.match_by=gain")
    assert again["shards"] == by_gain["shards"]


def test_another_base_does_not_go_on(recipe_file, tmp_path, monkeypatch):
    """Neither with finished shards nor with a started preparation; a base that chooses nothing is free."""
    chosen, grams = "method_options.match_by=gain", tmp_path / "grams"
    finished = prepared(recipe_file, tmp_path / "out", chosen)
    prepared(recipe_file, grams)
    assert finished["chosen_by"] and prepared(recipe_file, tmp_path / "out", chosen) == finished
    write = storage.write_atomically

    def dying(path, data):
        if path.name == "shard-00001.parquet":
            raise KeyboardInterrupt
        write(path, data)

    rows = "data.rows_per_shard=8"
    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_atomically", dying)
        with pytest.raises(KeyboardInterrupt):
            prepared(recipe_file, tmp_path / "begun", chosen, rows)
    with monkeypatch.context() as patched:
        patched.setattr(model, "fingerprint_of", lambda *given: "another")
        for folder, *more in ((tmp_path / "out",), (tmp_path / "begun", rows)):
            with pytest.raises(BadInput, match="another base than model.name_or_path chose the text"):
                prepared(recipe_file, folder, chosen, *more)
        prepared(recipe_file, grams)
    assert prepared(recipe_file, tmp_path / "begun", chosen, rows)["chosen_by"] == finished["chosen_by"]
    # What was made before the base was noted is taken as it is.
    path = tmp_path / "out" / shards.MANIFEST
    path.write_text(json.dumps({key: value for key, value in finished.items() if key != "chosen_by"}))
    assert "chosen_by" not in prepared(recipe_file, tmp_path / "out", chosen)


@pytest.mark.parametrize(
    "overrides, complaint",
    [
        (
            ["lengths.physical=512", "method_options.match_pieces=2"],
            "hold 512 tokens together, and the base's",
        ),
        (["method_options.match_candidates=0"], "match_candidates: Input should be greater than 0"),
    ],
)
def test_gains_that_cannot_be_had(recipe_file, tmp_path, overrides, complaint):
    with pytest.raises(BadInput, match=complaint):
        prepared(recipe_file, tmp_path / "out", "method_options.match_by=gain", *overrides)


def test_a_rule_that_is_not_there(recipe_file, tmp_path):
    with pytest.raises(BadInput, match="method_options.match_by: Input should be 'ngrams' or 'gain'"):
        prepared(recipe_file, tmp_path / "out", "method_options.match_by=lexical")
