"""What optimizers keep of a trained weight beside its float32 copy."""

import math
from collections.abc import Iterator
from typing import Any

from endprompt.bases import counting, families
from endprompt.recipe.training_keys import ADAMW

FLOAT = 4
ADAM = 2.0 * FLOAT  # two moments


def kept(train: dict[str, Any], about, adapters) -> float | None:
    """Bytes a trained weight of the optimizer that ``train`` names; None if it is not known here.

    Adafactor keeps a row and a column of each matrix, adagrad a sum of squares, rmsprop and sgd what their
    options ask for.  What an optimizer holds during its step alone is not counted.
    """
    optim = train.get("optim")
    if optim in ADAMW:
        return ADAM
    said = train.get("optim_args", "").replace(" ", "")
    given = dict(pair.partition("=")[::2] for pair in said.split(",") if pair)
    momentum = float(given.get("momentum", 0)) > 0
    counts = {"adagrad": 1, "sgd": momentum, "rmsprop": 1 + momentum + (given.get("centered") == "true")}
    if optim in counts:
        return float(FLOAT * counts[optim])
    if optim == "adafactor":
        shapes = list(_trained(about, adapters))
        return FLOAT * sum(map(_factored, shapes)) / sum(map(math.prod, shapes))
    return None


def _factored(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]


def _trained(about, adapters) -> Iterator[tuple[int, ...]]:
    """The shapes of what is trained: of all weights, or of ``adapters`` and what they train beside."""
    network = counting.skeleton(about)
    if adapters is None:
        yield from (tuple(one.shape) for one in network.parameters())
        return
    names = families.adapted(network.config, adapters.targets)
    for name, module in network.named_modules():
        if hasattr(module, "in_features") and name.rpartition(".")[2] in names:
            yield adapters.r, module.in_features
            yield module.out_features, adapters.r
    for name, one in network.named_parameters():
        if adapters.train_embed_norm and ("embed" in name or "norm" in name):
            yield tuple(one.shape)
