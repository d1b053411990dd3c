"""The benchmarks run and say what they measured; their figures are for quiet machines."""

import importlib
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from conftest import REPOSITORY, tiny_documents, write_jsonl

from endprompt import BadInput


def run(name: str, *options, timeout: int = 200) -> dict:
    out = options[options.index("--out") + 1]
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / name), *map(str, options)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text())[name.removesuffix(".py")]


@pytest.mark.slow
def test_loss(tmp_path):
    found = run(
        "loss.py",
        "--tokens",
        1024,
        "--vocabulary",
        40000,
        "--width",
        32,
        "--repeats",
        1,
        "--out",
        tmp_path / "r.json",
    )
    assert max(found["chunked"]["relative_gradient_difference"]) < 1e-5 and found["full"][
        "loss"
    ] == pytest.approx(found["chunked"]["loss"], rel=1e-5)
    assert 0 < found["memory_share"] < 0.8 and found["commit"] and found["command"].startswith("python")


@pytest.mark.slow
def test_prepare(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", tiny_documents(150, 18))
    found = run(
        "prepare.py",
        corpus,
        "--documents",
        150,
        "--model",
        "recipes/tiny/base",
        "--gguf",
        "",
        "--workers",
        1,
        "--repeats",
        1,
        "--out",
        tmp_path / "r.json",
    )
    # Rows are whole: of the corpus' tokens some remain, and eight times the corpus is eight times the tokens
    # and less than one row.
    for kind in ("prepare", "tokenizers"):
        assert (
            found[f"{kind}_first"]["tokens"]
            == 8192
            <= found[f"{kind}_1"]["tokens"]
            <= found["bare"]["tokens"] + 150
        )
        assert abs(found[f"{kind}_8"]["tokens"] - 8 * found["bare"]["tokens"]) < 8 * 8192
        assert (
            0 < found[f"{kind}_1"]["position_share_of_bytes"] < 0.05
            and found[f"{kind}_memory_8_times_of_once"] > 0
        )
        assert (
            found[f"{kind}_once_of_map"] > 0 and f"{kind}_without_start_up_of_bare" in found
        )  # of a corpus this small, noise
    assert found["map"]["tokens"] <= found["bare"]["tokens"] + 150


@pytest.mark.slow
def test_startup(tmp_path):
    found = run("startup.py", "--repeats", 1, "--out", tmp_path / "r.json")
    assert 0 < found["help_seconds"] < found["first_step_seconds"] < 120


@pytest.fixture
def scripts(monkeypatch):
    """The modules of benchmarks/, by name."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module


def result(device: str = "CPU: some, 2 thread(s)", **values) -> dict:
    return {"device": device, "date": "2026-11-26T00:00:00", "commit": "abcdefgh", **values}


def test_tables_are_what_the_results_say(scripts):
    """What stands in the pages is made by the command alone."""
    table = scripts("table")
    made = table.blocks(sorted(table.RESULTS.glob("*.json")))
    for path, name in table.PAGES.items():
        page = path.read_text(encoding="utf-8")
        assert table.replaced(page, name, made[name]) == page, f"{path.name}: run python benchmarks/table.py"
    with pytest.raises(ValueError, match="0 blocks other"):
        table.replaced("a page", "other", "text")


def test_a_target_is_met_or_not(scripts):
    table = scripts("table")
    loss = result(tokens=8192, vocabulary=128256, width=256, memory_share=0.06, time_ratio=0.9)
    found = {
        "loss": loss,
        "startup": result(help_seconds=0.6, first_step_seconds=15.0),
        "ruler": result(tasks=13, samples=500, length=65536, seconds=1260.0, seconds_from_cache=0.5),
    }
    met = [
        (what.partition(":")[0].partition(",")[0], shown, good) for what, shown, _, good in table.rows(found)
    ]
    assert met == [
        ("chunked loss", "6.0% of full logits'", False),
        ("chunked loss", "0.90 of full logits'", True),
        ("command to the first step", "15.0 s", True),
        ("`endprompt --help`", "0.60 s", False),
        ("RULER's samples", "21.0 minutes", False),
        ("the same", "0.5 s", None),
    ]
    found = {"ruler": result(tasks=13, samples=20, length=65536, seconds=60.0, seconds_from_cache=0.5)}
    assert [good for _, _, _, good in table.rows(found)] == [None, None]  # not what the target is about
    ratios = {
        "65536": {"speedup": 2.9, "arithmetic": 2.25, "memory_share_full": 0.13},
        "16384": {"speedup": 1.2, "arithmetic": 1.1, "memory_share_full": 0.5},
        "endprompt_slowest_of_fastest_target": 1.03,
    }
    for device, speedup in (("NVIDIA H100 x 1", False), ("CPU: some", None)):
        found = {
            "efficiency": {
                "llama-3.2-1b": result(
                    device, ratios=ratios, entries=[{"fits": True, "mfu": 0.51}, {"fits": False}]
                )
            }
        }
        assert [good for _, _, _, good in table.rows(found)] == [None, None, speedup, True, False, True]


def test_results_are_collected_by_machine(scripts):
    gather = scripts("gather")
    steps = result(shape="small", entries=[], ratios={})
    found = gather.collected(
        {"loss": result(a=1)},
        {"s.json": steps, "l.json": {"loss": result("CPU: some, 1 thread(s)", a=2), "startup": result()}},
    )
    assert (
        found["efficiency"] == {"small": steps}
        and found["loss"]["a"] == 2
        and set(found) == {"loss", "startup", "efficiency"}
    )
    with pytest.raises(
        BadInput, match=r"h\.json is of another device than what is there \(CPU: some and NVIDIA H100 x 1\)"
    ):
        gather.collected(found, {"h.json": {"machine": result("NVIDIA H100 x 1")}})
    for wrong in ({}, {"a": 1}, {"a": {}}):
        with pytest.raises(BadInput, match="is no result of a benchmark"):
            gather.collected({}, {"w.json": wrong})


@pytest.mark.slow
def test_train(tmp_path):
    found = run("train.py", "--shape", "small", "--rows", 1, "--steps", 2, "--out", tmp_path / "r.json")
    assert (
        found["steps"] == len(found["losses"]) == 2
        and found["tokens_per_second"] > 0
        and found["probe"] > 1e-3
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out"], "expected one argument"),
        (
            ["--out", "{folder}"],
            "endprompt: benchmarks/gpu.py: there is no GPU that torch can use; --small rehearses on a CPU",
        ),
    ],
)
def test_gpu_refuses_in_one_line(tmp_path, arguments, message):
    command = [sys.executable, "benchmarks/gpu.py", *(part.format(folder=tmp_path) for part in arguments)]
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 2 and result.stderr.strip().splitlines()[-1].endswith(message)


@pytest.mark.parametrize(
    "arguments, message", [(["OUT", "soon"], "SECONDS: soon is no whole number"), ([], "Measures one GPU")]
)
def test_gpu_sh_refuses_in_one_line(tmp_path, arguments, message):
    result = subprocess.run(
        ["bash", str(REPOSITORY / "benchmarks/gpu.sh"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 2 and message in result.stderr and not list(tmp_path.iterdir())


def gpu_sh(folder: Path, python: Path | str, *arguments, timeout: int = 100) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(REPOSITORY / "benchmarks/gpu.sh"), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHON": str(python)},
    )


def test_gpu_sh_needs_the_package(tmp_path):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    result = gpu_sh(tmp_path, bare, "OUT", 60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"endprompt is not installed for {bare}" in result.stderr and not (tmp_path / "OUT").exists()


@pytest.mark.slow
def test_gpu_sh_measures_into_a_folder_with_a_budget(tmp_path):
    result = gpu_sh(tmp_path, sys.executable, "OUT", 60, "--small", "--stages", "machine")
    assert result.returncode == 0 and " s of 60; OUT/summary.json" in result.stdout, result.stderr
    found = json.loads((tmp_path / "OUT/summary.json").read_text())["machine"]
    assert found["matrix_product_flops"] > 1e6 and found["copy_bytes_per_second"] > 1e6
    flash = found["attention"]["small"]["flash"]
    assert min(flash.values()) > 1e6 and "reason" in found["attention"]["small"]["cudnn"]  # of GPUs alone


def test_gpu_sh_ends_in_time_and_says_what_it_left(tmp_path):
    result = gpu_sh(tmp_path, sys.executable, "OUT", 1, "--small")
    assert result.returncode == 0 and result.stdout.count("\n") == 6, result.stderr
    summary = json.loads((tmp_path / "OUT/summary.json").read_text())
    for stage in ("machine", "loss", "train"):
        assert summary[stage]["reason"] == "no time is left"
    assert (summary["1b"]["measured"], summary["8b"]["measured"]) == (0, 0) and summary["1b"]["left"] > 8


@pytest.mark.slow
def test_gpu_sh_is_rehearsed_to_its_last_line(tmp_path):
    result = gpu_sh(tmp_path, sys.executable, "OUT", 540, "--small", timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("benchmarks/gpu.py: "), result.stdout
    summary = json.loads((tmp_path / "OUT/summary.json").read_text())
    assert list(summary) == sorted(["machine", "loss", "1b", "train", "8b"])
    assert {stage: found["reason"] for stage, found in summary.items() if "reason" in found} == {}
    for stage in ("1b", "8b"):
        best = summary[stage]["best"]
        assert all(best[method]["tokens_per_second"] > 0 for method in ("endprompt", "full_length"))
        assert summary[stage]["left"] == 0 and summary[stage]["ratios"]


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
            speed = (
                1.0
                + (settings["attention"] == "cudnn")
                + 2 * (settings["compiled"] == "layers")
                + settings["rows"]
            )
            return {
                "fits": True,
                "tokens_per_second": speed,
                "seconds": 1.0,
                "tokens": 1,
                "memory_above_states_bytes": 1,
                "flops_per_token": 1.0,
                "flops_per_second": speed,
                "mfu": None,
            }

    monkeypatch.setattr(gpu.efficiency, "Worker", Worker)
    return gpu, asked


def test_gpu_takes_the_fastest_options_and_goes_on(monkeypatch, tmp_path):
    gpu, asked = stand_in(monkeypatch)

    def go():
        return gpu.steps_of(
            "small", tmp_path / "r.json", time.monotonic() + 1000, (1024, 2048, 4096), 2048, (1, 2, 4)
        )

    found = go()
    assert all(
        setting["attention"] == "cudnn" and setting["compiled"] == "layers" for setting in asked[5:]
    ) and len(asked) == len(found["entries"])
    assert [(setting["method"], setting["target"], setting["checkpointing"]) for setting in asked[5:6]] == [
        ("full_length", 2048, "full")
    ]
    assert {
        setting["rows"] for setting in asked if setting["target"] == 4096 and setting["method"] == "endprompt"
    } == {2}  # 4 did not fit
    assert {
        setting["target"]
        for setting in asked
        if setting["method"] == "full_length" and setting["checkpointing"] == "full"
    } == {1024, 2048, 4096}
    before = len(asked)
    assert go()["entries"] == found["entries"] and len(asked) == before


def test_gpu_keeps_the_later_stages_their_share_and_says_what_failed(monkeypatch, tmp_path, capsys):
    gpu, _ = stand_in(monkeypatch)
    given = []

    def stage(name, arguments, deadline):
        given.append((name, deadline - now))
        if name == "train":
            raise RuntimeError("no such thing\nmore")
        return {"measured": 1}

    now = 1000.0
    monkeypatch.setattr(gpu, "time", types.SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(gpu, "_stage", stage)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--out", str(tmp_path), "--budget", "540"])
    gpu.main()
    assert given == [("machine", 370), ("loss", 370), ("1b", 370), ("train", 480), ("8b", 540)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (
        summary["train"]["reason"] == "no such thing"
        and summary["train"]["commit"]
        and summary["8b"]["measured"] == 1
    )
    given.clear()
    gpu.main()  # what is whole is not done again; settings always are looked through
    assert [name for name, _ in given] == ["1b", "train", "8b"]
