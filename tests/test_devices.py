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
    assert walking.places(source) == {"A.f": {4, 5}}
    assert walking.places('def g(cuda):\n    return "gloo" if not cuda else\\\n "nccl"\n') == {"g": {2, 3}}
    assert walking.places("def h(x):\n    return x.device.type == 'cuda'") == {"h": {2}}
    assert walking.places("def i(x):\n    '''On cuda.'''\n    return x.cpu()") == {}


def test_a_line_that_is_not_gone_over_is_missed():
    seen = walking.lines_of(lambda: loss.row_kernel(torch.zeros(1)))
    assert walking.missed("training/loss.py:row_kernel", seen) == []
    assert walking.missed("training/loss.py:liger_kernel", seen) != []


# -- whole steps ---------------------------------------------------------------------------------------------

# What a step waits for, by who asks: its kind, and how often in a step of two micro-batches.  Nothing else.
BATCHES = {("accelerate/utils/operations.py:send_to_device", "from host"): 14}
MASK = ("transformers/masking_utils.py:_ignore_causal_mask_sdpa", "read")  # whether all is seen, a forward
WATCH = {("endprompt/training/watch.py:on_step_end", "to host"): 1}  # whether to go on
STEP = {**BATCHES, **WATCH, MASK: 2}
OTHERS = {
    "longlora": {**BATCHES, **WATCH, ("transformers/masking_utils.py:flash_attention_mask", "read"): 2},
    "perturbed": {**STEP, MASK: 4},  # two views
    "self_distil": {**STEP, MASK: 4},  # teacher and student
}


def stepped(folder, slow: bool) -> dict[str, dict]:
    names = [name for name, case in pretend_steps.CASES.items() if case.slow == slow]
    return said("case", "pretend_steps.py", folder, *names, *([] if slow else ["measure"]))


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, dict]:
    return stepped(tmp_path_factory.mktemp("steps"), slow=False)


@pytest.fixture(scope="module")
def more_steps(tmp_path_factory) -> dict[str, dict]:
    return stepped(tmp_path_factory.mktemp("steps"), slow=True)


def check(name: str, found: dict) -> None:
    """Nothing was refused, nothing else waited for, and what was trained is what the host trains."""
    assert "error" not in found, found["error"] + found["trace"]
    assert {(by, kind): times for by, kind, times in found["step"]} == OTHERS.get(name.split(",")[0], STEP)
    there, here = (next(one for one in of["history"] if "loss" in one) for of in (found, found["here"]))
    assert there.keys() == here.keys()
    for key in there:
        if "loss" in key:
            assert there[key] == pytest.approx(here[key], rel=1e-2), key
    assert found["moved"] == pytest.approx(found["here"]["moved"], rel=0.05) and found["moved"] > 1e-4
    assert found["probe"] == pytest.approx(found["here"]["probe"], rel=0.05)


WHOLE = {
    slow: [name for name, one in pretend_steps.CASES.items() if not one.fault and one.slow == slow]
    for slow in (True, False)
}


@pytest.mark.parametrize("name", WHOLE[False])
def test_a_step_on_the_device_is_the_host_s_and_waits_for_what_is_named(name, steps):
    check(name, steps[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE[True])
def test_so_are_the_steps_of_other_methods(name, more_steps):
    check(name, more_steps[name])


def test_both_branches_of_the_loss_are_taken(steps):
    calls = {name: set(steps[name]["calls"]) for name in WHOLE[False]}
    weighted = {name for name in calls if name.startswith("endprompt")}  # Liger's knows no weights
    assert {name for name in calls if calls[name] == {"triton"}} == weighted
    assert {name for name in calls if calls[name] == {"liger"}} == calls.keys() - weighted


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
