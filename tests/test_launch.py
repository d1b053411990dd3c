"""What scripts ask of the command line: where a run is, how many ranks to start, and how the training
ended.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_main
from training import ENVIRONMENT, prepared

from endprompt.runs import launch

# -- where a run is ------------------------------------------------------------------------------------------


def test_path_knows_the_recipes_that_come_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main("path", "tiny", "short") == (0, "runs/tiny/short\n", "")


def test_path_is_where_every_command_writes(recipe_file, tmp_path):
    recipe = recipe_file("some.thing")
    assert run_main("path", recipe, "short") == (0, "runs/some.thing/short\n", "")
    assert run_main("path", recipe, "--out", tmp_path, "--set", "data.seed=1") == (
        0,
        f"{tmp_path}/some.thing\n",
        "",
    )
    folder = prepared(recipe, "short", tmp_path / "out").parents[1]
    copy = tmp_path / "out/some.thing/short/recipe.yaml"
    assert copy.is_file() and run_main("path", copy, "short", "--out", folder)[1] == f"{copy.parent}\n"
    assert run_main("path", copy, "pose", "--out", folder)[1] == f"{copy.parent.with_name('pose')}\n"
    moved = shutil.copy(copy, tmp_path / "renamed.yaml")
    assert run_main("path", moved, "short", "--out", folder)[1] == f"{copy.parent}\n"
    tree = copy.read_text()
    Path(moved).write_text(
        tree.replace("recipe: some.thing\n", "")
    )  # the twin: no resolved copy, so that the file's name counts
    assert run_main("path", moved, "short")[1] == "runs/renamed/short\n"


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["nowhere.yaml", "short"], "there is no file nowhere.yaml"),
        (["recipes/tiny.yaml", "nope"], "none named 'nope'"),
    ],
)
def test_path_refuses_what_is_no_run(arguments, complaint, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    code, out, error = run_main("path", *arguments)
    assert (code, out) == (2, "") and complaint in error and error.count("\n") == 1


def test_what_scripts_ask_is_quick():
    for arguments in (["path", "recipes/tiny.yaml", "endprompt"], ["gpus"]):
        script = f"from endprompt.cli import main; main({arguments!r})"
        out = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", script],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=ENVIRONMENT,
            timeout=60,
        )
        assert out.returncode == 0
        assert not [
            line
            for line in out.stderr.splitlines()
            if line.split("|")[-1].strip() in ("torch", "transformers")
        ]


def test_no_script_derives_the_folder_of_a_run():
    scripts = [
        REPOSITORY / name
        for name in subprocess.run(
            ["git", "ls-files", "*.sh", "*.sbatch"], capture_output=True, text=True, cwd=REPOSITORY
        ).stdout.split()
    ]
    assert len(scripts) > 8
    for script in scripts:
        code = "\n".join(
            line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")
        )
        assert "nvidia-smi" not in code and "SLURM_GPUS" not in code, script
        assert (
            'basename "$recipe"' not in code and 'basename "$RECIPE"' not in code and "OUT/tiny" not in code
        ), script


# -- GPUs ----------------------------------------------------------------------------------------------------

PLAIN = "".join(f"GPU {number}: NVIDIA A100-SXM4-80GB (UUID: GPU-{number}aaa-bbbb)\n" for number in range(8))
MIG = """GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0aaa-bbbb)
  MIG 3g.40gb     Device  0: (UUID: MIG-1111)
  MIG 3g.40gb     Device  1: (UUID: MIG-2222)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-1aaa-bbbb)
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """nvidia_smi(text, code=0): what the only nvidia-smi in PATH says, and its exit code."""

    def write(text: str, code: int = 0) -> None:
        folder = tmp_path / "nvidia"
        folder.mkdir(exist_ok=True)
        (folder / "said").write_text(text)
        fake = folder / "nvidia-smi"
        fake.write_text(f'#!/bin/sh\n[ "$1" = --list-gpus ] || exit 9\ncat {folder}/said\nexit {code}\n')
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        for name in (
            "CUDA_VISIBLE_DEVICES",
            "SLURM_GPUS_ON_NODE",
            "HIP_VISIBLE_DEVICES",
            "ROCR_VISIBLE_DEVICES",
        ):
            monkeypatch.delenv(name, raising=False)

    return write


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, 8),
        ({"CUDA_VISIBLE_DEVICES": "2"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "7,0,3"}, 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,8,1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "1,1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": " 1 , 2 "}, 2),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "GPU-3aaa-bbbb,GPU-5"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-9"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "GPU-"}, 0),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "16"}, 8),
        ({"SLURM_GPUS_ON_NODE": "gpu:4"}, 8),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 4),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "6"}, 1),
        ({"HIP_VISIBLE_DEVICES": "0"}, 8),
    ],
)
def test_gpus_are_those_that_the_process_may_use(nvidia_smi, variables, expected):
    nvidia_smi(PLAIN)
    environment = {"PATH": os.environ["PATH"], **variables}
    assert launch.gpus(environment) == expected


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, 1),
        ({"CUDA_VISIBLE_DEVICES": "MIG-2222"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1111,MIG-2222"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "MIG-9"}, 0),
    ],
)
def test_a_process_has_one_instance_of_mig(nvidia_smi, variables, expected):
    nvidia_smi(MIG)
    assert launch.gpus(variables) == expected


@pytest.mark.parametrize(
    "text, code",
    [
        ("", 0),
        ("No devices found.\n", 0),
        ("NVIDIA-SMI has failed because it couldn't communicate\nwith the driver.\n", 9),
        (PLAIN, 9),
    ],
)
def test_what_an_nvidia_smi_without_gpus_says_is_not_counted(nvidia_smi, text, code):
    nvidia_smi(text, code)
    assert launch.gpus({"SLURM_GPUS_ON_NODE": "8"}) == 0


def test_without_nvidia_smi_slurm_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.gpus({}) == launch.gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == 0
    assert launch.gpus({"SLURM_GPUS_ON_NODE": "4"}) == 4
    assert launch.gpus({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}) == 4
    assert (
        launch.gpus(
            {"SLURM_GPUS_ON_NODE": "4", "ROCR_VISIBLE_DEVICES": "0,1,2", "HIP_VISIBLE_DEVICES": "1,2"}
        )
        == 2
    )


# -- what run.sh starts --------------------------------------------------------------------------------------


@pytest.fixture
def started(recipe_file, tmp_path):
    """started(recipe, method, **environment) -> the arguments of the torchrun that run.sh would start; None
    if it starts none.
    """
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/bash\nif [ "$2" = endprompt ]; then exec {sys.executable} "$@"; fi\nprintf "%s\\n" "$@"'
        f" >{tmp_path}/started\n"
    )
    fake.chmod(0o755)

    def start(recipe, method: str, **environment) -> list[str] | None:
        (tmp_path / "started").unlink(missing_ok=True)
        environment = {
            **ENVIRONMENT,
            "PATH": os.environ["PATH"],
            "PYTHON": str(fake),
            "OUT": str(tmp_path / "out"),
            "STAGES": "train",
            **environment,
        }
        subprocess.run(
            ["bash", "recipes/run.sh", str(recipe), method],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            timeout=60,
        )
        return (tmp_path / "started").read_text().splitlines() if (tmp_path / "started").exists() else None

    return start


@pytest.mark.slow
def test_run_sh_starts_a_rank_for_each_gpu_that_it_may_use(recipe_file, started, nvidia_smi, tmp_path):
    recipe = recipe_file()
    folder = prepared(recipe, "short", tmp_path / "out")
    nvidia_smi(PLAIN)
    assert "--nproc_per_node=8" in started(recipe, "short")
    assert "--nproc_per_node=1" in started(recipe, "short", CUDA_VISIBLE_DEVICES="2")
    assert "--nproc_per_node=2" in started(recipe, "short", CUDA_VISIBLE_DEVICES="")  # on the CPU
    assert "--nproc_per_node=3" in started(recipe, "short", CUDA_VISIBLE_DEVICES="2", NPROC="3")
    # A run's own recipe, whatever its file is called, and not the folder that the file's name would give.
    assert "--nproc_per_node=8" in started(folder / "recipe.yaml", "short")
    assert "--nproc_per_node=8" in started(
        shutil.copy(folder / "recipe.yaml", tmp_path / "other.yaml"), "short"
    )
    (folder / "shards/manifest.json").unlink()
    assert started(folder / "recipe.yaml", "short") is None  # no shards: said once, by one process


@pytest.mark.parametrize("options", [["--out", "elsewhere"], ["--out=elsewhere"], ["--ou", "x"], ["--o=x"]])
def test_run_sh_takes_the_folder_from_the_environment_alone(options, staged, tmp_path):
    """It would look for shards and a model in OUT, and start one process in place of all ranks."""
    done = staged(*options)
    said = done.communicate(timeout=30)[0]
    assert done.returncode == 2 and said.count("\n") == 1 and "set OUT=DIR before the command" in said
    assert said.startswith(f"run.sh: {options[0]}: ") and not (tmp_path / "log").exists()


def test_run_sh_hands_other_options_on(staged, tmp_path):
    done = staged("--set", "data.tokens=1", "--only", "passkey", STAGES="evaluate")
    assert done.wait(30) == 0 and begun(tmp_path / "log") == ["evaluate"]


# -- several nodes, and signals ------------------------------------------------------------------------------

# A Python of the test's own: a stage notes its name; the training goes on until it is asked to stop.
STAGES = """#!/bin/bash
case "$*" in
  *"endprompt path"*) echo "{run}" ;;
  *"endprompt gpus"*) echo 0 ;;
  *torch.distributed.run*) echo "train $*" >>"{log}"; until [ -e "{run}/stop" ]; do sleep 0.05; done ;;
  *) echo "$3" >>"{log}"; [ -z "$STAYS" ] || exec sleep 60 ;;
esac
"""


@pytest.fixture
def staged(tmp_path):
    """staged(*options, **environment) -> run.sh as a process; what it starts is noted in tmp_path/log."""
    (tmp_path / "run/shards").mkdir(parents=True)
    (tmp_path / "run/shards/manifest.json").touch()
    fake = tmp_path / "python"
    fake.write_text(STAGES.format(run=tmp_path / "run", log=tmp_path / "log"))
    fake.chmod(0o755)

    def start(*options, **environment) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "recipes/run.sh", "recipes/tiny.yaml", "short", *options],
            cwd=REPOSITORY,
            env={**ENVIRONMENT, "PYTHON": str(fake), "OUT": str(tmp_path), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def begun(log: Path, count: int = 1) -> list[str]:
    end = time.monotonic() + 30
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert time.monotonic() < end
        time.sleep(0.02)
    return log.read_text().splitlines()


def test_the_first_of_several_nodes_prepares_and_evaluates_and_all_train(staged, tmp_path):
    nodes = {"NNODES": "2", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    log, shards = tmp_path / "log", tmp_path / "run/shards/manifest.json"
    shards.unlink()
    other = staged(**nodes, NODE_RANK="1")
    assert "node 1 waits until the first has prepared" in other.stdout.readline() and not log.exists()
    shards.touch()
    (line,) = begun(log)
    assert line.startswith("train ") and "--nnodes=2 --node_rank=1 --master_addr=first" in line
    (tmp_path / "run/model").mkdir()
    (tmp_path / "run/stop").touch()
    assert other.wait(20) == 0 and begun(log) == [line]
    first = staged(**nodes, NODE_RANK="0")
    assert first.wait(20) == 0 and begun(log)[1:] == ["prepare", "train", "evaluate"]


def test_sigterm_ends_a_stage_at_once_and_the_training_after_its_step(staged, tmp_path):
    log = tmp_path / "log"
    process = staged(STAYS="yes")
    assert begun(log) == ["prepare"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    log.unlink()
    (tmp_path / "run/stop").touch()  # of a start that did not live to hear it
    process = staged(STAGES="train evaluate")
    begun(log)
    assert process.poll() is None and not (tmp_path / "run/stop").exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75 and "evaluate" not in log.read_text()
    # Nor does it go on to the next stage where it came too late, with the last step.
    log.unlink()
    process = staged(STAGES="train evaluate")
    begun(log)
    (tmp_path / "run/model").mkdir()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75 and "evaluate" not in log.read_text()


def test_in_a_step_of_slurm_the_ranks_hear_the_signal_themselves(staged, tmp_path):
    process = staged(STAGES="train", SLURM_STEP_ID="0")
    begun(tmp_path / "log")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None and not (tmp_path / "run/stop").exists()
    (tmp_path / "run/stop").touch()
    assert process.wait(20) == 75


# -- exit codes ----------------------------------------------------------------------------------------------


def test_the_first_exit_code_stays(tmp_path, monkeypatch):
    monkeypatch.delenv(launch.EXIT_CODE_FILE, raising=False)
    launch.note_exit_code(2)
    monkeypatch.setenv(launch.EXIT_CODE_FILE, str(tmp_path / "code"))
    launch.note_exit_code(2)
    launch.note_exit_code(3)
    assert (tmp_path / "code").read_text() == "2\n"
    monkeypatch.setenv(launch.EXIT_CODE_FILE, str(tmp_path / "gone/code"))
    launch.note_exit_code(2)  # nowhere to leave it: the end itself must not fail


def test_wrong_arguments_of_a_rank_are_noted_too(tmp_path, monkeypatch):
    monkeypatch.setenv(launch.EXIT_CODE_FILE, str(tmp_path / "code"))
    assert (
        run_main("train", "recipes/tiny.yaml", "short", "--nonsense")[0] == 2
        and (tmp_path / "code").read_text() == "2\n"
    )
    (tmp_path / "code").unlink()
    assert run_main("--version")[0] == 0 and not (tmp_path / "code").exists()


def ended(recipe: Path, out: Path, **environment) -> tuple[int, str]:
    environment = {
        **ENVIRONMENT,
        "PYTHON": sys.executable,
        "OUT": str(out),
        "STAGES": "train",
        "NPROC": "2",
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    done = subprocess.run(
        ["bash", "recipes/run.sh", str(recipe), "endprompt"],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("shards of another recipe", marks=pytest.mark.slow),
        pytest.param("a foreign checkpoint", marks=pytest.mark.slow),
        pytest.param("ranks that do not divide a step", marks=pytest.mark.slow),
        "a rank that crashes",
    ],
)
def test_bad_input_that_only_the_ranks_find_ends_run_sh_with_2(case, train_recipe, two_ranks, tmp_path):
    folder, options, expected = tmp_path / "small/endprompt", {}, 2
    shutil.copytree(
        two_ranks,
        folder,
        ignore=shutil.ignore_patterns(".cache", "model", "eval", "logs", "checkpoint-6", "checkpoint-8"),
    )
    status = folder / "status.json"
    status.write_text(
        json.dumps({**json.loads(status.read_text()), "state": "failed", "reason": "of an earlier start"})
    )
    newest = folder / "checkpoints/checkpoint-4"
    if case == "shards of another recipe":
        shutil.rmtree(folder / "checkpoints")
        manifest = folder / "shards/manifest.json"
        tree = json.loads(manifest.read_text())
        manifest.write_text(
            json.dumps(
                {**tree, "settings": {**tree["settings"], "seed": 7}}
                if "settings" in tree
                else {**tree, "seed": 7}
            )
        )
        telling = "do not belong to this recipe"
    elif case == "a foreign checkpoint":
        (newest / "more.pkl").write_bytes(b"")
        telling = "is no file that the run itself wrote"
    elif case == "ranks that do not divide a step":
        marker = newest / "complete.json"
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "world_size": 3, "rows_per_step": 9}))
        telling = "rows, which 2 ranks do not divide"
    else:  # the twin: what is no bad input stays a failure, also after a start that a guard ended
        (tmp_path / "sitecustomize.py").write_text(
            'import os\nif os.environ.get("RANK") == "1":\n    os._exit(7)\n'
        )
        options = {"PYTHONPATH": f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}"}
        telling, expected = "exitcode", 1
    code, output = ended(train_recipe, tmp_path, **options)
    assert code == expected and telling in output, output[-3000:]
    assert not (folder / "model").exists()
    if expected == 2:
        assert output.count("endprompt: ") == 1 and json.loads(status.read_text())["state"] == "refused"
