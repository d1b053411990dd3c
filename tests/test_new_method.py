"""A method of one's own is one file: rows with an option, a term of the loss, and a step after training go
through every command, and nothing else is changed for it.
"""

import importlib.util
import json
import sys

import pytest
import training
import yaml
from conftest import REPOSITORY, run_main

from endprompt import methods
from endprompt.rows import shards

FILE = '''
"""Rows that skip positions evenly, a loss that counts text more, and a model that says so."""

import numpy as np
from pydantic import Field

from endprompt import storage
from endprompt.methods.base import Method, Options, Rows, register


class StridedOptions(Options):
    """stride: from a token's position to the next one's.  more: of the loss, added to it."""

    stride: int = Field(2, ge=2)
    more: float = Field(0.0, ge=0)


class StridedRows(Rows):
    def recorded(self):
        return {"stride": self.options.stride}  # the rest changes no row

    def build(self, cursor, rng):
        if (taken := self.take(cursor, self.length)) is None:
            return None
        text, documents = taken
        return self.row(text, np.arange(len(text)) * self.options.stride + rng.integers(2), documents)


@register
class Strided(Method):
    name = "strided"
    summary = "every other position"
    Options = StridedOptions
    Rows = StridedRows

    def loss_term(self, network, batch, outputs, options):
        return options.more * outputs["loss_sum"] if options.more else None

    def after_training(self, folder, experiment):
        super().after_training(folder, experiment)
        storage.write_json(folder / "strided.json", {"stride": experiment.options.stride})
'''
# As whoever has such a file would start the program: the file first.
SCRIPT = """
import runpy, sys
runpy.run_path(sys.argv[1])
from endprompt import cli
cli.main(sys.argv[2:])
"""
RECIPE = REPOSITORY / "recipes/tiny.yaml"
SETTINGS = {
    "data.tokens": 64 * 256,
    "train.deepspeed": None,
    "train.max_steps": 8,
    "train.logging_steps": 1,
    "eval.tasks": ["passkey"],
    "eval.lengths": [256],
    "eval.samples": 2,
    "eval.depths": 2,
    "method_options.more": 0.5,
}


@pytest.fixture
def file(tmp_path):
    """The file of the method, which is in this process' table too."""
    path = tmp_path / "strided.py"
    path.write_text(FILE)
    spec = importlib.util.spec_from_file_location("strided", path)
    before = dict(methods.METHODS)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert list(methods.METHODS) == [*before, "strided"]
    yield path
    methods.METHODS.clear()
    methods.METHODS.update(before)


@pytest.mark.parametrize(
    "before, after, said",
    [
        ('name = "strided"', 'name = "pose"', "a method named pose is there already"),
        ("stride: int", "lceg: int", "strided: the option lceg has a method's name"),
        ("stride: int", "strided: int", "strided: the option strided has a method's name"),
        ('name = "strided"', 'name = "pose_chunks"', "the option pose_chunks has a method's name"),
    ],
)
def test_names_that_would_be_taken_for_others(before, after, said):
    table_before = dict(methods.METHODS)
    with pytest.raises(ValueError, match=said):
        exec(FILE.replace(before, after), {"__name__": "strided"})
    assert table_before == methods.METHODS


WORKERS = ("--workers", 1)


class Commands:
    """The commands on one recipe: ``done`` gives what is printed, ``refused`` the one line of exit code 2."""

    def __init__(self, folder):
        self.folder, self.run = folder, folder / "out/tiny/strided"

    def line(self, name, *options, method="strided", out="out", **settings):
        given = [f"{key}={json.dumps(value)}" for key, value in (SETTINGS | settings).items()]
        chosen = [part for setting in given for part in ("--set", setting)]
        return [name, RECIPE, method, "--out", self.folder / out, *chosen, *options]

    def done(self, *arguments, **settings):
        code, told, error = run_main(*self.line(*arguments, **settings))
        assert code == 0, error
        return told

    def refused(self, *arguments, **settings):
        code, told, error = run_main(*self.line(*arguments, **settings))
        assert (code, told) == (2, "") and error.count("\n") == 1
        return error


def rows_follow_the_option(commands):
    assert "64 rows, 16384 tokens" in commands.done("prepare", *WORKERS)
    run = commands.run
    manifest = shards.read_manifest(run / "shards")
    assert (manifest["method"], manifest["stride"], manifest["rows"]) == ("strided", 2, 64)
    assert "more" not in manifest
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert resolved["method"] == "strided"
    assert resolved["method_options"] == {"strided": {"stride": 2, "more": 0.5}}
    starts = set()
    for row in shards.rows(run / "shards", manifest):
        first = row["position_ids"][0]
        starts.add(first)
        assert row["position_ids"] == list(range(first, first + 512, 2))
    assert starts == {0, 1}


def another_value_is_seen_or_refused(commands):
    other = {"method_options.stride": 3}
    for name in ("prepare", "train", "inspect"):
        assert "stride is 2, expected 3" in commands.refused(name, **other)
    commands.done("prepare", *WORKERS, out="other", **other)
    changed = shards.read_manifest(commands.folder / "other/tiny/strided/shards")
    assert changed["stride"] == 3
    manifest = shards.read_manifest(commands.run / "shards")
    assert changed["shards"][0]["sha256"] != manifest["shards"][0]["sha256"]
    assert "method_options.stride: " in commands.refused("prepare", **{"method_options.stride": 1})
    said = commands.refused("prepare", method="short")
    assert "method_options.more: short has no such option (it has: none)" in said


def a_shared_recipe_names_the_method():
    own = {"method_options.strided.stride": 5}
    plain = {key: value for key, value in SETTINGS.items() if not key.startswith("method_options")}
    given = [part for key, value in (plain | own).items() for part in ("--set", f"{key}={json.dumps(value)}")]
    code, told, error = run_main("prepare", RECIPE, "short", "--dry-run", *given)
    assert (code, error) == (0, "") and yaml.safe_load(told)["method_options"] == {}
    code, told, error = run_main("prepare", RECIPE, "strided", "--dry-run", *given)
    assert (code, error) == (0, "")
    assert yaml.safe_load(told)["method_options"] == {"strided": {"stride": 5, "more": 0.0}}


def training_has_its_term_and_its_step(commands, file):
    training.run([sys.executable, "-c", SCRIPT, file, *commands.line("train")])
    run = commands.run
    history = json.loads((run / "train.json").read_text())["history"]
    assert [entry["step"] for entry in history] == list(range(1, 9))
    for entry in history:
        assert entry["loss"] == pytest.approx(1.5 * entry["text_loss"], rel=1e-3)
    assert json.loads((run / "model/strided.json").read_text()) == {"stride": 2}
    assert json.loads((run / "model/config.json").read_text())["endprompt"]["method"] == "strided"


@pytest.mark.timeout(600)
def test_a_new_method_is_one_file(file, tmp_path):
    commands = Commands(tmp_path)
    rows_follow_the_option(commands)
    another_value_is_seen_or_refused(commands)
    a_shared_recipe_names_the_method()

    told = commands.done("inspect")
    assert "64 rows, 16384 tokens; all checksums hold" in told and "256 of 2048 supervised" in told
    told = commands.done("inspect", "--coverage")
    assert "coverage of strided: 64 prepared rows" in told
    assert f"never seen: {2048 - 256} of the distances 0..2047" in told
    assert (commands.run / "coverage.png").stat().st_size > 0

    training_has_its_term_and_its_step(commands, file)
    assert "passkey" in commands.done("evaluate")
    result = json.loads((commands.run / "eval/passkey/256.json").read_text())
    assert result["scores"]["samples"] == 2
