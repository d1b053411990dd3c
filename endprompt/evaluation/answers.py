"""What of a model's output is its answer."""


def strip_prompt(prompt: str, output: str) -> str:
    """``output`` without the prompt it begins with; any other output as it is.

    RULER and LongBench look for the answer anywhere in the output, and the prompt holds it.  An engine that
    returns prompt and continuation together would so score near 100 % whatever the model says (seen upstream:
    99.8 on qa_2).  White space around the prompt may differ, as it does once a tokenizer has written it
    again.  An output that begins with a part of the prompt is the model's own text, and stays.
    """
    if output.startswith(prompt):
        return output[len(prompt) :]
    said, asked = output.lstrip(), prompt.strip()
    return said[len(asked) :] if asked and said.startswith(asked) else output
