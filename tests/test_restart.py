"""A start between the last checkpoint and model/ trains nothing more, however the run's end is given."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from training import TORCHRUN, assert_same, losses, run, weights

# name -> (settings, steps): 64 rows, 8 of them a step on two ranks and 4 on one.
ENDS = {
    "max_steps": (("train.max_steps=3",), {1: 3, 2: 3}),
    "max_steps in a second epoch": (
        ("train.max_steps=9", "train.gradient_accumulation_steps=4"),
        {1: 9, 2: 9},
    ),
    "a part of an epoch": (("train.num_train_epochs=0.3",), {1: 5, 2: 3}),
    "the recipe's own end": (("train.gradient_accumulation_steps=8",), {1: 4, 2: 2}),
    "a part of a second epoch": (
        ("train.num_train_epochs=1.25", "train.gradient_accumulation_steps=8"),
        {1: 5, 2: 3},
    ),
}


def ended(recipe: Path, folder: Path, ranks: int, settings: tuple, before: str = "", expect: int = 0) -> str:
    """Trains in ``folder``; before: lines of Python that every rank runs first."""
    script = folder.parents[1] / "script.py"
    script.write_text(f"{before}\nfrom endprompt.cli import main\nmain()\n")
    settings = (*settings, *(() if ranks > 1 else ("train.deepspeed=null",)))
    options = [part for setting in settings for part in ("--set", setting)]
    launcher = [sys.executable] if ranks == 1 else TORCHRUN
    command = [*launcher, script, "train", recipe, "endprompt", "--out", folder.parents[1], *options]
    return run(command, expect)


def fresh(source: Path, out: Path, *, checkpoints: bool = False) -> Path:
    """A run's folder before its training, or between its last checkpoint and model/."""
    folder, without = out / "small/endprompt", ["model", "train.json", ".cache", "logs", "eval"]
    without += [] if checkpoints else ["checkpoints"]
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*without))
    return folder


def steps(folder: Path) -> int:
    return json.loads((folder / "train.json").read_text())["steps"]


FAST = ("max_steps",)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "end", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ENDS]
)
def test_a_start_after_the_last_checkpoint_trains_nothing_more(end, ranks, train_recipe, two_ranks, tmp_path):
    settings, expected = ENDS[end]
    whole = fresh(two_ranks, tmp_path / "whole")
    ended(train_recipe, whole, ranks, settings)
    assert steps(whole) == expected[ranks]
    again = fresh(whole, tmp_path / "again", checkpoints=True)
    output = ended(train_recipe, again, ranks, settings)
    assert f'"resumed_from": "checkpoint-{expected[ranks]}"' in output
    assert steps(again) == expected[ranks] and losses(again) == losses(whole)
    assert_same(weights(again), weights(whole), tolerance=0)


@pytest.mark.distributed
def test_a_model_that_is_changed_after_its_check_is_checked_again(train_recipe, two_ranks, tmp_path):
    folder = fresh(two_ranks, tmp_path, checkpoints=True)
    careless = (
        "import json\nfrom endprompt.methods.base import Method\n"
        "def changed(self, folder, experiment):\n    path = folder / 'config.json'\n"
        "    path.write_text(json.dumps({**json.loads(path.read_text()), 'rope_theta': 20000.0}))\n"
        "Method.after_training = changed"
    )
    assert "RoPE check" in ended(train_recipe, folder, 2, (), careless, expect=1)
    assert not (folder / "model").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_so_does_one_after_a_guard_of_the_saving_has_failed(train_recipe, two_ranks, tmp_path):
    folder = fresh(two_ranks, tmp_path)
    broken = (
        "from endprompt import Failure\nfrom endprompt.training import checkpoint\n"
        "def fail(*args, **kwargs):\n    raise Failure('saved model: broken on purpose')\n"
        "checkpoint.verify_saved = fail"
    )
    assert "broken on purpose" in ended(train_recipe, folder, 2, (), broken, expect=1)
    assert not (folder / "model").exists() and (folder / "checkpoints/checkpoint-8/complete.json").exists()
    ended(train_recipe, folder, 2, ())
    assert losses(folder) == losses(two_ranks)
    assert_same(weights(folder), weights(two_ranks), tolerance=0)


def test_a_whole_checkpoint_is_not_written_again(train_recipe, two_ranks, tmp_path):
    """A kill meanwhile would leave a half-written one in the place of the only one that is whole."""
    settings = ("train.save_steps=4", "train.gradient_accumulation_steps=8")
    folder = fresh(two_ranks, tmp_path)
    ended(train_recipe, folder, 1, settings)
    marker = "checkpoints/checkpoint-4/complete.json"
    before = (folder / marker).stat().st_mtime_ns
    again = fresh(folder, tmp_path / "again", checkpoints=True)
    ended(train_recipe, again, 1, settings)
    assert (again / marker).stat().st_mtime_ns == before
    assert_same(weights(again), weights(folder), tolerance=0)


@pytest.mark.distributed
def test_the_twin_asked_only_after_a_step_one_more_is_trained(train_recipe, two_ranks, tmp_path):
    settings, expected = ENDS["a part of an epoch"]
    whole = fresh(two_ranks, tmp_path / "whole")
    ended(train_recipe, whole, 1, settings)
    again = fresh(whole, tmp_path / "again", checkpoints=True)
    careless = "from endprompt.training import trainer\ntrainer.is_over = lambda state: False"
    ended(train_recipe, again, 1, settings, careless)
    assert steps(again) == expected[1] + 1
    with pytest.raises(AssertionError):
        assert_same(weights(again), weights(whole), tolerance=0)
