"""Each fault is injected and its end looked at: what is said, with which exit code, and what is left to go on
from.
"""

import errno
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, run_main
from training import ENVIRONMENT, TORCHRUN, assert_same, losses, prepared, run, train, weights

from endprompt import BadInput, Failure
from endprompt.runs import checkpoint_files, launch, runfolder
from endprompt.training import run as training_run
from endprompt.training import watch

RUN = "\nfrom endprompt.cli import main\nmain()\n"


@pytest.fixture
def shards_of(two_ranks):
    """shards_of(out) -> a run's folder with the shards of the undisturbed run, ready to train."""

    def copy(out: Path) -> Path:
        folder = out / "small/endprompt"
        shutil.copytree(two_ranks / "shards", folder / "shards", ignore=shutil.ignore_patterns(".cache"))
        shutil.copy(two_ranks / "recipe.yaml", folder)
        return folder

    return copy


@pytest.fixture
def half_way(two_ranks, shards_of):
    """half_way(out) -> the undisturbed run as it was after checkpoint-4 of 8 steps."""

    def copy(out: Path) -> Path:
        folder = shards_of(out)
        for step in (2, 4):
            shutil.copytree(
                two_ranks / f"checkpoints/checkpoint-{step}", folder / f"checkpoints/checkpoint-{step}"
            )
        return folder

    return copy


def patched(folder: Path, patch: str) -> Path:
    script = folder / "patched.py"
    script.write_text(patch + RUN)
    return script


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """ended(error) -> what the first rank raises for it, the exit code it notes, the run's status."""
    monkeypatch.setenv(launch.EXIT_CODE_FILE, str(tmp_path / "code"))

    def end(error: Exception):
        experiment = SimpleNamespace(run=tmp_path, recipe=SimpleNamespace(train={}))
        with pytest.raises((Failure, type(error))) as caught:
            training_run._explain(error, experiment, 0)
        noted = tmp_path / "code"
        return caught.value, noted.read_text().strip() if noted.exists() else None, state(tmp_path)

    return end


def messages(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("endprompt: ")]


def state(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


# -- losses that are no numbers ------------------------------------------------------------------------------

POISON = """
import os, torch
from endprompt.training import trainer
sound = trainer.WeightedTrainer.compute_loss
def poisoned(self, model, inputs, **kwargs):
    if self.state.global_step == 4 and os.environ["RANK"] == "1" and len(self.micro_batches) == 1:
        inputs["shift_weights"] = inputs["shift_weights"] * float("{value}")
    return sound(self, model, inputs, **kwargs)
trainer.WeightedTrainer.compute_loss = poisoned
"""


@pytest.mark.distributed
@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(value, train_recipe, shards_of, tmp_path):
    folder = shards_of(tmp_path)
    output = run(
        [
            *TORCHRUN,
            patched(tmp_path, POISON.format(value=value)),
            "train",
            train_recipe,
            "endprompt",
            "--out",
            tmp_path,
            "--set",
            "train.save_steps=1",
        ],
        expect=1,
    )
    (message,) = messages(output)
    assert (
        "step 5 is not finite" in message
        and "rank 1 micro-batch 1, loss nan" in message
        and "checkpoint-4;" in message
    )
    rows = [int(row) for row in message.partition("rows ")[2].partition(")")[0].split(", ")]
    assert len(rows) == 2 and all(0 <= row < 64 for row in rows)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        f"checkpoint-{step}" for step in (1, 2, 3, 4)
    ]
    assert (
        state(folder)["state"] == "failed"
        and "not finite" in state(folder)["reason"]
        and not (folder / "model").exists()
    )
    # The named rows are those of the batch: every row is in exactly one batch of the only epoch.
    code, out, _ = run_main("inspect", train_recipe, "endprompt", "--out", tmp_path, "--row", rows[0])
    assert code == 0 and "positions" in out


@pytest.mark.slow
def test_the_advice_after_a_first_step_that_is_no_number_can_be_followed(train_recipe, tmp_path):
    folder = prepared(train_recipe, "endprompt", tmp_path)
    steps = [f"--set=train.{key}" for key in ("deepspeed=null", "max_steps=3", "save_steps=4")]
    high = [*steps, "--set", "train.learning_rate=1e30", "--set", "train.max_grad_norm=0"]
    (message,) = messages(run(train(train_recipe, "endprompt", tmp_path, *high), expect=1))
    assert "the base model" in message and "or lower train.learning_rate, then start again" in message
    assert (folder / "checkpoints").is_dir()
    run(train(train_recipe, "endprompt", tmp_path, *steps))
    assert (folder / "model").is_dir()


def test_the_advice_where_there_is_a_checkpoint_names_another_folder(tmp_path):
    """Under another setting the checkpoint is not gone on with."""
    watching = watch.Watch(watch.StopRequest(tmp_path), tmp_path)
    watching.trainer = SimpleNamespace(micro_batches=[(torch.tensor([[7], [3]]), torch.tensor(math.nan))])
    at = SimpleNamespace(process_index=0), SimpleNamespace(global_step=5), 1.0
    assert watching._not_finite(*at).endswith("or lower train.learning_rate, then start again")
    checkpoint = tmp_path / "checkpoints/checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / checkpoint_files.MARKER).write_text("{}")
    said = watching._not_finite(*at)
    assert (
        "rows 7, 3)" in said and f"another --out (or delete {tmp_path}/checkpoints; the shards stay)" in said
    )


@pytest.mark.slow
def test_a_gradient_that_is_no_number_ends_a_run_without_deepspeed_too(train_recipe, shards_of, tmp_path):
    folder = shards_of(tmp_path)
    patch = """
from endprompt.training import watch
before = watch.Watch.on_pre_optimizer_step
def spoil(self, args, state, control, model=None, **kwargs):
    gradients = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    next(gradients).view(-1)[0] = float("inf")
    before(self, args, state, control, model=model, **kwargs)
watch.Watch.on_pre_optimizer_step = spoil
"""
    output = run(
        [
            sys.executable,
            patched(tmp_path, patch),
            "train",
            train_recipe,
            "endprompt",
            "--out",
            tmp_path,
            "--set",
            "train.deepspeed=null",
        ],
        expect=1,
    )
    assert (
        "step 1 is not finite (the gradient's norm" in messages(output)[0]
        and "none, the base model" in messages(output)[0]
    )
    assert not list((folder / "checkpoints").glob("checkpoint-*"))


# -- disks that are full -------------------------------------------------------------------------------------

FULL = """
import resource
from endprompt.training import watch
def full(self, args, state, control, **kwargs):
    if state.global_step == 3:  # from here on no file may grow beyond 100 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
watch.Report.on_step_end = full
"""


@pytest.mark.distributed
def test_a_full_disk_keeps_the_earlier_checkpoint_and_the_run_goes_on_from_it(
    train_recipe, shards_of, two_ranks, tmp_path
):
    folder = shards_of(tmp_path)
    output = run(
        [*TORCHRUN, patched(tmp_path, FULL), "train", train_recipe, "endprompt", "--out", tmp_path], expect=1
    )
    said = messages(output)
    assert said and any("could not be written" in line and "checkpoint-2;" in line for line in said), output[
        -3000:
    ]
    assert "endprompt/training/run.py" not in output, "a traceback of ours"
    assert checkpoint_files.newest(folder / "checkpoints").name == "checkpoint-2"
    assert state(folder)["state"] == "failed"
    output = run(train(train_recipe, "endprompt", tmp_path, ranks=2))
    assert_same(weights(folder), weights(two_ranks), tolerance=0)


def test_a_full_disk_leaves_prepare_where_it_was(train_recipe, two_ranks, tmp_path):
    script = patched(tmp_path, "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n")
    command = ["prepare", train_recipe, "endprompt", "--out", tmp_path / "out", "--workers", "1"]
    result = subprocess.run(
        [sys.executable, str(script), *map(str, command)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert (
        result.returncode == 1
        and result.stderr.count("\n") == 1
        and "File too large" in result.stderr
        and "nothing half-written was kept" in result.stderr
    )
    assert not [
        path
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and path.name not in ("recipe.yaml", "deepspeed.json")
    ]
    assert run_main(*command)[0] == 0
    one, two = (
        json.loads((folder / "shards/manifest.json").read_text())["shards"]
        for folder in (tmp_path / "out/small/endprompt", two_ranks)
    )
    assert one == two


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(train_recipe, tmp_path):
    """A tmpfs of 64 kB instead of a limit: the same words, the same end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        (disk / "filler").write_bytes(b"x" * 52_000)
        code, _, error = run_main("prepare", train_recipe, "endprompt", "--out", disk / "out", "--workers", 1)
        assert code == 1 and error.count("\n") == 1 and "No space left on device" in error
        assert not list(disk.rglob("*.part")) and not list(disk.rglob("shard-*"))
        (disk / "filler").unlink()
        assert run_main("prepare", train_recipe, "endprompt", "--out", disk / "out", "--workers", 1)[0] == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


SERIALIZING = "Error while serializing: I/O error: {} (os error {})"


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(code, os.strerror(code)) for code in sorted(watch.FULL)),
        OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
        PermissionError(errno.EACCES, "Permission denied", "RUN/checkpoints/checkpoint-2/rng_state_0.pth"),
        PermissionError(errno.EPERM, "Operation not permitted", "RUN/status.json"),
        PermissionError(errno.EACCES, "Permission denied", "RUN/shards/.cache/rows"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
        *(RuntimeError(SERIALIZING.format("no", code)) for code in (28, 27, 122, 30, 5, 13)),
    ],
    ids=str,
)
def test_what_keeps_a_file_from_being_written_ends_the_job(error, ended, tmp_path):
    if getattr(error, "filename", None):
        error = type(error)(error.errno, error.strerror, error.filename.replace("RUN", str(tmp_path)))
    failure, code, told = ended(error)
    assert code == "3" and "could not be written" in str(failure) and failure.everywhere
    assert told["state"] == "failed" and "could not be written" in told["reason"]


@pytest.mark.parametrize(
    "error, state",
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "RUN/shards/x.parquet"), "crashed"),
        (OSError(errno.EMFILE, "Too many open files", "/proc/self/maps"), "crashed"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "crashed"),
        (OSError(errno.ESTALE, "Stale file handle", "RUN/shards/x.parquet"), "crashed"),
        (PermissionError(errno.EACCES, "Permission denied", "RUN/shards/x.parquet"), "crashed"),
        (PermissionError(errno.EACCES, "Permission denied", "/base/model.safetensors"), "crashed"),
        (PermissionError(errno.EACCES, "Permission denied", 3), "crashed"),
        (RuntimeError("Connection closed by peer"), "lost a rank"),
    ],
    ids=str,
)
def test_other_errors_of_the_system_end_with_a_line_and_may_be_tried_again(error, state, ended, tmp_path):
    """Exit code 3 would keep Slurm from starting the job again."""
    if isinstance(getattr(error, "filename", None), str):
        error = type(error)(error.errno, error.strerror, error.filename.replace("RUN", str(tmp_path)))
    failure, code, told = ended(error)
    assert code is None and "could not be written" not in str(failure) and "\n" not in str(failure)
    assert str(getattr(error, "strerror", None) or "connection") in str(failure) and failure.everywhere
    assert told["state"] == state and "the same command goes on" in str(failure)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        OSError("no errno"),
        RuntimeError("PytorchStreamReader failed reading zip archive: inline_container says so"),
        RuntimeError("Error while deserializing header: Permission denied (os error 13)"),
        ValueError("x"),
    ],
    ids=str,
)
def test_what_is_no_error_of_the_system_keeps_its_traceback(error, ended):
    raised, code, told = ended(error)
    assert raised is error and code is None and told["state"] == "crashed"


@pytest.mark.parametrize("readable", [True, False])
def test_a_checkpoint_that_may_not_be_read_is_not_one_that_cannot_be_written(readable, tmp_path, monkeypatch):
    path = tmp_path / "optimizer.pt"
    path.touch()
    monkeypatch.setattr(watch.os, "access", lambda *_: readable)  # root may read everything
    denied = PermissionError(errno.EACCES, "Permission denied", str(path))
    assert (watch.unwritable(denied, tmp_path) is not None) == readable


# -- checkpoints that were damaged ---------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.distributed
def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(
    train_recipe, half_way, two_ranks, tmp_path
):
    folder = half_way(tmp_path)
    truncate(next((folder / "checkpoints/checkpoint-4").rglob("zero_pp_rank_1*optim_states.pt")))
    output = run(train(train_recipe, "endprompt", tmp_path, ranks=2))
    assert (
        "checkpoint-4 is damaged (global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt has" in output
        and "passed over" in output
    )
    assert json.loads((folder / "train.json").read_text())["resumed_from"] == "checkpoint-2"
    assert (folder / "checkpoints/damaged-4").is_dir()
    assert losses(folder) == losses(two_ranks)
    assert_same(weights(folder), weights(two_ranks), tolerance=0)


def test_checkpoints_that_were_whole_and_are_not_end_the_run(train_recipe, half_way, tmp_path):
    folder = half_way(tmp_path)
    for step in (2, 4):
        truncate(folder / f"checkpoints/checkpoint-{step}/model.safetensors")
    code, _, error = run_main("train", train_recipe, "endprompt", "--out", tmp_path)
    assert code == 2 and "holds none that is whole" in error and "restore one from a copy" in error


def test_only_the_newest_whole_checkpoints_are_kept_and_never_none(tmp_path):
    def make(step: int, whole: bool = True) -> None:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"1234")
        if whole:
            (folder / "complete.json").write_text(
                json.dumps(
                    {"global_step": step, "world_size": 1, "files": checkpoint_files.inventory(folder)}
                )
            )

    for step in (2, 4, 10):
        make(step)
    make(12, whole=False)
    checkpoint_files.keep_newest(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-12"]
    assert checkpoint_files.newest(tmp_path).name == "checkpoint-10"
    checkpoint_files.set_aside(tmp_path, tmp_path / "checkpoint-10")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    (tmp_path / "checkpoint-10/weights").write_bytes(b"12345")
    assert "has 5 bytes, 4 were written" in checkpoint_files.fault(tmp_path / "checkpoint-10")
    with pytest.raises(BadInput, match="holds none that is whole"):
        checkpoint_files.to_resume(tmp_path)


# -- pickles -------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_a_checkpoint_builds_tensors_and_runs_nothing(train_recipe, half_way, tmp_path):
    """A ZeRO file of the right name, size and owner, whose pickle calls a function."""
    folder = half_way(tmp_path)
    path = folder / "checkpoints/checkpoint-4/global_step4/zero_pp_rank_0_mp_rank_00_model_states.pt"
    data = pickle.dumps(Evil(tmp_path / "ran"))
    path.write_bytes(data)
    marker = folder / "checkpoints/checkpoint-4/complete.json"
    tree = json.loads(marker.read_text())
    tree["files"][str(path.relative_to(marker.parent))] = len(data)
    marker.write_text(json.dumps({**tree, "world_size": 1}))
    result = subprocess.run(
        list(map(str, train(train_recipe, "endprompt", tmp_path))),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        timeout=200,
    )
    assert result.returncode == 1 and "Weights only load failed" in result.stdout + result.stderr
    assert not (tmp_path / "ran").exists()
    # The control: without the guard, the file does what it says.
    import torch

    with pytest.raises(RuntimeError, match="magic number"):  # after it has run
        torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "case", ["foreign name", "not in the marker", "link", "everybody may write", "another owner"]
)
def test_a_checkpoint_with_a_foreign_pickle_is_refused(train_recipe, half_way, tmp_path, case):
    checkpoint = half_way(tmp_path) / "checkpoints/checkpoint-4"
    state = next(checkpoint.rglob("*model_states.pt"))
    telling = {
        "foreign name": "is no file that the run itself wrote",
        "not in the marker": "is no file that the run itself wrote",
        "link": "is no plain file",
        "everybody may write": "may be written by everybody",
        "another owner": "belongs to user",
    }[case]
    if case == "foreign name":
        (checkpoint / "more.pkl").write_bytes(pickle.dumps(1))
    elif case == "not in the marker":
        shutil.copy(state, state.with_name("zero_pp_rank_7_mp_rank_00_model_states.pt"))
    elif case == "link":
        state.rename(tmp_path / "elsewhere.pt")
        state.symlink_to(tmp_path / "elsewhere.pt")
    elif case == "everybody may write":
        state.chmod(0o666)
    elif os.geteuid() == 0:
        os.chown(state, 12345, -1)
    else:
        pytest.skip("only root can give a file away")
    code, _, error = run_main("train", train_recipe, "endprompt", "--out", tmp_path)
    assert code == 2 and error.count("\n") == 1 and telling in error


# -- ranks that hang or die ----------------------------------------------------------------------------------

HANG = """
import os, time
from endprompt.training import watch
def hang(self, args, state, control, **kwargs):
    if state.global_step == 3 and args.process_index == 1:
        {action}
watch.Report.on_step_end = hang
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    "action, telling",
    [
        pytest.param(
            "time.sleep(600)",
            "another rank did not answer for 8 s (train.ddp_timeout)",
            marks=pytest.mark.slow,
        ),
        ("os.kill(os.getpid(), 9)", "the connection to another rank broke"),
    ],
)
def test_the_others_end_when_one_rank_hangs_or_dies(train_recipe, shards_of, tmp_path, action, telling):
    folder = shards_of(tmp_path)
    started = time.monotonic()
    output = run(
        [
            *TORCHRUN,
            patched(tmp_path, HANG.format(action=action)),
            "train",
            train_recipe,
            "endprompt",
            "--out",
            tmp_path,
            "--set",
            "train.ddp_timeout=8",
        ],
        expect=1,
    )
    assert time.monotonic() - started < 120
    (message,) = messages(output)
    assert (
        message.startswith("endprompt: train: rank 0: ") and telling in message and "checkpoint-2;" in message
    )
    assert state(folder)["state"] == "lost a rank"


@pytest.mark.distributed
def test_a_folder_that_a_node_does_not_share_is_refused(train_recipe, shards_of, tmp_path):
    folder = shards_of(tmp_path)
    patch = """
import os, time
import torch.distributed as distributed
from endprompt.commands import saying
if os.environ["RANK"] == "0":  # slow to speak: the other rank must not end both before
    said = saying.say
    def later(*args):
        time.sleep(1)
        said(*args)
    saying.say = later
if os.environ["RANK"] == "1":
    told = distributed.broadcast_object_list
    def elsewhere(objects, *args, **kwargs):
        told(objects, *args, **kwargs)
        if isinstance(objects[0], str) and objects[0].startswith(".shared-"):
            objects[0] += "-on-another-disk"
    distributed.broadcast_object_list = elsewhere
"""
    output = run(
        [*TORCHRUN, patched(tmp_path, patch), "train", train_recipe, "endprompt", "--out", tmp_path], expect=1
    )
    (message,) = messages(output)
    assert "is not the same folder on all nodes (rank 1 does not see what rank 0 wrote)" in message
    assert not list(folder.glob(".shared-*")) and not (folder / "model").exists()


@pytest.mark.distributed
def test_ranks_that_would_resume_from_different_checkpoints_are_refused(train_recipe, half_way, tmp_path):
    folder = half_way(tmp_path)
    patch = """
import os
from endprompt.runs import checkpoint_files
if os.environ["RANK"] == "1":
    checkpoint_files.to_resume = lambda folder, log=None: folder / "checkpoint-2"
"""
    output = run(
        [*TORCHRUN, patched(tmp_path, patch), "train", train_recipe, "endprompt", "--out", tmp_path], expect=1
    )
    (message,) = messages(output)
    assert "would resume from different ones (['checkpoint-2', 'checkpoint-4'])" in message
    assert (folder / "checkpoints/checkpoint-4/complete.json").exists()


# -- another number of ranks ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_go_on_as_one_to_the_same_weights(train_recipe, half_way, two_ranks, tmp_path):
    folder = half_way(tmp_path)
    run(train(train_recipe, "endprompt", tmp_path))
    summary = json.loads((folder / "train.json").read_text())
    assert summary["resumed_from"] == "checkpoint-4" and summary["world_size"] == 1 and summary["steps"] == 8
    assert all(
        a == pytest.approx(b, rel=1e-4) for a, b in zip(losses(folder), losses(two_ranks), strict=True)
    )
    assert_same(weights(folder), weights(two_ranks), tolerance=1e-5)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, "{r: 4, alpha: 8}"])
def test_one_rank_goes_on_as_two_to_the_same_weights(train_recipe, tmp_path, lora):
    options = ["--set", "train.save_steps=4", *(["--set", f"train.lora={lora}"] if lora else [])]
    whole, cut = (prepared(train_recipe, "endprompt", tmp_path / name) for name in ("whole", "cut"))
    run(train(train_recipe, "endprompt", tmp_path / "whole", *options))
    shutil.copytree(whole / "checkpoints/checkpoint-8", cut / "checkpoints/checkpoint-8")
    shutil.copy(whole / "recipe.yaml", cut)
    run(train(train_recipe, "endprompt", tmp_path / "cut", *options, ranks=2))
    assert json.loads((cut / "train.json").read_text())["world_size"] == 2
    assert_same(weights(cut), weights(whole), tolerance=2e-4 if lora else 1e-5)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_converted_says_so(half_way, tmp_path, monkeypatch):
    from endprompt import Failure
    from endprompt.training.run import make_universal

    checkpoint = half_way(tmp_path) / "checkpoints/checkpoint-4"
    truncate(next(checkpoint.rglob("*optim_states.pt")))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        Failure,
        match=(
            "checkpoint-4 could not be converted for another number of ranks: .*; start as many ranks as"
            " before"
        ),
    ):
        make_universal(checkpoint)
    assert (
        not (checkpoint / "latest_universal").exists()
        and not (checkpoint / "global_step4_universal").exists()
    )


def test_a_resized_run_keeps_what_its_zero_options_say(train_recipe):
    """Also where they stand in the recipe itself, and where they have a section checkpoint of their own."""
    from endprompt.recipe import schema
    from endprompt.training.arguments import loading_universal

    options = {"zero_optimization": {"stage": 2}, "checkpoint": {"tag_validation": "Fail"}}
    loaded = schema.load(train_recipe, [f"train.deepspeed={json.dumps(options)}"])
    assert loaded.deepspeed == options
    assert loading_universal(loaded.deepspeed) == {
        "zero_optimization": {"stage": 2},
        "checkpoint": {"tag_validation": "Fail", "load_universal": True},
    }
    assert schema.load(train_recipe).deepspeed["zero_optimization"]["stage"] == 3


def test_a_step_keeps_its_rows_on_other_ranks():
    from endprompt.training.arguments import resumed_shape

    before = {"world_size": 8, "rows_per_step": 64}
    assert resumed_shape((4, 2), 8, before) == (4, 2)
    assert resumed_shape((4, 2), 16, before) == (4, 1)
    assert resumed_shape((4, 2), 4, before) == (4, 4)
    assert resumed_shape((4, 2), 32, before) == (2, 1)
    assert resumed_shape((4, 2), 4, {"world_size": 8}) == (4, 2)  # a marker of an earlier version
    with pytest.raises(BadInput, match="64 rows, which 24 ranks do not divide"):
        resumed_shape((4, 2), 24, before)


# -- asked to stop -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", ["file", "USR1", "TERM to torchrun"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_weights(
    way, train_recipe, shards_of, two_ranks, tmp_path
):
    folder = shards_of(tmp_path)
    slow = patched(
        tmp_path,
        "import time\nfrom endprompt.training import watch\n"
        "watch.Report.on_step_end = lambda self, args, state,"
        " control, **kwargs: time.sleep(0.7)\n",
    )
    process = subprocess.Popen(
        [*map(str, TORCHRUN), str(slow), "train", str(train_recipe), "endprompt", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env=ENVIRONMENT,
    )
    while not (folder / "checkpoints/checkpoint-2/complete.json").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    found = runfolder.summary(folder)
    assert (
        found["state"] == "training"
        and found["max_steps"] == 8
        and "train on" in found["held"][0]
        and "eta" in found
    )
    if way == "file":
        (folder / "stop").touch()
    elif way == "USR1":
        os.kill(int(found["held"][0].partition(" pid ")[2].split()[0]), signal.SIGUSR1)
    else:
        process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert "stopped on request after step" in output, output[-3000:]
    assert (process.returncode == 0) == (way != "TERM to torchrun")
    stopped = checkpoint_files.newest(folder / "checkpoints").name
    assert (
        stopped in {f"checkpoint-{step}" for step in range(2, 8)}
        and not (folder / "model").exists()
        and not (folder / "stop").exists()
    )
    assert runfolder.summary(folder)["state"] == "stopped on request"
    run(train(train_recipe, "endprompt", tmp_path, ranks=2))
    assert json.loads((folder / "train.json").read_text())["resumed_from"] == stopped
    assert_same(weights(folder), weights(two_ranks), tolerance=0)
    assert runfolder.summary(folder)["state"] == "finished"


def test_run_sh_tells_its_endings_apart(train_recipe, shards_of, tmp_path):
    """A torchrun of the test's own: what run.sh makes of its exit code and of the run's folder."""
    folder = shards_of(tmp_path)
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/python"
    fake.write_text(f"""#!/bin/sh
case "$*" in
  *"endprompt path"*) echo '{folder}' ;;
  *"endprompt gpus"*) echo 0 ;;
  *) [ -z "$SAYS" ] || echo "$SAYS" >"$ENDPROMPT_EXIT_CODE_FILE"; exit "$CODE" ;;
esac
""")
    fake.chmod(0o755)

    def ending(code: int, says: str = "") -> int:
        environment = {
            **ENVIRONMENT,
            "CODE": str(code),
            "SAYS": says,
            "PYTHON": str(fake),
            "OUT": str(tmp_path),
            "STAGES": "train",
            "NPROC": "1",
        }
        return subprocess.run(
            ["bash", "recipes/run.sh", str(train_recipe), "endprompt"],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            timeout=30,
        ).returncode

    assert ending(0) == 75 and ending(1) == 1
    assert ending(1, "2") == 2 and ending(1, "3") == 3
    (folder / "model").mkdir()
    assert ending(0) == 0


# -- two runs in one folder ----------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from endprompt.runs import runfolder
with runfolder.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "command, lock",
    [("prepare", ".prepare.lock"), ("train", ".train.lock"), ("evaluate", "eval/.passkey-256.lock")],
)
def test_the_second_of_two_runs_in_one_folder_refuses(command, lock, train_recipe, shards_of, tmp_path):
    folder = shards_of(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / lock)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=ENVIRONMENT,
    )
    try:
        assert process.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        code, _, error = run_main(command, train_recipe, "endprompt", "--out", tmp_path)
        assert (
            code == 2
            and error.count("\n") == 1
            and f"is in use by {os.uname().nodename} pid {process.pid}" in error
        )
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        assert runfolder.holder(folder / lock).split(" since")[0].endswith(f"pid {process.pid}")
    finally:
        process.kill()
        process.wait()
    assert runfolder.holder(folder / lock) is None  # kill -9 frees it, though the file is left
    with runfolder.hold(folder / lock):
        pass
    assert not (folder / lock).exists()


def test_slurm_s_job_number_is_in_the_message(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with runfolder.hold(tmp_path / "lock"):
        assert "Slurm job 4711" in (tmp_path / "lock").read_text()


# -- status --------------------------------------------------------------------------------------------------


def test_status_of_a_run_at_each_stage(train_recipe, two_ranks, half_way, tmp_path):
    code, out, _ = run_main("status", two_ranks)
    assert code == 0 and "finished" in out and "checkpoint-8" in out and "8192 tokens" not in out
    found = json.loads(run_main("status", two_ranks, "--json")[1])
    history = json.loads((two_ranks / "train.json").read_text())["history"]
    assert (
        found["step"] == found["max_steps"] == 8
        and found["loss"] == history[-1]["loss"]
        and found["text_loss"]
        and found["end_prompt_loss"]
    )
    folder = half_way(tmp_path)
    assert json.loads(run_main("status", folder, "--json")[1])["state"] == "prepared, not trained"
    # Killed half-way: it says that it trains, and nobody holds it.
    runfolder.write_status(
        folder, state="training", step=4, max_steps=8, tokens_per_second=1000.0, tokens_per_step=1024
    )
    found = json.loads(run_main("status", folder, "--json")[1])
    assert (
        found["state"].startswith("ended without a word")
        and found["checkpoint"] == "checkpoint-4"
        and "eta" not in found
    )
    with runfolder.hold(folder / runfolder.TRAIN_LOCK):
        script = f"from endprompt.cli import main; main(['status', {str(folder)!r}])"
        out = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", script],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=ENVIRONMENT,
            timeout=60,
        )
    assert (
        "training" in out.stdout and "eta" in out.stdout and "4 s" in out.stdout
    )  # 4 steps of 1024 tokens at 1000 a second
    assert " torch" not in out.stderr, "status imports torch"
    code, _, error = run_main("status", tmp_path / "nothing")
    assert code == 2 and "is no run's folder" in error


def test_a_part_of_prepare_that_is_under_way_shows(train_recipe, tmp_path):
    options = ["--out", tmp_path, "--workers", 1]
    assert run_main("prepare", train_recipe, "endprompt", *options, "--part", "2/3")[0] == 0
    found = runfolder.summary(tmp_path / "small/endprompt")
    assert found["state"] == "not prepared" and found["preparing"] == ["part-00002-of-00003: 21 rows"]


@pytest.mark.distributed
def test_ranks_end_with_a_killed_launcher_before_they_have_met(train_recipe, shards_of, tmp_path):
    """They wait inside C++ then, where no handler of Python's is run."""
    folder = shards_of(tmp_path)
    script = patched(
        tmp_path,
        "from endprompt.bases import model\nimport time\n"
        "model.load_tokenizer = lambda *given: time.sleep(600)\n",
    )
    process = subprocess.Popen(
        [*map(str, TORCHRUN), str(script), "train", str(train_recipe), "endprompt", "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
        env=ENVIRONMENT,
    )
    end = time.monotonic() + 60
    while runfolder.holder(folder / runfolder.TRAIN_LOCK) is None:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    time.sleep(1)
    process.kill()
    process.wait()
    while runfolder.holder(folder / runfolder.TRAIN_LOCK) is not None:
        assert time.monotonic() < end, "a rank outlived its launcher"
        time.sleep(0.1)
