"""What a cluster's own file (slurm/site.sh, ENDPROMPT_SITE) may do, and what is refused before a job begins.
On fake programs, see fake_site.py; on a real Slurm: test_slurm.py.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, tiny_documents, write_jsonl
from fake_site import ANSWERS, MODULE, SBATCH, SCONTROL, SRUN, Site
from training import prepared

from endprompt.runs import checkpoint_files

SCRIPTS = ("prepare.sbatch", "train_64k.sbatch", "eval.sbatch", "submit_all.sh")
TELL = (
    'source slurm/environment.sh; echo "$PYTHON"; echo "${launcher[*]}"; command -v python;'
    ' in_job "$PYTHON" --version'
)


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def bash(site: Site, *command: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", *command],
        cwd=site.root,
        env=site.environment(**environment),
        capture_output=True,
        text=True,
        timeout=120,
    )


def told(site: Site, text: str | None = None, **environment) -> list[str]:
    """PYTHON, the launcher, the python in PATH and PYTHON's version, as the job scripts have them."""
    if text is not None:
        (site.root / "slurm/site.sh").write_text(text)
    done = bash(site, "-c", TELL, **environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


# -- what it may do ------------------------------------------------------------------------------------------


def test_without_a_file_everything_is_as_it_was(site):
    python, launcher, found, version = told(site)
    assert (python, launcher, found) == ("python", "", str(site.bin / "python")) and "Python 3" in version
    own = site.program("../repository/.venv/bin/python", '#!/bin/bash\nexec {python} "$@"\n')
    assert told(site)[0] == str(own.resolve())
    assert told(site, PYTHON="python3")[0] == "python3"


def test_the_file_may_bring_a_python_of_its_own(site):
    site.program("../repository/.venv/bin/python", '#!/bin/bash\nexec {python} "$@"\n')
    other = site.program("../other/python", '#!/bin/bash\nexec {python} "$@"\n').resolve()
    assert told(site, f'PATH={other.parent}:$PATH; [ -z "$NOBODY_HAS_SET_THIS" ]\n')[::2] == [
        "python",
        str(other),
    ]
    assert told(site, f"PYTHON={other}")[0] == str(other)
    # Named, or left out.
    (site.root / "mine.sh").write_text("PYTHON=python3\ncd /\n")
    assert told(site, ENDPROMPT_SITE="mine.sh")[0] == "python3"
    assert told(site, ENDPROMPT_SITE="")[0].endswith(".venv/bin/python")


def test_the_modules_example(site):
    site.program("module", MODULE)
    own = site.program("../repository/.venv/bin/python", '#!/bin/bash\nexec {python} "$@"\n').resolve()
    assert told(site, ENDPROMPT_SITE="slurm/sites/modules.sh")[0] == str(own)
    assert site.calls("module") == ["purge", "load cuda/12.8 gcc/13"]
    # Where the shell of the job knows no `module` yet.
    (site.bin / "module").unlink()
    start = site.root / "modules-init.sh"
    start.write_text('module() { echo "by its file: $*" >&3; }\n')
    done = bash(
        site,
        "-c",
        f"exec 3>{site.log}/module; {TELL}",
        ENDPROMPT_SITE="slurm/sites/modules.sh",
        MODULES_INIT=start,
    )
    assert done.returncode == 0, done.stderr
    assert site.calls("module") == ["by its file: purge", "by its file: load cuda/12.8 gcc/13"]


def test_the_environment_example(site):
    python = site.program("../env/bin/python", '#!/bin/bash\nexec {python} "$@"\n').resolve()
    activate = python.with_name("activate")
    activate.write_text(
        f'[ -z "$NOBODY_HAS_SET_THIS" ]\nexport VIRTUAL_ENV={python.parents[1]} PATH={python.parent}:$PATH\n'
    )
    found = told(site, ENDPROMPT_SITE="slurm/sites/venv.sh", VENV=python.parents[1])
    assert found[0] == "python" and found[2] == str(python)


def test_the_container_example_wraps_every_python_of_every_job(site):
    fake = {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "python3": ANSWERS}
    for name, text in fake.items():
        site.program(name, text)
    for script in SCRIPTS:
        done = bash(
            site,
            f"slurm/{script}",
            ENDPROMPT_SITE="slurm/sites/apptainer.sh",
            SLURM_JOB_NODELIST="n1",
            SLURM_JOB_ID="1",
        )
        assert done.returncode == 0, done.stderr
    calls = site.calls("python")
    for command in ("prepare", "evaluate", "path", "gpus"):
        assert [call for call in calls if f"-m endprompt {command} " in f"{call} "], command
    assert all(call.startswith(f"{site.image} ") for call in calls)
    assert all(call.startswith("exec --nv --bind ") for call in site.calls("apptainer"))
    assert "apptainer exec --nv" in site.calls("srun")[0] and "--export=ALL" in site.calls("srun")[0]


def test_the_options_example_reaches_sbatch(site):
    site.program("sbatch", SBATCH)
    site.program("python", ANSWERS)
    done = bash(site, "slurm/submit_all.sh", ENDPROMPT_SITE="slurm/sites/gres.sh", GPUS="8", GPU_TYPE="h100")
    assert done.returncode == 0, done.stderr
    prepare, train, evaluate = site.calls("sbatch")
    assert "gres" not in prepare and "--gres=gpu:h100:8 --partition=gpu" in train and "gpu:h100:1" in evaluate
    bash(site, "slurm/submit_all.sh", ENDPROMPT_SITE="slurm/sites/gres.sh", TRAIN_OPTIONS="--gres=gpu:2")
    assert "--gres=gpu:2 slurm/train" in site.calls("sbatch")[-2]


def test_a_method_that_trains_nothing_is_evaluated_alone(site):
    site.program("sbatch", SBATCH)
    site.program("python", ANSWERS)
    done = bash(site, "slurm/submit_all.sh", "base", "short", TRAIN_OPTIONS="--partition=gpu")
    assert done.returncode == 0 and done.stdout.count("train") == 2, done.stderr
    assert [line.split()[2::2] for line in done.stdout.splitlines()] == [["-", "-", "7"], ["7", "7", "7"]]
    first, *chain = site.calls("sbatch")
    assert first.endswith("slurm/eval.sbatch") and "dependency" not in first
    assert [call.rpartition("/")[2] for call in chain] == [
        "prepare.sbatch",
        "train_64k.sbatch",
        "eval.sbatch",
    ]
    assert [call.count("--dependency=afterok:7") for call in chain] == [0, 1, 1]


def test_a_method_or_step_that_cannot_be_trained_is_not_queued(site):
    """By the program's own answer; of two methods, what comes before the wrong one stays queued."""
    site.program("sbatch", SBATCH)
    for method, recipe, words in (
        ("nonsense", "tiny.yaml", "nonsense"),
        ("full_length", "one.yaml", "are 0.125 rows of 2048"),
    ):
        tree = yaml.safe_load((REPOSITORY / "recipes/tiny.yaml").read_text())
        tree["train"] |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        (site.root.parent / "one.yaml").write_text(yaml.safe_dump(tree))
        path = site.root.parent / recipe if recipe == "one.yaml" else REPOSITORY / "recipes/tiny.yaml"
        done = bash(site, "slurm/submit_all.sh", method, RECIPE=path)
        assert done.returncode == 2 and words in done.stderr and not site.calls("sbatch"), done.stderr


# -- what is refused -----------------------------------------------------------------------------------------

CONTAINER = 'launcher=(apptainer exec {} "$IMAGE")\nPYTHON=python3\n'


@pytest.mark.parametrize(
    "text, words",
    [
        ("true\nfalse\n", ("slurm/site.sh ended with exit code 1 (line 2: false)", "mend that file")),
        ("f() { return 3; }\nf\ntrue\n", ("exit code 3 (line 2: f)",)),
        ("false | true\n", ("exit code 1",)),
        ("exit 0\n", ("ended with exit code 0", "mend that file")),
        ("return 4\n", ("exit code 4; mend",)),
        ('launcher="apptainer exec $IMAGE"\n', ("no command 'apptainer exec ", "are an array")),
        ("launcher=(no-such-program run)\n", ("no command 'no-such-program'",)),
        ("PYTHON=no-such-python\n", ("'no-such-python'", "not found", "mend slurm/site.sh or PYTHON")),
        ("PYTHON=bare\n", ("it lacks torch, transformers, deepspeed",)),
        ("PYTHON=fell\n", ("'fell'", "Segmentation")),
        (CONTAINER.format("--no-such-option"), ("apptainer exec --no-such-option", "unknown flag")),
        ("IMAGE=none.sif\n" + CONTAINER.format("--nv"), ("could not open image none.sif",)),
        (CONTAINER.format("--cleanenv"), ("does not hand the environment on", "no --cleanenv")),
        ('mkdir "$OUT"\n' + CONTAINER.format('--hide "$OUT"'), ("does not show", "/runs (Apptainer: ")),
        (CONTAINER.format('--hide "$RECIPE"'), ("does not show", "recipes/tiny.yaml (Apptainer: --bind it)")),
    ],
)  # fmt: skip
def test_a_file_that_does_not_do_is_refused_in_one_line(site, text, words):
    site.program("bare", '#!/bin/bash\nexec {python} -I -S "$@"\n')
    site.program("fell", '#!/bin/bash\necho "Segmentation fault" >&2; exit 139\n')
    (site.root / "slurm/site.sh").write_text(text)
    done = bash(site, "slurm/prepare.sbatch", SLURM_JOB_NAME="endprompt-prepare")
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("endprompt-prepare: "), done.stderr
    assert not [word for word in words if word not in done.stderr], done.stderr
    assert not [call for call in site.calls("python") if "-m endprompt" in call]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("named", ["none.sh", "slurm"])
def test_a_named_file_that_is_none_is_refused_by_every_script(site, script, named):
    site.program("sbatch", SBATCH)
    site.program("none.sh", "true\n")  # bash would find it in PATH
    done = bash(site, f"slurm/{script}", ENDPROMPT_SITE=named)
    assert done.returncode == 2 and not site.calls("sbatch")
    assert done.stderr.count("\n") == 1 and f"there is no file {named} to read" in done.stderr


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.endswith(".sbatch")])
@pytest.mark.parametrize("option", ["--out", "--out=elsewhere", "--ou=elsewhere"])
def test_a_folder_that_the_environment_does_not_name_is_refused(site, script, option):
    done = bash(site, f"slurm/{script}", "--set", "data.tokens=1e6", option, "elsewhere")
    assert done.returncode == 2 and not site.calls("python"), done.stderr
    assert done.stderr.count("\n") == 1 and "set OUT=DIR before sbatch" in done.stderr


def scored(site, ids: list[int], **environment) -> list[subprocess.CompletedProcess]:
    """The tasks ``ids`` of an array of eval.sbatch, one after the other."""
    array = {"MIN": min(ids), "MAX": max(ids), "COUNT": len(ids)}
    told = {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
    return [bash(site, "slurm/eval.sbatch", **told, SLURM_ARRAY_TASK_ID=one, **environment) for one in ids]


@pytest.mark.parametrize("ids", [[2, 4], [0, 2, 4, 6, 8], [0, 1, 3]])
def test_an_array_with_gaps_would_leave_pairs_unscored_and_is_refused(site, ids):
    site.program("python", ANSWERS)
    for done in scored(site, ids):
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "has gaps" in done.stderr and "what is scored is skipped" in done.stderr
    assert not [call for call in site.calls("python") if "evaluate" in call]


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0], [2, 3], [7]])
def test_an_array_without_gaps_scores_every_pair_once(site, ids):
    pairs = [f"passkey:{length}" for length in (64, 128, 256, 512, 1024, 2048, 4096)]
    site.program("python", ANSWERS.replace("passkey:1024", " ".join(pairs)))
    assert all(done.returncode == 0 for done in scored(site, ids))
    calls = [call for call in site.calls("python") if " evaluate " in call and "--list" not in call]
    assert sorted(re.findall(r"--only (\S+)", " ".join(calls))) == sorted(pairs) and len(calls) == len(ids)


def test_a_link_to_nowhere_is_not_passed_over(site):
    (site.root / "slurm/site.sh").symlink_to("gone.sh")
    done = bash(site, "-c", TELL)
    assert done.returncode == 2 and "there is no file slurm/site.sh to read" in done.stderr


def test_examples_that_lack_what_they_name_are_refused(site):
    for name, words in {
        "modules.sh": ": module load ",
        "venv.sh": "ended with exit code 1",
        "apptainer.sh": "could not open image",
    }.items():
        site.program("module", MODULE)
        done = bash(
            site,
            "-c",
            TELL,
            ENDPROMPT_SITE=f"slurm/sites/{name}",
            MODULES_GCC="missing",
            VENV="none",
            IMAGE="none.sif",
        )
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr


@pytest.fixture
def probe():
    spec = importlib.util.spec_from_file_location("probe", REPOSITORY / "slurm/probe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_probe(probe, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", "runs")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    here = (str(tmp_path), str(os.stat(tmp_path).st_ino))
    device = tmp_path / "nvidiactl"
    assert probe.wrong("runs", [here], str(device)) is None
    assert "does not show" in probe.wrong("runs", [(here[0], "1")], str(device))
    assert "does not show the repository" in probe.wrong("runs", [(".", "1")], str(device))
    # A container without the driver: its ranks would train on CPU.
    monkeypatch.setattr(probe.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    device.touch()
    assert probe.wrong("runs", [here], str(device)) is None  # no GPU was asked for
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert "--nv" in probe.wrong("runs", [here], str(device))
    monkeypatch.setattr(probe.ctypes, "CDLL", lambda name: name)
    assert probe.wrong("runs", [here], str(device)) is None
    monkeypatch.setitem(sys.modules, "endprompt.cli", None)
    assert "cannot import endprompt" in probe.wrong("runs", [here], str(device))
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    assert probe.wrong("runs", [here], str(device)) == "this is Python 3.9, and 3.11 is needed"


# -- signals and endings through a container -----------------------------------------------------------------


@pytest.fixture(scope="module")
def sixty_steps(tmp_path_factory, base) -> Path:
    """The folder of a run of 240 rows in 60 steps, with a checkpoint every 4, that has its shards."""
    folder = tmp_path_factory.mktemp("sixty")
    path = folder / "small.yaml"
    tree = {
        "model": {"name_or_path": str(base)},
        "lengths": {"physical": 128, "target": 1024},
        "data": {
            "corpus": str(write_jsonl(folder / "corpus.jsonl", tiny_documents(240, 18))),
            "tokens": 240 * 128,
        },
        "train": {
            "deepspeed": str(REPOSITORY / "ds_configs/zero3.json"),
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_steps": 4,
        },
    }
    path.write_text(yaml.safe_dump(tree))
    return prepared(path, "endprompt", folder / "runs")


FAILS = """#!/bin/bash
echo start >>"{log}/srun"
starts=$(wc -l <"{log}/srun")
if [ "$starts" = "$GAINING_START" ]; then
  mkdir -p "$OUT/tiny/endprompt/checkpoints/checkpoint-4"
  touch "$OUT/tiny/endprompt/checkpoints/checkpoint-4/complete.json"
fi
exit 1
"""


@pytest.fixture
def start(site):
    """Starts the job for the ``number``-th time after its first; the start called ``gaining`` writes a
    checkpoint, and every one fails.
    """
    site.program("python", ANSWERS)
    for name, text in {"srun": FAILS, "scontrol": SCONTROL}.items():
        site.program(name, text)

    def start(number: int, gaining: str = "none") -> subprocess.CompletedProcess:
        return bash(
            site,
            "slurm/train_64k.sbatch",
            SLURM_JOB_NODELIST="n1",
            SLURM_JOB_ID="5",
            SLURM_RESTART_COUNT=str(number),
            GAINING_START=gaining,
            PYTHON="python",
        )

    return start


@pytest.mark.parametrize("gaining, before_it_gives_up", [("none", 2), ("3", 5)])
def test_three_starts_in_a_row_without_a_checkpoint_are_the_last(site, start, gaining, before_it_gives_up):
    """One start that fails, as on a node that has just come back, does not end the job."""
    for number in range(before_it_gives_up):
        done = start(number, gaining)
        assert done.returncode == -signal.SIGTERM and "queued again" in done.stdout, done.stdout + done.stderr
    last = start(before_it_gives_up, gaining)
    assert last.returncode == 1 and "the third start in a row without a new checkpoint" in last.stderr
    assert site.calls("scontrol").count("requeue 5") == before_it_gives_up
    assert start(0).returncode == -signal.SIGTERM  # somebody's new job of the same run counts from nought


@pytest.mark.parametrize("kept", ["", "no number"])
def test_a_checkpoint_of_a_start_that_slurm_ended_counts(site, start, kept):
    """Such a start, or one that was stopped on request, does not come to the lines that count."""
    assert [start(number).returncode for number in (0, 1)] == [-signal.SIGTERM] * 2
    marker = site.out / "tiny/endprompt/checkpoints/checkpoint-8/complete.json"
    marker.parent.mkdir(parents=True)
    marker.touch()
    if kept:
        (site.out / "tiny/endprompt/starts_without_checkpoint").write_text(kept)
    assert [start(number).returncode for number in (3, 4)] == [-signal.SIGTERM] * 2
    assert start(5).returncode == 1


@pytest.mark.parametrize("signalled", [False, True])
def test_a_job_that_has_nothing_to_train_is_not_queued_again(site, start, signalled):
    """With a signal before the training began it is; without one, nothing is left to do."""
    signal_it = "kill -USR1 $PPID\nsleep 0.2\n" if signalled else ""
    site.program("srun", f'#!/bin/bash\necho start >>"{{log}}/srun"\n{signal_it}exit 0\n')
    done = start(0)
    assert site.calls("scontrol").count("requeue 5") == signalled
    assert done.returncode == (-signal.SIGTERM if signalled else 0), done.stdout + done.stderr
    assert site.calls("srun").count("start") == (1 if signalled else 2)


def test_a_checkpoint_counts_beside_a_damaged_one_of_a_higher_step(site, start):
    """What is set aside keeps its marker, and would be the newest for ever."""
    checkpoints = site.out / "tiny/endprompt/checkpoints"
    for step, files in ((2, {}), (96, {"model.pt": 1})):
        (checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        (checkpoints / f"checkpoint-{step}" / checkpoint_files.MARKER).write_text(
            json.dumps({"files": files})
        )
    checkpoint_files.set_aside(checkpoints, checkpoint_files.newest(checkpoints))
    assert (checkpoints / "damaged-96" / checkpoint_files.MARKER).exists()
    first = start(1)
    assert "(1 of 3 in a row)" in first.stdout and "/checkpoint-2/complete.json" in first.stdout
    second = start(2, gaining="2")
    assert "in a row" not in second.stdout and "/checkpoint-4/complete.json" in second.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_a_signal_reaches_the_training_through_a_container_and_the_job_goes_on(site, sixty_steps):
    """train_64k.sbatch, on a Slurm that is not there: USR1 before the time limit, and the start after it."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        site.program(name, text)
    (site.root / "slurm/site.sh").symlink_to(REPOSITORY / "slurm/sites/apptainer.sh")
    out = sixty_steps.parents[1]
    environment = site.environment(
        OUT=out, RECIPE=out.parent / "small.yaml", NPROC="1", SLURM_JOB_NODELIST="n1", SLURM_JOB_ID="5"
    )
    log = site.log / "job"

    def start() -> subprocess.Popen:
        with log.open("ab") as file:
            return subprocess.Popen(
                ["bash", "slurm/train_64k.sbatch"],
                cwd=site.root,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    job = start()
    while not (sixty_steps / "checkpoints/checkpoint-4/complete.json").exists():
        assert job.poll() is None, log.read_text()
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)  # to the batch script alone, as --signal=B:USR1@300
    assert job.wait(60) == -signal.SIGTERM, log.read_text()[-3000:]
    assert site.calls("scontrol")[-1] == "requeue 5"
    step = int(re.search(r"stopped on request after step (\d+)", log.read_text())[1])
    assert 4 <= step < 60 and "queued again" in log.read_text() and not (sixty_steps / "stop").exists()

    # The second start: SIGTERM to the container alone, which has nothing below it but recipes/run.sh.
    container = subprocess.Popen(
        ["apptainer", "exec", str(site.image), "bash", "recipes/run.sh", environment["RECIPE"], "endprompt"],
        cwd=site.root,
        env={**environment, "STAGES": "prepare train evaluate"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (sixty_steps / f"checkpoints/checkpoint-{step // 4 * 4 + 4}/complete.json").exists():
        assert container.poll() is None, container.stdout.read()
        time.sleep(0.05)
    container.send_signal(signal.SIGTERM)
    said = container.communicate(timeout=60)[0]
    assert container.returncode == 75 and "stopped on request after step" in said, said[-3000:]
    assert not (sixty_steps / "eval").exists()  # nor is the next stage begun

    assert start().wait(120) == 0, log.read_text()[-3000:]
    summary = json.loads((sixty_steps / "train.json").read_text())
    assert summary["steps"] == 60 and int(summary["resumed_from"].split("-")[1]) > step
