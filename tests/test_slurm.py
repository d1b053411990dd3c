"""The job scripts on a real Slurm: two nodes on this machine, one rank each, nodes that die and signals that
come.  See slurm_cluster.py.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
import torch
import yaml
from conftest import REPOSITORY, tiny_documents, write_jsonl
from fake_site import Site
from safetensors.torch import load_file

REASON = slurm_cluster.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        REASON is not None, reason=f"NO SLURM HERE, SO THE JOB SCRIPTS ARE NOT TESTED: {REASON}"
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base) -> Path:
    """240 rows of 128 tokens, 60 steps of 4 rows, a checkpoint every 4."""
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "small.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"name_or_path": str(base)},
                "lengths": {"physical": 128, "target": 1024},
                "data": {
                    "corpus": str(write_jsonl(folder / "corpus.jsonl", tiny_documents(240, 18))),
                    "tokens": 240 * 128,
                },
                "train": {
                    "deepspeed": str(REPOSITORY / "ds_configs/zero3.json"),
                    "per_device_train_batch_size": 2,
                    "learning_rate": 1e-3,
                    "warmup_steps": 2,
                    "gradient_checkpointing": False,
                    "logging_steps": 1,
                    "save_steps": 4,
                },
                "eval": {"tasks": ["passkey"], "lengths": [128, 256], "samples": 4, "depths": 2},
            }
        )
    )
    return path


class Jobs:
    def __init__(self, cluster, recipe: Path, out: Path):
        self.cluster, self.recipe, self.out, self.run = cluster, recipe, out, out / "small/endprompt"
        out.mkdir(parents=True, exist_ok=True)
        self.environment = {"RECIPE": str(recipe), "OUT": str(out), "NPROC": "1", "OMP_NUM_THREADS": "1"}

    def submit(self, *options: str, script: str = "slurm/train_64k.sbatch", folder: Path = REPOSITORY) -> str:
        text = self.cluster.client(
            "sbatch",
            "--parsable",
            f"--chdir={folder}",
            "--gres=none",
            f"--output={self.out}/%x-%j.log",
            *options,
            REPOSITORY / script,
            **self.environment,
        )
        return text.splitlines()[-1].partition(";")[0]

    def wait(self, number: str, seconds: int = 400) -> dict[str, str]:
        """The job's description once it is over for good."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            job = self.cluster.job(number)
            if (
                job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
                and job["Reason"] != "BeginTime"
            ):
                return job
            time.sleep(0.5)
        raise TimeoutError(f"{job}\n{self.log()}")

    def until(self, path: Path, seconds: int = 120) -> None:
        end = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < end, f"no {path}\n{self.log()}"
            time.sleep(0.05)

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.out.glob("*.log")))


@pytest.fixture(scope="module")
def undisturbed(cluster, recipe, tmp_path_factory) -> Jobs:
    """The whole chain of submit_all.sh: two parts that are prepared, training on two nodes, an array of two
    that evaluates.
    """
    jobs = Jobs(cluster, recipe, tmp_path_factory.mktemp("undisturbed"))
    options = f"--output={jobs.out}/%x-%A.log --open-mode=append"
    said = cluster.client(
        "bash",
        REPOSITORY / "slurm/submit_all.sh",
        **jobs.environment,
        NODES="2",
        PARTS="2",
        EVALS="2",
        PREPARE_OPTIONS=f"{options} --cpus-per-task=1",
        TRAIN_OPTIONS=f"{options} --gres=none",
        EVAL_OPTIONS=f"{options} --gres=none --cpus-per-task=1",
    )
    words = said.split()
    jobs.numbers = {name: words[words.index(name) + 1] for name in ("prepare", "train", "evaluate")}
    return jobs


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model.safetensors")


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_chain_prepares_in_parts_trains_on_two_nodes_and_evaluates_in_an_array(undisturbed):
    jobs = undisturbed
    train = jobs.wait(jobs.numbers["train"])
    assert train["JobState"] == "COMPLETED" and train["NumNodes"] == "2" and train["Restarts"] == "0", (
        jobs.log()
    )
    manifest = json.loads((jobs.run / "shards/manifest.json").read_text())
    assert (
        manifest["parts"] == 2 and manifest["rows"] == 240 and not list((jobs.run / "shards").glob("part-*"))
    )
    summary = json.loads((jobs.run / "train.json").read_text())
    assert summary["world_size"] == 2 and summary["steps"] == 60 and summary["resumed_from"] is None
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(jobs.run / "model").config.max_position_embeddings == 1024
    assert jobs.wait(jobs.numbers["evaluate"])["JobState"] == "COMPLETED", jobs.log()
    jobs.until(jobs.run / "eval/passkey/128.json", 60)
    jobs.until(jobs.run / "eval/passkey/256.json", 60)


@pytest.fixture
def again(undisturbed, cluster, recipe, tmp_path):
    """A run with the undisturbed one's shards, not trained yet."""
    undisturbed.wait(undisturbed.numbers["train"])
    jobs = Jobs(cluster, recipe, tmp_path / "runs")
    shutil.copytree(undisturbed.run / "shards", jobs.run / "shards", ignore=shutil.ignore_patterns(".cache"))
    return jobs


@pytest.mark.parametrize("node", ["n2", "n1"])
def test_a_lost_node_costs_a_restart_and_nothing_else(again, undisturbed, cluster, node):
    """n1 runs the batch script too: there, nobody is left to ask for the requeue but Slurm.

    n2 comes back at once.  Slurm may then end its part of the next start for the one before, whose step has
    the same number: that start gains nothing, and the one after it does.
    """
    number = again.submit("--nodes=2")
    again.until(again.run / "checkpoints/checkpoint-8/complete.json")
    cluster.kill_node(node)
    cluster.until(lambda: cluster.states()[node].startswith("DOWN"), f"{node} down", 90)  # SlurmdTimeout
    cluster.start_node(node)  # taken back when it registers: ReturnToService
    job = again.wait(number)
    assert job["JobState"] == "COMPLETED" and int(job["Restarts"]) >= 1, again.log()
    summary = json.loads((again.run / "train.json").read_text())
    assert summary["resumed_from"] and summary["steps"] == 60
    assert_same_weights(again.run, undisturbed.run)


@pytest.mark.parametrize("launcher", ["none", "container"])
def test_a_signal_before_the_end_saves_and_queues_again(again, undisturbed, cluster, launcher, tmp_path):
    if launcher == "container":
        site = Site(tmp_path / "site")
        inside = site.environment(ENDPROMPT_SITE="slurm/sites/apptainer.sh")
        again.environment |= {
            name: inside[name] for name in ("PATH", "IMAGE", "ENDPROMPT_SITE", "PYTHONPATH")
        }
    number = again.submit("--nodes=2")
    again.until(again.run / "checkpoints/checkpoint-4/complete.json")
    cluster.client("scancel", "--batch", "--signal=USR1", number)  # what --signal=B:USR1@300 sends
    job = again.wait(number)
    assert job["JobState"] == "COMPLETED" and job["Restarts"] == "1", again.log()
    log = again.log()
    assert (
        "asking the job to stop" in log and "stopped on request after step" in log and "queued again" in log
    )
    stopped = int(log.partition("stopped on request after step ")[2].split()[0])
    assert 4 <= stopped < 60
    assert json.loads((again.run / "train.json").read_text())["resumed_from"] == f"checkpoint-{stopped}"
    assert not (again.run / "stop").exists()
    assert_same_weights(again.run, undisturbed.run)
    if launcher == "container":
        # On both nodes, in both starts: prepare on one, training on two.
        started = [line for line in site.calls("apptainer") if " recipes/run.sh " in line]
        assert len(started) == 6 and all(line.startswith(f"{site.image} ") for line in site.calls("python"))


@pytest.mark.parametrize(
    "options, gpus",
    [
        (["--gres=gpu:a100:2"], "2"),
        (["--gres=gpu:1"], "1"),
        (["--gres=none", "--gpus-per-node=2"], "2"),
        (["--gres=none"], "0"),
    ],
)
def test_a_job_counts_the_gpus_that_it_was_given(again, options, gpus, tmp_path):
    """Whatever way they are asked for; the nodes have two.  This Python does no more than count."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
case "$*" in
  *" path "* | -c*) exec {sys.executable} "$@" ;;
  *" gpus"*) {sys.executable} "$@" | tee -a {tmp_path}/gpus ;;
  *) exit 2 ;;
esac
"""
    )
    python.chmod(0o755)
    again.environment["PYTHON"] = str(python)
    job = again.wait(again.submit(*options))
    assert job["ExitCode"] == "2:0", again.log()
    assert (tmp_path / "gpus").read_text().split() == [gpus]


def test_a_cancelled_job_is_not_queued_again(again, cluster):
    number = again.submit("--nodes=2")
    again.until(again.run / "checkpoints/checkpoint-4/complete.json")
    cluster.client("scancel", number)
    job = again.wait(number)
    assert job["JobState"] == "CANCELLED" and job["Restarts"] == "0", again.log()


def test_what_starting_again_would_not_mend_is_not_queued_again(again, cluster, tmp_path):
    number = again.submit("--nodes=2", script="slurm/train_64k.sbatch", folder=tmp_path)
    job = again.wait(number)
    assert (job["JobState"], job["ExitCode"]) == (
        "FAILED",
        "2:0",
    ) and "submit it from the repository's root" in again.log()
    again.environment["RECIPE"] = "recipes/none.yaml"
    job = again.wait(again.submit("--nodes=2"))
    assert (job["JobState"], job["ExitCode"]) == (
        "FAILED",
        "2:0",
    ) and "there is no file recipes/none.yaml" in again.log()
    again.environment["RECIPE"] = str(again.recipe)
    os.truncate(next((again.run / "shards").glob("*.parquet")), 1000)
    job = again.wait(again.submit("--nodes=2"))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), again.log()
    assert "is damaged" in again.log()
