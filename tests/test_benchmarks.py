"""The benchmarks run and say what they measured; their figures are for quiet machines."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, tiny_documents, write_jsonl


def run(name: str, *options, timeout: int = 200) -> dict:
    out = options[options.index("--out") + 1]
    result = subprocess.run([sys.executable, str(REPOSITORY / "benchmarks" / name), *map(str, options)], cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text())[name.removesuffix(".py")]


def test_loss(tmp_path):
    found = run("loss.py", "--tokens", 1024, "--vocabulary", 40000, "--width", 32, "--repeats", 1, "--out", tmp_path / "r.json")
    assert max(found["chunked"]["relative_gradient_difference"]) < 1e-5 and found["full"]["loss"] == pytest.approx(found["chunked"]["loss"], rel=1e-5)
    assert 0 < found["memory_share"] < 0.8 and found["commit"] and found["command"].startswith("python")


@pytest.mark.slow
def test_prepare(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", tiny_documents(150, 18))
    found = run("prepare.py", corpus, "--documents", 150, "--model", "recipes/tiny/base", "--gguf", "", "--workers", 1, "--repeats", 1,
                "--out", tmp_path / "r.json")
    # Rows are whole: of the corpus' tokens some remain, and eight times the corpus is eight times the tokens and less than one row.
    assert 8192 <= found["prepare"]["tokens"] <= found["bare"]["tokens"] + 100 and found["map"]["tokens"] <= found["bare"]["tokens"] + 100
    assert abs(found["prepare_8_times"]["tokens"] - 8 * found["bare"]["tokens"]) < 8 * 8192
    assert 0 < found["prepare"]["position_share_of_bytes"] < 0.05 and found["memory_8_times_of_once"] > 0


@pytest.mark.slow
def test_startup(tmp_path):
    found = run("startup.py", "--repeats", 1, "--out", tmp_path / "r.json")
    assert 0 < found["help_seconds"] < found["first_step_seconds"] < 120


@pytest.mark.slow
def test_train(tmp_path):
    found = run("train.py", "--shape", "small", "--rows", 1, "--steps", 2, "--out", tmp_path / "r.json")
    assert found["steps"] == len(found["losses"]) == 2 and found["tokens_per_second"] > 0 and found["probe"] > 1e-3


@pytest.mark.parametrize("arguments, message", [
    (["--out"], "expected one argument"),
    (["--out", "{folder}"], "endprompt: benchmarks/gpu.py: there is no GPU that torch can use; --small rehearses on a CPU")])
def test_gpu_refuses_in_one_line(tmp_path, arguments, message):
    command = [sys.executable, "benchmarks/gpu.py", *(part.format(folder=tmp_path) for part in arguments)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 2 and result.stderr.strip().splitlines()[-1].endswith(message)


@pytest.mark.parametrize("arguments, message", [(["OUT", "soon"], "SECONDS: soon is no whole number"), ([], "The cost evidence")])
def test_gpu_sh_refuses_in_one_line(tmp_path, arguments, message):
    result = subprocess.run(["bash", str(REPOSITORY / "benchmarks/gpu.sh"), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert result.returncode == 2 and message in result.stderr and not list(tmp_path.iterdir())


def stand_in(monkeypatch):
    """benchmarks/gpu.py with a harness that measures nothing: what is fast is what the names say."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import gpu

    asked = []

    class Worker:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def run(self, settings, timeout=None):
            asked.append({**settings, "method": settings["method_name"]})
            if settings["rows"] > 2:
                return {"fits": False}
            speed = 1.0 + (settings["attention"] == "cudnn") + 2 * (settings["compiled"] == "layers") + settings["rows"]
            return {"fits": True, "tokens_per_second": speed, "seconds": 1.0, "tokens": 1, "memory_above_states_bytes": 1, "flops_per_token": 1.0, "flops_per_second": speed,
                    "mfu": None}

    monkeypatch.setattr(gpu.efficiency, "Worker", Worker)
    return gpu, asked


def test_gpu_takes_the_fastest_options_and_goes_on(monkeypatch, tmp_path):
    gpu, asked = stand_in(monkeypatch)

    def go():
        return gpu.steps_of("small", tmp_path / "r.json", time.monotonic() + 1000, (1024, 2048, 4096), 2048, (1, 2, 4))

    found = go()
    assert all(setting["attention"] == "cudnn" and setting["compiled"] == "layers" for setting in asked[5:]) and len(asked) == len(found["entries"])
    assert [(setting["method"], setting["target"], setting["checkpointing"]) for setting in asked[5:6]] == [("full_length", 2048, "full")]
    assert {setting["rows"] for setting in asked if setting["target"] == 4096 and setting["method"] == "endprompt"} == {2}  # 4 did not fit
    assert {setting["target"] for setting in asked if setting["method"] == "full_length" and setting["checkpointing"] == "full"} == {1024, 2048, 4096}
    before = len(asked)
    assert go()["entries"] == found["entries"] and len(asked) == before


def test_gpu_keeps_the_later_stages_their_share_and_says_what_failed(monkeypatch, tmp_path, capsys):
    gpu, _ = stand_in(monkeypatch)
    given = []

    def stage(name, arguments, deadline):
        given.append((name, round(deadline - time.monotonic())))
        if name == "train":
            raise RuntimeError("no such thing\nmore")
        return {"measured": 1}

    monkeypatch.setattr(gpu, "_stage", stage)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--out", str(tmp_path), "--budget", "540"])
    gpu.main()
    assert given == [("machine", 390), ("loss", 390), ("1b", 390), ("8b", 450), ("train", 540)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["train"]["reason"] == "no such thing" and summary["train"]["commit"] and summary["8b"]["measured"] == 1
    given.clear()
    gpu.main()  # what is whole is not done again; settings always are looked through
    assert [name for name, _ in given] == ["1b", "8b", "train"]
