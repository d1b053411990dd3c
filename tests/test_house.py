"""How the code is laid out: rooms that import downwards, functions that are read at one sight."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "endprompt"
# A room imports only itself and rooms before it; what lies in the package itself is before all but cli.
ROOMS = "positions bases methods recipe rows runs training planning evaluation reports commands".split()
LINES, PARAMETERS = 60, 6
# The signatures of autograd functions, kernels and of others' interfaces are not ours.
NOT_OURS = {"forward", "backward", "_forward", "_kernel", "_row", "shifted_sparse_attention"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "tasks" not in path.parts)


def room(path: Path) -> str | None:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def imported(tree: ast.AST) -> Iterator[str]:
    """The rooms that are imported anywhere in ``tree``, in functions too."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "endprompt" and len(parts) > 1 and parts[1] in ROOMS:
                yield parts[1]


def upwards(source: str, here: str) -> list[str]:
    return [other for other in imported(ast.parse(source)) if ROOMS.index(other) > ROOMS.index(here)]


def test_every_room_says_what_passes_through():
    found = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert found == set(ROOMS)
    for name in ROOMS:
        said = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text())) or ""
        assert len(said.splitlines()) >= 3, f"endprompt/{name}/__init__.py says too little"


@pytest.mark.parametrize("path", [path for path in modules() if room(path)], ids=lambda path: path.stem)
def test_rooms_import_downwards(path):
    assert upwards(path.read_text(), room(path)) == []


def test_an_import_upwards_is_seen():
    assert upwards("from endprompt.training import run", "rows") == ["training"]
    assert upwards("def f():\n    import endprompt.reports.tables", "evaluation") == ["reports"]
    assert upwards("from endprompt import storage\nfrom endprompt.rows import shards", "training") == []


def too_long(source: str) -> list[str]:
    """Functions of more lines or parameters than a reader takes in at once."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        given = node.args
        count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
        count -= bool(given.args) and given.args[0].arg in ("self", "cls")
        first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
        if node.end_lineno - first + 1 > LINES:
            found.append(f"{node.name}: {node.end_lineno - first + 1} lines")
        if count > PARAMETERS and node.name not in NOT_OURS:
            found.append(f"{node.name}: {count} parameters")
    return found


def every_file() -> list[Path]:
    rooms = (REPOSITORY / name for name in ("endprompt", "eval", "benchmarks", "recipes", "tests"))
    return sorted(path for folder in rooms for path in folder.rglob("*.py") if "tasks" not in path.parts)


@pytest.mark.parametrize("path", every_file(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_functions_are_read_at_one_sight(path):
    found = too_long(path.read_text())
    # A test's parameters are fixtures and the names of its cases.
    assert [line for line in found if "tests" not in path.parts or line.endswith("lines")] == []


def test_a_long_function_is_seen():
    assert too_long("def f():\n" + "    pass\n" * 60) == ["f: 61 lines"]
    assert too_long("def f(a, b, c, *, d, e, f, g): pass") == ["f: 7 parameters"]
    assert too_long("class A:\n    def f(self, a, b, c, d, e, f): pass") == []


def test_no_flag_of_a_method_is_asked_outside_its_file():
    import re

    flags = re.compile(r"method\.(chunked|matched|recall|end_prompt|sharpen\b|attention\b(?!\())")
    for path in modules():
        if room(path) != "methods":
            assert not flags.search(path.read_text()), path


# What makes a tensor from nothing: on the host unless told otherwise, and a GPU's code is not told by a CPU.
MAKERS = (
    "tensor as_tensor scalar_tensor zeros ones full empty empty_strided arange range linspace logspace eye"
    " rand randn randint randperm normal bartlett_window hann_window tril_indices triu_indices"
).split()


def without_device(source: str) -> list[str]:
    """Calls of torch's MAKERS that do not say on which device, by line; however torch is imported."""
    tree, found = ast.parse(source), []
    modules, names = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {name.asname or "torch" for name in node.names if name.name.split(".")[0] == "torch"}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            names |= {name.asname or name.name: name.name for name in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called, maker = node.func, ""
        if isinstance(called, ast.Name):
            maker = names.get(called.id, "")
        elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            maker = called.attr if called.value.id in modules else ""
        if maker in MAKERS and not any(word.arg == "device" for word in node.keywords):
            found.append(f"{node.lineno}: torch.{maker}")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_tensors_are_made_on_a_device_that_is_named(path):
    """``device="cpu"`` where the host is meant."""
    assert without_device(path.read_text()) == []


def test_a_tensor_without_a_device_is_seen():
    assert without_device("import torch\nx = torch.zeros(3)") == ["2: torch.zeros"]
    assert without_device("import torch as t\ndef f():\n    return t.arange(4)[None]") == ["3: torch.arange"]
    assert without_device("from torch import eye as one\none(3)") == ["2: torch.eye"]
    assert without_device("import torch\ntorch.full((2,), 1.0, **options)") == ["2: torch.full"]
    told = (
        "import torch\ntorch.zeros(3, device=x.device)\ntorch.zeros_like(x)\nx.new_zeros(3)\nother.zeros(3)"
    )
    assert without_device(told) == []
