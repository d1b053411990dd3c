"""The files in cluster/: against the schemas of Kubernetes, Kubeflow and SkyPilot, and their commands on this
machine, with the variables that those set on each of two nodes.  Nothing here has run on a cluster.
"""

import copy
import json
import socket
import subprocess
import sys

import cluster_schemas
import pytest
import yaml
from conftest import REPOSITORY
from training import ENVIRONMENT

CLAIM, JOB = yaml.safe_load_all((REPOSITORY / "cluster/kubernetes.yaml").read_text())
TASK = yaml.safe_load((REPOSITORY / "cluster/skypilot.yaml").read_text())
KINDS = {"PersistentVolumeClaim": "V1PersistentVolumeClaim", "PyTorchJob": "KubeflowOrgV1PyTorchJob"}
REASON = cluster_schemas.missing()
schemas = pytest.mark.skipif(REASON is not None, reason=f"cluster/ is not validated: {REASON}")


def container(job: dict) -> dict:
    return job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]


def faults(schema: dict, tree) -> list[str]:
    import jsonschema

    found = jsonschema.Draft202012Validator(schema).iter_errors(tree)
    return [f"{one.json_path}: {one.message}" for one in found]


@schemas
@pytest.mark.parametrize("document", [CLAIM, JOB], ids=lambda document: document["kind"])
def test_the_kubernetes_file_is_valid(document):
    assert faults(cluster_schemas.model(KINDS[document["kind"]]), document) == []


def changed(job: dict, change) -> dict:
    other = copy.deepcopy(job)
    change(other)
    return other


@schemas
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda job: job["spec"].update(replicas=2), "'replicas' was unexpected"),
        (lambda job: job["spec"].pop("runPolicy"), "'runPolicy' is a required"),
        (lambda job: job["spec"]["runPolicy"].update(backoffLimit="20"), "is not of type 'integer'"),
        (lambda job: container(job).pop("name"), "'name' is a required"),
        (lambda job: container(job).update(command="bash"), "is not of type 'array'"),
        (lambda job: container(job)["volumeMounts"][0].update(path="/runs"), "'path' was unexpected"),
        (lambda job: container(job)["env"].append({"name": "N", "value": 8}), "8 is not of type 'string'"),
    ],
)
def test_a_wrong_kubernetes_file_is_seen(change, words):
    schema = cluster_schemas.model("KubeflowOrgV1PyTorchJob")
    assert any(words in said for said in faults(schema, changed(JOB, change)))


@schemas
def test_the_skypilot_file_is_valid():
    found = cluster_schemas.skypilot()
    assert faults(found["task"], TASK) == [] and faults(found["resources"], TASK["resources"]) == []
    for wrong in ({"nodes": 2}, {"num_nodes": "2"}, {"envs": {"a-b": "1"}}, {"run": ["bash"]}):
        assert faults(found["task"], {**TASK, **wrong}), wrong
    for wrong in ({"gpus": "H100:8"}, {"disk_size": []}, {"accelerators": 8}):
        assert faults(found["resources"], {**TASK["resources"], **wrong}), wrong


def test_both_say_that_they_are_untried_and_start_the_same_script():
    for name, command in {"kubernetes": container(JOB)["args"][0], "skypilot": TASK["run"]}.items():
        assert "NEVER RUN ON A CLUSTER" in (REPOSITORY / f"cluster/{name}.yaml").read_text()
        assert 'bash recipes/run.sh "$RECIPE" "$METHOD"' in command
    assert (
        JOB["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        == (JOB["spec"]["pytorchReplicaSpecs"]["Master"]["template"])
    )
    files = {one["value"] for one in container(JOB)["env"] if one["name"] == "RECIPE"} | {
        TASK["envs"]["RECIPE"]
    }
    assert all((REPOSITORY / name).is_file() for name in files)


def kubernetes(node: int, port: int) -> tuple[list[str], dict[str, str]]:
    """What a pod runs, and what the training operator sets there (RANK and WORLD_SIZE count pods)."""
    named = {one["name"]: one["value"] for one in container(JOB)["env"]}
    given = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(node)}
    newer = {"PET_NNODES": "2", "PET_NODE_RANK": str(node), "PET_NPROC_PER_NODE": "auto"} if node else {}
    return [*container(JOB)["command"], *container(JOB)["args"]], {**named, **given, **newer}


def skypilot(node: int, port: int) -> tuple[list[str], dict[str, str]]:
    """What a node runs, and what SkyPilot sets there."""
    given = {
        "SKYPILOT_NODE_RANK": str(node),
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "0",
    }
    assert "MASTER_PORT=29500" in TASK["run"]
    return ["bash", "-c", TASK["run"].replace("29500", str(port))], {**TASK["envs"], **given}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("program", [kubernetes, skypilot])
def test_the_command_on_two_nodes(program, train_recipe, tmp_path):
    """Both nodes run the same command: the first prepares and evaluates, both train one run."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    tree = yaml.safe_load(train_recipe.read_text())
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        yaml.safe_dump({**tree, "eval": {"tasks": ["passkey"], "lengths": [128], "samples": 2, "depths": 1}})
    )
    nodes = []
    own = {"RECIPE": str(recipe), "OUT": str(tmp_path), "NPROC": "1", "PYTHON": sys.executable}
    for node in (1, 0):  # the first comes last, so that the other has to wait for its shards
        command, environment = program(node, port)
        nodes.append(
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**ENVIRONMENT, **environment, **own, "HF_HOME": str(tmp_path / "home")},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    other, first = (node.communicate(timeout=120)[0] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], first[-2000:] + other[-2000:]
    run = tmp_path / "small/endprompt"
    assert "waits until the first has prepared" in other and "evaluate" not in other
    summary = json.loads((run / "train.json").read_text())
    assert summary["world_size"] == 2 and summary["steps"] == 8
    assert (run / "eval/passkey/128.json").is_file()
