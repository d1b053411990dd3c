"""The recipe: a strict schema, dotted overrides, and the resolved copy that a run keeps beside its
results.
"""

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from endprompt import BadInput
from endprompt.positions.rope import Type
from endprompt.recipe import former_keys, settings_file, task_names, training_checks, zero_file
from endprompt.recipe.settings_file import SHIPPED


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    name_or_path: str = Field(
        min_length=1,
        description="the base: a folder with config.json, an id of the Hugging Face hub, or `package:NAME`,"
        " an installed Python package that holds one",
    )
    gguf_file: str | None = Field(None, description="the GGUF file in it that holds config and weights")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    trust_remote_code: bool = Field(
        False, description="whether Python files that come with the model may run"
    )
    original_length: int | None = Field(
        None, gt=0, description="tokens that the base reads as it came, C; null: as its config.json says"
    )
    attn_implementation: Literal["flash_attention_2", "sdpa", "eager"] | None = Field(
        None, description="null: flash_attention_2 where it is installed and there is a GPU, else sdpa"
    )


class LengthsSection(Section):
    physical: int = Field(gt=1, description="tokens in a row of the short-row methods")
    # shards hold positions as int32
    target: int = Field(
        gt=1, le=2**31, description="positions that a row may span, L: the window of the trained model"
    )

    @model_validator(mode="after")
    def ordered(self):
        if self.physical > self.target:
            raise ValueError(
                f"lengths.physical {self.physical} is greater than lengths.target {self.target}; rows cannot"
                " be longer than the positions they span, so lower physical or raise target"
            )
        return self


class DataSection(Section):
    corpus: str | list[str] = Field(
        description="text to train on: files of .jsonl, .json, .parquet or .txt (packed ones too), a folder"
        " of them, or an id of the hub; several as a list"
    )
    text_column: str = Field("text", description="the field of a row that is its text")
    split: str = Field("train", description="of a hub id")
    tokens: int = Field(
        gt=0,
        lt=2**63,
        description="of all rows together, end prompts included; a longer corpus is read so far; with"
        " packing: document a row counts as full, and may hold less",
    )
    packing: Literal["cut", "document"] = Field(
        "cut",
        description="cut: documents one after the other, cut into rows; document: a row holds one alone",
    )
    rows_per_shard: int = Field(4096, gt=0, description="rows of a Parquet file")
    filter_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="of the text, in whole documents, those in which the base gains most from far context"
        " within its window; null: all of it, unranked",
    )
    filter_short: int | None = Field(
        None,
        ge=4,
        description="tokens of the short context that filter_share tells the whole window against, of which"
        " the second half is scored; null: a quarter of the window",
    )
    filter_windows: int = Field(
        4, gt=0, description="places of a document that filter_share scores, evenly from its start to its end"
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="of everything that is drawn for rows, and of training unless it has one",
    )

    @field_validator("tokens", mode="before")
    @classmethod
    def whole(cls, value):
        return int(value) if isinstance(value, float) and value.is_integer() else value


class RopeSection(Section):
    type: Type | None = Field(None, description="the scaling; null: as the method says")
    theta: float | None = Field(
        None, gt=1, description="of type theta: the base frequency; null: from L / C by the NTK rule"
    )
    long_factor: list[Annotated[float, Field(gt=0)]] | None = Field(
        None,
        min_length=1,
        description="of type longrope: what the frequency of each pair of rotary dimensions is divided by",
    )
    sharpen: float | None = Field(
        None,
        ge=0,
        le=4,
        description="attention scores are multiplied by (ln L / ln C) ** sharpen once trained, or once built"
        " where nothing is trained; null: as the method says",
    )
    sharpen_heads: bool = Field(
        False,
        description="beside it, a factor for each head, trained, and folded into the queries when the model"
        " is saved",
    )
    yarn_factor: bool = Field(
        True,
        description="of type yarn: whether cos and sin are multiplied by 0.1 ln s + 1, as its paper says",
    )

    @field_validator("type", mode="before")
    @classmethod
    def of_every_length(cls, value):
        if value == "dynamic":
            raise ValueError(
                "dynamic NTK reads short rows with other frequencies than rows of the target length train; "
                "set rope.type=ntk, which holds the target's for every length"
            )
        return value


class EvalSection(Section):
    tasks: list[str] = Field(["passkey"], description="benchmarks and groups of them (evaluation.md)")
    lengths: list[int] = Field(
        [4096, 8192, 16384, 32768, 65536], min_length=1, description="tokens of a prompt"
    )
    samples: int = Field(500, gt=0, description="of a task and length, where the benchmark holds as many")
    depths: int = Field(
        10, gt=0, description="places of a key in its haystack, evenly from the first to the last"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="of the samples that are drawn")
    perplexity_corpus: str | None = Field(
        None, description="held-out documents of perplexity and far_gain, as data.corpus"
    )
    perplexity_column: str | None = Field(
        None, description="the field that holds their text; null: data.text_column"
    )
    perplexity_tokens: int = Field(65536, gt=0, description="tokens that are scored at a length")
    perplexity_stride: int = Field(256, gt=0, description="tokens that are scored at the end of a window")
    distance_haystack: int = Field(
        1024,
        gt=0,
        description="tokens of the short haystack whose keys are asked for from further and further on, up to"
        " lengths.target",
    )
    distance_keys: int = Field(
        2, gt=0, le=16, description="keys of such a haystack; samples / distance_keys haystacks are made"
    )
    distances: list[int] | None = Field(
        None, min_length=1, description="positions left out before a question; null: 13 of them"
    )
    named_keys: int = Field(
        4, gt=0, le=16, description="keys of a haystack, each asked for in turn, at some of the depths"
    )
    far_gain_tokens: int = Field(256, gt=0, description="tokens that are scored at the end of a text")
    far_gain_texts: int = Field(64, gt=0, description="texts, where the documents hold as many")
    ruler_samples: str | None = Field(
        None, description="a folder of RULER samples made elsewhere; null: made here"
    )
    longbench_data: str | None = Field(
        None, description="a folder of the official jsonl files; null: from the hub"
    )
    longbench_length: int = Field(
        32768, gt=1, description="tokens that a LongBench prompt is cut to, in its middle"
    )
    short_text_samples: int | None = Field(
        None, gt=0, description="of a subtask of the short-text tasks; null: all"
    )
    short_text_shots: int | None = Field(
        None,
        ge=0,
        description="examples before a question of the short-text tasks; null: the task's own number",
    )
    chat_template: bool = Field(
        False, description="put around prompts; never around the text of perplexity and far_gain"
    )
    run_unsafe_code: bool = Field(False, description="whether HumanEval may run what the model writes")
    backend: Literal["hf", "vllm"] = Field("hf", description="what runs the model")

    @field_validator("tasks")
    @classmethod
    def known(cls, value):
        return task_names.expand(value)

    @field_validator("distances")
    @classmethod
    def forwards(cls, value):
        if value is not None and min(value) < 0:
            raise ValueError(f"{min(value)} is no distance; use numbers of positions from 0 on")
        return value

    @field_validator("lengths")
    @classmethod
    def positive(cls, value):
        if min(value) < 1:
            raise ValueError(f"{min(value)} is not a length; use positive numbers of tokens")
        return value

    @model_validator(mode="after")
    def has_corpus(self):
        for task in ("perplexity", task_names.FAR_GAIN):
            if task in self.tasks and not self.perplexity_corpus:
                raise ValueError(
                    f"eval.perplexity_corpus is missing; name held-out documents, or drop {task} from"
                    " eval.tasks"
                )
        return self

    @model_validator(mode="after")
    def examples_there(self):
        for task in self.tasks:
            most = task_names.MOST_SHOTS.get(task)
            if most is not None and (self.short_text_shots or 0) > most:
                raise ValueError(
                    f"eval.short_text_shots {self.short_text_shots}: {task} has {most} examples; lower it, or"
                    f" drop {task} from eval.tasks"
                )
        return self

    @model_validator(mode="after")
    def keys_at_depths(self):
        if task_names.NAMED_KEYS in self.tasks and self.named_keys > self.depths:
            raise ValueError(
                f"eval.named_keys {self.named_keys} do not fit at eval.depths {self.depths}, one each; lower"
                " the one or raise the other"
            )
        return self


class Recipe(Section):
    """The sections; what each key means is its ``description``, which docs/recipe.md shows."""

    model: ModelSection
    lengths: LengthsSection
    data: DataSection
    method_options: dict[str, Any] = {}  # of the method, by its own schema (methods/)
    rope: RopeSection = RopeSection()
    train: dict[str, Any] = {}
    eval: EvalSection = EvalSection()

    name: str = Field(exclude=True)
    folder: Path = Field(exclude=True)
    former: dict[str, Any] = Field({}, exclude=True)  # options of methods by their earlier keys

    @model_validator(mode="after")
    def inside_the_target(self):
        """The tasks that ask at chosen positions do so below the target length."""
        target, options = self.lengths.target, self.eval
        for task in (task_names.NAMED_KEYS, task_names.FAR_GAIN):
            if task in options.tasks and max(options.lengths) > target:
                raise ValueError(
                    f"eval.lengths: {task} at {max(options.lengths)} is beyond lengths.target {target}; lower"
                    f" the length, or drop {task} from eval.tasks"
                )
        if task_names.DISTANCE in options.tasks:
            far = options.distance_haystack + max(options.distances or [0])
            if far >= target:
                raise ValueError(
                    f"eval.distance_haystack {options.distance_haystack}"
                    + (f" and a distance of {max(options.distances)}" if options.distances else "")
                    + f": no position is left for a question below lengths.target {target}; lower"
                    + (" one of them" if options.distances else " it")
                    + ", or drop distance from eval.tasks"
                )
        return self

    def path(self, value: str) -> Path | None:
        """``value`` as an existing path: as given, beside the recipe, one folder above it, or among the files
        that come with this program; None if there is none."""
        for base in (Path(), self.folder, self.folder.parent, SHIPPED):
            try:
                if (found := (base / value).expanduser()).exists():
                    return found
            except (OSError, RuntimeError):  # a name too long for a path, the home of a user who is not there
                pass
        return None

    @property
    def sequence_parallel(self) -> int:
        """Ranks that share a row; 1 is none."""
        return self.train.get("sequence_parallel", 1)

    @property
    def deepspeed(self) -> dict[str, Any] | None:
        """DeepSpeed's options, from the recipe itself or from the file it names; None without."""
        given = self.train.get("deepspeed")
        return json.loads(settings_file.read(Path(given))) if isinstance(given, str) else given


def defaults() -> dict[str, Any]:
    """{"section.key": default} of the keys that may be left out, as ``dump`` writes them."""
    return {
        f"{section}.{key}": inner.get_default()
        for section, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for key, inner in field.annotation.model_fields.items()
        if not inner.is_required()
    }


def _override(tree: dict, assignment: str) -> None:
    key, equals, value = assignment.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > settings_file.DEPTH:
        raise BadInput(
            f"--set {reprlib.repr(assignment)[1:-1]}: write it as section.key=value, for example --set"
            " lengths.target=32768"
        )
    former_keys.give_way(tree, ".".join(parts))
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise BadInput(
                f"--set {assignment}: {part!r} is a value, not a section; give its keys to a section"
            )
    tree[parts[-1]] = settings_file.parse(value, f"--set {key}")


def _message(error: ValidationError) -> str:
    """All complaints of pydantic in one line, each with its dotted key and the mend where we know one."""
    found = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        given = repr(item.get("input"))[:60]
        if item["type"] == "extra_forbidden":
            section: Any = Recipe
            if len(item["loc"]) > 1:
                section = Recipe.model_fields[str(item["loc"][0])].annotation
            known = ", ".join(name for name, field in section.model_fields.items() if not field.exclude)
            found.append(f"unknown key {key}; known here: {known}")
        elif item["type"] == "missing":
            found.append(f"{key} is missing; add it")
        else:
            found.append(
                f"{key}: {item['msg'].removeprefix('Value error, ')} (given: {given})"
                if item["type"] != "value_error"
                else (
                    item["msg"].removeprefix("Value error, ")
                    if key in ("", "lengths", "data", "eval")
                    else f"{key}: {item['msg'].removeprefix('Value error, ')}"
                )
            )
    return "; ".join(found)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and checks a recipe, see ``settings_file.find``.  Raises BadInput with one line that
    names the key and the mend."""
    path = settings_file.find(Path(path))
    name, tree = settings_file.recipe(path)
    return made(tree, name, path, overrides)


def made(tree: dict, name: str, path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe ``name`` of the sections ``tree``, overridden and checked.

    path: of its file, whether or not it is there; the folder is where its own paths begin, and messages begin
    with it.  Raises BadInput, see ``load``.
    """
    for assignment in overrides:
        _override(tree, assignment)
    for key in ("name", "folder", "former"):
        if key in tree:
            known = ", ".join(key for key, field in Recipe.model_fields.items() if not field.exclude)
            raise BadInput(f"{path}: unknown key {key}; known here: {known}")
    own = {"name": name, "folder": path.parent.absolute(), "former": former_keys.taken(tree)}
    try:
        recipe = Recipe.model_validate({**tree, **own})
    except ValidationError as error:
        raise BadInput(f"{path}: {_message(error)}") from None
    try:
        recipe.train = training_checks.check(recipe.train)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    _deepspeed(recipe, path)
    if recipe.model.gguf_file and (recipe.train.get("lora") or {}).get("quantize"):
        raise BadInput(
            f"{path}: train.lora.quantize: model.gguf_file is read whole, by another quantization; name the"
            " model's safetensors, or remove it"
        )
    return recipe


def _deepspeed(recipe: Recipe, path: Path) -> None:
    """Checks the recipe's ZeRO options, and puts in the file's path as it was found.  Raises BadInput."""
    deepspeed = recipe.train.get("deepspeed")
    if isinstance(deepspeed, dict):
        zero_file.check(recipe.train, deepspeed, f"{path}: train.deepspeed")
    if isinstance(deepspeed, str):
        found = recipe.path(deepspeed)
        if found is None or not found.is_file():
            raise BadInput(
                f"{path}: train.deepspeed: there is no ZeRO file {deepspeed}; ds_configs/ holds zero3.json,"
                " zero3_offload.json and zero2.json"
            )
        try:
            options = json.loads(settings_file.read(found))
        except (OSError, ValueError, RecursionError) as error:
            raise BadInput(
                f"{path}: train.deepspeed: {found} is not valid JSON: {error}; mend it, or take one of"
                " ds_configs/"
            ) from None
        zero_file.check(recipe.train, options, f"{path}: train.deepspeed: {found}")
        recipe.train["deepspeed"] = str(found)
