"""What the repository promises about itself: its README, its shell, its style."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from endprompt import methods
from endprompt.recipe import schema, training_keys

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


# What pages name beside our modules and the keys of a recipe: of config.json, of other programs, files.
OTHERS = (
    "AutoModelForCausalLM.from_pretrained config.rope_parameters data_types.grad_accum_dtype"
    " datasets.load_dataset datasets.map endprompt.base_share endprompt.sharpened rope_freqs.weight"
    " rope_parameters.llama_4_scaling_beta transformers.TrainingArguments"
).split()
NAME = re.compile(r"(?<![\w/])`([A-Za-z]\w*)\.(\w+)(?:\([^`]*\))?`")
FILES = "bin csv html json jsonl gguf log md model png py safetensors sbatch sh txt yaml zip".split()


def told_by_modules() -> dict[str, set[str]]:
    """Of every module and class of the package, by its name alone, the names that can be asked of it."""
    found: dict[str, set[str]] = {}
    for path in (REPOSITORY / "endprompt").rglob("*.py"):
        stem = path.parent.name if path.stem == "__init__" else path.stem
        places = [(stem, ast.parse(path.read_text()))]
        places += [(node.name, node) for node in ast.walk(places[0][1]) if isinstance(node, ast.ClassDef)]
        for name, place in places:
            told = found.setdefault(name, {"py"})
            for node in place.body:
                match node:
                    case ast.FunctionDef(name=one) | ast.AsyncFunctionDef(name=one) | ast.ClassDef(name=one):
                        told.add(one)
                    case ast.AnnAssign(target=ast.Name(id=one)):
                        told.add(one)
                    case ast.Assign(targets=targets):
                        told |= {one.id for one in targets if isinstance(one, ast.Name)}
                    case ast.ImportFrom(names=names) | ast.Import(names=names):
                        told |= {one.asname or one.name for one in names}
    return found


def unknown(text: str) -> list[str]:
    """The names in ``text`` of the form `module.function`, `Class.method` or `module.py` that are none."""
    known = told_by_modules()
    for section, field in schema.Recipe.model_fields.items():
        keys = getattr(field.annotation, "model_fields", None)
        known.setdefault(section, set()).update(keys or ())
    known.setdefault("train", set()).update(training_keys.ALLOWED, training_keys.OURS)
    known.setdefault("method_options", set()).update(
        key for method in methods.METHODS.values() for key in method.Options.model_fields
    )
    scripts = {Path(name).stem for name in TRACKED if name.endswith(".py")}
    return [
        f"{first}.{second}"
        for first, second in NAME.findall(text)
        if second not in known.get(first, ())
        and f"{first}.{second}" not in OTHERS
        and not (second in FILES and (second != "py" or first in scripts))
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_functions_that_a_page_names_exist(page):
    assert not unknown((REPOSITORY / page).read_text())


@pytest.mark.parametrize("name", ["corpus.changed", "attention.same_draws", "nowhere.py", "data.lengths"])
def test_a_name_that_is_gone_is_found(name):
    assert unknown(f"so it is refused (`{name}`)") == [name]
    assert unknown(f"`{name}(ROWS)`, beside `ledger.changed` and `data.corpus`") == [name]


def test_the_readme_is_read_at_one_sight():
    assert README.count("\n") <= 200 and max(map(len, README.splitlines())) <= 110


def too_long(name: str, text: str) -> list[str]:
    """The lines of more than 110 columns of a page, script or comment; tables and data have lines of their
    own width, and ruff measures Python."""
    if name.endswith(".md"):
        kept = re.compile(r"[^|]")
    elif name.endswith((".sh", ".sbatch")) or name == "Makefile":
        kept = re.compile("")
    else:
        kept = re.compile(r"\s*#")
    return [line for line in text.splitlines() if len(line) > 110 and kept.match(line)]


def test_lines_of_pages_scripts_and_comments():
    kinds = (".md", ".sh", ".sbatch", ".yaml", ".toml", ".txt", "Makefile")
    # What a command wrote of one run stays as it was written.
    names = [name for name in TRACKED if name.endswith(kinds) and "/results/" not in name]
    assert len(names) > 60
    found = {name: too_long(name, (REPOSITORY / name).read_text()) for name in names}
    assert not {name: lines for name, lines in found.items() if lines}
    assert too_long("page.md", "a" * 111) and not too_long("page.md", "|" + "a" * 111)
    assert too_long("run.sh", "a" * 111) and too_long("recipe.yaml", "  # " + "a" * 108)


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


INTERVAL = re.compile(r"([+-]?\d[\d.,]*)(?: %| points?| nats)? \[([+-]?\d[\d.,]*), ([+-]?\d[\d.,]*)\]")


def intervals(lines: list[str]) -> list[tuple[float, ...]]:
    """(mean, low, high) of each "54 % [49, 59]" in a text, which may be wrapped inside of one."""
    found = INTERVAL.findall(re.sub(r"\s+", " ", "\n".join(lines)))
    return [tuple(float(number.replace(",", "").rstrip(".")) for number in one) for one in found]


def of_no_table(texts: list[str]) -> list[tuple[float, ...]]:
    """The intervals in prose that no table of ``texts`` holds, as it is or turned round."""
    lines = [line for text in texts for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines()]
    held = {one for line in lines if line.startswith("|") for one in intervals([line])}
    held |= {(-mean, -high, -low) for mean, low, high in held}
    return [one for one in intervals([line for line in lines if line[:1] != "|"]) if one not in held]


def test_intervals_in_prose_are_those_of_tables():
    """The tables come from the results by command, the prose by hand: new runs must change both."""
    texts = [(REPOSITORY / page).read_text() for page in PAGES if page.startswith(("README", "docs/"))]
    assert len(intervals([line for text in texts for line in text.splitlines() if line[:1] != "|"])) > 50
    assert not of_no_table(texts)


@pytest.mark.parametrize(
    "prose, stray",
    [
        ("finds 54 %\n[49, 59] of them", 0),
        ("is 3 points [1, 5.5] behind", 0),
        ("finds 54 % [49, 60]", 1),
        ("finds 55 % [49, 59]", 1),
        ("1,234 [1,000, 1,500], and 2 [1, 3].", 1),
    ],
)
def test_an_interval_of_no_table_is_found(prose, stray):
    table = "| `short` | 54 [49, 59] | -3 [-5.5, -1] | 1234 [1000, 1500] |"
    assert len(of_no_table([f"{prose}\n\n{table}\n"])) == stray


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
