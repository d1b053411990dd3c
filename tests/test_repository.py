"""What the repository promises about itself: its README, its shell, its style."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
).stdout.split()
SHELL = [name for name in TRACKED if name.endswith((".sh", ".sbatch")) or name == ".ci/run"]


def test_the_first_command_stands_within_thirty_lines():
    assert README[: README.index("```")].count("\n") < 30
    makefile = (REPOSITORY / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"^make (\w+)", README, re.M))


def test_files_that_the_readme_names_exist():
    named = set(
        re.findall(r"(?<![\w/])(?:recipes|docs|ds_configs|endprompt|eval|tests|slurm)/[\w./-]*\w", README)
    ) - {"endprompt/eval"}
    assert len(named) >= 8
    missing = [name for name in named if not (REPOSITORY / name).exists()]
    assert not missing, missing


def test_every_module_is_in_the_file_map():
    """Each module stands in the lines of its room."""
    rooms = re.split(r"^ ?(\w+)/ ", README[README.index("## File map") :], flags=re.M)
    told = dict(zip(rooms[1::2], rooms[2::2], strict=True))
    modules = [name.split("/") for name in TRACKED if re.fullmatch(r"(endprompt|eval)/[\w/]+\.py", name)]
    modules = [path for path in modules if not path[-1].startswith("__") and "tasks" not in path]
    assert len(modules) > 60
    rooms = {"/".join(path): path[1] if len(path) > 2 else path[0] for path in modules}
    assert not [path for path, room in rooms.items() if Path(path).name not in told[room].split()]


@pytest.mark.parametrize("name", SHELL)
def test_shell_is_strict(name):
    text = (REPOSITORY / name).read_text()
    assert "set -euo pipefail" in text
    checked = subprocess.run(
        [str(Path(sys.executable).parent / "shellcheck"), "-x", name],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout


def test_ruff_is_clean():
    checked = subprocess.run(
        [str(Path(sys.executable).parent / "ruff"), "check", "."],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout
