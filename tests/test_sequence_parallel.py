"""Two ranks that share every row train as one rank does; what cannot be shared is refused in one message."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, run_main, tiny_documents, write_jsonl
from safetensors.torch import load_file
from test_train import TORCHRUN, assert_same, prepared, run, train, weights

TOGETHER = ["--set", "train.sequence_parallel=2"]
TWICE = ["--set", "train.num_train_epochs=2"]
ALONE = [
    "--set",
    "train.per_device_train_batch_size=16",
]  # a device's rows: one device takes what two took together


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base) -> Path:
    """32 rows of 512 tokens, beyond the base's window of 256, in 8 steps of 4 rows."""
    folder = tmp_path_factory.mktemp("sequence")
    path = folder / "small.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"name_or_path": str(base), "attn_implementation": "sdpa"},
                "lengths": {"physical": 128, "target": 512},
                "data": {
                    "corpus": str(write_jsonl(folder / "corpus.jsonl", tiny_documents(100, 18))),
                    "tokens": 32 * 512,
                },
                "train": {
                    "deepspeed": str(REPOSITORY / "ds_configs/zero3.json"),
                    "per_device_train_batch_size": 8,
                    "learning_rate": 1e-3,
                    "warmup_steps": 2,
                    "logging_steps": 1,
                    "save_steps": 3,
                    "save_total_limit": 10,
                },
                "eval": {"lengths": [256, 512], "samples": 4, "depths": 2},
            }
        )
    )
    return path


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "train.json").read_text())["history"]


@pytest.fixture(scope="module")
def together(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("together")
    folder = prepared(recipe, "full_length", out)
    run(train(recipe, "full_length", out, *TOGETHER, *TWICE, ranks=2))
    return folder


def assert_equal(one: Path, two: Path, tolerance: float = 2e-3) -> None:
    first, second = history(one), history(two)
    assert len(first) == len(second) >= 8
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(a["text_loss"], rel=1e-5)  # every weight is 1
        # Adam does not feel the gradient's size, so the norm tells whether the scale is right.
        for key in ("loss", "text_loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-4 if key != "grad_norm" else 1e-3), (key, a, b)
    start = load_file(REPOSITORY / "recipes/tiny/base/model.safetensors")
    moved = max(float((weights(one)[name] - start[name]).abs().max()) for name in start)
    assert moved > 3 * tolerance, "hardly anything was learned, so equality would say nothing"
    assert_same(weights(one), weights(two), tolerance)


@pytest.mark.distributed
def test_two_ranks_that_share_rows_equal_one(recipe, together, tmp_path):
    folder = prepared(recipe, "full_length", tmp_path)
    run(train(recipe, "full_length", tmp_path, *ALONE, *TWICE))
    assert_equal(folder, together)
    found = [entry["loss"] for entry in history(folder)]
    assert len(found) == 16 and found[-1] < found[0] - 0.1
    summary = json.loads((together / "train.json").read_text())
    assert summary["world_size"] == 2 and summary["probe"] > 1e-2


@pytest.fixture(scope="module")
def by_gradient(recipe, tmp_path_factory) -> tuple[Path, list]:
    """One rank alone, with steps that feel the gradient's size, and without clipping; and its options.

    Adam without a first moment and with an epsilon far above the gradients' size steps by learning_rate /
    epsilon times the gradient.
    """
    out = tmp_path_factory.mktemp("alone")
    folder = prepared(recipe, "lceg", out)
    keys = (
        "adam_beta1=0.0",
        "adam_epsilon=1000.0",
        "learning_rate=20.0",
        "max_grad_norm=1000.0",
        "warmup_steps=0",
    )
    options = [part for key in keys for part in ("--set", f"train.{key}")]
    run(train(recipe, "lceg", out, *options, *ALONE))
    return folder, options


@pytest.mark.distributed
@pytest.mark.parametrize(
    "stage, ranks",
    [("zero3", 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("zero2", 2), ("zero3", 4)))],
)
def test_the_gradient_has_its_size(stage, ranks, recipe, by_gradient, tmp_path):
    """At every stage of ZeRO, and with two groups of two ranks that also accumulate."""
    alone, options = by_gradient
    folder = prepared(recipe, "lceg", tmp_path)
    if ranks == 4:
        options = [
            *options,
            "--set",
            "train.per_device_train_batch_size=2",
            "--set",
            "train.gradient_accumulation_steps=2",
        ]
    command = train(
        recipe,
        "lceg",
        tmp_path,
        *options,
        *TOGETHER,
        "--set",
        f"train.deepspeed={REPOSITORY}/ds_configs/{stage}.json",
        ranks=2,
    )
    run([f"--nproc_per_node={ranks}" if part == TORCHRUN[-1] else part for part in command])
    assert_equal(alone, folder, tolerance=1e-4)


KILL = """
import os, signal
from endprompt.training import checkpoint
def die(self, args, state, control, **kwargs):
    if state.global_step == 11:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.MarkComplete.on_step_end = die
from endprompt.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_killed_in_its_second_epoch_resumes_to_the_same_weights(recipe, together, tmp_path):
    folder = prepared(recipe, "full_length", tmp_path)
    script = tmp_path / "killed.py"
    script.write_text(KILL)
    run([*TORCHRUN, script, "train", recipe, "full_length", "--out", tmp_path, *TOGETHER, *TWICE], expect=1)
    run(train(recipe, "full_length", tmp_path, *TOGETHER, *TWICE, ranks=2))
    assert json.loads((folder / "train.json").read_text())["resumed_from"] == "checkpoint-9"
    assert [entry["loss"] for entry in history(folder)] == [entry["loss"] for entry in history(together)]
    assert_same(weights(folder), weights(together), tolerance=0)


@pytest.mark.distributed
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_shards_that_cannot_see_each_other_are_refused_before_the_first_step(dropout, recipe, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_dropout": dropout}))
    (tmp_path / recipe.name).write_text(recipe.read_text().replace(str(base), str(tmp_path / "base")))
    recipe = tmp_path / recipe.name
    folder = prepared(recipe, "full_length", tmp_path)
    script = tmp_path / "patched.py"
    script.write_text("""
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
UlyssesSPAttentionHF.forward = lambda self, *args, **kwargs: self.attn(*args, **kwargs)
from endprompt.cli import main
main()
""")
    output = run([*TORCHRUN, script, "train", recipe, "full_length", "--out", tmp_path, *TOGETHER], expect=1)
    assert (
        "liveness probe: changing all 256 tokens of the first rank's shard" in output
        and "by 0.0e+00" in output
    )
    assert not list((folder / "checkpoints").glob("checkpoint-*"))


BAD = {
    "ranks": ("full_length", 1, ["train.sequence_parallel=2"], "2 does not divide the 1 ranks"),
    "heads": (
        "full_length",
        3,
        ["train.sequence_parallel=3", "train.per_device_train_batch_size=4"],
        "3 does not divide the model's 4 attention heads",
    ),
    "jumps": ("endprompt", 2, ["train.sequence_parallel=2"], "endprompt has jumps in its positions"),
    "shifted": ("longlora", 2, ["train.sequence_parallel=2"], "longlora shifts its own attention"),
    "no deepspeed": (
        "full_length",
        2,
        ["train.sequence_parallel=2", "train.deepspeed=null"],
        "set train.deepspeed",
    ),
    "eager": (
        "full_length",
        2,
        ["train.sequence_parallel=2", "model.attn_implementation=eager"],
        "no eager attention",
    ),
    "padding": (
        "full_length",
        2,
        ["train.sequence_parallel=2", "data.packing=document"],
        "set data.packing to cut",
    ),
    "zero": ("full_length", 1, ["train.sequence_parallel=0"], "a whole number of ranks"),
    "text": ("full_length", 1, ["train.sequence_parallel=two"], "a whole number of ranks"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_shared_is_refused_in_one_message(name, recipe, tmp_path, monkeypatch):
    method, ranks, options, message = BAD[name]
    options = [part for option in options for part in ("--set", option)]
    run_main("prepare", recipe, method, "--out", tmp_path, "--workers", 1, *options)
    for variable, value in {
        "WORLD_SIZE": str(ranks),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(variable, value)
    code, _, error = run_main("train", recipe, method, "--out", tmp_path, *options)
    assert code == 2 and message in error and "train.sequence_parallel" in error and error.count("\n") == 1, (
        error
    )


def test_sharing_rows_keeps_the_tokens_of_a_step(recipe):
    from endprompt import BadInput
    from endprompt.recipe import schema
    from endprompt.recipe.batch import batch_shape
    from endprompt.recipe.experiment import Experiment

    def shape(method: str, rows: int, accumulation: int, n: int) -> tuple[int, int]:
        loaded = schema.load(
            recipe,
            [
                f"train.per_device_train_batch_size={rows}",
                f"train.gradient_accumulation_steps={accumulation}",
                f"train.sequence_parallel={n}",
            ],
        )
        return batch_shape(Experiment.of(loaded, method))

    assert shape("full_length", 4, 1, 1) == (1, 1)
    assert shape("full_length", 4, 1, 2) == (2, 1)
    assert shape("full_length", 1, 2, 2) == (1, 1)
    assert shape("full_length", 1, 1, 4) == (1, 1)
    assert shape("short", 4, 2, 2) == (8, 2)
    with pytest.raises(BadInput, match="multiple of 2"):
        shape("full_length", 1, 1, 2)


def test_a_sharded_batch_has_no_mask_and_refuses_what_needs_one():
    from endprompt.rows.collate import Collator

    def row(length: int, jump: int = 0) -> dict:
        return {
            "input_ids": list(range(5, 5 + length)),
            "position_ids": [*range(length - 2), length - 2 + jump, length - 1 + jump],
            "loss_weights": [1.0] * length,
            "text_length": length,
            "prompt_length": 0,
        }

    whole, sharded = Collator(0, 64), Collator(0, 64, sharded=True)
    one, two = whole([row(8), row(8)]), sharded([row(8), row(8)])
    assert two.keys() == {*one, "labels"} - {"attention_mask"}
    # What DeepSpeed's data loader makes of the labels.
    assert torch.equal(torch.nn.functional.pad(two["labels"], (0, 1), value=-100)[:, 1:], one["shift_labels"])
    for rows in ([row(8), row(6)], [row(8, jump=9)]):
        with pytest.raises(ValueError, match="only a mask could mend"):
            sharded(rows)
