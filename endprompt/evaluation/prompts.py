"""What a model reads of a text that it is to go on with: the text's own tokens behind what the tokenizer puts
before every text, and nothing after.

A tokenizer's post-processor may append tokens, as an end of sequence.  A prompt that ended in it would ask
the model to begin something new, and a pair of context and continuation that is split by the number of the
context's tokens would lose the first token of the continuation.  So whoever sizes a prompt and whoever asks a
model count by ``encode``.
"""

from endprompt import BadInput

PROBE = "a"


def frame(tokenizer) -> tuple[list[int], list[int]]:
    """(ids before, ids after) every text by the tokenizer's own post-processor.  Raises BadInput if it does
    not leave a text in one piece.
    """
    plain = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(PROBE)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise BadInput(
        f"tokenizer: its post-processor makes {whole} of a text whose tokens are {plain}; a prompt cannot be "
        "found in that, so mend post_processor in tokenizer.json"
    )


def encode(tokenizer, text: str) -> list[int]:
    """The ids that a model reads of the prompt ``text``.

    Nothing is put before a text that begins with the beginning-of-sequence token itself, as chat templates
    write it; the harness has the same rule.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is not None and (written := tokenizer.decode(first)) and text.startswith(written):
        return ids
    return frame(tokenizer)[0] + ids


def render(tokenizer, prompt: str, chat: bool) -> str:
    """``prompt`` as it is asked: with ``chat``, as a user's only message in the tokenizer's chat template, up
    to where the answer begins.
    """
    if not chat:
        return prompt
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )


def check_template(tokenizer) -> None:
    """Raises BadInput if there is no chat template, or it cannot hold a user's message."""
    if not tokenizer.chat_template:
        raise BadInput(
            "eval.chat_template: the model's tokenizer has no chat template; set eval.chat_template=false, "
            "or name a model that has one"
        )
    try:
        if render(tokenizer, "1", True) == render(tokenizer, "2", True):
            raise ValueError("the message is not in what it makes")
    except Exception as error:  # a template is a program, and may raise anything
        raise BadInput(
            "eval.chat_template: the model's chat template cannot be used: "
            f"{str(error).strip() or type(error).__name__}; mend it, or set eval.chat_template=false"
        ) from None


def room(tokenizer, chat: bool) -> int:
    """How many tokens the chat template adds to a prompt's own; 0 without ``chat``."""
    if not chat:
        return 0
    text = f"{PROBE} {PROBE}"
    count = [
        len(tokenizer(written, add_special_tokens=False)["input_ids"])
        for written in (text, render(tokenizer, text, True))
    ]
    return max(0, count[1] - count[0]) + 2  # at both seams tokens may be cut otherwise
