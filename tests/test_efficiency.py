"""The efficiency harness: one real setting, and what is made of many."""

import dataclasses
import io
import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY
from matplotlib import image

from endprompt import BadInput
from endprompt.planning import efficiency, step
from endprompt.reports import costs
from endprompt.training.trainer import flops_per_token


@pytest.mark.parametrize(
    "method, length",
    [("endprompt", 512), ("pose", 512), ("pose_recall", 512), ("full_length", 1024), ("longlora", 1024)],
)
def test_a_setting_is_measured(method, length):
    found = efficiency.measure(efficiency.Asked("small", method, 1024, 1, "none", steps=1, warm_up=0))
    assert found["row_length"] == found["tokens"] == length and found["mfu"] is None
    assert set(found["parts"]) == {"data", "forward", "backward", "optimizer"} and all(
        seconds > 0 for seconds in found["parts"].values()
    )
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"]) and found[
        "tokens_per_second"
    ] == pytest.approx(length / found["seconds"])
    assert found["memory_above_states_bytes"] > length * 256 * 4 * 4  # at the least, every layer's input
    if method == "full_length":
        assert found["flops_per_token"] == flops_per_token(efficiency.config_of("small"), 1024)


def test_flops_are_those_of_the_issue():
    """9.0 and 20.3 GFLOP a token for the 1B at rows of 8K and 64K, attention counted causally; 51.5 for the
    8B, as in its recipe.
    """
    one, eight = (efficiency.config_of(name) for name in ("llama-3.2-1b", "llama-3-8b"))
    assert [
        round(flops_per_token(config, length) / 1e9, 1)
        for config, length in ((one, 8192), (one, 65536), (eight, 8192))
    ] == [9.0, 20.3, 51.5]


def test_memory_follows_the_row_not_the_target():
    kept = {
        (method, target): efficiency.measure(efficiency.Asked("small", method, target, 1, way, 1, 0))[
            "memory_above_states_bytes"
        ]
        for method, target, way in (
            ("endprompt", 1024, "none"),
            ("endprompt", 4096, "none"),
            ("full_length", 1024, "none"),
        )
    }
    assert kept["endprompt", 1024] == kept["endprompt", 4096] < 0.6 * kept["full_length", 1024]
    assert (
        efficiency.measure(efficiency.Asked("small", "endprompt", 1024, 1, "full", 1, 0))[
            "memory_above_states_bytes"
        ]
        < 0.6 * kept["endprompt", 1024]
    )


def entry(method, target, speed, memory, rows=1, way="none", fits=True):
    measured = (
        {
            "tokens_per_second": speed,
            "seconds": 100 / speed,
            "tokens": 100,
            "memory_above_states_bytes": memory,
            "flops_per_token": 3.0 if method == "full_length" else 1.0,
        }
        if fits
        else {}
    )
    return {"method": method, "target": target, "rows": rows, "checkpointing": way, "fits": fits, **measured}


ENTRIES = [
    entry("endprompt", 64, 100.0, 10),
    entry("endprompt", 64, 300.0, 40, rows=4),
    entry("endprompt", 128, 297.0, 40, rows=4),
    entry("endprompt", 64, 90.0, 5, way="full"),
    entry("full_length", 64, 50.0, 90),
    entry("full_length", 64, 60.0, 50, way="full"),
    entry("full_length", 128, 0, 0, fits=False),
]


def test_ratios_compare_each_at_its_best_and_memory_under_one_policy():
    found = efficiency.ratios(ENTRIES)
    assert found["64"] == {
        "speedup": 5.0,
        "arithmetic": 3.0,
        "memory_share_none": pytest.approx(10 / 90),
        "memory_share_full": 0.1,
    }
    assert "128" not in found and found["endprompt_slowest_of_fastest_target"] == pytest.approx(300 / 297)


def test_the_picture_stands_beside_the_paper_s(tmp_path):
    costs.draw({"entries": ENTRIES, "shape": "small", "device": "CPU: some"}, tmp_path / "costs.png")
    pixels = image.imread(tmp_path / "costs.png")
    assert pixels.shape[0] > 300 and pixels.std() > 0.05
    with pytest.raises(BadInput, match="no target length was measured for all"):
        costs.draw(
            {"entries": [ENTRIES[0], entry("full_length", 128, 1.0, 1)], "shape": "small", "device": "x"},
            tmp_path / "none.png",
        )


class Scripted(efficiency.Worker):
    """A worker whose process is a small script: what a broken one does."""

    def __init__(self, script: str):
        super().__init__()
        self.command = (sys.executable, "-c", script)


@pytest.mark.parametrize(
    "script, timeout, found",
    [
        ("print('{\"fits\": false}', flush=True)", None, {"fits": False}),
        ("import os; os.kill(os.getpid(), 9)", None, {"fits": False}),
        ("raise ValueError('other')", None, {"fits": False, "reason": "ValueError: other"}),
        ("import time; time.sleep(60)", 0.5, {"fits": False, "reason": "not done after 0 s"}),
    ],
)
def test_a_setting_that_fails_is_an_answer_and_ends_its_process(script, timeout, found):
    with Scripted(script) as worker:
        assert worker.run({}, timeout) == found and worker.process is None


def test_one_process_serves_until_the_kernels_change():
    echo = (
        "import json, os, sys\nfor line in sys.stdin: print(json.dumps({'fits': True, 'pid': os.getpid()}),"
        " flush=True)"
    )
    with Scripted(echo) as worker:
        first, second, third = (
            worker.run({"kernels": kernels})["pid"] for kernels in ("torch", "torch", "liger")
        )
    assert first == second != third


ASKED = json.dumps(dataclasses.asdict(step.Asked("small", "endprompt", 1024, 1, "none", 1, 0))) + "\n"


def test_what_runs_out_of_memory_in_the_serving_process(monkeypatch, capsys):
    def fails(error):
        def measure(_):
            raise error

        return measure

    for error, found in (
        (torch.OutOfMemoryError("CUDA out of memory."), {"fits": False}),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), {"fits": False}),
        (RuntimeError("No available kernel.\nmore"), {"fits": False, "reason": "No available kernel."}),
    ):
        monkeypatch.setattr(step, "measure", fails(error))
        monkeypatch.setattr(sys, "stdin", io.StringIO(ASKED * 2))
        monkeypatch.setattr(sys, "stdout", answers := io.StringIO())
        step.serve()
        assert [json.loads(line) for line in answers.getvalue().splitlines()] == [found]


class Stand:
    """A worker that measures nothing and remembers what it was asked."""

    asked: list[dict] = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def run(self, settings, timeout=None):
        self.asked.append(settings)
        if settings["method_name"] == "full_length" and settings["target"] > 1024:
            return {"fits": False}
        if settings["attention"] == "cudnn":
            return {"fits": False, "reason": "No available kernel."}
        return {
            "fits": True,
            "tokens_per_second": 100.0 * settings["rows"],
            "seconds": 1.0,
            "tokens": 100,
            "memory_above_states_bytes": 2**20,
            "flops_per_token": 1.0,
            "mfu": None,
        }


def test_a_file_is_gone_on_with(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(efficiency, "Worker", Stand)
    monkeypatch.setattr(Stand, "asked", [])
    out, settings = (
        tmp_path / "r.json",
        [{"target": 1024}, {"target": 1024, "rows": 2}, {"target": 1024, "attention": "cudnn"}],
    )
    efficiency.measure_all("small", settings[:1], out)
    found = efficiency.measure_all("small", settings, out)
    assert (
        len(Stand.asked) == 3
        and json.loads(out.read_text()) == found
        and [entry["fits"] for entry in found["entries"]] == [True, True, False]
    )
    efficiency.measure_all("small", settings, out)
    assert (
        len(Stand.asked) == 4 and Stand.asked[-1]["attention"] == "cudnn"
    )  # what failed for a reason is tried again
    longer = [{"method": "full_length", "target": target} for target in (1024, 2048, 4096)]
    found = efficiency.measure_all("small", longer, out)
    assert len(Stand.asked) == 6 and [entry["fits"] for entry in found["entries"][-3:]] == [
        True,
        False,
        False,
    ]
    assert "cudnn: No available kernel." in capsys.readouterr().err
    with pytest.raises(BadInput, match="holds small on .*, not smollm2-135m on"):
        efficiency.measure_all("smollm2-135m", [{"target": 16384}], out)


def test_a_budget_leaves_what_would_take_longer(monkeypatch, tmp_path):
    monkeypatch.setattr(efficiency, "Worker", Stand)
    found = efficiency.measure_all(
        "small",
        [{"target": 1024}],
        tmp_path / "r.json",
        limits=efficiency.Limits(deadline=time.monotonic() + 1),
    )
    assert (
        found["entries"] == []
        and found["left"][0]["target"] == 1024
        and found["left"][0]["predicted_seconds"] >= 1
    )
    found = efficiency.measure_all(
        "small",
        [{"target": 1024}],
        tmp_path / "r.json",
        limits=efficiency.Limits(deadline=time.monotonic() + 1000),
    )
    assert len(found["entries"]) == 1 and found["left"] == []


def test_time_that_is_up_leaves_one_step():
    assert (
        efficiency.measure(
            efficiency.Asked("small", "endprompt", 1024, 1, "none", steps=50, warm_up=50, seconds=1e-3)
        )["steps"]
        == 1
    )


def test_options_reach_the_model(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compiled.append((type(self).__name__, options))
    )
    plain = efficiency.measure(efficiency.Asked("small", "endprompt", 1024, 1, "none", 1, 0))
    found = efficiency.measure(
        efficiency.Asked("small", "endprompt", 1024, 1, "none", 1, 0, compiled="layers", attention="flash")
    )
    assert compiled == [("LlamaDecoderLayer", {"dynamic": False})] * 4 and found["loss"] == pytest.approx(
        plain["loss"], rel=1e-5
    )
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(BadInput, match="the package liger-kernel is not installed"):
        efficiency.measure(efficiency.Asked("small", "endprompt", 1024, 1, "none", 1, 0, kernels="liger"))


@pytest.mark.slow
def test_compiled_layers_give_the_same_loss():
    plain, found = (
        efficiency.measure(efficiency.Asked("small", "endprompt", 1024, 1, "none", 1, 0, compiled=compiled))
        for compiled in ("no", "layers")
    )
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [
        sys.executable,
        "-m",
        "endprompt.planning.efficiency",
        "--targets",
        "1024",
        "--methods",
        "endprompt",
        "--steps",
        "1",
        "--warm-up",
        "0",
        "--out",
        str(tmp_path / "r.json"),
    ]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert (
        found["entries"][0]["fits"]
        and torch.__version__.startswith(found["versions"]["torch"])
        and found["command"].endswith("r.json")
    )
    result = subprocess.run(
        [*command[:3], "--targets", "256"], cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )
    assert (
        result.returncode == 2
        and result.stderr.strip() == "endprompt: --targets: 256 does not exceed the window of 512"
    )
    result = subprocess.run(
        [*command[:2], "endprompt.reports.costs", str(tmp_path / "none.json")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
