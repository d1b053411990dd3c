"""An experiment: a recipe, what overrides it, a method and a base, resolved once a command."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from endprompt import BadInput, methods
from endprompt.bases import families, sharpen
from endprompt.bases.model import Base
from endprompt.methods.base import Method, Options, Rows, Setting
from endprompt.positions import rope
from endprompt.recipe import schema
from endprompt.recipe.training_keys import Lora


def options(method: Method, given: dict[str, Any], former: dict[str, Any] | None = None) -> Options:
    """The options of ``method``: of ``given``, those by themselves and those under the method's name.

    former: options by their earlier keys, of which the method takes those that it has.
    Raises BadInput on an option that the method does not have, or under the name of a method that lacks it.
    """
    known = set(method.Options.model_fields)
    own = {key: value for key, value in given.items() if key not in methods.METHODS}
    for name in given.keys() & methods.METHODS.keys():
        _validated(methods.METHODS[name], given[name], f"method_options.{name}")
    taken = {key: value for key, value in (former or {}).items() if key in known}
    return _validated(method, {**taken, **own, **given.get(method.name, {})}, "method_options")


def _validated(method: Method, given: Any, where: str) -> Options:
    if not isinstance(given, dict):
        raise BadInput(f"{where}: {given!r:.60} is no section; give it keys, or remove it")
    try:
        return method.Options.model_validate(given)
    except ValidationError as error:
        known = ", ".join(method.Options.model_fields) or "none"
        found = []
        for item in error.errors():
            key = f"{where}.{'.'.join(map(str, item['loc']))}"
            if item["type"] == "extra_forbidden":
                found.append(f"{key}: {method.name} has no such option (it has: {known}); remove it")
            else:
                said = item["msg"].removeprefix("Value error, ")
                found.append(f"{key}: {said} (given: {item.get('input')!r:.60})")
        raise BadInput("; ".join(found)) from None


@dataclass(frozen=True)
class Experiment:
    """recipe x method x base: everything after it takes this, or the one part of it that it needs.

    out: the folder of all runs.  The base is found, and its config and tokenizer are read, when first asked
    for, and once.
    """

    recipe: schema.Recipe
    method: Method
    options: Options
    out: Path = Path("runs")

    @classmethod
    def of(cls, recipe: schema.Recipe, method: Method | str, out: Path = Path("runs")) -> "Experiment":
        """Raises BadInput if there is no such method, or it has not the options that the recipe gives."""
        method = methods.get(method) if isinstance(method, str) else method
        found = options(method, recipe.method_options, recipe.former)
        method.check(found, recipe.data.packing)
        return cls(recipe, method, found, Path(out))

    def with_method(self, name: str) -> "Experiment":
        """The same recipe under another method; options that are not under a method's name are left out."""
        given = {key: value for key, value in self.recipe.method_options.items() if key in methods.METHODS}
        return self.of(self.recipe.model_copy(update={"method_options": given}), name, self.out)

    @property
    def name(self) -> str:
        return f"{self.recipe.name}/{self.method.name}"

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.out / self.recipe.name / self.method.name

    @cached_property
    def base(self) -> Base:
        return Base(self.recipe)

    @property
    def target_length(self) -> int:
        """Positions that a row may span, L."""
        return self.recipe.lengths.target

    @property
    def row_length(self) -> int:
        """Tokens in a training row."""
        return self.method.row_length(self.recipe.lengths.physical, self.target_length)

    @property
    def attended(self) -> int:
        """Keys that a query may meet in training."""
        return self.method.attended(self.options, self.row_length)

    @property
    def adapters(self) -> Lora | None:
        """The adapters that are trained: the method's under the recipe's ``train.lora``.  None, also from
        null, trains all weights."""
        own = self.method.adapters
        given = self.recipe.train.get("lora", own)
        return None if given is None else Lora.model_validate({**(own or {}), **given})

    @property
    def base_share(self) -> float:
        """Of the base's weights in the saved model."""
        return self.recipe.train.get("base_share", self.method.base_share)

    @cached_property
    def scaling(self) -> rope.Scheme:
        """From the base's own RoPE to the target length.  Raises BadInput if the two do not compose."""
        given, base = self.recipe.rope, self.base
        factors = None if given.long_factor is None else tuple(given.long_factor)
        pairs = rope.rotary_dimensions(base.config) // 2
        if factors is not None and len(factors) != pairs:
            raise BadInput(
                f"rope.long_factor: {len(factors)} factors are given, and a head of {base.name!r} has {pairs}"
                " pairs of rotary dimensions; give one for each"
            )
        asked = rope.Asked(given.type, given.theta, factors, given.yarn_factor)
        found = self.method.scaling(asked, base.own_scheme, base.window, self.target_length)
        return families.written_scheme(base.config, found, base.window)

    @cached_property
    def sharpness(self) -> float:
        """What attention scores are multiplied by after training, or before an untrained model is scored."""
        power, base = self.method.power(self.recipe.rope.sharpen), self.base
        return sharpen.missing(power, base.config, base.original_length, self.target_length)

    def rows(self, tokenizer=None, for_text: bool = False) -> Rows:
        """Builds the method's rows, with the base's tokenizer unless another is given.

        for_text: whether their text counts, which some methods ask the base about, and not their positions
        alone.
        """
        return self.method.rows(
            Setting(
                self.method.name,
                self.options,
                self.row_length,
                self.target_length,
                self.recipe.data.packing,
                self.recipe.data.seed,
                self.base.tokenizer if tokenizer is None else tokenizer,
                self.base if for_text else None,
            )
        )

    def dump(self) -> str:
        """The resolved recipe as YAML, which loads again under the same name."""
        tree = self.recipe.model_dump(mode="json")
        own = self.options.model_dump(mode="json")
        tree["method_options"] = {self.method.name: own} if own else {}
        tree = {"recipe": self.recipe.name, "method": self.method.name, **tree}
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def resolve(path: str | Path, overrides: list[str], method: str, out: Path = Path("runs")) -> Experiment:
    """The experiment of a recipe's file.  Raises BadInput with one line that names the key and the mend."""
    found = methods.get(method)  # the shorter complaint first
    return Experiment.of(schema.load(path, overrides), found, out)
