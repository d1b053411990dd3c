"""The efficiency harness: one real setting, and what is made of many."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from matplotlib import image

from endprompt import BadInput
from endprompt.eval import efficiency
from endprompt.trainer import flops_per_token


@pytest.mark.parametrize("method, length", [("endprompt", 512), ("pose", 512), ("full_length", 1024), ("longlora", 1024)])
def test_a_setting_is_measured(method, length):
    found = efficiency.measure("small", method, 1024, 1, "none", steps=1, warm_up=0)
    assert found["row_length"] == found["tokens"] == length and found["mfu"] is None
    assert set(found["parts"]) == {"data", "forward", "backward", "optimizer"} and all(seconds > 0 for seconds in found["parts"].values())
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"]) and found["tokens_per_second"] == pytest.approx(length / found["seconds"])
    assert found["memory_above_states_bytes"] > length * 256 * 4 * 4  # at the least, every layer's input
    if method == "full_length":
        assert found["flops_per_token"] == flops_per_token(efficiency.config_of("small"), 1024)


def test_memory_follows_the_row_not_the_target():
    kept = {(method, target): efficiency.measure("small", method, target, 1, way, 1, 0)["memory_above_states_bytes"]
            for method, target, way in (("endprompt", 1024, "none"), ("endprompt", 4096, "none"), ("full_length", 1024, "none"))}
    assert kept["endprompt", 1024] == kept["endprompt", 4096] < 0.6 * kept["full_length", 1024]
    assert efficiency.measure("small", "endprompt", 1024, 1, "full", 1, 0)["memory_above_states_bytes"] < 0.6 * kept["endprompt", 1024]


def entry(method, target, speed, memory, rows=1, way="none", fits=True):
    measured = {"tokens_per_second": speed, "seconds": 100 / speed, "tokens": 100, "memory_above_states_bytes": memory,
                "flops_per_token": 3.0 if method == "full_length" else 1.0} if fits else {}
    return {"method": method, "target": target, "rows": rows, "checkpointing": way, "fits": fits, **measured}


ENTRIES = [entry("endprompt", 64, 100.0, 10), entry("endprompt", 64, 300.0, 40, rows=4), entry("endprompt", 128, 297.0, 40, rows=4), entry("endprompt", 64, 90.0, 5, way="full"),
           entry("full_length", 64, 50.0, 90), entry("full_length", 64, 60.0, 50, way="full"), entry("full_length", 128, 0, 0, fits=False)]


def test_ratios_compare_each_at_its_best_and_memory_under_one_policy():
    found = efficiency.ratios(ENTRIES)
    assert found["64"] == {"speedup": 5.0, "arithmetic": 3.0, "memory_share_none": pytest.approx(10 / 90), "memory_share_full": 0.1}
    assert "128" not in found and found["endprompt_slowest_of_fastest_target"] == pytest.approx(300 / 297)


def test_the_picture_stands_beside_the_paper_s(tmp_path):
    efficiency.draw({"entries": ENTRIES, "shape": "small", "device": "CPU: some"}, tmp_path / "costs.png")
    pixels = image.imread(tmp_path / "costs.png")
    assert pixels.shape[0] > 300 and pixels.std() > 0.05
    with pytest.raises(BadInput, match="no target length was measured for all"):
        efficiency.draw({"entries": [ENTRIES[0], entry("full_length", 128, 1.0, 1)], "shape": "small", "device": "x"}, tmp_path / "none.png")


def test_memory_that_runs_out_is_an_answer(monkeypatch):
    def out(*_, **__):
        return subprocess.CompletedProcess([], 1, "", "torch.OutOfMemoryError: CUDA out of memory.")

    monkeypatch.setattr(subprocess, "run", out)
    assert efficiency.run({}) == {"fits": False}
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "ValueError: other"))
    with pytest.raises(BadInput, match="ValueError: other"):
        efficiency.run({})


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "endprompt.eval.efficiency", "--targets", "1024", "--methods", "endprompt", "--steps", "1", "--warm-up", "0",
               "--out", str(tmp_path / "r.json")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["entries"][0]["fits"] and found["versions"]["torch"] == torch.__version__ and found["command"].endswith("r.json")
    result = subprocess.run([*command[:3], "--targets", "256"], cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert result.returncode == 2 and result.stderr.strip() == "endprompt: --targets: 256 does not exceed the window of 512"
    result = subprocess.run([*command[:3], "--picture", str(tmp_path / "none.json")], cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
