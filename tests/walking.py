"""Which lines of the package ask for a GPU, and which of them a call goes over."""

import ast
import functools
import sys
from collections.abc import Callable, Iterator

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "endprompt"
NAMES = ("cuda", "nccl")  # of devices and backends, as strings


def _asks(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return node.value in NAMES
    if isinstance(node, ast.Attribute):
        of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
        return node.attr == "is_cuda" or of_torch and node.attr == "cuda"
    return False


def _decides(node: ast.AST) -> Iterator[ast.expr]:
    """What ``node`` decides by, of what is called cuda."""
    for part in ast.walk(node.test) if isinstance(node, ast.If | ast.IfExp) else ():
        if isinstance(part, ast.Name) and part.id == "cuda":
            yield part
        if isinstance(part, ast.Attribute) and part.attr == "cuda" and not _asks(part):
            yield part


def places(source: str) -> dict[str, set[int]]:
    """The lines of ``source`` that ask for a GPU, by the function they stand in ("" outside of all)."""
    found: dict[str, set[int]] = {}

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            lines = {child.lineno} if _asks(child) else set()
            lines |= {part.lineno for part in _decides(child)}
            if lines:
                found.setdefault(name, set()).update(lines)
            visit(child, f"{name}.{child.name}".lstrip(".") if named else name)

    visit(ast.parse(source), "")
    return found


@functools.cache
def all_places() -> dict[str, set[int]]:
    """The same of the whole package, by file:function."""
    return {
        f"{path.relative_to(PACKAGE).as_posix()}:{name}": lines
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, lines in places(path.read_text()).items()
    }


def lines_of(call: Callable[[], object]) -> set[tuple[str, int]]:
    """The file, below the package, and the number of every line of it that ``call`` goes over."""
    seen: set[tuple[str, int]] = set()
    start = f"{PACKAGE}/"

    def line(frame, event, _):
        if event == "line":
            seen.add((frame.f_code.co_filename.removeprefix(start), frame.f_lineno))
        return line

    def function(frame, event, _):
        return line if frame.f_code.co_filename.startswith(start) else None

    before = sys.gettrace()
    sys.settrace(function)
    try:
        call()
    finally:
        sys.settrace(before)
    return seen


def missed(place: str, seen: set[tuple[str, int]]) -> list[int]:
    """The lines of ``place`` that are not in ``seen``."""
    file = place.partition(":")[0]
    return sorted(line for line in all_places()[place] if (file, line) not in seen)
