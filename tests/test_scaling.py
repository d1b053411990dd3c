"""Laboratories at several targets and numbers of tokens, side by side: known numbers, and what is refused."""

import json
import re
import sys

import pytest
from conftest import REPOSITORY
from matplotlib import image
from test_findings import passkey_result, script  # noqa: F401 (a fixture)

from endprompt.recipe import schema
from endprompt.reports import laboratory, markdown, scaling

PICTURES = {"targets.png", "targets-multikey.png", "tokens.png", "tokens-multikey.png"}


def runs_of(folder, target, tokens, setting="plain", **found):
    """Runs of ``found`` {method: keys of ten that are found at ``target``} after ``tokens``, one seed."""
    recipe = folder / setting / "seed0/small"
    for method, keys in found.items():
        for task in ("passkey", "multikey"):
            passkey_result(recipe, method, 64, {0.0: 10}, task=task)
            passkey_result(recipe, method, target, {0.0: keys}, task=task)
        if method != "base":
            (recipe / method / "train.json").write_text(json.dumps({"tokens": tokens, "seconds": 1.0}))
    return folder


@pytest.fixture
def laboratories(tmp_path):
    """Three targets after 1000 tokens, two after 4000, and a method that was run once."""
    return [
        runs_of(tmp_path / "usual", 512, 1000, base=0, short=1, pose=6, endprompt=1),
        runs_of(tmp_path / "near", 128, 1000, base=2, short=5, pose=9),
        runs_of(tmp_path / "far", 1024, 1000, short=0, pose=2),
        runs_of(tmp_path / "more", 512, 4000, short=1, pose=8),
        runs_of(tmp_path / "more-near", 128, 4000, short=6),
    ]


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["scaling", *map(str, arguments)])
    try:
        scaling.main()
        code = 0
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def rows(table):
    """{(method, tokens): means by target}"""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert lines[0][:2] == ["method", "tokens"]
    return {
        (row[0].strip("`"), row[1]): dict(
            zip(lines[0][2:], (cell.split()[0] for cell in row[2:]), strict=True)
        )
        for row in lines[2:]
    }


def test_a_row_a_method_and_number_of_tokens(laboratories):
    tables = scaling.tables(scaling.entries(laboratories))
    assert rows(tables["scaling-passkey"]) == {
        ("base", "-"): {"128": "20", "512": "0", "1024": "-"},
        ("short", "1,000"): {"128": "50", "512": "10", "1024": "0"},
        ("short", "4,000"): {"128": "60", "512": "10", "1024": "-"},
        ("pose", "1,000"): {"128": "90", "512": "60", "1024": "20"},
        ("pose", "4,000"): {"128": "-", "512": "80", "1024": "-"},
    }
    # Over both lengths, 64 and the target.
    assert rows(tables["scaling-multikey-mean"])["pose", "1,000"] == {"128": "95", "512": "80", "1024": "60"}


def test_a_setting_is_a_row_of_its_own(laboratories, tmp_path):
    """Of a setting that was run at one target alone, nothing is said."""
    for folder, target, keys in (("usual", 512, 7), ("near", 128, 10)):
        runs_of(tmp_path / folder, target, 1000, "decay-4", pose=keys)
    runs_of(tmp_path / "far", 1024, 1000, "yarn", short=3)
    found = rows(scaling.tables(scaling.entries(laboratories))["scaling-passkey"])
    assert found["pose, decay-4", "1,000"] == {"128": "100", "512": "70", "1024": "-"}
    assert list(found)[-1] == ("pose, decay-4", "1,000") and not any("yarn" in name for name, _ in found)


def test_the_numbers_alone_give_the_same(laboratories, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- scaling-passkey -->\n<!-- /scaling-passkey -->\n")
    code, out, err = run(monkeypatch, capsys, *laboratories, "--out", tmp_path / "out", "--page", page)
    assert code == 0 and not err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scaling.json", *PICTURES}
    for name in PICTURES:
        assert image.imread(tmp_path / "out" / name).std() > 0.05
    assert rows("\n".join(page.read_text().splitlines()[1:-1]))["pose", "4,000"]["512"] == "80"

    before = (tmp_path / "out/scaling.json").read_bytes()
    first = {name: (tmp_path / "out" / name).read_bytes() for name in PICTURES}
    code, again, err = run(monkeypatch, capsys, tmp_path / "out/scaling.json", "--out", tmp_path / "out")
    assert code == 0 and not err and again.splitlines()[:-7] == out.splitlines()[:-8]
    assert (tmp_path / "out/scaling.json").read_bytes() == before
    assert {name: (tmp_path / "out" / name).read_bytes() for name in PICTURES} == first


def test_later_sources_stand_in_the_place_of_earlier_ones(laboratories, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, capsys, *laboratories, "--out", tmp_path / "out")[0] == 0
    newer = runs_of(tmp_path / "newer", 1024, 1000, pose=7)
    tables = scaling.tables(scaling.entries([tmp_path / "out/scaling.json", newer]))
    assert rows(tables["scaling-passkey"])["pose", "1,000"]["1024"] == "70"
    assert rows(tables["scaling-passkey"])["short", "1,000"]["1024"] == "0"


def test_nothing_is_drawn_of_one_target_and_number_of_tokens(laboratories, tmp_path, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, laboratories[0], "--out", tmp_path / "out")
    assert code == 0 and [path.name for path in (tmp_path / "out").iterdir()] == ["scaling.json"]
    assert not rows(re.search(r"<!-- scaling-passkey -->\n(.*?)\n<!-- /", out, re.S)[1])


@pytest.mark.parametrize("source", ["nothing", "empty", "broken", "hollow", "odd"])
def test_unusable_sources(tmp_path, monkeypatch, capsys, source):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").write_text("{")
    (tmp_path / "hollow").write_text('{"entries": [{"values": {}}]}')
    (tmp_path / "odd").write_text('{"entries": [{"values": {}, "method": "pose", "scores": []}]}')
    code, out, err = run(monkeypatch, capsys, tmp_path / source, "--out", tmp_path / "out")
    assert code == 2 and not out and err.startswith("scaling: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_page_without_a_place(laboratories, tmp_path, monkeypatch, capsys):
    (tmp_path / "page.md").write_text("nothing\n")
    code, out, err = run(
        monkeypatch, capsys, *laboratories, "--out", tmp_path / "out", "--page", tmp_path / "page.md"
    )
    assert code == 2 and not out and "it has no place for a table" in err and not (tmp_path / "out").exists()


def test_the_script_takes_another_corpus(script):  # noqa: F811
    done, calls = script("plain", SEEDS="0", METHODS="pose", CORPUS="more.jsonl.gz")
    assert done.returncode == 0, done.stderr
    for call in (call for call in calls if "evaluate" in call or "prepare" in call):
        assert "--set data.corpus=more.jsonl.gz" in call
    assert any("evaluate" in call for call in calls)
    schema.load(REPOSITORY / "recipes/tiny.yaml", ["data.corpus=more.jsonl.gz"])


def test_the_page_holds_the_committed_numbers():
    found = laboratory.read(REPOSITORY / "docs/findings/scaling.json")["entries"]
    page = REPOSITORY / "docs/findings.md"
    assert markdown.filled(page, scaling.tables(found)) == page.read_text()
