"""The comparison over seeds: known means and intervals, what is refused, and the script that runs it."""

import json
import os
import shutil
import subprocess
import sys

import matplotlib.axes
import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image
from test_eval import cells, passkey_scores, run_compare, write_result

from endprompt import BadInput, methods
from endprompt.evaluation import figures, intervals
from endprompt.reports import compare


def test_options_by_their_former_keys_are_the_same_setting(tmp_path):
    """An earlier recipe.yaml named the options of all methods; a key that came after has its default."""
    former, now = tmp_path / "former/pose", tmp_path / "now/pose"
    setting(former, 0, pose_chunks=3, end_prompts=["EP_2"], recall_share=0.5)
    setting(now, 0)
    path = now / "recipe.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["train"]["deepspeed"] = "/clone/zero3.json"
    path.write_text(yaml.safe_dump({**tree, "method_options": {"pose": {"pose_chunks": 3}}}))
    found = compare.run_setting(former / "recipe.yaml")
    assert found == compare.run_setting(path) and found[1]["method_options"]["pose_chunks"] == 3
    setting(now, 0)
    assert compare.run_setting(path) != found


def test_over_seeds():
    """Three seeds 0.4, 0.5, 0.6: mean 0.5, s = 0.1, t = 4.30265, half width 0.248414."""
    cell = intervals.over_seeds([0.4, 0.5, 0.6], (0.0, 0.1), 0.0, 1.0)
    assert cell == {
        "mean": pytest.approx(0.5),
        "low": pytest.approx(0.251586, abs=1e-6),
        "high": pytest.approx(0.748414, abs=1e-6),
        "seeds": 3,
        "interval": "t",
    }
    cell = intervals.over_seeds([0.9, 1.0], (0.0, 0.1), 0.0, 1.0)
    assert cell == {
        "mean": pytest.approx(0.95),
        "low": pytest.approx(0.314690, abs=1e-6),
        "high": 1.0,
        "seeds": 2,
        "interval": "t",
    }
    for values in ([0.3], [0.3, 0.3, 0.3]):
        assert intervals.over_seeds(values, (0.1, 0.5)) == {
            "mean": pytest.approx(0.3),
            "low": 0.1,
            "high": 0.5,
            "seeds": len(values),
            "interval": "samples",
        }


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_interval_holds_the_mean(hits):
    cell = intervals.over_seeds([hit / 20 for hit in hits], intervals.wilson(hits[0], 20), 0.0, 1.0)
    assert 0 <= cell["low"] <= cell["mean"] + 1e-12 and cell["mean"] - 1e-12 <= cell["high"] <= 1


def setting(folder, seed, **data):
    folder.mkdir(parents=True, exist_ok=True)
    tree = {
        "recipe": "tiny",
        "method": folder.name,
        "model": {"name_or_path": "base"},
        "lengths": {"physical": 256, "target": 2048},
        "data": {"tokens": 1000, "seed": seed, **data},
        "rope": {"type": None},
        "train": {"deepspeed": f"/clone{seed}/zero3.json", "learning_rate": 0.001},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))


@pytest.fixture
def seeds(tmp_path):
    """Three seeds of endprompt with 8, 10 and 12 of 20 keys at 512; base with the first seed only; 1024 with
    one seed only.
    """
    folders = [tmp_path / f"runs/seed{seed}/tiny" for seed in range(3)]
    write_result(folders[0], "base", "passkey", 512, model="b", **passkey_scores(1))
    for seed, folder in enumerate(folders):
        write_result(folder, "endprompt", "passkey", 512, model=f"m{seed}", **passkey_scores(8 + 2 * seed))
        write_result(
            folder,
            "endprompt",
            "perplexity",
            512,
            model=f"m{seed}",
            score=3.0 + seed,
            nats=1.0,
            low=2.5,
            high=3.5,
        )
        write_result(folder, "short", "passkey", 512, model=f"s{seed}", **passkey_scores(0))
        (folder / "endprompt/train.json").write_text(
            json.dumps(
                {
                    "tokens": 1000,
                    "seconds": 10 + seed,
                    "final_text_loss": 2.0 + seed / 10,
                    "final_end_prompt_loss": None,
                }
            )
        )
        for method in ("endprompt", "short"):
            setting(folder / method, seed)
    write_result(folders[1], "short", "passkey", 1024, model="s1", **passkey_scores(3))
    return folders


def test_table_over_seeds(seeds):
    lines = compare.table(*seeds).splitlines()
    assert lines[-1] == compare.NOTE and lines[-2] == ""
    found = cells("\n".join(lines[:-2]))
    trained = {"trained tokens": "1,000", "train s": "11", "text loss": "2.100", "end-prompt loss": "-"}
    untrained = dict.fromkeys(trained, "-")
    assert found == {
        "base": {
            "passkey 512": "5% [1%, 24%] n=1",
            "passkey 1024": "not run",
            "perplexity 512": "not run",
            **untrained,
        },
        "short": {
            "passkey 512": "0% [0%, 16%] n=3",
            "passkey 1024": "15% [5%, 36%] n=1",
            "perplexity 512": "not run",
            **untrained,
        },
        "endprompt": {
            "passkey 512": "50% [25%, 75%] n=3",
            "passkey 1024": "not run",
            "perplexity 512": "4.00 [1.52, 6.48] n=3",
            **trained,
        },
    }


def test_order_of_the_folders_does_not_matter(seeds):
    assert compare.table(*seeds) == compare.table(*reversed(seeds))


def test_pool_adds_up_samples():
    def row(length, *found):
        return {
            "scores": {
                "length": length,
                "score": 0.0,
                "cells": [
                    {"depth": depth, "correct": correct, "total": total} for depth, correct, total in found
                ],
            }
        }

    pooled = figures.pool(
        [[row(512, (0.0, 1, 2), (1.0, 2, 2))], [row(512, (0.0, 2, 2)), row(256, (0.5, 1, 4))], []]
    )
    assert [result["scores"] for result in pooled] == [
        {
            "length": 256,
            "correct": 1,
            "total": 4,
            "score": 25.0,
            "cells": [{"depth": 0.5, "correct": 1, "total": 4}],
        },
        {
            "length": 512,
            "correct": 5,
            "total": 6,
            "score": pytest.approx(500 / 6),
            "cells": [{"depth": 0.0, "correct": 3, "total": 4}, {"depth": 1.0, "correct": 2, "total": 2}],
        },
    ]
    assert figures.pool([[], []]) == []


def test_comparison_over_seeds_writes_what_it_prints(seeds, monkeypatch, capsys):
    drawn = {}
    draw = matplotlib.axes.Axes.errorbar

    def errorbar(axis, across, means, bars, **options):
        drawn[options["label"]] = (means, bars)
        return draw(axis, across, means, bars, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", errorbar)
    code, out, err = run_compare(monkeypatch, capsys, *seeds, "--title", "three seeds")
    folder = seeds[0].parents[1] / "comparison-tiny"
    assert code == 0 and not err and compare.table(*seeds) in out
    assert {path.name for path in folder.iterdir()} == {
        "comparison.md",
        "comparison.json",
        "comparison.png",
        "comparison-lines.png",
    }
    assert (folder / "comparison.md").read_text() == compare.table(*seeds) + "\n"
    record = json.loads((folder / "comparison.json").read_text())
    assert (
        record["methods"]["endprompt"]["passkey"]["512"] | {"mean": 50.0, "seeds": 3}
        == record["methods"]["endprompt"]["passkey"]["512"]
    )
    assert record.keys() >= {"commit", "versions", "device", "date", "folders"}
    assert drawn["endprompt"][0] == [50.0] and drawn["endprompt"][1] == [
        [pytest.approx(24.8414, abs=1e-4)],
        [pytest.approx(24.8414, abs=1e-4)],
    ]
    assert drawn["short"][0] == [0.0, 15.0] and set(drawn) == {"base", "short", "endprompt"}
    for name in ("comparison.png", "comparison-lines.png"):
        assert image.imread(folder / name).std() > 0.05
    assert run_compare(monkeypatch, capsys, *seeds, "--out", seeds[0].parents[1] / "elsewhere")[0] == 0
    assert (seeds[0].parents[1] / "elsewhere/comparison.md").exists()


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (
            lambda folders: setting(folders[2] / "endprompt", 1),
            "both have data.seed 1; name one folder a seed",
        ),
        (
            lambda folders: setting(folders[2] / "endprompt", 2, tokens=2000),
            r"differ in more than the seed \(data\); compare runs of one setting",
        ),
        (
            lambda folders: setting(folders[2] / "endprompt", 2, prompt_loss_weight=1.0),
            r"differ in more than the seed \(method_options\); compare runs of one setting",
        ),
        (
            lambda folders: setting(folders[2] / "endprompt", 2, end_prompts=3),
            "recipe.yaml: method_options.end_prompts: Input should be a valid list",
        ),
        (
            lambda folders: (folders[2] / "endprompt/recipe.yaml").write_text("- 1\n"),
            "recipe.yaml is no recipe",
        ),
        (lambda folders: folders.append(folders[0]), "a folder is named twice"),
        (lambda folders: shutil.rmtree(folders[1]), "seed1/tiny holds no evaluated method"),
    ],
)
def test_folders_that_are_no_seeds_of_one_setting(seeds, monkeypatch, capsys, spoil, complaint):
    spoil(seeds)
    code, out, err = run_compare(monkeypatch, capsys, *seeds)
    assert code == 2 and not out and err.count("\n") == 1
    with pytest.raises(BadInput, match=complaint):
        compare.compare(seeds)


def test_different_questions_are_not_averaged(seeds):
    path = seeds[1] / "endprompt/eval/passkey/512.json"
    result = json.loads(path.read_text())
    result["question"]["samples"] = 7
    path.write_text(json.dumps(result))
    with pytest.raises(BadInput, match=r"were asked different questions \(passkey at 512: samples\)"):
        compare.check(seeds)


@pytest.mark.parametrize(
    "key, value", [("samples", 7), ("seed", 1), ("tokenizer", "another"), ("code", "another"), ("new", 3)]
)
def test_methods_that_were_asked_different_questions_are_not_told_apart(
    seeds, monkeypatch, capsys, key, value
):
    for folder in seeds:  # alike within a method
        path = folder / "short/eval/passkey/512.json"
        result = json.loads(path.read_text())
        result["question"][key] = value
        path.write_text(json.dumps(result))
    code, out, err = run_compare(monkeypatch, capsys, seeds[0])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"were asked different questions (passkey at 512: {key}); evaluate them alike" in err
    assert not (seeds[0] / "comparison.md").exists()
    with pytest.raises(BadInput, match="tiny/(short|base) and .*tiny/short were asked different questions"):
        compare.check(seeds)


def test_two_models_are_no_two_seeds_of_what_trains_nothing(seeds):
    """A method that is not trained leaves no recipe that could say how its models differ."""
    for seed, folder in enumerate(seeds):
        source = seeds[0] / "base/eval/passkey/512.json"
        file = json.loads(source.read_text())
        file["question"]["model"] = {"fingerprint": "f", "rope_parameters": {"factor": 1 + seed}}
        path = folder / "interpolation/eval/passkey/512.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(file))
    with pytest.raises(BadInput, match="interpolation .* are two models, and interpolation trains nothing"):
        compare.check(seeds)
    for folder in seeds:
        path = folder / "interpolation/eval/passkey/512.json"
        path.write_text((seeds[0] / "interpolation/eval/passkey/512.json").read_text())
    compare.check(seeds)


def test_a_copy_of_a_result_is_none(seeds):
    """What someone put aside does not stand in the place of what was scored."""
    before = compare.summary(seeds)
    path = seeds[0] / "short/eval/passkey/512.json"
    file = json.loads(path.read_text())
    file["scores"]["score"] = 99.0
    for name in ("512_old.json", "512 (1).json", "z512.json"):
        (path.parent / name).write_text(json.dumps(file))
    assert compare.summary(seeds) == before


def test_perplexity_of_other_words_is_not_compared(seeds):
    """What is scored is what fits behind the greatest length that was asked for in one call."""
    for length in (512, 2048):
        path = seeds[0] / f"endprompt/eval/perplexity/{length}.json"
        result = json.loads((seeds[0] / "endprompt/eval/perplexity/512.json").read_text())
        result["question"] |= {"longest": length, "data": str(length)}
        result["scores"]["length"] = length
        path.write_text(json.dumps(result))
    complaint = (
        r"perplexity is not of the same words everywhere: .*endprompt at 2048 \(greatest length 2048\).*"
        "score them with the same eval.lengths"
    )
    with pytest.raises(BadInput, match=complaint):
        compare.check(seeds[:1])
    result["question"] |= {"longest": 512, "data": "512", "words": "one"}
    path.write_text(json.dumps(result))
    compare.check(seeds[:1])  # the other was scored before the words were noted
    other = seeds[0] / "endprompt/eval/perplexity/512.json"
    before = json.loads(other.read_text())
    before["question"] |= {"longest": 512, "data": "512", "words": "two"}
    other.write_text(json.dumps(before))
    with pytest.raises(BadInput, match="perplexity is not of the same words everywhere"):
        compare.check(seeds[:1])


# The script


@pytest.fixture
def script(tmp_path):
    """Runs recipes/compare.sh with a Python that only notes what it is asked, asks the real one about the
    method table, and knows where runs are.
    """
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/bash\nif [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\ncase "$3" in gpus) echo 0;'
        ' exit;; path) [ "$5" = --out ] && echo "$6/tiny" || echo "$7/tiny/$5"; exit;; esac\necho "$*"'
        f' >>{tmp_path}/calls\ncase "$*" in *FAIL*) exit 1;; *WRONG*) exit 2;; *evaluate*) mkdir -p'
        ' "$OUT/tiny/$5/eval";;'
        " esac\n"
    )
    fake.chmod(0o755)

    def call(*arguments, **environment):
        done = subprocess.run(
            ["bash", str(REPOSITORY / "recipes/compare.sh"), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHON": str(fake), "OUT": "out", **environment},
        )
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done, calls

    return call


def test_script_runs_every_method_with_every_seed(script):
    done, calls = script(str(REPOSITORY / "recipes/tiny.yaml"), "--set", "data.tokens=9")
    assert done.returncode == 0, done.stderr
    asked = [call.split() for call in calls if call.startswith("-m endprompt ")]
    trained = [name for name, method in methods.METHODS.items() if method.trained]
    expected = [(name, seed) for seed in "012" for name in methods.METHODS if name in trained or seed == "0"]
    assert [
        (call[4], call[-1].removeprefix("data.seed=")) for call in asked if call[2] == "evaluate"
    ] == expected
    assert all(call[5:9] == ["--out", f"out/seed{call[-1][-1]}", "--set", "data.tokens=9"] for call in asked)
    assert (
        calls[-1]
        == "-m endprompt.reports.compare out/seed0/tiny out/seed1/tiny out/seed2/tiny --title tiny over seeds"
        " 0 1 2"
    )


def test_script_takes_methods_and_seeds(script):
    done, calls = script(METHODS="base", SEEDS="4 7", STAGES="evaluate")
    assert (
        done.returncode == 0
        and len(calls) == 2
        and calls[0].split()[4] == "base"
        and "data.seed=4" in calls[0]
    )
    assert calls[1] == "-m endprompt.reports.compare out/seed4/tiny --title tiny over seeds 4 7"


def test_script_stops_at_a_failure_and_shows_it(script):
    done, calls = script("--set", "FAIL", METHODS="short endprompt")
    assert done.returncode == 1 and len(calls) == 1 and "compare.sh: short with seed 0 failed" in done.stderr
    assert "the same command goes on from there" in done.stderr


def test_script_ends_with_2_on_bad_input(script):
    done, calls = script("--set", "WRONG", METHODS="short endprompt")
    assert done.returncode == 2 and len(calls) == 1 and "compare.sh: short with seed 0 failed" in done.stderr
    assert "goes on from there" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["./nowhere.yaml"], ["-h"], [str(REPOSITORY / "recipes/tiny.yaml"), "endprompt"]]
)
def test_script_says_how_it_is_called(script, arguments):
    done, calls = script(*arguments)
    assert done.returncode == 2 and "bash recipes/compare.sh [RECIPE]" in done.stderr and not calls
