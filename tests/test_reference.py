"""docs/recipe.md says of every key what the schema that reads it says."""

import json
import re
from typing import Annotated, Literal

import pytest
from conftest import REPOSITORY
from pydantic import BaseModel, Field

from endprompt import BadInput, methods
from endprompt.recipe import schema, training_keys
from endprompt.reports import reference

PAGE = REPOSITORY / "docs/recipe.md"


def rows(mark: str) -> dict[str, list[str]]:
    """{key: cells} of a generated table of the page."""
    block = re.search(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", PAGE.read_text(), re.DOTALL)[1]
    split = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in block.splitlines()[2:]]
    return {cells[0].strip("`"): cells[1:] for cells in split}


def test_the_page_is_what_the_command_writes(tmp_path):
    copy = tmp_path / "recipe.md"
    copy.write_text(PAGE.read_text().replace("tokens in a row of the short-row methods", "stale"))
    reference.main([str(copy)])
    assert copy.read_text() == PAGE.read_text() and "stale" not in PAGE.read_text()


def test_every_key_and_default_is_there(recipe_file):
    recipe = schema.load(recipe_file())
    sections = [key for key, field in schema.Recipe.model_fields.items() if not field.exclude]
    assert set(sections) <= set(reference.blocks())
    for key, default in schema.defaults().items():
        section, _, name = key.partition(".")
        assert json.loads(rows(section)[name][1].strip("`")) == default
        assert hasattr(getattr(recipe, section), name)
    asked = {"model.name_or_path", "lengths.physical", "lengths.target", "data.corpus", "data.tokens"}
    found = {
        f"{section}.{key}"
        for section in ("model", "lengths", "data", "rope", "eval")
        for key, cells in rows(section).items()
        if cells[1] == "must be given"
    }
    assert found == asked and all(f"`{key}`" in PAGE.read_text().split("```")[0] for key in asked)
    assert set(rows("train")) == {*training_keys.ALLOWED, *training_keys.OURS}
    for key, value in training_keys.DEFAULTS.items():
        assert json.loads(rows("train")[key][1].strip("`")) == value


def test_options_name_the_methods_that_have_them():
    found = rows("method_options")
    for method in methods.METHODS.values():
        having = {key for key, cells in found.items() if f"`{method.name}`" in cells[-1]}
        assert having == set(method.Options.model_fields)
    assert set(rows("methods")) == set(methods.METHODS)


@pytest.mark.parametrize(
    "annotation, words",
    [
        (int, "whole number"),
        (Annotated[float, Field(gt=0, le=4)], "number, above 0, at most 4"),
        (Annotated[int, Field(ge=0, lt=2**32)], "whole number, from 0 on, below 2^32"),
        (list[str] | None, "list of: text or null"),
        (Literal["a", "b"] | bool, "`a`, `b` or true or false"),
        (dict[str, int], "section"),
    ],
)
def test_types_in_words(annotation, words):
    assert reference.kind(annotation) == words


def test_what_has_no_meaning_or_no_words_is_refused():
    class Silent(BaseModel):
        key: int = 1

    class Odd(BaseModel):
        key: complex = Field(1j, description="what it means")

    with pytest.raises(ValueError, match="Silent.key has no description"):
        list(reference.described(Silent))
    with pytest.raises(TypeError, match="complex"):
        list(reference.described(Odd))


def test_another_page_is_refused_and_left_alone(tmp_path, capsys):
    other = tmp_path / "other.md"
    other.write_text("# another page\n")
    with pytest.raises(SystemExit) as caught:
        reference.main([str(other)])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "0 blocks model" in said and said.count("\n") == 1
    assert other.read_text() == "# another page\n"


def test_the_example_is_a_recipe(tmp_path):
    """Its five keys are all that must be given."""
    path = tmp_path / "mine.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
    assert schema.load(path).lengths.target == 131072
    path.write_text(path.read_text().replace("tokens: 1.0e8", ""))
    with pytest.raises(BadInput, match="data.tokens is missing"):
        schema.load(path)
