"""The page of all keys of a recipe, from the schema that reads them.

python -m endprompt.reports.reference docs/recipe.md

What a key means stands beside the key in the code: the ``description`` of a pydantic field, and ``does`` of a
key of ``train:``.  The page's generated parts are made of these.
"""

import argparse
import json
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from endprompt import methods, storage
from endprompt.recipe import schema, training_keys
from endprompt.reports.markdown import grid, replaced

PAGE_BYTES = 2**20
NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
}
COLUMNS = ["type", "default", "meaning"]


def _limits(metadata: Sequence[Any]) -> Iterator[str]:
    for one in metadata:
        match one:
            case annotated_types.Gt(gt=limit):
                yield f"above {limit}"
            case annotated_types.Ge(ge=limit):
                yield f"from {limit} on"
            case annotated_types.Lt(lt=limit):
                yield f"below {_power(limit)}"
            case annotated_types.Le(le=limit):
                yield f"at most {_power(limit)}"
            case annotated_types.MinLen(min_length=1):
                yield "not empty"
            case annotated_types.MaxLen(max_length=limit):
                yield f"at most {limit} of them"
            case annotated_types.Interval():
                yield from _limits([part for part in one if part is not None])
            case FieldInfo():
                yield from _limits(one.metadata)


def _power(limit: Any) -> str:
    for exponent in (31, 32, 63):
        if limit == 2**exponent:
            return f"2^{exponent}"
    return str(limit)


def _joined(name: str, metadata: Sequence[Any]) -> str:
    return ", ".join([name, *_limits(metadata)])


def kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, with its limits.  Raises TypeError on a type that has no words here."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _joined(kind(arguments[0]), [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        parts = [kind(part, metadata if part is not type(None) else ()) for part in arguments]
        return " or ".join(dict.fromkeys(parts))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return _joined(f"list of: {kind(arguments[0])}", metadata)
    if origin is dict:
        return "section"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if annotation not in NAMES:
        raise TypeError(f"{annotation!r} has no words in the page of keys; add it to NAMES")
    return _joined(NAMES[annotation], metadata)


def _written(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def described(model: type[BaseModel]) -> Iterator[tuple[str, list[str]]]:
    """(key, [type, default, meaning]) of the keys of ``model``.  Raises ValueError if one has no meaning."""
    for key, field in model.model_fields.items():
        if field.exclude:
            continue
        if not field.description:
            raise ValueError(f"{model.__name__}.{key} has no description; give its Field one")
        default = "must be given" if field.is_required() else _written(field.get_default())
        cells = [kind(field.annotation, field.metadata), default, field.description]
        yield f"`{key}`", [_cell(cell) for cell in cells]


def _section(model: type[BaseModel]) -> str:
    return grid("key", COLUMNS, list(described(model)))


def _train() -> str:
    """Of ``train:``.  A default that depends on the machine is said by the key's meaning alone."""
    rows = [
        (
            f"`{key}`",
            [
                _cell(kind(about.type)),
                _written(training_keys.DEFAULTS[key]) if key in training_keys.DEFAULTS else "-",
                _cell(about.does),
            ],
        )
        for key, about in training_keys.ALLOWED.items()
    ]
    ours = {
        "lora": "section or null",
        "sequence_parallel": "whole number, from 1 on",
        "base_share": "number, from 0 on, below 1",
    }
    rows += [(f"`{key}`", [ours[key], "-", does]) for key, does in training_keys.OURS.items()]
    return grid("key", COLUMNS, rows)


def _options() -> str:
    """Of ``method_options:``, with the methods that have each."""
    found: dict[tuple[str, ...], list[str]] = {}
    for method in methods.METHODS.values():
        for key, cells in described(method.Options):
            found.setdefault((key, *cells), []).append(f"`{method.name}`")
    rows = [(key, [*cells, ", ".join(names)]) for (key, *cells), names in found.items()]
    return grid("key", [*COLUMNS, "methods that have it"], rows)


def _methods() -> str:
    rows = []
    for method in methods.METHODS.values():
        adapters = ", ".join(f"{key} {json.dumps(value)}" for key, value in (method.adapters or {}).items())
        length = f"`lengths.{method.fills}`" if method.trained else "nothing is trained"
        cells = [
            method.summary,
            length,
            f"`{method.rope}`" if method.rope else "the base's own",
            f"{method.sharpening:g}",
            adapters or "-",
        ]
        rows.append((f"`{method.name}`", cells))
    columns = ["what it does", "tokens in a row", "`rope.type`", "`rope.sharpen`", "`train.lora`"]
    return grid("method", columns, rows)


def blocks() -> dict[str, str]:
    """The generated parts of the page by their marks."""
    found = {
        section: _section(field.annotation)
        for section, field in schema.Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, schema.Section)
    }
    lora = _section(training_keys.Lora)
    return {**found, "train": _train(), "lora": lora, "method_options": _options(), "methods": _methods()}


def page(text: str) -> str:
    """``text`` of the page with its generated parts as the code has them.  Raises ValueError on a part that
    it lacks."""
    for mark, block in blocks().items():
        text = replaced(text, mark, block)
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the generated parts of the page of a recipe's keys.")
    parser.add_argument("page", type=Path, metavar="PAGE", help="docs/recipe.md")
    path = parser.parse_args(argv).page
    try:
        text = storage.read_text(path, PAGE_BYTES)
        storage.write_atomically(path, page(text).encode())
    except (OSError, ValueError) as error:
        print(f"reference: {path}: {error}; name docs/recipe.md", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
