"""EndPrompt (arXiv 2605.14589): text at the first positions, then a short prompt at the last ones."""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field, field_validator

from endprompt import BadInput
from endprompt.methods.base import Method, Options, Rows, register
from endprompt.positions import plans

# The three prompts that the paper measures (Eq. 10, appendix B.1).
END_PROMPTS = {
    "EP_1": "This is the end of text, please pay attention here",
    "EP_2": "<|eot_id|>",
    "EP_3": "End.",
}
KEY = "method_options.end_prompts"


class EndPromptOptions(Options):
    end_prompts: list[str] = Field(
        ["EP_1"],
        min_length=1,
        description="EP_1, EP_2, EP_3 (the paper's), or texts of one's own; a row takes one at random",
    )
    prompt_loss_weight: float = Field(
        0.1,
        ge=0,
        description="of a prompt's tokens in the loss, where text weighs 1 (paper Eq. 11)",
    )

    @field_validator("prompt_loss_weight", mode="before")
    @classmethod
    def real(cls, value):
        return float(value) if type(value) is int else value

    @field_validator("end_prompts")
    @classmethod
    def worded(cls, value):
        if any(not prompt.strip() for prompt in value):
            raise ValueError("an end prompt without text; name EP_1, EP_2, EP_3 or write one")
        return value


@dataclass(frozen=True)
class EndPrompt:
    """An end prompt as the tokenizer writes it: its name, its text, and int32 ids [b]."""

    name: str
    text: str
    ids: np.ndarray


def tokenized(names: list[str], tokenizer) -> list[EndPrompt]:
    """The prompts of these names or texts.  Raises BadInput if one is a special token that the tokenizer
    lacks, or unreadable to it."""
    result = []
    for name in names:
        text = END_PROMPTS.get(name, name)
        if re.fullmatch(r"EP_\w+", text):
            known = ", ".join(END_PROMPTS)
            raise BadInput(f"{KEY}: there is no prompt {name}; use {known}, or write the text itself")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if re.fullmatch(r"<\S+>", text) and len(ids) != 1:
            raise BadInput(
                f"{KEY}: this tokenizer has no special token {text} (it would become {len(ids)} pieces);"
                " choose another prompt"
            )
        if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
            raise BadInput(f"{KEY}: this tokenizer cannot write {text!r}; choose another prompt")
        result.append(EndPrompt(name if name in END_PROMPTS else "custom", text, np.array(ids, np.int32)))
    return result


class EndPromptRows(Rows):
    """Text of length - b tokens, then a prompt of b, placed as ``plan`` says."""

    uniform = False
    plan: ClassVar = staticmethod(plans.text_then_end_prompt)

    def __init__(self, setting):
        super().__init__(setting)
        self.prompts = tokenized(self.options.end_prompts, setting.tokenizer)
        longest = max(len(prompt.ids) for prompt in self.prompts)
        if longest >= self.length:
            raise BadInput(
                f"lengths.physical: rows of {self.length} tokens leave no room for text beside an end prompt"
                f" of {longest}; raise it"
            )

    def recorded(self):
        prompts = [
            {"name": prompt.name, "text": prompt.text, "ids": prompt.ids.tolist()} for prompt in self.prompts
        ]
        return {**super().recorded(), "end_prompts": prompts}

    def written(self):
        return {f"{KEY}: {prompt.text!r}": prompt.ids.tolist() for prompt in self.prompts}

    def build(self, cursor, rng):
        prompt = self.prompts[int(rng.integers(len(self.prompts)))]
        if (taken := self.take_text(cursor, self.length - len(prompt.ids))) is None:
            return None
        text, documents = taken
        text, position_ids = self.placed(text, len(prompt.ids), rng)
        weights = np.full(len(prompt.ids), self.options.prompt_loss_weight, np.float32)
        return self.row(text, position_ids, documents, prompt.ids, weights, prompt.name)

    def take_text(self, cursor, count: int):
        return self.take(cursor, count)

    def placed(self, text, b: int, rng):
        """(the row's text [a], positions [a + b])."""
        return text, self.plan(len(text), b, self.target_length, rng)


@register
class EndPromptMethod(Method):
    name = "endprompt"
    summary = "text at 0..a-1, end prompt at L-b..L-1"
    Options = EndPromptOptions
    Rows = EndPromptRows


class RandomEndPromptRows(EndPromptRows):
    plan = staticmethod(plans.text_then_random_prompt)


@register
class RandomEndPrompt(Method):
    name = "endprompt_random"
    summary = "text at 0..a-1, end prompt ending anywhere up to L-1"
    Options = EndPromptOptions
    Rows = RandomEndPromptRows
