"""The golden values of tests/golden.json: shards are still those, and a difference is seen."""

import json

import golden
import pytest

GOLD = {
    "shards/a/x.parquet": "1f",
    "training/a/train.json/history/0/loss": 4.5,
    "training/a/model/model.safetensors": "2f",
    "evaluation/a/passkey/256.jsonl/0/pred": "17",
    "evaluation/a/passkey/256.json/scores/samples": 4,
}


SEED = "data.seed=1"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict:
    """{setting, or none: values of shards} of commands in one process, whose start is what takes time."""
    work = tmp_path_factory.mktemp("golden")
    runs = {None: golden.Runs(work / "same", []), SEED: golden.Runs(work / "seed", [SEED])}
    names = {None: ["short", "endprompt_pose", "pose_matched"], SEED: ["endprompt_pose"]}
    todo = [command for key, run in runs.items() for command in run.preparing(names[key])]
    golden.run("-c", golden.COMMANDS, json.dumps(todo))
    for key, run in runs.items():
        for name in names[key]:
            run.read_shards(name)
    return {key: run.values for key, run in runs.items()}


@pytest.fixture
def at_hand(prepared, monkeypatch):
    """Compares with what is prepared already."""
    monkeypatch.setattr(golden, "collect", lambda *asked: prepared[(asked[-1] or [None])[0]])


def test_shards_are_the_golden_ones(at_hand, capsys):
    assert golden.main(["compare", "--only", "shards", "--methods", "short,endprompt_pose,pose_matched"]) == 0
    equal = int(capsys.readouterr().out.splitlines()[-1].removesuffix(" values are equal, 0 differ"))
    assert equal > 100


def test_another_seed_is_a_difference(at_hand, capsys):
    given = ["compare", "--only", "shards", "--methods", "endprompt_pose", "--set", SEED]
    assert golden.main(given) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "shards/endprompt_pose/manifest.json/seed: 0 became 1" in lines
    assert any(line.startswith("shards/endprompt_pose/shard-00000.parquet: ") for line in lines)


@pytest.mark.parametrize("key", GOLD)
def test_on_one_machine_every_change_is_a_difference(key):
    assert golden.differences(GOLD, dict(GOLD)) == ([], len(GOLD))
    changed = GOLD | {key: GOLD[key] + 1e-9 if isinstance(GOLD[key], float) else GOLD[key] * 2}
    assert golden.differences(GOLD, changed)[0] == [f"{key}: {GOLD[key]!r} became {changed[key]!r}"]


def test_missing_and_new_values_are_differences():
    less = {key: value for key, value in GOLD.items() if "loss" not in key}
    assert golden.differences(GOLD, less)[0] == ["training/a/train.json/history/0/loss: 4.5 is missing"]
    assert golden.differences(less, GOLD)[0] == ["training/a/train.json/history/0/loss: 4.5 is new"]


def test_on_another_machine_last_bits_do_not_count_and_the_rest_does():
    bits = GOLD | {
        "training/a/train.json/history/0/loss": 4.5005,
        "training/a/model/model.safetensors": "3f",
        "evaluation/a/passkey/256.jsonl/0/pred": "18",
    }
    assert golden.differences(GOLD, bits, bits=False) == ([], 3)
    more = {
        "shards/a/x.parquet": "2f",
        "training/a/train.json/history/0/loss": 4.6,
        "evaluation/a/passkey/256.json/scores/samples": 5,
    }
    assert len(golden.differences(GOLD, GOLD | more, bits=False)[0]) == 3


def test_outputs_of_before_are_refused(tmp_path, capsys):
    (tmp_path / "old").touch()
    assert golden.main(["compare", "--work", str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_dates_and_versions_are_left_out_and_lists_are_leaves():
    value = {"date": "today", "versions": {"torch": "2"}, "rows": [{"ids": [1, 2]}], "tokens_per_second": 3}
    assert golden.flat(value, "m") == {"m/rows/0/ids": [1, 2]}
