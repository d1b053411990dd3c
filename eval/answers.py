"""What of a model's output is its answer."""


def strip_prompt(prompt: str, output: str) -> str:
    """``output`` without ``prompt`` at its beginning.

    Some engines return prompt and continuation as one text.  The prompt holds what is asked for, so scoring it gives nearly full marks to
    any model (qa_2 at 99.8 was published that way).
    """
    return output[len(prompt):] if prompt and output.startswith(prompt) else output
