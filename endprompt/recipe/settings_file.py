"""Files of settings that anyone may have written: read up to a size, parsed as plain YAML without
surprises.
"""

import os
import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

from endprompt import BadInput, storage

# No recipe comes near them.  YAML's aliases let a page of text stand for a terabyte, which the count of
# values catches.
FILE_BYTES = 2**20
VALUES, DEPTH = 100_000, 32
NAME_BYTES = 200

_HERE = Path(__file__).resolve().parents[1]
# The folder with recipes/ and ds_configs/: the package where it was installed from a wheel, else the clone
# around it.
SHIPPED = _HERE if (_HERE / "recipes").is_dir() else _HERE.parent


def read(path: Path) -> str:
    """The text of a settings file, see ``storage.read_text``."""
    return storage.read_text(path, FILE_BYTES)


class Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error and 2e-5 is a number (YAML 1.1 reads it as text)."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise BadInput(
                    f"line {key_node.start_mark.line + 1}: the key {reprlib.repr(key)} is not text; quote it"
                )
            if key in seen:
                raise BadInput(
                    f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice; keep one"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _plain(tree: Any) -> None:
    """Raises BadInput unless ``tree`` is text, numbers, booleans, null, and lists and mappings of them, of a
    size that a person writes.
    """
    waiting, values = [(tree, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        values += 1
        if depth > DEPTH or values > VALUES:
            raise BadInput(
                f"it holds more than {VALUES} values, is nested more than {DEPTH} deep, or refers to itself;"
                " write it out, and shorter"
            )
        if isinstance(value, dict | list):
            waiting += (
                (item, depth + 1)
                for item in (value if isinstance(value, list) else [*value, *value.values()])
            )
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise BadInput(
                    f"{reprlib.repr(value)} holds half of a UTF-16 surrogate pair, which is no text; mend it"
                ) from None
        elif not isinstance(value, bool | int | float | None):
            raise BadInput(
                f"{reprlib.repr(value)} is read as {type(value).__name__}, which no key takes; quote it if it"
                " is text"
            )


def parse(text: str, where: str) -> Any:
    """What stands in ``text``.  Raises BadInput beginning with ``where`` if it is not YAML, gives a key
    twice, or holds other than plain values.
    """
    try:
        tree = yaml.load(text, Loader)
        _plain(tree)
        return tree
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        OverflowError,
        RecursionError,
    ) as error:  # "!!int x" and the like raise what they meet
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise BadInput(
            f"{where}: not valid YAML{line}: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"
        ) from None


def folder_name(name: Any, source: str) -> str:
    """``name`` if it can be the folder of a recipe's results and leads nowhere else.  Raises BadInput."""
    if (
        not isinstance(name, str)
        or not name.strip()
        or name != name.strip()
        or name.startswith((".", "-"))
        or not name.isprintable()
        or any(mark in name for mark in "/\\")
        or len(name.encode(errors="replace")) > NAME_BYTES
    ):
        raise BadInput(
            f"{source} {reprlib.repr(name)} cannot name the folder of results; use a plain name of letters,"
            f" digits, dots and dashes (no slash, no dot or dash first, at most {NAME_BYTES} bytes)"
        )
    return name


def find(path: Path) -> Path:
    """The file of a recipe: ``path``, else the recipe of that path or name that comes with this program."""
    recipes = SHIPPED / "recipes"
    shipped = [] if os.path.lexists(path) else [SHIPPED / path, recipes / path, recipes / f"{path}.yaml"]
    return next((found for found in shipped if found.is_file()), path)


def recipe(path: str | Path) -> tuple[str, dict]:
    """(name, sections) of a recipe's file, see ``find``, the sections unchecked.  Raises BadInput."""
    path = Path(path)
    try:
        path = find(path)
        text = read(path)
    except FileNotFoundError:
        known = ", ".join(
            sorted(file.stem for file in (SHIPPED / "recipes").glob("*.yaml") if file.stem != "sft")
        )  # which is TRL's
        raise BadInput(
            f"recipe: there is no file {path}; those of recipes/ are known by their names too: {known}"
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"recipe: {path} cannot be read as UTF-8 text: {error}; name a recipe file") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        raise BadInput(
            f"{path}: a recipe is a mapping of sections (model, lengths, data, ...), not"
            f" {type(tree).__name__}"
        )
    # A resolved copy names its recipe and method: it loads again under the same name.
    copied = "method" in tree and "recipe" in tree
    name = (
        folder_name(tree.pop("recipe"), f"{path}: recipe:")
        if copied
        else folder_name(path.stem, "recipe: the file's name")
    )
    tree.pop("method", None)
    return name, tree
