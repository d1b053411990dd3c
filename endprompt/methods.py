"""The method table: every way of extending a window that can be compared here is one row.

A method is segment plan x RoPE scaling x row length (paper section 3; the baselines from their own papers).  A recipe is a
setting; the method is chosen beside it, so two methods of one recipe differ in their row of this table and in nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from endprompt import BadInput, positions

Plan = Callable[[int | np.ndarray, int, int, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    plan: (text_length a, prompt_length b, target_length L, generator) -> int64 positions [a + b]; None: nothing is trained.
    end_prompt: whether a row ends in a prompt (b > 0).
    chunked: whether the text is cut at random as ``data.pose_chunks`` and ``data.pose_text`` say; the plan then gets the int64 lengths
        [k] of the chunks in the place of a.
    row_length: "physical" or "target", the recipe's length that a training row fills.
    rope: scaling used unless the recipe's ``rope.type`` names another; None keeps the model's own frequencies.
    """

    name: str
    summary: str
    plan: Plan | None
    end_prompt: bool = False
    chunked: bool = False
    row_length: str = "physical"
    rope: str | None = "linear"

    @property
    def trained(self) -> bool:
        return self.plan is not None


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
register(Method("endprompt", "text at 0..a-1, end prompt at L-b..L-1", positions.text_then_end_prompt, end_prompt=True))
register(Method("endprompt_random", "text at 0..a-1, end prompt ending anywhere up to L-1", positions.text_then_random_prompt, end_prompt=True))
register(Method("pose", "text in two chunks, the second shifted by a random skip", positions.skipwise, chunked=True))
register(Method("endprompt_pose", "text in chunks as in pose, end prompt at L-b..L-1", positions.skipwise_then_end_prompt, end_prompt=True, chunked=True))
register(Method("full_length", "interpolation, trained on rows of the target length", positions.contiguous, row_length="target"))
