"""Code for GPUs on a machine without one: whole training steps on a device that is pretended
(tests/pretend.py), and a walk over every line that asks for a GPU (tests/walks.py).
"""

import json
import sys

import pretend_steps
import pytest
import torch
import training
import walking
import walks
from conftest import REPOSITORY

from endprompt.training import loss


def said(word: str, *command) -> dict[str, dict]:
    """What a script of tests/ says in lines of JSON that start with ``word``, by what it is about."""
    script, *rest = command
    lines = training.run([sys.executable, REPOSITORY / "tests" / script, *rest]).splitlines()
    found = [json.loads(line.removeprefix(f"{word} ")) for line in lines if line.startswith(f"{word} {{")]
    return {one.pop(word): one for one in found}


# -- every line that asks for a GPU --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> dict[str, dict]:
    return said("walk", "walks.py", tmp_path_factory.mktemp("walks"))


@pytest.mark.parametrize("name", walks.WALKS)
def test_lines_for_gpus_are_walked(name, walked):
    assert "error" not in walked[name], walked[name]["error"]
    missed = walked[name]["missed"]
    assert missed and not any(missed.values()), missed


def test_every_place_that_asks_for_a_gpu_is_known():
    walked = {place for _, places in walks.WALKS.values() for place in places}
    assert walking.all_places().keys() == walked | walks.FAR | walks.NAMED.keys()
    assert not (walked & walks.FAR or walked & walks.NAMED.keys() or walks.FAR & walks.NAMED.keys())


def test_a_place_that_asks_for_a_gpu_is_seen():
    source = (
        "import torch\nclass A:\n    def f(self, x):\n        if x.is_cuda:\n            return torch.cuda\n"
    )
    assert walking.places(source) == {"A.f": {3, 4}}
    assert walking.places('def g(cuda):\n    return "gloo" if not cuda else\\\n "nccl"\n') == {"g": {2, 3}}
    assert walking.places("def h(x):\n    return x.device.type == 'cuda'") == {"h": {2}}
    assert walking.places("def i(x):\n    '''cuda'''\n    return x.cpu()") == {}


def test_a_line_that_is_not_gone_over_is_missed():
    seen = walking.lines_of(lambda: loss.row_kernel(torch.zeros(1)))
    assert walking.missed("training/loss.py:row_kernel", seen) == []
    assert walking.missed("training/loss.py:liger_kernel", seen) != []


# -- whole steps ---------------------------------------------------------------------------------------------

# What a step waits for, by who asks: its kind, and how often in a step of two micro-batches.  Nothing else.
BATCHES = {("accelerate/utils/operations.py:send_to_device", "from host"): 14}
MASK = {("transformers/masking_utils.py:_ignore_causal_mask_sdpa", "read"): 2}
WATCH = {("endprompt/training/watch.py:on_step_end", "to host"): 1}
STEP = {**BATCHES, **MASK, **WATCH}
OTHERS: dict[str, dict] = {}


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, dict]:
    names = ["measure", *pretend_steps.CASES]
    return said("case", "pretend_steps.py", tmp_path_factory.mktemp("steps"), *names)


WHOLE = [name for name, case in pretend_steps.CASES.items() if not case.fault]


@pytest.mark.parametrize("name", WHOLE)
def test_a_step_waits_for_nothing_but_what_is_named(name, steps):
    found = steps[name]
    assert "error" not in found, found["error"] + found["trace"]
    assert {(by, kind): times for by, kind, times in found["step"]} == OTHERS.get(name, STEP)


@pytest.mark.parametrize("name", WHOLE)
def test_the_device_trains_what_the_host_trains(name, steps):
    there, here = (
        [entry for entry in steps[name][which] if "loss" in entry] for which in ("history", "here")
    )
    assert len(there) == len(here) == 2
    for one, other in zip(there, here, strict=True):
        assert {key for key in one if "loss" in key} == {key for key in other if "loss" in key}
        for key in one:
            if "loss" in key:
                assert one[key] == pytest.approx(other[key], rel=2e-2), key


def test_both_branches_of_the_loss_are_taken(steps):
    assert {name for name in WHOLE if steps[name]["calls"].get("triton")} >= {"endprompt", "endprompt, lora"}
    assert {name for name in WHOLE if steps[name]["calls"].get("liger")} >= {"short", "longlora", "perturbed"}
    assert all(len(steps[name]["calls"]) == 1 for name in WHOLE)


@pytest.mark.parametrize(
    "fault, said",
    [
        ("host shift_labels", "is on the host"),
        ("host input_ids", "is on the host"),
        ("float32 product", "operands of ['torch.bfloat16', 'torch.float32']"),
    ],
)
def test_what_a_gpu_refuses_is_refused(fault, said, steps):
    error = steps[f"fault: {fault}"]["error"]
    assert error.startswith("Mixed: ") and said in error and "asked by" in error


@pytest.mark.parametrize(
    "fault, kind", [("item", "read"), ("bool", "read"), ("mask", "counted"), ("new tensor", "from host")]
)
def test_what_a_gpu_is_waited_for_is_noted(fault, kind, steps):
    found = {(by, kind): times for by, kind, times in steps[f"fault: {fault}"]["step"]}
    assert found == {**STEP, ("tests/pretend_steps.py:compute", kind): 2}


def test_the_efficiency_harness_s_step_on_a_gpu(steps):
    measured = steps["measure"]
    assert not measured["missed"]
    found = measured["found"]
    assert found["memory_above_states_bytes"] == 2 * 2**30 and found["mfu"] > 0 and found["seconds"] > 0
