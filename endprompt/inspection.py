"""What a prepared row looks like to a person: decoded text, positions, and the distances it supervises."""

from pathlib import Path

import numpy as np

from endprompt import BadInput, positions, shards


def describe(folder: Path, manifest: dict, tokenizer, number: int) -> str:
    """Row ``number`` of the shards in ``folder`` as text.  Raises BadInput if there is no such row."""
    if not 0 <= number < manifest["rows"]:
        raise BadInput(f"--row {number}: the shards hold rows 0 to {manifest['rows'] - 1}")
    row = next(row for index, row in enumerate(shards.rows(folder, manifest)) if index == number)
    ids, a, b, L = row["input_ids"], row["text_length"], row["prompt_length"], manifest["target_length"]
    parts = positions.segments(np.array(row["position_ids"]))
    distances = positions.observed_distances(np.array(row["position_ids"]))
    gaps = np.flatnonzero(np.diff(distances) > 1)
    missing = [f"{distances[i] + 1}..{distances[i + 1] - 1}" for i in gaps] + ([f"{distances[-1] + 1}..{L - 1}"] if distances[-1] < L - 1 else [])

    def shown(tokens: list[int]) -> str:
        text = tokenizer.decode(tokens)
        return text if len(text) <= 400 else f"{text[:200]} [...] {text[-200:]}"

    lines = [
        f"row {number}: {a} text tokens" + (f" + {b} of end prompt {row['prompt_name']}" if b else "") + f", from {', '.join(row['document_ids'][:4])}",
        f"text:       {shown(ids[:a])!r}",
        *([f"end prompt: {shown(ids[a:])!r}"] if b else []),
        f"positions:  {', '.join(f'{first}..{last}' for first, last in parts)} of 0..{L - 1}",
        f"distances:  {len(distances)} of {L} supervised ({len(distances) / L:.1%})" + (f"; never seen: {', '.join(missing)}" if missing else ""),
        f"loss:       {sum(weight > 0 for weight in row['loss_weights'])} targets, weights {sorted(set(round(weight, 6) for weight in row['loss_weights']))}",
    ]
    if b:
        gap = positions.distance_gap(a, b, L)
        lines.append(f"paper Eq. 9: gap {gap[0]}..{gap[1]}" if gap else "paper Eq. 9: no gap")
    return "\n".join(lines)
