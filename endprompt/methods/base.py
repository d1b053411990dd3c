"""What a method may own, and the parts that methods share.

A method is one file of this folder: its options, how its rows are built, its RoPE scaling, its attention and
adapters in training, a term of the loss, and what is done to the trained model.  Nothing outside this folder
asks which method it has.
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from endprompt import BadInput
from endprompt.bases import sharpen
from endprompt.bases.model import Base
from endprompt.positions import plans
from endprompt.positions.rope import Asked, Scheme, extended

NOTHING = np.zeros(0, np.float32)


class Options(BaseModel):
    """Options of a method, the keys of ``method_options``.  They are recorded in the manifest by their
    names.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Setting:
    """What rows are built for.  length: tokens in a row; target_length: positions that it may span; packing:
    "cut" or "document", as ``data.packing``; seed: of all rows; tokenizer: of the base; base: the model
    itself, for rows whose text it chooses; None where rows are made for their positions alone."""

    method: str
    options: Any
    length: int
    target_length: int
    packing: str
    seed: int
    tokenizer: Any
    base: Base | None = None


class Rows:
    """Builds a method's rows, one by its number from wherever the corpus stands.

    A subclass writes ``build``.  Everything random about a row comes from its number and the seed.
    uniform: whether every target weighs 1.  contiguous: whether positions run on without a jump.
    together: rows that are made of one stretch of the corpus; between them the cursor stands behind all of
        it.  of_text: whether positions depend on what the text says, and not on its length alone.
    asks_base: whether the base says which text comes together.
    """

    uniform = True
    contiguous = False
    together = 1
    of_text = False
    asks_base = False

    def __init__(self, setting: Setting):
        """Raises BadInput if the options do not fit the setting."""
        self.setting, self.options = setting, setting.options
        self.length, self.target_length = setting.length, setting.target_length

    def recorded(self) -> dict[str, Any]:
        """What the manifest says of the options; shards of other options are refused."""
        return self.options.model_dump(mode="json")

    def written(self) -> dict[str, list[int]]:
        """Token ids that are put into rows beside the corpus' own, by what they are called in messages."""
        return {}

    def __call__(self, number: int, cursor) -> dict | None:
        """The row of the shard schema with that number; None at the end of the corpus."""
        return self.build(cursor, np.random.default_rng([self.setting.seed, number]))

    def build(self, cursor, rng: np.random.Generator) -> dict | None:
        raise NotImplementedError

    def take(self, cursor, count: int, of_document: int | None = None):
        """The next ``count`` tokens and the ids of their documents, or with ``packing: document`` as many, or
        ``of_document``, of the next document; None at the end of the corpus."""
        if self.setting.packing == "cut":
            return cursor.take(count)
        return cursor.take_document(of_document or count)

    def row(
        self,
        text: np.ndarray,
        position_ids: np.ndarray,
        documents: list[str],
        ending: np.ndarray | None = None,
        weights: np.ndarray = NOTHING,
        name: str = "",
    ) -> dict:
        """The row of ``text`` [a] and its ``ending`` [b] at ``position_ids`` [a + b].

        weights: float32 [b] loss weights of the ending; text weighs 1, and the first token, which nothing
        predicts, 0.  Raises ValueError unless positions increase strictly within the target length.
        """
        plans.check(position_ids, self.target_length)
        loss_weights = np.concatenate([np.ones(len(text), np.float32), weights])
        loss_weights[0] = 0
        return {
            "input_ids": text if ending is None else np.concatenate([text, ending]),
            "position_ids": position_ids.astype(np.int32),
            "loss_weights": loss_weights,
            "text_length": len(text),
            "prompt_length": len(weights),
            "prompt_name": name,
            "document_ids": documents,
        }


AnyOptions = Any  # of a method's own schema


class Method:
    """One way of extending a window (paper section 3; the baselines from their own papers).

    name, summary: as the command line and the tables say them. Rows: how rows are built; None where nothing
        is trained. Options: the schema of ``method_options``.
    fills: "physical" or "target", the recipe's length that a training row fills.
    rope: scaling unless the recipe's ``rope.type`` names another; None keeps the model's own frequencies.
    whole_factor: L / C is rounded up first, as the baseline's code does; the same where L is a multiple of C.
    sharpening: attention scores are multiplied by (ln L / ln C) ** sharpening once the model is trained, or,
        where nothing is trained, before it is scored, unless ``rope.sharpen`` names another power; 0 leaves
        them.
    adapters: settings of ``train.lora`` that the method trains with, under the recipe's; None: all weights.
    base_share: of the base's weights in the saved model, the rest being what was trained, unless
        ``train.base_share`` names another.
    reads_hidden: whether ``loss_term`` needs the last hidden states, ``outputs["hidden"]`` [rows, length,
        width].
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    Rows: ClassVar[type[Rows] | None] = None
    fills: ClassVar[str] = "physical"
    rope: ClassVar[str | None] = "linear"
    whole_factor: ClassVar[bool] = False
    sharpening: ClassVar[float] = 0.0
    adapters: ClassVar[dict[str, Any] | None] = None
    base_share: ClassVar[float] = 0.0
    reads_hidden: ClassVar[bool] = False

    @property
    def trained(self) -> bool:
        return self.Rows is not None

    def rows(self, setting: Setting):
        """Raises BadInput if nothing is trained, or the options do not fit the setting."""
        if self.Rows is None:
            raise BadInput(f"method: {self.name} trains nothing, so it has no rows")
        return self.Rows(setting)

    @property
    def uniform(self) -> bool:
        """Whether every target of a row weighs 1."""
        return self.Rows is None or self.Rows.uniform

    def row_length(self, physical: int, target: int) -> int:
        """Tokens in a training row."""
        return target if self.fills == "target" else physical

    def check(self, options: AnyOptions, packing: str) -> None:
        """Raises BadInput if ``options`` do not go with ``data.packing``, before anything is read."""

    def scaling(self, asked: Asked, own: Scheme, window: int, target_length: int) -> Scheme:
        """The RoPE from the base's ``own`` and ``window`` to ``target_length``; asked: the recipe's, whose
        type None is the method's.

        Raises BadInput, see ``rope.extended``.
        """
        if self.rope is None:
            return own
        chosen = dataclasses.replace(asked, type=asked.type or self.rope)
        return extended(chosen, own, window, target_length, self.whole_factor)

    def power(self, given: float | None) -> float:
        """The power of ln L / ln C that attention is sharpened by; given: the recipe's ``rope.sharpen``."""
        return self.sharpening if given is None else given

    def attended(self, options: AnyOptions, length: int) -> int:
        """Keys that a query of a row of ``length`` tokens may meet in training, for counts of FLOPs."""
        return length

    def attention(self, network, options: AnyOptions, length: int) -> contextlib.AbstractContextManager:
        """Inside, ``network`` attends as the method trains."""
        return contextlib.nullcontext()

    def work(self, options: AnyOptions) -> float:
        """FLOPs of a step in those of a forward and backward pass over its rows, for estimates."""
        return 1.0

    def base_beside(self, adapters) -> bool:
        """Whether every rank holds the base a second time, whole, in training with ``adapters`` (of
        ``train.lora``, or None), for estimates."""
        return False

    def before_training(self, network, experiment, cuda: bool) -> None:
        """Puts what ``loss_term`` needs beside ``network``, which is built and has its adapters.  All ranks
        call it.  Raises BadInput if the experiment does not fit."""

    def loss_term(self, network, batch: dict, outputs: dict, options: AnyOptions):
        """A scalar that is added to the sum of the loss over the targets of ``batch``, in nats; None:
        nothing.

        It is divided like the loss by the weights of all rows of the step on all ranks.  network: without
        what wraps it; its output layer sums divergences too (``distilling.divergence``).
        """
        return None

    def refuses_shared_rows(self) -> str | None:
        """Why several ranks cannot share a row (``train.sequence_parallel``); None if they can."""
        return None if self.Rows is not None and self.Rows.contiguous else "has jumps in its positions"

    def note(self, options: AnyOptions, length: int) -> dict[str, Any]:
        """What config.json of the trained model says of the method under ``endprompt``, beside its name."""
        return {}

    def after_training(self, folder: Path, experiment) -> None:
        """Changes the trained model in ``folder``, which was saved and read back.  On the first rank alone.

        Raises Failure if it cannot; the folder then never gets its name."""
        if experiment.sharpness != 1:
            sharpen.sharpen(folder, experiment.sharpness)

    def before_scoring(self, network, experiment) -> None:
        """Changes the ``network`` of a method that trains nothing, before it is scored."""
        if experiment.sharpness != 1:
            sharpen.sharpen_network(network, experiment.sharpness)


METHODS: dict[str, Method] = {}


def register(kind: type[Method]) -> type[Method]:
    """Enters a method into the table, in the order of the files that ``table`` imports.

    Raises ValueError if the name is taken, or an option has a method's name: ``method_options`` holds both.
    """
    if kind.name in METHODS:
        raise ValueError(f"{kind.__module__}: a method named {kind.name} is there already; rename it")
    others: list[Any] = [kind, *METHODS.values()]
    for other in others:
        for option in other.Options.model_fields.keys() & {kind.name, *METHODS}:
            raise ValueError(f"{other.name}: the option {option} has a method's name; rename it")
    METHODS[kind.name] = kind()
    return kind


def get(name: str) -> Method:
    """Raises BadInput, with the names there are, if there is no such method."""
    if name not in METHODS:
        raise BadInput(f"method: there is none named {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]
