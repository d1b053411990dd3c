"""The method table: every way of extending a window that can be compared here is one row.

A method is segment plan x RoPE scaling x row length, and what is done to the trained model (paper section 3;
the baselines from their own papers).  A recipe is a setting; the method is chosen beside it, so two methods
of one recipe differ in their row of this table and in nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from endprompt import BadInput, positions

# a and b are numbers or arrays of lengths, as the method's row says.
Plan = Callable[[Any, Any, int, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    plan: (text_length a, prompt_length b, target_length L, generator) -> int64 positions [a + b]; None:
        nothing is trained.
    end_prompt: whether a row ends in a prompt (b > 0).
    recall: whether a row ends in spans that repeat its own text, as ``data.recall_*`` say; the plan then gets
        their int64 lengths [m] in the place of b.
    chunked: whether the text is cut at random as ``data.pose_chunks`` and ``data.pose_text`` say; the plan
        then gets the int64 lengths [k] of the chunks in the place of a.
    row_length: "physical" or "target", the recipe's length that a training row fills.
    rope: scaling used unless the recipe's ``rope.type`` names another; None keeps the model's own
        frequencies.
    whole_factor: L / C is rounded up to a whole number first, as the code of the baseline does; the same
        wherever L is a multiple of C.
    matched: a row is ``data.match_pieces`` pieces of a stretch of L tokens that repeat something of each
        other (endprompt/matching.py).
    sharpen: attention scores of the trained model are multiplied by (ln L / ln C) ** sharpen as it is saved
        (endprompt/sharpen.py), unless the recipe's ``rope.sharpen`` names another power; 0 leaves them.
        Where nothing is trained, the built model's are, before it is scored.
    attention: attention in training; None is the model's own, "s2" shifted sparse attention
        (endprompt/s2.py).
    lora: settings of endprompt.training_keys.Lora that the method trains with, over which the recipe's
        ``train.lora`` goes; None: all weights.
    """

    name: str
    summary: str
    plan: Plan | None
    end_prompt: bool = False
    recall: bool = False
    chunked: bool = False
    matched: bool = False
    row_length: str = "physical"
    rope: str | None = "linear"
    whole_factor: bool = False
    sharpen: float = 0.0
    attention: Literal["s2"] | None = None
    lora: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def trained(self) -> bool:
        return self.plan is not None

    @property
    def weighted(self) -> bool:
        """Whether a row's targets have weights other than 1."""
        return self.end_prompt or self.recall


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    METHODS[method.name] = method
    return method


def get(name: str) -> Method:
    if name not in METHODS:
        raise BadInput(f"method: there is none named {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


register(Method("base", "the model as it came: neither scaled nor trained", None, rope=None))
register(Method("interpolation", "position interpolation alone, no training", None))
register(Method("short", "the control: interpolation, trained on plain short rows", positions.contiguous))
register(
    Method(
        "endprompt", "text at 0..a-1, end prompt at L-b..L-1", positions.text_then_end_prompt, end_prompt=True
    )
)
register(
    Method(
        "endprompt_random",
        "text at 0..a-1, end prompt ending anywhere up to L-1",
        positions.text_then_random_prompt,
        end_prompt=True,
    )
)
register(
    Method(
        "pose", "text in two chunks, the second shifted by a random skip", positions.skipwise, chunked=True
    )
)
register(
    Method(
        "endprompt_pose",
        "text in chunks as in pose, end prompt at L-b..L-1",
        positions.skipwise_then_end_prompt,
        end_prompt=True,
        chunked=True,
    )
)
register(
    Method(
        "full_length",
        "interpolation, trained on rows of the target length",
        positions.contiguous,
        row_length="target",
    )
)
# LCEG's protocol (github.com/Leooyii/LCEG) compares several scalings of full-length training; the paper names
# "LCEG" without saying which it means.  NTK with the frequencies of L held is the default here; rope.type
# linear or yarn, both at L / C, are the others.
register(
    Method(
        "lceg",
        "LCEG's protocol: NTK scaling held at the target's frequencies, rows of the target length",
        positions.contiguous,
        row_length="target",
        rope="ntk",
        whole_factor=True,
    )
)
register(
    Method(
        "longlora",
        "shifted sparse attention, LoRA with embeddings and norms trained, rows of the target length",
        positions.contiguous,
        row_length="target",
        whole_factor=True,
        attention="s2",
        lora={"r": 8, "alpha": 16.0, "train_embed_norm": True},
    )
)
# Scores times log n are Su Jianlin's (kexue.fm 8823, 2021) and Chiang and Cholak's (2202.12172); Qwen's logn
# attention, YaRN's temperature and SSMax (2501.19399) are kin, see sharpen.py.  Ours is the constant, folded
# into the queries after short rows with jumps.  Why rows of the target length teach far distances seldom is
# counted by STRING (2410.18745).
register(
    Method(
        "pose_sharp",
        "pose on YaRN, attention sharpened by ln L / ln C when training is over",
        positions.skipwise,
        chunked=True,
        rope="yarn",
        sharpen=1.0,
    )
)
register(
    Method(
        "pose_recall",
        "pose_sharp, whose rows end in spans of their own text repeated at far positions",
        positions.skipwise_then_recall,
        recall=True,
        chunked=True,
        rope="yarn",
        sharpen=1.0,
    )
)
register(
    Method(
        "pose_matched",
        "pose_sharp, whose rows are pieces of text that repeat something of each other, from all over L"
        " tokens",
        positions.skipwise,
        chunked=True,
        matched=True,
        rope="yarn",
        sharpen=1.0,
    )
)
