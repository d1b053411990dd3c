"""Reading documents: every kind and packing gives the same ones, and what cannot be read is named."""

import gzip
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from endprompt import BadInput
from endprompt.recipe import schema
from endprompt.rows import corpus

TEXTS = [
    "First.\nIt has two lines.",
    "Zwölf Boxkämpfer \u2028 \u0085 jagen 🙂.",
    "  \n ",
    "",
    '{"not": "json"}',
    "last",
]
KEPT = [text for text in TEXTS if text.strip()]


def jsonl(texts, column="text"):
    return "".join(json.dumps({"n": 1, column: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def parquet(path, texts, column="text", **options):
    pq.write_table(pa.table({"n": list(range(len(texts))), column: texts}), path, **options)
    return path


PACKINGS = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.fixture
def read(recipe_file):
    """read(corpus, column="text") -> [(document id, text), ...]"""

    def documents(where, column="text", split="train"):
        where = [str(item) for item in where] if isinstance(where, list) else str(where)
        recipe = schema.load(recipe_file(data={"corpus": where, "text_column": column, "split": split}))
        return list(corpus.documents(recipe, corpus.local_files(recipe)))

    return documents


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_jsonl(read, tmp_path, suffix, packing):
    path = tmp_path / f"some.text{suffix}{packing}"
    path.write_bytes(PACKINGS[packing](jsonl(TEXTS)))
    assert read(path) == [(f"{path.name}#{TEXTS.index(text)}", text) for text in KEPT]


@pytest.mark.parametrize("packing", PACKINGS)
def test_txt_is_one_document(read, tmp_path, packing):
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACKINGS[packing]("\n".join(TEXTS).encode()))
    assert read(path) == [(f"{path.name}#0", "\n".join(TEXTS))]


def test_parquet(read, tmp_path):
    path = parquet(tmp_path / "a.parquet", TEXTS * 200, "body", row_group_size=300)
    assert [text for _, text in read(path, "body")] == KEPT * 200
    assert read(path, "body")[-1][0] == f"a.parquet#{200 * len(TEXTS) - 1}"


def test_blank_lines_and_documents_are_passed_over(read, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n\n" + jsonl(["", "one"]) + b"   \n" + jsonl(["\t", "two"])[:-1])
    assert [text for _, text in read(path)] == ["one", "two"]
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n")
    assert read(blank) == []


@pytest.fixture
def folder(tmp_path):
    """Files that sort as their texts say, and others to be left alone."""
    root = tmp_path / "folder"
    (root / "c").mkdir(parents=True)
    (root / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(["3", "4"])))
    (root / "a.jsonl").write_bytes(jsonl(["1", "2"]))
    (root / "c" / "a.txt").write_text("5")
    parquet(root / "d.parquet", ["6"])
    (root / "e.json.zst").write_bytes(zstandard.compress(jsonl(["7"])))
    for other in ("README.md", "a.jsonl.bz2", "d.parquet.gz", "noname"):
        (root / other).write_bytes(b"\xff")
    return root


def test_folder_is_read_in_sorted_order(read, folder):
    assert [text for _, text in read(folder)] == list("1234567")


def test_files_and_lists_are_read_as_given(read, folder):
    assert [text for _, text in read(folder / "b.jsonl.gz")] == ["3", "4"]
    assert [text for _, text in read([folder / "d.parquet", folder / "a.jsonl", folder / "c"])] == list(
        "6125"
    )


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a.jsonl", ".jsonl"),
        ("a.json", ".jsonl"),
        ("a.json.zst", ".jsonl"),
        ("a.b.txt.gz", ".txt"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.csv", None),
        ("jsonl", None),
        ("a.jsonl.bz2", None),
    ],
)
def test_kind(tmp_path, name, kind):
    assert corpus.kind(tmp_path / name) == kind


def test_zst_of_several_frames(read, tmp_path):
    lines = [jsonl([f"document {number} {'x' * 30000}"]) for number in range(12)]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(b"".join(lines[start : start + 4])) for start in (0, 4, 8)))
    assert [text.split()[1] for _, text in read(path)] == [str(number) for number in range(12)]


def state(folder):
    return {
        path: (path.lstat().st_mtime_ns, path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


def test_links_to_files_are_read(read, folder, tmp_path):
    """The hub's cache is made of them."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for number, path in enumerate(
        sorted(path for path in folder.rglob("*") if path.is_file() and corpus.kind(path))
    ):
        (linked / f"{number}{''.join(path.suffixes)}").symlink_to(path)
    assert sorted(text for _, text in read(linked)) == list("1234567")
    assert [text for _, text in read(linked / "0.jsonl")] == ["1", "2"]
    (tmp_path / "folder_by_link").symlink_to(folder)
    assert [text for _, text in read(tmp_path / "folder_by_link")] == list("1234567")


def test_reading_leaves_the_corpus_as_it_is(read, folder):
    before = state(folder)
    read(folder)
    assert state(folder) == before


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.parquet"])
def test_a_document_of_just_the_greatest_length_is_read(read, tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpus, "LONGEST", 5000)
    monkeypatch.setattr(corpus, "PIECE", 777)
    path, text = (
        tmp_path / name,
        "ä" * (5000 if corpus.kind(tmp_path / name) in (".txt", ".parquet") else 4988 - 3),
    )
    if name == "a.parquet":
        parquet(path, [text])
    else:
        data = (
            text.encode()
            if name == "a.txt"
            else json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
        )
        path.write_bytes(PACKINGS[path.suffix if path.suffix in PACKINGS else ""](data))
    assert [found for _, found in read(path)] == [text]
    path.unlink()
    longer = text + "ä" * 20
    if name == "a.parquet":
        parquet(path, [longer])
    else:
        data = (
            longer.encode()
            if name == "a.txt"
            else json.dumps({"text": longer}, ensure_ascii=False).encode() + b"\n"
        )
        path.write_bytes(PACKINGS[path.suffix if path.suffix in PACKINGS else ""](data))
    with pytest.raises(BadInput, match="longer than 5000 characters"):
        read(path)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_cut_short_is_not_taken_for_a_whole_one(read, tmp_path, packing):
    # Noise, so that there are several blocks; cut at every place where zstandard's own reader would just
    # stop.
    texts = [random.Random(number).randbytes(40000).hex() for number in range(8)]
    whole = PACKINGS[packing](jsonl(texts))
    path = tmp_path / f"a.jsonl{packing}"
    for keep in (len(whole) // 2, len(whole) - 1, 20):
        path.write_bytes(whole[:keep])
        with pytest.raises(BadInput, match=f"a.jsonl{packing}"):
            read(path)
    path.write_bytes(whole)
    assert [text for _, text in read(path)] == texts


def test_what_is_of_no_known_kind_is_named(read, tmp_path, capsys):
    """Data under names that nothing here reads; what is no data by its name is not spoken of."""
    tmp_path /= "corpus"
    tmp_path.mkdir()
    for name in ("part-0.jsonl", "part-1.JSONL", "part-2.ndjson", "part-3.jsonl.bz2", "deep/part-4.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl(["Some text."]))
    for name in ("README.md", "make.py", "LICENSE"):
        (tmp_path / name).write_text("About it.")
    assert [name for name, _ in read(tmp_path)] == ["part-0.jsonl#0"]
    err = capsys.readouterr().err
    assert "not read: 4 of no known kind (deep/part-4.csv, ...)" in err and "README" not in err


def test_a_folder_that_cannot_be_read(read, tmp_path):
    tmp_path /= "corpus"
    tmp_path.mkdir()
    (tmp_path / "a.jsonl").write_bytes(jsonl(["Some text."]))
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "b.jsonl").write_bytes(jsonl(["More text."]))
    assert len(read(tmp_path)) == 2

    def scandir(path, real=os.scandir):
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(BadInput, match=f"data.corpus: {locked} cannot be read .Permission denied"):
            read(tmp_path)


def test_text_longer_than_any_buffer(read, tmp_path):
    text = "".join(random.Random(1).choices("abcdefgh ä\n", k=1_500_000)) + "."
    for packing, pack in PACKINGS.items():
        path = tmp_path / f"long.txt{packing}"
        path.write_bytes(pack(text.encode()))
        assert [found for _, found in read(path)] == [text]


class Hub:
    """Stands in for datasets.load_dataset, and notes how it was called."""

    def __init__(self, rows=(), error=None, after=None):
        self.rows, self.error, self.after, self.calls = rows, error, after, []

    def __call__(self, path, **options):
        self.calls.append((path, options))
        if self.error:
            raise self.error
        return self.stream()

    def stream(self):
        yield from self.rows
        if self.after:
            raise self.after


@pytest.mark.parametrize("where", ["some-user/Some.set_6B", ["some-user/Some.set_6B"]])
def test_hub_id_is_streamed(read, monkeypatch, where):
    hub = Hub([{"body": "one"}, {"body": " "}, {"body": "three"}])
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert read(where, "body", "validation") == [
        ("some-user/Some.set_6B#0", "one"),
        ("some-user/Some.set_6B#2", "three"),
    ]
    assert hub.calls == [("some-user/Some.set_6B", {"split": "validation", "streaming": True})]


def test_a_commit_of_the_hub_is_asked_for(recipe_file, monkeypatch):
    hub = Hub([{"text": "one"}])
    monkeypatch.setattr(datasets, "load_dataset", hub)
    recipe = schema.load(recipe_file(data={"corpus": "a/b"}))
    assert len(list(corpus.documents(recipe, None, commit="0123abc"))) == 1
    assert hub.calls == [("a/b", {"split": "train", "streaming": True, "revision": "0123abc"})]


def test_which_commit_the_hub_has(recipe_file, monkeypatch, capsys):
    recipe = schema.load(recipe_file(data={"corpus": ["a/b"]}))
    info = lambda self, name: SimpleNamespace(sha=f"commit of {name}")  # noqa: E731
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    assert corpus.revision(recipe) == "commit of a/b" and capsys.readouterr().err == ""

    def down(self, name):
        raise TimeoutError("no answer\nwithin 10 s")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", down)
    assert corpus.revision(recipe) is None and capsys.readouterr().err == ""


def test_hub_is_not_asked_before_it_is_read(recipe_file, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub)
    recipe = schema.load(recipe_file(data={"corpus": "wikitext"}))
    assert corpus.local_files(recipe) is None
    corpus.documents(recipe, None)
    assert hub.calls == []


@pytest.mark.parametrize(
    "hub, telling",
    [
        (
            Hub(error=FileNotFoundError("Dataset 'a/b' doesn't exist on the Hub\nsecond line")),
            "FileNotFoundError: Dataset 'a/b' doesn't exist",
        ),
        (Hub(error=ConnectionError("no route")), "ConnectionError: no route"),
        (Hub(error=ValueError("Bad split: train. Available splits: ['test']")), "Available splits"),
        (Hub(error=RuntimeError()), "RuntimeError"),
        (Hub(error=StopIteration()), "'a/b' is no local path and cannot be streamed from the hub"),
        (Hub([{"text": "fine"}], after=OSError("lost while streaming")), "behind row 0 (OSError: lost while"),
        (Hub([{"text": "fine"}] * 3, after=EOFError("Compressed file ended")), "behind row 2 (EOFError: Com"),
        (Hub([{"text": "fine"}], after=TimeoutError()), "behind row 0 (TimeoutError); the same command goes"),
        (Hub([{"content": "x", "id": 1}]), "a/b row 0 has no 'text'; it has content, id"),
        (Hub([{"text": "fine"}, {"text": None}]), "a/b row 1: 'text' is NoneType"),
    ],
)
def test_hub_errors(read, monkeypatch, hub, telling):
    monkeypatch.setattr(datasets, "load_dataset", hub)
    with pytest.raises(BadInput) as caught:
        read("a/b")
    assert telling in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "where",
    [
        "no/such/folder",
        "/no/such",
        "./name",
        "name.jsonl",
        "user/name.parquet",
        "",
        "a b",
        ["a/b", "c/d"],
        [],
    ],
)
def test_what_can_be_no_hub_id(read, monkeypatch, where):
    monkeypatch.setattr(datasets, "load_dataset", Hub(error=AssertionError("the hub was asked")))
    with pytest.raises(BadInput, match="data.corpus"):
        read(where)
