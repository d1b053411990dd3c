"""The commands as a newcomer meets them: help, versions, completion, and evaluation without a recipe."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, run_main, write_jsonl
from safetensors.torch import load_file, save_file
from training import ENVIRONMENT

from endprompt import methods
from endprompt.commands import alone, of_runs, options

QUICK = (["--version"], ["--help"], ["doctor", "--help"], ["evaluate", "--help"])


def commands() -> list[str]:
    parser = options.parser()
    return list(next(action for action in parser._actions if action.dest == "command").choices)


def test_every_command_does_something():
    assert set(commands()) == {*alone.COMMANDS, *of_runs.OF_EXPERIMENTS}


@pytest.mark.parametrize("command", commands())
def test_help_ends_in_the_exit_codes(command):
    code, said, _ = run_main(command, "--help")
    assert code == 0 and "exit codes: 0" in said and "2 bad input" in " ".join(said.split())


def test_versions_of_what_the_figures_depend_on():
    code, said, _ = run_main("--version")
    found = dict(line.split(" ", 1) for line in said.splitlines())
    assert code == 0 and set(found) >= {"endprompt", "torch", "transformers", "deepspeed", "flash-attn"}
    import torch

    assert found["torch"] == torch.__version__


def test_what_is_asked_quickly_imports_no_torch():
    script = f"""
import sys
from endprompt.cli import main
for given in {[list(one) for one in QUICK]!r}:
    try:
        main(given)
    except SystemExit as error:
        assert not error.code
print(sorted({{"torch", "transformers", "numpy", "pydantic"}} & set(sys.modules)))
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert out.returncode == 0 and out.stdout.splitlines()[-1] == "[]", out.stderr


def completed(line: str, folder: Path) -> list[str]:
    """What the shell is offered behind ``line``."""
    environment = {
        **ENVIRONMENT,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "_ARGCOMPLETE_SHELL": "bash",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    script = (
        "import os, sys; os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 8);"
        "sys.argv[:] = ['endprompt']; from endprompt.cli import main; main()"
    )
    out = folder / "offered"
    out.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-c", script, str(out)], env=environment, cwd=folder, timeout=120)
    return out.read_text().split()


def test_the_shell_completes(tmp_path):
    assert set(completed("endprompt ", tmp_path)) >= set(commands())
    (tmp_path / "mine.yaml").touch()
    assert "mine.yaml" in completed("endprompt plan mi", tmp_path)
    assert set(completed("endprompt plan mine.yaml ", tmp_path)) >= set(methods.METHODS)
    assert "ruler_vt" in completed("endprompt evaluate --tasks ruler_v", tmp_path)
    assert "--gpu-memory" in completed("endprompt init --gpu", tmp_path)


# -- evaluate without a recipe -----------------------------------------------------------------------------


@pytest.fixture
def scored(base, tmp_path):
    """scored(*more) of the tiny base on passkey at two lengths."""

    def run(*more):
        given = ["--model", base, "--tasks", "passkey", "--lengths", "128", "256"]
        return run_main(
            "evaluate",
            *given,
            "--out",
            tmp_path / "out",
            "--set",
            "eval.samples=4",
            "--set",
            "eval.depths=2",
            *more,
        )

    return run


def test_a_model_is_scored_without_a_recipe(scored, tmp_path, base, recipe_file):
    code, said, error = scored()
    assert code == 0 and said.count("passkey") == 2, error
    found = sorted((tmp_path / "out").glob("base/base/eval-base-*/passkey/*.json"))
    assert [path.name for path in found] == ["128.json", "256.json"]
    one = json.loads(found[0].read_text())
    # The same answers as a recipe's command gives, under the same question but for what a recipe names.
    lengths = {"eval": {"lengths": [128, 256]}}
    recipe = ["evaluate", recipe_file(**lengths), "base", "--model", base, "--out", tmp_path / "recipe"]
    code, _, error = run_main(*recipe)
    assert code == 0, error
    other = json.loads(next((tmp_path / "recipe").rglob("passkey/128.json")).read_text())
    assert one["scores"] == other["scores"] and set(one) == set(other)
    assert one["question"]["model"] == other["question"]["model"]
    before = found[0].stat().st_mtime_ns
    assert scored()[0] == 0 and found[0].stat().st_mtime_ns == before  # what is there is not made again


def test_tasks_and_lengths_go_before_the_recipe(recipe_file, tmp_path):
    out = ["--out", tmp_path / "out", "--list"]
    assert run_main("evaluate", recipe_file(), "base", *out)[1].split() == ["passkey:64", "passkey:128"]
    given = ["--tasks", "multikey,passkey", "--lengths", "2.56e2"]
    for order in ([recipe_file(), "base", *given, *out], [*given, *out, recipe_file(), "base"]):
        assert run_main("evaluate", *order)[1].split() == ["multikey:256", "passkey:256"]
    code, _, error = run_main("evaluate", *out, *given, recipe_file(), "base")  # taken for lengths
    assert code == 2 and error.count("\n") == 1


def test_lengths_of_the_recipe_narrow_it_and_others_replace_them(recipe_file, tmp_path):
    tasks = {"tasks": ["passkey", "longbench_qasper", "mmlu", "distance"], "longbench_length": 256}
    path = recipe_file(eval={**tasks, "distance_haystack": 128, "lengths": [64, 128, 320]})

    def listed(*given):
        return run_main("evaluate", path, "base", "--out", tmp_path / "out", "--list", *given)[1].split()

    own = ["longbench_qasper:256", "mmlu:-", "distance:512"]
    assert listed("--lengths", "128", "64") == ["passkey:64", "passkey:128", *own]
    assert listed("--lengths", "64,96") == ["passkey:64", "passkey:96", *own]
    assert listed("--lengths", "320", "128", "64") == listed()
    narrow = ["--set", "eval.lengths=[96,128]", "--lengths", "96", "--tasks", "passkey"]
    assert listed(*narrow) == ["passkey:96"]

    def asked(*given):
        tree = run_main("evaluate", path, "base", "--out", tmp_path / "out", "--dry-run", *given)[1]
        return yaml.safe_load(tree)["eval"]["lengths"]

    assert asked("--lengths", "64") == [64, 128, 320] and asked("--lengths", "64", "96") == [64, 96]
    # Lengths that cannot be asked are mended by those in their place.
    broken = recipe_file("broken", eval={"tasks": ["named_keys"], "named_keys": 2, "lengths": [4096]})
    found = run_main("evaluate", broken, "base", "--out", tmp_path / "out", "--lengths", "128", "--list")
    assert found[1].split() == ["named_keys:128"]


def test_far_gain_is_left_out_where_no_length_is_far(recipe_file, tmp_path):
    text = write_jsonl(tmp_path / "heldout.jsonl", ["word " * 900])
    options = {"tasks": ["passkey", "far_gain"], "lengths": [96, 320], "perplexity_corpus": str(text)}
    given = ["evaluate", recipe_file(eval=options), "base", "--out", tmp_path / "out", "--lengths", "96"]
    code, said, error = run_main(*given)
    assert code == 0 and said.count("\n") == 1, error
    assert "far_gain: no length of --lengths is beyond the base's window" in error
    code, _, error = run_main(*given, "--tasks", "far_gain")
    assert code == 2 and error.count("\n") == 1 and "no length of --lengths" in error


def test_places_between_options(recipe_file, tmp_path):
    """RECIPE and METHOD stand anywhere, as they did before they could be left out."""
    found = run_main("evaluate", recipe_file(), "--out", tmp_path / "out", "base", "--list")
    assert found[1].split() == ["passkey:64", "passkey:128"]


@pytest.mark.parametrize(
    "given, complaint",
    [
        ([], "--model is missing"),
        (["--model", "x"], "--tasks is missing"),
        (["--model", "x", "--tasks", "passkey"], "--lengths is missing"),
        (["--model", "x", "--tasks", "passkey", "--lengths", "many"], "--lengths 'many'"),
        (["--model", "x", "--tasks", "passkey", "--lengths", "0"], "--lengths '0'"),
        (["--model", "x", "--tasks", "passkey", "--lengths", "6.5"], "--lengths '6.5': give a whole number"),
        (["--model", "x", "--tasks", "passkey", "--lengths", "1e12"], "--lengths '1e12': give numbers"),
        (["--model", "x", "--tasks", "nope", "--lengths", "64"], "there is no task 'nope'"),
        (["--model", "./x", "--tasks", "passkey", "--lengths", "64"], "there is no folder"),
        (["--model", "x", "--tasks", "far_gain", "--lengths", "64"], "eval.perplexity_corpus is missing"),
        (
            ["--model", "x", "--tasks", "passkey", "--lengths", "64", "--set", "data.tokens=3"],
            "--set data.tokens=3: without a recipe",
        ),
        (
            ["--model", "x", "--tasks", "passkey", "--lengths", "64", "--set", "eval.x=3"],
            "unknown key eval.x",
        ),
        (["recipes/tiny.yaml"], "METHOD is missing"),
    ],
)
def test_bad_input_in_one_line(given, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, error = run_main("evaluate", *given)
    assert (code, said) == (2, "") and complaint in error and error.count("\n") == 1, error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "setting, complaint",
    [
        ("model.gguf_file=x.gguf", "--set model.gguf_file: without a recipe a GGUF file is not read"),
        ("model.revision=v1", "is a folder, which has one content alone"),
        ("model.revision=''", "--set model.revision: it is empty"),
        ("model.name_or_path=elsewhere", "without a recipe --model names the model"),
        ("eval.tasks=[multikey]", "--set eval.tasks=[multikey]: without a recipe --tasks says it"),
        ("eval.lengths=[512]", "--set eval.lengths=[512]: without a recipe --lengths says it"),
    ],
)
def test_a_key_of_the_model_that_nothing_reads_is_refused(scored, tmp_path, setting, complaint):
    code, said, error = scored("--set", setting)
    assert (code, said, error.count("\n")) == (2, "", 1) and complaint in error, error
    assert not (tmp_path / "out").exists()


def test_vllm_takes_no_revision(tmp_path):
    given = ["--model", "org/tiny", "--tasks", "passkey", "--lengths", "128", "--out", tmp_path / "out"]
    settings = ["--set", "model.revision=v1", "--set", "eval.backend=vllm"]
    code, said, error = run_main("evaluate", *given, *settings)
    assert (code, said, error.count("\n")) == (2, "", 1) and "does not reach vLLM here" in error, error


def hub(folder: Path, base: Path, scales: dict[str, float]) -> None:
    """The hub's cache with org/tiny: the base with its final norm multiplied, by the name of a revision."""
    root = folder / "models--org--tiny"
    (root / "refs").mkdir(parents=True)
    for number, (name, scale) in enumerate(scales.items()):
        commit = f"{number:040x}"
        (root / "refs" / name).write_text(commit)
        there = shutil.copytree(base, root / "snapshots" / commit)
        weights = load_file(there / "model.safetensors")
        weights["model.norm.weight"] *= scale
        save_file(weights, there / "model.safetensors", {"format": "pt"})


def test_the_revision_of_a_hub_id_is_the_one_that_is_scored(tmp_path, base, tiny_text):
    hub(tmp_path / "hub", base, {"main": 1.0, "v1": 0.0})
    text = write_jsonl(tmp_path / "heldout.jsonl", [" ".join(tiny_text[:4])])
    found = {}
    for revision in ("main", "v1", None):
        options = {"perplexity_corpus": text, "perplexity_tokens": 64, "perplexity_stride": 32}
        settings = [f"eval.{key}={value}" for key, value in options.items()]
        settings += [f"model.revision={revision}"] if revision else []
        command = [sys.executable, "-m", "endprompt", "evaluate", "--model", "org/tiny"]
        command += ["--tasks", "perplexity", "--lengths", "128", "--out", f"out-{revision}"]
        done = subprocess.run(
            [*command, *(part for one in settings for part in ("--set", one))],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": str(REPOSITORY)},
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(next((tmp_path / f"out-{revision}").rglob("perplexity/128.json")).read_text())
        found[revision] = result["scores"]["score"], result["question"]["model"]
    assert found["v1"][0] > 2 * found["main"][0] == 2 * found[None][0]
    assert [model["commit"][-1] for _, model in found.values()] == ["0", "1", "0"]
    assert [model.get("revision") for _, model in found.values()] == ["main", "v1", None]


def test_far_gain_asks_for_the_window(base, tmp_path):
    given = ["--model", base, "--tasks", "far_gain", "--lengths", "512", "--set", "eval.perplexity_corpus=x"]
    code, _, error = run_main("evaluate", *given, "--out", tmp_path / "out")
    assert code == 2 and "model.original_length=TOKENS" in error
    code, said, _ = run_main("evaluate", *given, "--set", "model.original_length=256", "--list")
    assert (code, said.split()) == (0, ["far_gain:512"])
