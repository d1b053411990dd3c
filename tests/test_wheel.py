"""A wheel, installed apart from the clone, does what the clone does: every file that it needs is in it."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

FOLDERS = {
    "endprompt": "endprompt",
    "recipes": "endprompt/recipes",
    "ds_configs": "endprompt/ds_configs",
}
# Scripts are for a clone: they are started by path, and its documents name them so.
LEFT_OUT = re.compile(r".*\.sh|recipes/tiny/.*\.py")
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
).stdout.split()


def build(folder: Path, edit=lambda text: text) -> Path:
    """The wheel of the tracked files, with ``edit`` applied to pyproject.toml; built in a copy, for a build
    leaves its files behind."""
    source = folder / "source"
    for name in TRACKED:
        if name.split("/")[0] in FOLDERS or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    (source / "pyproject.toml").write_text(edit((source / "pyproject.toml").read_text()))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--wheel-dir",
            folder,
            source,
        ],
        check=True,
        capture_output=True,
        timeout=240,
    )
    return next(folder.glob("*.whl"))


def missing(wheel: Path) -> list[str]:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        name: name.split("/", 1)
        for name in TRACKED
        if name.split("/")[0] in FOLDERS and not LEFT_OUT.fullmatch(name)
    }
    return [name for name, (folder, rest) in wanted.items() if f"{FOLDERS[folder]}/{rest}" not in held]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def test_every_file_is_in_the_wheel(wheel, tmp_path):
    assert missing(wheel) == []
    assert not [
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if not name.startswith(("endprompt/", "endprompt-"))
    ]
    hook = "[tool.hatch.build.targets.wheel.hooks.custom]"
    before = build(
        tmp_path,
        lambda text: text.replace(hook, "").replace(
            'packages = ["endprompt"]', 'packages = ["endprompt"]\nexclude = ["*.yaml"]'
        ),
    )
    assert {
        "endprompt/evaluation/tasks/passkey/passkey.yaml",
        "endprompt/reports/paper.yaml",
        "recipes/tiny.yaml",
        "ds_configs/zero3.json",
    } <= set(missing(before))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """run(*command, expect=0) -> its output: in an empty folder, in an environment that has the wheel, and
    beside it what this one has."""
    project = tmp_path_factory.mktemp("project")  # of somebody who keeps the environment in it
    subprocess.run(["git", "init", "--quiet", project], check=True)
    commit = "git -c user.name=a -c user.email=a@b commit --quiet --allow-empty --message=x"
    subprocess.run(commit.split(), cwd=project, check=True)
    venv.create(project / ".venv", with_pip=False)
    packages = next((project / ".venv/lib").glob("python*/site-packages"))
    # Folders that a .pth file names are searched, their own .pth files (an editable endprompt) are not read.
    (packages / "beside.pth").write_text(
        "".join(f"{path}\n" for path in sys.path if path.endswith("-packages"))
    )
    python = project / ".venv/bin/python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, wheel], check=True, capture_output=True, timeout=240)
    (project / "empty").mkdir()
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ENDPROMPT_COMMIT")
    }

    def run(*command, expect: int = 0) -> str:
        found = subprocess.run(
            [str(project / ".venv/bin" / command[0]), *map(str, command[1:])],
            cwd=project / "empty",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            env={**environment, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(project / "cache")},
        )
        assert found.returncode == expect, found.stdout[-4000:]
        return found.stdout

    run.folder, run.packages = project / "empty", packages
    return run


RULER = (
    ["ruler_niah_single_1"] if importlib.util.find_spec("long_context_eval") else []
)  # its samples are made by workers of their own
SMALL = (
    "--set",
    "data.tokens=16384",
    "--set",
    "eval.lengths=[2048]",
    "--set",
    "eval.samples=3",
    "--set",
    "eval.perplexity_tokens=256",
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_wheel_prepares_trains_evaluates_and_plans(installed):
    where = installed(
        "python",
        "-c",
        "import endprompt, endprompt.evaluation.engine as engine; print(endprompt.__file__, engine.TASKS)",
    )
    assert where.split() == [
        str(installed.packages / "endprompt/__init__.py"),
        str(installed.packages / "endprompt/evaluation/tasks"),
    ]
    plan = installed("endprompt", "plan", "recipes/tiny.yaml", "endprompt", *SMALL)
    assert re.search(r"GB a GPU +zero3 +zero2 +zero3_offload\n", plan)
    assert "16384 tokens" in installed("endprompt", "prepare", "tiny", "endprompt", *SMALL)
    installed("endprompt", "train", "tiny", "endprompt", *SMALL)
    tasks = ["passkey", "perplexity", *RULER]
    scores = installed(
        "endprompt", "evaluate", "tiny", "endprompt", *SMALL, "--set", f"eval.tasks=[{', '.join(tasks)}]"
    )
    assert [line.split()[1:3] for line in scores.splitlines() if line.startswith("endprompt ")] == [
        [task, str(length)] for task in tasks for length in (2048,)
    ]
    run = installed.folder / "runs/tiny/endprompt"
    result = json.loads((run / "eval/passkey/2048.json").read_text())
    assert (
        result["versions"]["endprompt"] and result["commit"] is None
    )  # not that of the repository around the environment
    installed(
        "endprompt", "inspect", run / "recipe.yaml", "endprompt", *SMALL
    )  # names recipes/tiny/base, which is nowhere here
    assert "\n| endprompt |" in installed("python", "-m", "endprompt.reports.compare", "runs/tiny")
    installed("python", "-m", "endprompt.reports.tables")
    assert (installed.folder / "results/index.md").is_file()
