"""RULER samples that were made elsewhere: what is taken of them, and what is refused."""

import json

import pytest

from endprompt import BadInput
from endprompt.evaluation import ruler, ruler_package, ruler_samples


@pytest.fixture
def folder(tmp_path, base):
    """vt at 1024 for the tiny base's tokenizer, five samples, seed 42, as a cache file; made by hand, so that
    nothing of the package is asked.
    """
    from endprompt.rows.prepare import tokenizer_fingerprint

    question = {
        "task": "vt",
        "length": 1024,
        "format": ruler.FORMAT,
        "tokenizer": tokenizer_fingerprint(ruler.load_tokenizer(base)),
        "split_special_tokens": False,
        "samples": 5,
        "seed": 42,
        "generation": ruler_package.GENERATION,
        "words": "w",
        "sentences": "s",
        "python": "3.1",
        "versions": {"nltk": "0"},
    }
    rows = [
        {"index": number, "input": f"prompt {number}", "outputs": [f"{number}"], "length": 1000}
        for number in range(5)
    ]
    folder = tmp_path / "samples"
    folder.mkdir()
    ruler._write(
        folder / "vt-1024-5-0.jsonl",
        question,
        "".join(json.dumps(row) + "\n" for row in rows).encode(),
        [1000] * 5,
    )
    return folder


def test_the_first_so_many_are_taken_without_the_packages_data(folder, base, monkeypatch):
    monkeypatch.setattr(ruler_package, "generator", lambda: pytest.fail("the generator was asked"))
    found = ruler.dataset(
        "vt", tokenizer=str(base), max_seq_lengths=[1024], samples=3, ruler_samples=str(folder)
    )["test"]
    assert [row["input"] for row in found] == ["prompt 0", "prompt 1", "prompt 2"] and found[0][
        "max_length"
    ] == 1024
    path, question = ruler_samples.find(folder, "vt", 1024, ruler.Draw(5), ruler.load_tokenizer(base))
    assert path.parent == folder and ruler_samples.generator(question) == {
        "generation": ruler_package.GENERATION,
        "words": "w",
        "sentences": "s",
        "python": "3.1",
        "versions": {"nltk": "0"},
        "drawn": 5,
    }


@pytest.mark.parametrize(
    "asked, why",
    [
        ({"draw": ruler.Draw(6)}, "what is there has 5"),
        ({"draw": ruler.Draw(3, 1)}, "what is there differs in seed"),
        ({"length": 2048}, "at 2048 for this"),
        ({"task": "fwe"}, "no 3 samples of ruler_fwe"),
    ],
)
def test_what_is_not_there_is_refused_with_the_command_that_makes_it(folder, base, asked, why):
    wanted = {"task": "vt", "length": 1024, "draw": ruler.Draw(3), **asked}
    with pytest.raises(
        BadInput, match=f"eval.ruler_samples: .*{why}.*python -m endprompt.evaluation.ruler --cache FOLDER"
    ):
        ruler_samples.take(folder, tokenizer=ruler.load_tokenizer(base), **wanted)


def test_another_tokenizer_and_damage_are_refused(folder, base):
    loaded = ruler.load_tokenizer(base)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"prompt 4", b"prompt 5"))
    with pytest.raises(BadInput, match="is damaged"):
        ruler_samples.take(folder, "vt", 1024, ruler.Draw(3), loaded)
    head = json.loads(whole.split(b"\n")[0])
    head["question"]["tokenizer"] = "other"
    file.write_bytes(json.dumps(head).encode() + b"\n")
    with pytest.raises(BadInput, match="differs in tokenizer"):
        ruler_samples.take(folder, "vt", 1024, ruler.Draw(3), loaded)
    file.write_bytes(b"{")
    with pytest.raises(BadInput, match="holds no 3 samples"):
        ruler_samples.take(folder, "vt", 1024, ruler.Draw(3), loaded)


def test_scoring_needs_the_scorers_alone(monkeypatch):
    """Where the samples come from elsewhere, the package's data need not be there."""
    for function in (ruler_package.package, ruler_package.settings):
        function.cache_clear()
    monkeypatch.setitem(ruler_package.CHECKSUMS, "data/synthetic/json/hotpotqa.json", "0" * 64)
    assert ruler.score("vt", ["ABC"], [["abc", "def"]]) == [50.0]
    with pytest.raises(BadInput, match="hotpotqa.json is not the wheel's"):
        ruler_package.package()
    monkeypatch.setitem(ruler_package.CHECKSUMS, "synthetic.yaml", "0" * 64)
    for function in (ruler_package.package, ruler_package.settings):
        function.cache_clear()
    with pytest.raises(BadInput, match="synthetic.yaml is not the wheel's"):
        ruler.score("vt", ["ABC"], [["abc"]])
    for function in (ruler_package.package, ruler_package.settings):
        function.cache_clear()
