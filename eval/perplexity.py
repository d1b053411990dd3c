"""Sliding-window perplexity: the same tokens scored with more and more context before them.

Windows of ``length`` tokens slide by ``stride``; each scores its last ``stride`` tokens.  The scored tokens are the same at every
length (they start where the longest window first fits), so a model that uses far context must score lower at greater lengths.
"""

import math

import torch


def windows(documents: list[list[int]], length: int, longest: int, stride: int, budget: int) -> list[tuple[list[int], int]]:
    """(window of ``length`` tokens, tokens scored at its end) over ``documents``, in order, up to ``budget`` scored tokens.

    Raises ValueError if no document holds ``longest`` tokens or the stride leaves a window without context.
    """
    if stride >= length:
        raise ValueError(f"a stride of {stride} leaves no context in windows of {length}")
    found, scored = [], 0
    for ids in documents:
        for end in range(longest, len(ids) + 1, stride):
            if scored >= budget:
                return found
            found.append((ids[end - length:end], stride))
            scored += stride
    if not found:
        raise ValueError(f"no document holds {longest} tokens; give longer held-out documents or smaller lengths")
    return found


@torch.no_grad()
def score(model, documents: list[list[int]], length: int, longest: int, stride: int, budget: int) -> dict:
    """Perplexity at one length: {"length", "perplexity", "nats", "low", "high", "tokens"}; low and high bound the perplexity
    with 95 % by the spread of the windows' means (normal approximation)."""
    means = []
    for ids, count in windows(documents, length, longest, stride, budget):
        tokens = torch.tensor([ids], device=model.device)
        hidden = model.get_decoder()(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).last_hidden_state[0, -count - 1:-1]
        logits = model.get_output_embeddings()(hidden).float()
        means.append(torch.nn.functional.cross_entropy(logits, tokens[0, -count:]).item())
    nats = sum(means) / len(means)
    error = math.sqrt(sum((mean - nats) ** 2 for mean in means) / max(1, len(means) - 1) / len(means))
    return {"length": length, "perplexity": math.exp(nats), "nats": nats, "low": math.exp(nats - 1.96 * error), "high": math.exp(nats + 1.96 * error),
            "tokens": len(means) * stride}
