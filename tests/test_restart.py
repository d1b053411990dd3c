"""A start between the last checkpoint and model/ trains nothing more, however the run's end is given."""

import json
import shutil
import sys
from pathlib import Path

import family_models
import pytest
import torch
import yaml
from conftest import run_main, write_jsonl
from safetensors.torch import load_file, save_file
from training import TORCHRUN, assert_same, losses, run, train, weights
from transformers import AutoModelForCausalLM

from endprompt import Failure
from endprompt.training import checkpoint

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


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-30B-A3B", "Phi-4-mini"])
def test_experts_are_read_from_a_checkpoint_as_they_were_trained(name, tmp_path, base):
    """The files hold each expert apart, and the network all in one tensor."""
    folder = family_models.saved(tmp_path / "checkpoint", family_models.written(name), base)
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    network = AutoModelForCausalLM.from_config(trained.config)
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    files = load_file(folder / "model.safetensors")
    network.load_state_dict(files, strict=False)  # as the Trainer does
    lacking = [key for key, weight in network.named_parameters() if not weight.any()]
    assert bool(lacking) is (name != "Phi-4-mini")
    checkpoint.load_renamed(network, folder)
    assert_same(dict(network.named_parameters()), dict(trained.named_parameters()), 0)
    gone = next((key for key in files if "experts" in key), None)
    if gone:
        files.pop(gone)
        save_file(files, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(Failure, match="does not hold all that is trained"):
            checkpoint.load_renamed(network, folder)


def test_a_run_does_not_go_on_on_other_shards(recipe_file, tmp_path):
    """Nor does it count as finished; a run from before this was noted is let be."""
    recipe = recipe_file(data={"tokens": 64 * 16}, train={"deepspeed": None, "save_steps": 2, "max_steps": 2})
    out, folder = ["--out", tmp_path / "a"], tmp_path / "a/small/short"

    def prepare():
        shutil.rmtree(folder / "shards", ignore_errors=True)
        code, _, error = run_main("prepare", recipe, "short", *out, "--workers", 1)
        assert code == 0, error

    prepare()
    run(train(recipe, "short", tmp_path / "a"))
    corpus = Path(yaml.safe_load(recipe.read_text())["data"]["corpus"])
    before = corpus.read_bytes()
    write_jsonl(corpus, [json.loads(line)["text"] for line in before.decode().splitlines()][::-1])
    prepare()
    told = run(train(recipe, "short", tmp_path / "a"), expect=2)
    assert "model was trained on others than are there now" in told and "Traceback" not in told
    shutil.move(folder / "model", tmp_path / "model")
    told = run(train(recipe, "short", tmp_path / "a"), expect=2)
    assert "checkpoint-2 was trained on others than are there now" in told and "Traceback" not in told
    shutil.move(tmp_path / "model", folder / "model")
    whole = (folder / "train.json").read_text()
    record = json.loads(whole)
    del record["shards"]
    (folder / "train.json").write_text(json.dumps(record))
    assert "nothing to train" in run(train(recipe, "short", tmp_path / "a"))
    (folder / "train.json").write_text(whole)
    corpus.write_bytes(before)
    prepare()  # those again
    assert "nothing to train" in run(train(recipe, "short", tmp_path / "a"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mixtral", "Llama-2"])
def test_a_mixture_of_experts_goes_on_as_if_nothing_had_happened(name, recipe_file, tmp_path, base):
    model = family_models.saved(tmp_path / "model", family_models.written(name), base)
    target = family_models.MODELS[name].target
    recipe = recipe_file(
        model={"name_or_path": str(model)},
        lengths={"physical": 64, "target": target},
        data={"tokens": 64 * 16},
        train={"deepspeed": None, "save_steps": 2, "max_steps": 4},
    )
    code, _, error = run_main("prepare", recipe, "short", "--out", tmp_path / "a", "--workers", 1)
    assert code == 0, error
    folder = tmp_path / "a/small/short"
    run(train(recipe, "short", tmp_path / "a"))
    whole = weights(folder)
    for path in ("model", "train.json", "checkpoints/checkpoint-4"):
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()
    assert (folder / "checkpoints/checkpoint-2").is_dir()
    run(train(recipe, "short", tmp_path / "a"))
    assert_same(whole, weights(folder), 0)
    shutil.rmtree(folder / "model")  # killed behind the last checkpoint
    run(train(recipe, "short", tmp_path / "a"))
    assert_same(whole, weights(folder), 0)
