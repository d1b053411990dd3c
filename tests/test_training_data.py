"""Training data that was asked for, and no other: which files of a folder are read, what they were, how
documents are named, and tokens without an embedding.
"""

import gzip
import itertools
import json
import os
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import run_main, write_jsonl
from datasets import data_files

from endprompt import BadInput, storage
from endprompt.bases import model
from endprompt.recipe import schema, settings_file
from endprompt.recipe.experiment import Experiment
from endprompt.rows import corpus, corpus_folder, parts, prepare, shards
from endprompt.training import dataset

BOM = "\ufeff"


def filled(root: Path, names) -> Path:
    """A folder with files that hold their own name, as text."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"text": [name]}), path)
        elif name.endswith(".jsonl"):
            write_jsonl(path, [name])
        else:
            path.write_text("{}" if name.endswith(".json") else name)
    return root


@pytest.fixture
def read(recipe_file):
    """read(folder, split="test") -> [(document id, text), ...]"""

    def documents(where, split="train"):
        recipe = schema.load(
            recipe_file(
                data={
                    "corpus": [str(one) for one in where] if isinstance(where, list) else str(where),
                    "split": split,
                }
            )
        )
        return list(corpus.documents(recipe, corpus.local_files(recipe)))

    return documents


# -- which files of a folder ---------------------------------------------------------------------------------

LAYOUTS = {
    "no names of splits": ["a.jsonl", "b/c.jsonl", "d.txt", "constraint.jsonl", "latest.jsonl"],
    "hidden": [
        "train.jsonl",
        ".ipynb_checkpoints/train-checkpoint.jsonl",
        "__pycache__/train.jsonl",
        ".train.jsonl",
        "._train.jsonl",
    ],
    "hidden alone beside": ["a.jsonl", ".git/b.jsonl", "c/.d/e.jsonl", "c/f.jsonl", "__MACOSX/a.jsonl"],
    "sharded": [
        "data/train-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
        "dataset_infos.json",
    ],
    "files": ["train.jsonl", "validation.jsonl", "test.jsonl", "extra.jsonl"],
    "other words": ["training.jsonl", "dev.jsonl", "eval.jsonl", "testing.jsonl"],
    "inside names": ["my_train_file.jsonl", "my-test.jsonl", "x.valid.y.jsonl"],
    "folders": ["train/a.jsonl", "test/b.jsonl", "train/c/d.jsonl"],
    "about the data": ["a.jsonl", "dataset_infos.json", "dataset_info.json", "config.json"],
    "test alone": ["test.jsonl", "b.jsonl"],
    "packed": ["train.jsonl", "test.txt", "c/train.txt"],
}


def by_datasets(folder: Path) -> dict[str, list[str]]:
    """{split: files} as ``datasets`` finds them, among those of a kind that is read here."""
    found = data_files.DataFilesDict.from_patterns(
        data_files.get_data_patterns(str(folder)), base_path=str(folder)
    )
    return {
        str(split): sorted(os.path.relpath(path, folder) for path in paths) for split, paths in found.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_read_as_datasets_reads_it(read, tmp_path, layout):
    folder = filled(tmp_path / "folder", LAYOUTS[layout])
    expected = by_datasets(folder)
    assert expected
    for split in ("train", "validation", "test"):
        if split in expected:
            assert sorted(text for _, text in read(folder, split)) == expected[split]
        else:
            with pytest.raises(
                BadInput,
                match=f"has no files of the split '{split}'.*its files are of {next(iter(expected))}",
            ):
                read(folder, split)


def test_as_load_dataset_itself(read, tmp_path):
    folder = filled(tmp_path / "folder", [*LAYOUTS["files"], ".old/train.jsonl"])
    for split in ("train", "test"):
        loaded = datasets.load_dataset(str(folder), split=split, cache_dir=str(tmp_path / "cache"))
        assert [text for _, text in read(folder, split)] == loaded["text"][:] == [f"{split}.jsonl"]


def test_without_that_choice_all_are_read(read, tmp_path, monkeypatch):
    folder = filled(tmp_path / "folder", [*LAYOUTS["files"], ".old/train.jsonl"])
    monkeypatch.setattr(corpus_folder, "choose", lambda folder, names, *others: (names, ""))
    assert [text for _, text in read(folder)] == sorted([*LAYOUTS["files"], ".old/train.jsonl"])


def test_what_is_passed_over_is_said(recipe_file, tmp_path, capsys):
    folder = filled(
        tmp_path / "folder",
        ["train.jsonl", "test.jsonl", ".a/train.jsonl", "dataset_infos.json", "README.md"],
    )
    corpus.local_files(schema.load(recipe_file(data={"corpus": str(folder)})))
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and all(
        part in told
        for part in ("1 of the split test (test.jsonl)", "1 hidden", ".a/train.jsonl", "dataset_infos.json")
    )
    corpus.local_files(
        schema.load(recipe_file(data={"corpus": str(filled(tmp_path / "plain", ["a.jsonl", "b.txt"]))}))
    )
    assert capsys.readouterr().err == ""


def test_files_that_are_named_are_read(read, tmp_path):
    folder = filled(tmp_path / "folder", [".hidden.jsonl", "test.jsonl", "train.jsonl", ".dir/a.jsonl"])
    assert [text for _, text in read([folder / ".hidden.jsonl", folder / "test.jsonl"])] == [
        ".hidden.jsonl",
        "test.jsonl",
    ]
    assert [text for _, text in read(folder / ".dir")] == [".dir/a.jsonl"]


def test_several_splits(read, tmp_path):
    folder = filled(tmp_path / "folder", LAYOUTS["files"])
    assert [text for _, text in read(folder, "train+test")] == ["test.jsonl", "train.jsonl"]


def test_a_readme_says_which_files(read, tmp_path):
    folder = filled(tmp_path / "folder", ["one.jsonl", "two.jsonl"])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path:"
        " two.jsonl\n---\nText.\n"
    )
    assert [text for _, text in read(folder)] == ["two.jsonl"]
    (folder / "README.md").write_text("No header.\n")
    assert [text for _, text in read(folder)] == ["one.jsonl", "two.jsonl"]


# -- names of files and documents ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, shown",
    [
        (b"caf\xe9.jsonl", r"caf\xe9.jsonl"),
        (b"a\x1b[2J.jsonl", r"a\x1b[2J.jsonl"),
        (b"a\nb.jsonl", r"a\nb.jsonl"),
        ("ü.jsonl".encode(), "ü.jsonl"),
    ],
)
def test_odd_file_names(recipe_file, tmp_path, tiny_text, name, shown):
    (tmp_path / "c").mkdir()
    path = os.path.join(os.fsencode(tmp_path / "c"), name)
    shutil.copy(write_jsonl(tmp_path / "plain.jsonl", tiny_text), path)
    for number in (1, 2):
        code, _, err = run_main(
            "prepare",
            recipe_file(data={"corpus": str(tmp_path / "c")}),
            "short",
            "--out",
            tmp_path / "out",
            "--workers",
            number,
        )
        assert code == 0 and "Traceback" not in err
    folder = tmp_path / "out/small/short/shards"
    manifest = shards.read_manifest(folder)
    assert manifest["corpus_files"][0][0] == shown
    names = {one for row in shards.rows(folder, manifest) for one in row["document_ids"]}
    assert f"{shown}#0" in names and all(one.isprintable() for one in names)


def test_a_name_that_is_no_utf8_on_the_command_line(recipe_file, tmp_path):
    recipe, out = recipe_file(), os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    code, told, err = run_main("prepare", recipe, "short", "--out", out)
    assert (code, told) == (2, "") and err.count("\n") == 1 and "no UTF-8" in err and not os.path.exists(out)


def test_one_name_in_two_folders(read, tmp_path):
    folder = filled(tmp_path / "c", ["de/part-0.jsonl", "en/part-0.jsonl", "en/x/one.jsonl", "other.jsonl"])
    assert [name for name, _ in read(folder)] == [
        "de/part-0.jsonl#0",
        "en/part-0.jsonl#0",
        "one.jsonl#0",
        "other.jsonl#0",
    ]
    # Also where the folders are named one by one, and where it takes several levels to tell them apart.
    assert [name for name, _ in read([folder / "de", folder / "en" / "part-0.jsonl"])] == [
        "de/part-0.jsonl#0",
        "en/part-0.jsonl#0",
    ]
    deep = filled(tmp_path / "deep", ["a/x/p.jsonl", "b/x/p.jsonl", "b/p.jsonl"])
    names = [name for name, _ in read(deep)]
    assert len(set(names)) == 3 and names[0] == "a/x/p.jsonl#0"


def test_document_ids_without_folders_would_be_equal(read, tmp_path, monkeypatch):
    folder = filled(tmp_path / "c", ["de/part-0.jsonl", "en/part-0.jsonl"])
    monkeypatch.setattr(
        corpus,
        "_told_apart",
        lambda found: [corpus.File(file.path, file.index, file.inside, file.path.name) for file in found],
    )
    assert len({name for name, _ in read(folder)}) == 1


# -- the mark of UTF-8 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pack",
    [
        lambda data: (data, ""),
        lambda data: (gzip.compress(data), ".gz"),
        lambda data: (zstandard.compress(data), ".zst"),
    ],
    ids=["plain", "gz", "zst"],
)
def test_a_mark_of_utf8_is_no_text(read, tmp_path, pack):
    for name, text in (
        ("a.txt", f"one {BOM}two"),
        ("b.jsonl", json.dumps({"text": f"three {BOM}four"}, ensure_ascii=False) + "\n"),
    ):
        data, suffix = pack((BOM + text).encode())
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / f"{name}{suffix}").write_bytes(data)
    assert [text for _, text in read(tmp_path / "c")] == [f"one {BOM}two", f"three {BOM}four"]
    data, suffix = pack((BOM + BOM + "x").encode())  # the first alone is a mark
    (tmp_path / f"d.txt{suffix}").write_bytes(data)
    assert [text for _, text in read(tmp_path / f"d.txt{suffix}")] == [BOM + "x"]


def test_a_mark_of_utf8_in_settings_and_recipes(recipe_file, tmp_path):
    path = recipe_file()
    plain = schema.load(path)
    path.write_bytes(BOM.encode() + path.read_bytes())
    assert schema.load(path) == plain
    (tmp_path / "z.json").write_text(BOM + "{}")
    assert settings_file.read(tmp_path / "z.json") == "{}"


# -- a corpus that changes -----------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.fixture
def two_files(tmp_path, tiny_text):
    for name, texts in (("a.jsonl", tiny_text[:20]), ("d/b.jsonl", tiny_text[20:])):
        (tmp_path / "c/d").mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "c" / name, texts)
    return tmp_path / "c"


def swapped(path: Path, number: int) -> None:
    """Two neighbouring documents of a file change places: its size stays."""
    lines = path.read_text().splitlines(keepends=True)
    lines[number], lines[number + 1] = lines[number + 1], lines[number]
    path.write_text("".join(lines))


CHANGES = {
    "other text of the same length": (
        lambda c: swapped(c / "a.jsonl", 0),
        "a.jsonl holds other text of the same length",
    ),
    "a document more": (lambda c: (c / "a.jsonl").open("a").write('{"text": "more"}\n'), "a.jsonl has"),
    "a file more": (lambda c: write_jsonl(c / "A.jsonl", ["new"]), "A.jsonl is new"),
    "a file less": (lambda c: (c / "d/b.jsonl").unlink(), "d/b.jsonl is missing"),
    "a file in another folder": (
        lambda c: (c / "d").rename(c / "e"),
        "d/b.jsonl is missing, e/b.jsonl is new",
    ),
}


@pytest.fixture
def killed(recipe_file, two_files, tmp_path, monkeypatch):
    """(recipe, arguments of prepare): killed when the fourth shard is to be written, out of 16."""
    recipe, arguments = (
        recipe_file(data={"corpus": str(two_files), "rows_per_shard": 4}),
        ("short", "--out", tmp_path / "out", "--workers", 1),
    )
    write, calls = storage.write_atomically, itertools.count()

    def dying(path, data):
        if path.name == "shard-00003.parquet" and next(calls) == 0:
            raise Killed
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomically", dying)
        with pytest.raises(Killed):
            run_main("prepare", recipe, *arguments)
    return recipe, arguments


@pytest.mark.parametrize("case", CHANGES)
def test_going_on_with_another_corpus_is_refused(killed, two_files, case):
    recipe, arguments = killed
    change, telling = CHANGES[case]
    change(two_files)
    code, told, err = run_main("prepare", recipe, *arguments)
    last = err.splitlines()[-1]
    assert (
        (code, told) == (2, "")
        and "the corpus changed since the preparation in" in last
        and telling in last
        and "delete the folder" in last
    )


def test_without_the_check_documents_come_twice(killed, two_files, monkeypatch, tmp_path):
    recipe, arguments = killed
    lines = (two_files / "a.jsonl").read_text().splitlines(keepends=True)
    (two_files / "a.jsonl").write_text("".join(lines[-1:] + lines[:-1]))
    monkeypatch.setattr(parts, "changed", lambda *arguments: "")
    assert run_main("prepare", recipe, *arguments)[0] == 0
    folder = tmp_path / "out/small/short/shards"
    rows = [row["input_ids"] for row in shards.rows(folder, shards.read_manifest(folder))]
    assert run_main("prepare", recipe, "short", "--out", tmp_path / "other", "--workers", 1)[0] == 0
    other = tmp_path / "other/small/short/shards"
    assert rows != [row["input_ids"] for row in shards.rows(other, shards.read_manifest(other))]


def test_what_was_not_read_may_be_other_text(killed, two_files, tmp_path):
    """Of the same size; what was not yet read is read as it is now."""
    recipe, arguments = killed
    swapped(two_files / "d/b.jsonl", 3)
    assert run_main("prepare", recipe, *arguments)[0] == 0
    manifest = shards.read_manifest(tmp_path / "out/small/short/shards")
    assert [record[0] for record in manifest["corpus_files"]] == ["a.jsonl", "d/b.jsonl"] and manifest[
        "corpus_files"
    ][0][2] > 0


@pytest.mark.parametrize("case", CHANGES)
def test_a_finished_folder_is_not_of_another_corpus(recipe_file, two_files, tmp_path, case):
    recipe, arguments = (
        recipe_file(data={"corpus": str(two_files)}),
        ("short", "--out", tmp_path / "out", "--workers", 1),
    )
    assert run_main("prepare", recipe, *arguments)[0] == 0
    assert run_main("prepare", recipe, *arguments)[0] == 0
    moved = two_files.rename(tmp_path / "elsewhere")
    moved.rename(two_files)
    assert run_main("prepare", recipe, *arguments)[0] == 0
    change, telling = CHANGES[case]
    change(two_files)
    code, told, err = run_main("prepare", recipe, *arguments)
    assert (code, told) == (2, "") and "the corpus changed since" in err and telling in err


@pytest.mark.parametrize("when", ["between the parts", "before they are joined", "never"])
def test_parts_agree_on_the_corpus(recipe_file, tmp_path, tiny_text, when):
    """One file, read by both parts."""
    recipe, arguments = recipe_file(), ("short", "--out", tmp_path / "out", "--workers", 1)
    assert run_main("prepare", recipe, *arguments, "--part", "1/2")[0] == 0
    if when == "between the parts":
        swapped(tmp_path / "corpus.jsonl", 0)
    assert run_main("prepare", recipe, *arguments, "--part", "2/2")[0] == 0
    if when == "before they are joined":
        swapped(tmp_path / "corpus.jsonl", 0)
    code, _, err = run_main("prepare", recipe, *arguments)
    assert code == (0 if when == "never" else 2) and (when == "never" or "the corpus changed" in err)


def test_the_record_does_not_depend_on_workers(recipe_file, two_files, tmp_path):
    recipe, records = recipe_file(data={"corpus": str(two_files), "rows_per_shard": 4}), []
    for workers in (1, 2):
        assert (
            run_main("prepare", recipe, "short", "--out", tmp_path / f"o{workers}", "--workers", workers)[0]
            == 0
        )
        records.append(shards.read_manifest(tmp_path / f"o{workers}/small/short/shards")["corpus_files"])
    assert records[0] == records[1]


# -- tokens without an embedding -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def more_tokens(base, tmp_path_factory):
    """The base with two tokens for which the model has no embedding."""
    folder = tmp_path_factory.mktemp("more") / "base"
    shutil.copytree(base, folder)
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"] += [
        {
            "id": 896 + number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, text in enumerate(["<pad>", "<|eot_id|>"])
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    return folder


@pytest.fixture
def more(recipe_file, more_tokens, tmp_path, tiny_text):
    def make(text="", **sections):
        path = write_jsonl(tmp_path / "more.jsonl", [*tiny_text[:4], tiny_text[4] + text, *tiny_text[5:]])
        return recipe_file(
            model={"name_or_path": str(more_tokens)},
            data={"corpus": str(path), **sections.pop("data", {})},
            **sections,
        )

    return make


@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_with_a_token_without_an_embedding(more, tmp_path, workers):
    code, told, err = run_main(
        "prepare", more(" before <pad> after"), "short", "--out", tmp_path / "out", "--workers", workers
    )
    assert (code, told) == (2, "") and all(
        part in err for part in ("more.jsonl#4 holds the token '<pad>' (896)", "0 to 895", "take it out")
    )
    assert not list(tmp_path.glob("out/**/*.parquet")) and not list(tmp_path.glob("out/**/*.json"))


@pytest.mark.parametrize("prompt", ["EP_2", "This is the <pad> end"])
def test_an_end_prompt_with_a_token_without_an_embedding(more, tmp_path, prompt):
    recipe = more(data={"end_prompts": [prompt]})
    code, told, err = run_main("prepare", recipe, "endprompt", "--out", tmp_path / "out", "--workers", 1)
    assert (
        (code, told) == (2, "")
        and "method_options.end_prompts" in err
        and "the model has embeddings for 0 to 895 alone" in err
    )
    assert (
        run_main("prepare", recipe, "short", "--out", tmp_path / "out", "--workers", 1)[0] == 0
    )  # which has no end prompts


def test_tokens_that_no_text_holds_do_no_harm_and_old_shards_are_refused(more, tmp_path, monkeypatch):
    clean, out = more(), tmp_path / "out"
    assert run_main("prepare", clean, "short", "--out", out, "--workers", 1)[0] == 0
    experiment = Experiment.of(schema.load(clean), "short", out)
    folder = experiment.run / "shards"
    assert experiment.base.config.vocab_size == 896 and len(dataset.load_rows(experiment, True)[0]) == 64
    # As they were made before: without the check.
    shutil.rmtree(out)
    recipe = schema.load(more(" before <pad> after"))
    experiment, wider = (Experiment.of(recipe, "short", out) for _ in range(2))
    monkeypatch.setattr(model, "check_ids", lambda *arguments: None)
    manifest = prepare.prepare(experiment, folder, 1, {})
    assert any(896 in row["input_ids"] for row in shards.rows(folder, manifest))
    wider.base.config.vocab_size = 900  # a model with more embeddings
    assert len(dataset.load_rows(wider, True)[0]) == 64
    with pytest.raises(
        BadInput, match=r"row \d+: it has the token id 896, and the model has embeddings for 0 to 895 alone"
    ):
        dataset.load_rows(experiment, True)


def test_evaluate_refuses_them_in_a_line(more, more_tokens, tmp_path, tiny_text, monkeypatch):
    held = write_jsonl(
        tmp_path / "held.jsonl", [" ".join(tiny_text[:2]) + " <pad> " + " ".join(tiny_text[2:4])]
    )
    evaluation = {
        "tasks": ["perplexity"],
        "lengths": [64],
        "perplexity_corpus": str(held),
        "perplexity_tokens": 800,
        "perplexity_stride": 32,
    }
    code, _, err = run_main(
        "evaluate", more(eval=evaluation), "base", "--out", tmp_path / "out", "--model", more_tokens
    )
    assert code == 2 and "holds the token '<pad>' (896)" in err.splitlines()[-1] and "Traceback" not in err
    with monkeypatch.context() as patch:
        patch.setattr(model, "check_ids", lambda *arguments: None)
        with pytest.raises(IndexError):
            run_main(
                "evaluate", more(eval=evaluation), "base", "--out", tmp_path / "other", "--model", more_tokens
            )
    write_jsonl(held, [" ".join(tiny_text[:4])])
    assert (
        run_main(
            "evaluate", more(eval=evaluation), "base", "--out", tmp_path / "out", "--model", more_tokens
        )[0]
        == 0
    )


def test_held_out_text_of_a_folder_with_splits(recipe_file, tmp_path, tiny_text):
    from endprompt.evaluation import perplexity

    class Words:
        def __call__(self, text, **options):
            ends = list(itertools.accumulate(len(word) + 1 for word in text.split(" ")))
            return {"offset_mapping": [(0, end - 1) for end in ends]}

    for name, number in (("train", 0), ("test", 1)):
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / f"{name}.txt").write_text(BOM + tiny_text[number])
    found = perplexity.held_out(str(tmp_path / "c"), Words(), 10, 5, 5)
    assert [text.text for text in found] == [tiny_text[1]]
