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


PAGES = [name for name in TRACKED if name.endswith(".md") and not name.startswith("docs/results/")]


def named(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w/.])(?:recipes|docs|ds_configs|endprompt|tests|slurm)/[\w./-]*\w", text))


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    text = (REPOSITORY / page).read_text()
    if page == "README.md":
        assert len(named(text)) >= 8
    told = set() if page == "CHANGELOG.md" else named(text)  # which tells of what went
    missing = [name for name in told if not (REPOSITORY / name).exists()]
    folder = (REPOSITORY / page).parent
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text)
    missing += [link for link in links if not (folder / link).exists()]
    assert not missing, missing


def test_the_readme_is_read_at_one_sight():
    assert README.count("\n") <= 200 and max(map(len, README.splitlines())) <= 110


def test_every_module_is_in_the_file_map():
    """Each module stands in the lines of its room."""
    page = (REPOSITORY / "docs/architecture.md").read_text()
    rooms = re.split(r"^ ?(\w+)/ ", page[page.index("## File map") :], flags=re.M)
    told = dict(zip(rooms[1::2], rooms[2::2], strict=True))
    modules = [name.split("/") for name in TRACKED if re.fullmatch(r"(endprompt|eval)/[\w/]+\.py", name)]
    modules = [path for path in modules if not path[-1].startswith("__") and "tasks" not in path]
    assert len(modules) > 60
    rooms = {"/".join(path): path[1] if len(path) > 2 else path[0] for path in modules}
    assert not [path for path, room in rooms.items() if Path(path).name not in told[room].split()]


@pytest.mark.parametrize("name", SHELL)
def test_shell_is_strict(name):
    text = (REPOSITORY / name).read_text()
    # A cluster's own file is read by environment.sh, which is strict.
    assert "set -euo pipefail" in text or name.startswith("slurm/sites/")
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
