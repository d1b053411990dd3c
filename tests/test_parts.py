"""prepare --part: parts that are made apart and joined."""

import contextlib
import itertools
import json
import shutil
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
from conftest import run_main, write_jsonl

from endprompt import storage
from endprompt.rows import shards


def go(recipe, out, part=None):
    return run_main(
        "prepare",
        recipe,
        "endprompt_random",
        "--out",
        out,
        "--workers",
        1,
        *(["--part", part] if part else []),
    )


def folder(out):
    return out / "small/endprompt_random/shards"


def rows(out):
    return list(shards.rows(folder(out), shards.read_manifest(folder(out))))


@contextlib.contextmanager
def killed_at_write(number, monkeypatch):
    """Inside, the number-th file is not written: the command is interrupted there."""
    write, count = storage.write_atomically, itertools.count(1)

    def killed(path, data):
        if path.parent.name == "shards" and next(count) == number:
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomically", killed)
        yield


@pytest.fixture
def many_files(recipe_file, tmp_path, tiny_text):
    """The corpus as 6 files of 8 documents: parts take whole files."""
    for number in range(6):
        (tmp_path / "files").mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"files/{number}.jsonl", tiny_text[8 * number : 8 * number + 8])
    return recipe_file(data={"corpus": str(tmp_path / "files"), "rows_per_shard": 10})


@pytest.mark.parametrize("kind", ["one file", "many files"])
def test_joined_parts_hold_every_document_once(kind, recipe_file, many_files, tmp_path):
    recipe = many_files if kind == "many files" else recipe_file(data={"rows_per_shard": 10})
    for part in ("3/3", "1/3", "2/3"):  # in any order
        code, out, err = go(recipe, tmp_path / "parts", part)
        assert code == 0 and f"part {part[0]} of 3" in out, err
        assert not (folder(tmp_path / "parts") / shards.MANIFEST).exists()
    assert go(recipe, tmp_path / "parts")[0] == 0
    manifest = shards.read_manifest(folder(tmp_path / "parts"))
    assert (
        manifest["parts"] == 3
        and manifest["rows"] == 64
        and [entry["file"] for entry in manifest["shards"]]
        == sorted(entry["file"] for entry in manifest["shards"])
    )
    assert sorted(path.name for path in folder(tmp_path / "parts").iterdir()) == sorted(
        [shards.MANIFEST, *(entry["file"] for entry in manifest["shards"])]
    )
    found = rows(tmp_path / "parts")
    shares = [22, 21, 21]
    named = [
        {name for row in found[sum(shares[:i]) : sum(shares[: i + 1])] for name in row["document_ids"]}
        for i in range(3)
    ]
    assert all(named) and not named[0] & named[1] and not named[1] & named[2] and not named[0] & named[2]
    if kind == "many files":
        assert [
            {name.partition("#")[0] for name in names} <= {f"{i}.jsonl", f"{i + 3}.jsonl"}
            for i, names in enumerate(named)
        ] == [True] * 3
    # A row's randomness comes from its number among all, so the positions are those of a preparation in one
    # piece.
    assert go(recipe, tmp_path / "whole")[0] == 0
    whole = rows(tmp_path / "whole")
    assert [row["position_ids"] for row in found] == [row["position_ids"] for row in whole]
    assert (
        found[0]["input_ids"] != whole[1]["input_ids"]
        and len({tuple(row["input_ids"]) for row in found}) == 64
    )
    # And it trains: the settings are the recipe's.
    assert run_main("inspect", recipe, "endprompt_random", "--out", tmp_path / "parts", "--row", 63)[0] == 0


@pytest.fixture
def hub(monkeypatch, tiny_text):
    """A dataset of the hub that another version may replace: hub["commit"] = "second"."""
    there = {"commit": "first", "asked": []}

    def load_dataset(name, split, streaming, revision):
        there["asked"].append(revision)
        more = ["A document that was put in front."] if revision == "second" else []
        return iter([{"text": text} for text in more + tiny_text])

    info = lambda self, name: SimpleNamespace(sha=there["commit"])  # noqa: E731
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return there


def test_a_preparation_keeps_to_the_commit_that_it_began_with(recipe_file, tmp_path, monkeypatch, hub):
    recipe = recipe_file(data={"corpus": "a/b", "rows_per_shard": 10})
    assert go(recipe, tmp_path / "whole")[0] == 0
    with killed_at_write(5, monkeypatch):
        assert go(recipe, tmp_path / "killed")[0] == 130
    hub["commit"] = "second"
    assert go(recipe, tmp_path / "killed")[0] == 0 and set(hub["asked"]) == {"first"}
    whole, resumed = (shards.read_manifest(folder(tmp_path / name)) for name in ("whole", "killed"))
    assert whole["corpus_commit"] == "first" and resumed["shards"] == whole["shards"]
    assert go(recipe, tmp_path / "new")[0] == 0
    assert shards.read_manifest(folder(tmp_path / "new"))["shards"] != whole["shards"]


def test_parts_of_two_commits_are_not_joined(recipe_file, tmp_path, hub):
    recipe = recipe_file(data={"corpus": "a/b", "rows_per_shard": 10})
    for name, commits in (("one", ("first", "first")), ("two", ("first", "second"))):
        for number, hub["commit"] in enumerate(commits, 1):
            assert go(recipe, tmp_path / name, f"{number}/2")[0] == 0
    assert go(recipe, tmp_path / "one")[0] == 0
    code, _, err = go(recipe, tmp_path / "two")
    assert code == 2 and "are of several versions of the dataset on the hub; delete the folder" in err


def test_one_part_is_the_whole(recipe_file, tmp_path):
    recipe = recipe_file()
    assert (
        go(recipe, tmp_path / "part", "1/1")[0] == 0
        and go(recipe, tmp_path / "part")[0] == 0
        and go(recipe, tmp_path / "whole")[0] == 0
    )
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")


def test_a_killed_part_goes_on_to_the_same_bytes_and_leaves_the_others_alone(
    recipe_file, tmp_path, monkeypatch
):
    recipe = recipe_file(data={"rows_per_shard": 5})
    assert go(recipe, tmp_path / "whole", "1/2")[0] == 0
    assert go(recipe, tmp_path / "cut", "2/2")[0] == 0
    other = {path: path.read_bytes() for path in folder(tmp_path / "cut").glob("*-00002-of-00002*")}
    (folder(tmp_path / "cut") / ".shard-00002-of-00002-00009.parquet.77.part").write_bytes(
        b"of a part that is being made"
    )
    with killed_at_write(7, monkeypatch):
        assert go(recipe, tmp_path / "cut", "1/2")[0] == 130
    assert 0 < len(list(folder(tmp_path / "cut").glob("shard-00001-of-00002-*.parquet"))) < 7
    code, _, error = go(recipe, tmp_path / "cut")
    assert code == 2 and "holds 1 of 2 finished parts" in error and "--part I/2` for 1," in error
    assert go(recipe, tmp_path / "cut", "1/2")[0] == 0
    assert other == {path: path.read_bytes() for path in other} and list(
        folder(tmp_path / "cut").glob(".*.part")
    )
    for path in folder(tmp_path / "whole").glob("shard-*"):
        assert path.read_bytes() == (folder(tmp_path / "cut") / path.name).read_bytes()
    assert go(recipe, tmp_path / "cut")[0] == 0 and len(rows(tmp_path / "cut")) == 64


def test_a_short_corpus_makes_fewer_rows_and_says_so(recipe_file, tmp_path):
    recipe = recipe_file(data={"tokens": 64 * 400})
    for part in ("1/2", "2/2"):
        code, _, error = go(recipe, tmp_path, part)
        assert code == 0 and "the corpus of this part ended after" in error
    assert go(recipe, tmp_path)[0] == 0
    assert shards.read_manifest(folder(tmp_path))["corpus_ended"] is True


@pytest.mark.parametrize(
    "part", ["0/2", "3/2", "1", "1/", "/2", "-1/2", "1/2/3", "a/b", "1/100000", "١/2", ""]
)
def test_a_part_that_is_none(recipe_file, tmp_path, part):
    code, _, error = run_main(
        "prepare", recipe_file(), "endprompt", "--out", tmp_path / "out", f"--part={part}"
    )
    assert (
        code == 2
        and "--part" in error
        and error.count("\n") == 1
        and not list((tmp_path / "out").rglob("*.*"))
    )


def damage(name):
    def edit(out):
        path = next(folder(out).glob("part-00001*"))
        tree = json.loads(path.read_text())
        if name == "not json":
            path.write_text("{")
        elif name == "other setting":
            path.write_text(json.dumps({**tree, "seed": 7}))
        elif name == "no shards":
            path.write_text(json.dumps({key: value for key, value in tree.items() if key != "shards"}))
        elif name == "other corpus":
            path.write_text(json.dumps({**tree, "corpus_files": [["x", 1, 0, ""]]}))
        elif name == "other count":
            shutil.copy(path, path.with_name("part-00001-of-00003.json"))
        elif name == "flipped":
            shard = next(folder(out).glob("shard-00001*"))
            data = np.frombuffer(shard.read_bytes(), np.uint8).copy()
            data[len(data) // 2] ^= 4
            shard.write_bytes(data.tobytes())

    return edit


@pytest.mark.parametrize(
    "name, telling",
    [
        ("not json", "cannot be read"),
        ("other setting", "is of another setting (seed is 7"),
        ("no shards", "cannot be read"),
        ("other corpus", "the corpus changed while"),
        ("other count", "holds parts of 2 and of 3"),
        ("flipped", "is damaged"),
    ],
)
def test_damaged_parts_are_not_joined(recipe_file, tmp_path, name, telling):
    recipe = recipe_file()
    for part in ("1/2", "2/2"):
        assert go(recipe, tmp_path, part)[0] == 0
    damage(name)(tmp_path)
    code, _, error = go(recipe, tmp_path)
    assert code == 2 and telling in error and error.count("\n") == 1
    assert not (folder(tmp_path) / shards.MANIFEST).exists()


def test_parts_and_a_whole_do_not_mix(recipe_file, tmp_path, monkeypatch):
    recipe = recipe_file(data={"rows_per_shard": 5})
    with killed_at_write(5, monkeypatch):
        assert go(recipe, tmp_path)[0] == 130
    code, _, error = go(recipe, tmp_path, "1/2")
    assert code == 2 and "holds a started preparation without parts" in error
    code, _, error = go(recipe_file("few", data={"tokens": 128}), tmp_path / "few", "1/3")
    assert code == 2 and "asks for 2 rows, which are not enough for 3 parts" in error
