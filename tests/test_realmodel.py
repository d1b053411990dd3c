"""The script of the study of a real model (recipes/realmodel.sh), with a Python that only notes what it is
asked.
"""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from endprompt.methods import METHODS
from endprompt.recipe import schema

RECIPE = REPOSITORY / "recipes/smollm2-135m-64k-cpu.yaml"
FAKE = """#!/bin/bash
if [ "$1" = -c ]; then exec {python} "$@"; fi
case "$3" in
  gpus) echo 0; exit ;;
  path) echo "$7/smollm2/$5"; exit ;;
esac
echo "$*" >>{calls}
case "$*" in *"train "*"$FAIL"*) [ -z "$FAIL" ] || exit "${{CODE:-1}}" ;; esac
"""


@pytest.fixture
def study(tmp_path):
    """Runs recipes/realmodel.sh and gives what became of it and what it asked for."""
    fake, calls = tmp_path / "python", tmp_path / "calls"
    fake.write_text(FAKE.format(python=sys.executable, calls=calls))
    fake.chmod(0o755)

    def call(*settings, **environment):
        calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(REPOSITORY / "recipes/realmodel.sh"), *settings],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHON": str(fake), "OUT": "out", "FAIL": "", **environment},
        )
        return done, calls.read_text().splitlines() if calls.exists() else []

    return call


def asked(calls, command="evaluate"):
    """(method, out, overrides) of each call of a command."""
    found = []
    for line in calls:
        words = line.split(" --set ")
        head = words[0].split()
        if command in head:
            found.append((head[head.index(command) + 2], head[head.index("--out") + 1], words[1:]))
    return found


def test_every_arm_is_a_recipe_and_is_run_once(study):
    done, calls = study(SEEDS="0 1", JOBS="3", HELD_OUT="held.txt", SHORT_TEXT="hellaswag")
    assert done.returncode == 0, done.stderr
    evaluated = asked(calls)
    arms = {(method, out) for method, out, _ in evaluated}
    # From afar, near and inside the window: 8 untrained arms, and two seeds of those that are trained.
    assert len(evaluated) == 3 * len(arms) == 3 * (8 + 2 * (4 + 1 + 2 * (6 + 2 + 3 + 2)))
    assert ("pose_sharp", "out/yarn-unsharpened-131072/seed1") in arms
    assert {out for method, out in arms if method == "base"} == {"out/own/seed0", "out/own-sharpened/seed0"}
    for method, out, overrides in evaluated:
        recipe = schema.load(RECIPE, overrides)
        assert method in METHODS and f"seed{recipe.data.seed}" in out
        assert not recipe.train.get("bf16")
    recipes = [schema.load(RECIPE, overrides) for *_, overrides in evaluated]
    assert {tuple(recipe.eval.tasks) for recipe in recipes} == {
        ("distance",),
        ("named_keys", "far_gain"),
        ("perplexity", "hellaswag"),
    }
    inside = [recipe.eval for recipe in recipes if "perplexity" in recipe.eval.tasks]
    assert all(part.lengths == [8192] and part.short_text_shots == 0 for part in inside)
    assert "endprompt.reports.distances" in calls[-1] and "yarn/short=out/yarn-131072/seed1" in calls[-1]


def test_what_is_finished_is_skipped_and_what_failed_is_run_again(study):
    options = {"SEEDS": "0", "JOBS": "1", "LENGTHS": "", "METHODS": "short pose_sharp"}
    done, calls = study("yarn", FAIL="pose_sharp", **options)
    assert done.returncode == 1 and not any("reports" in call for call in calls)
    assert "the same command goes on from there" in done.stderr
    assert "realmodel.sh: yarn pose_sharp seed 0 failed; its log is out/yarn-131072/seed0" in done.stderr
    done, calls = study("yarn", FAIL="pose_sharp", CODE="2", **options)
    assert done.returncode == 2 and "goes on from there" not in done.stderr
    done, calls = study("yarn", **options)
    assert done.returncode == 0, done.stderr
    assert [method for method, *_ in asked(calls)] == ["pose_sharp"]
    done, calls = study("yarn", **options)
    assert done.returncode == 0 and len(calls) == 1 and "reports" in calls[0]
    assert len(asked(study("yarn", **options, QUESTIONS="50")[1])) == 2  # other questions


def test_a_precision_is_passed_on(study):
    calls = study("yarn", SEEDS="0", METHODS="short", LENGTHS="", BF16="true")[1]
    ((*_, overrides),) = asked(calls, "train")
    assert schema.load(RECIPE, overrides).train["bf16"] is True


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("setting", ["yarn-unsharpened", "yarn-half"])
def test_what_only_saves_otherwise_takes_the_last_checkpoint_if_there_is_one(study, tmp_path, setting, there):
    sharp = tmp_path / "out/yarn-131072/seed0/smollm2/pose_sharp"
    for part in ("shards", "checkpoints/checkpoint-32", *(["model"] if there else [])):
        (sharp / part).mkdir(parents=True)
    done, _ = study(setting, SEEDS="0", METHODS="pose_sharp", LENGTHS="")
    assert done.returncode == 0, done.stderr
    taken = tmp_path / f"out/{setting}-131072/seed0/smollm2/pose_sharp/checkpoints/checkpoint-32"
    assert taken.exists() is there


def test_methods_that_no_setting_has_are_one_line(study, tmp_path):
    done, calls = study("own", METHODS="nosuch")
    assert done.returncode == 2 and not calls and done.stderr.count("\n") == 1
    assert "realmodel.sh: METHODS: none of nosuch is in the settings own" in done.stderr
    assert not list(tmp_path.glob("out/*"))


def test_an_unknown_setting_is_one_line(study):
    done, calls = study("nowhere")
    assert done.returncode == 2 and not calls and done.stderr.count("\n") == 1
    assert "realmodel.sh: there is no setting 'nowhere'; use" in done.stderr
