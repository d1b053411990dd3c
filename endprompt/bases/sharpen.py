"""Sharper attention in a saved model, for rows of the target length.

Pretraining in a window of C tokens teaches each query to outweigh C keys.  At the target length L several
times as many compete, and attention that was sharp enough is spread thin.  Training on short rows with jumps
does not mend this: its rows span L positions, but no query in them meets more than ``lengths.physical``
keys.  Multiplying the queries by ln L / ln C once training is over does, at no cost: RoPE is linear, so
queries times t are attention scores times t, in any engine that loads the model.

The factor counts from C, the base's window, whatever ``lengths.physical`` is.  Everything measured here has
physical = C.  With shorter rows it is assumed that training leaves the sharpness of pretraining as it was.
Rows longer than C let queries practise with more keys than C, so the factor is then too large, and a
``rope.sharpen`` below 1 is nearer.

Scaling scores by the logarithm of the number of keys is not new.  Su Jianlin multiplies them by log n
(kexue.fm 8823, December 2021; 9588: by log_512 n), and so do Chiang and Cholak (arXiv 2202.12172).  Qwen's
first models multiply by log_C i beyond the window (``use_logn_attn``).  YaRN (2309.00071) multiplies by (0.1
ln s + 1)^2, and SSMax (2501.19399) learns a scale a head.  Ours is the constant n = L, folded into the
queries after training on short rows with jumps, and its comparison with a trained baseline that carries the
same factor.
"""

import contextlib
import json
import math
import re
from pathlib import Path

from endprompt import BadInput, Failure, storage
from endprompt.bases import families

HEADS = "sharpness"  # the factors of heads that are being learnt, in a query projection (training.heads)


@contextlib.contextmanager
def heads_off(network):
    """While it lasts, ``network`` predicts without the factors of heads that it is learning."""
    found = [module for module in network.modules() if HEADS in getattr(module, "_parameters", {})]
    for module in found:
        module.heads_off = True
    try:
        yield
    finally:
        for module in found:
            del module.heads_off


def factor(power: float, original_length: int, target_length: int) -> float:
    """(ln L / ln C) ** power.  A score that outweighs n equal ones must exceed them by ln n, so that 1 keeps
    at L the weight that it has at C.
    """
    return (
        math.log(target_length) / math.log(max(2, original_length))
    ) ** power  # a window of 1 is no window, but no reason to divide by 0


def note(config) -> dict:
    """What this program wrote into a base's config when it trained it; empty if it did not.  Raises BadInput
    on a note of another kind."""
    found = getattr(config, "endprompt", None) or {}
    if not isinstance(found, dict):
        raise BadInput(
            f"model: endprompt in its config.json is {found!r:.60}, not what this program writes; mend it"
        )
    return found


def inherited(config) -> dict[str, float | int]:
    """What a base's config notes of the sharpening in its weights: {"sharpened": factor of the scores,
    "sharpened_from": the window in tokens that the factor counts from, where that is known}; empty if there
    is none.  Raises BadInput on a note that is none.
    """
    said = note(config)
    t = said.get("sharpened")
    if t is None:
        return {}
    start = said.get("sharpened_from", said.get("original_length"))
    if (
        type(t) not in (int, float)
        or not 0 < t < math.inf
        or type(start) not in (int, type(None))
        or start is not None
        and start < 1
    ):
        raise BadInput(
            f"model: its config.json says that attention is sharpened by {t!r:.40} from a window of "
            f"{start!r:.40}, which are no positive factor and number of tokens; mend endprompt.sharpened and "
            "endprompt.original_length in it"
        )
    return {"sharpened": t, **({"sharpened_from": start} if start else {})}


def missing(power: float, config, original_length: int, target_length: int) -> float:
    """What attention scores are multiplied by after training, or, where a method trains nothing, before the
    model is scored; 1 leaves them.

    power: of ln L / ln C.  config: the base's own, before ``rope.apply`` gave it another window.  A base that
    is sharpened already gets what its own factor lacks of the method's, both counted from the same window; it
    loses nothing.
    """
    there = inherited(config)
    start = int(min(there.get("sharpened_from", math.inf), original_length))
    return max(1.0, factor(power, start, target_length) / there.get("sharpened", 1.0))


class Queries:
    """What is multiplied by t in a model of ``config``.

    Layers with a window of their own meet no more keys than before, and stay.
    """

    def __init__(self, config, t: float):
        self.family, self.rows, self.t = families.of(config), families.query_rows(config), t
        self.layers = [layer for layer, local in enumerate(families.local_layers(config)) if not local]
        self.ending = re.compile(rf"layers\.(\d+)\.self_attn\.{self.family.queries}\.(weight|bias)")

    def named(self, name: str) -> bool:
        """Whether ``name`` is that of a parameter that is multiplied."""
        found = self.ending.search(name)
        return found is not None and int(found[1]) in self.layers

    def sharper(self, tensor):
        values, offset = tensor.float(), self.family.offset
        found = (values + offset) * self.t - offset if offset else values * self.t
        if self.rows is not None:  # keys and values follow
            found[self.rows :] = values[self.rows :]
        return found.to(tensor.dtype)

    def check(self, found: int, what: str) -> None:
        """Raises Failure unless the queries of all layers were ``found``."""
        if found != len(self.layers):
            raise Failure(
                f"sharpen: {what} has {found} query projections in {len(self.layers)} layers; which scores"
                " would be sharpened is not known"
            )


def sharpen_network(network, t: float) -> None:
    """As ``sharpen`` does it on disk, in the queries of ``network``, a built model with whole weights: what a
    method that trains nothing is scored with.

    Raises Failure if the queries of a layer are not found.
    """
    import torch

    queries, found = Queries(network.config, t), 0
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if queries.named(name):
                weights.copy_(queries.sharper(weights))
                found += name.endswith("weight")
    queries.check(found, "the model")


def sharpen(folder: Path, t: float) -> None:
    """Multiplies the queries of the model in ``folder`` by ``t``, in float32, in place, and notes in
    config.json what they have been multiplied by in all.

    What is multiplied is the projection, or the norm behind it, see ``families.Family.queries``.  Raises
    Failure if the queries of a layer are not found.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    queries = Queries(AutoConfig.from_pretrained(folder, trust_remote_code=False), t)
    path = folder / "config.json"
    config, found = json.loads(path.read_text()), 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            metadata, names = opened.metadata(), [*filter(queries.named, opened.keys())]
        if names:
            tensors = load_file(file)
            tensors |= {name: queries.sharper(tensors[name]) for name in names}
            save_file(tensors, file, metadata)
            found += sum(name.endswith("weight") for name in names)
    queries.check(found, str(folder))
    note = config.get("endprompt", {})
    config["endprompt"] = {**note, "sharpened": note.get("sharpened", 1.0) * t}
    storage.write_json(path, config)
