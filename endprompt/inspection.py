"""What a prepared row looks like to a person: decoded text, positions, and the distances that rows
supervise.
"""

from collections.abc import Sequence
from itertools import islice, pairwise, repeat
from pathlib import Path

import numpy as np

from endprompt import BadInput, coverage, methods, positions, prepare, row_stream, shards
from endprompt.config import Recipe
from endprompt.coverage import Span
from endprompt.methods import Method

SAMPLED_TOKENS = 2**24
BANDS = 8


def _listed(spans: Sequence[Span], most: int = 6) -> str:
    text = ", ".join(f"{low}..{high}" for low, high in spans[:most])
    return (text + f", ... ({len(spans)} ranges)" if len(spans) > most else text) or "none"


def describe(folder: Path, manifest: dict, tokenizer, number: int) -> str:
    """Row ``number`` of the shards in ``folder`` as text.  Raises BadInput if there is no such row."""
    if not 0 <= number < manifest["rows"]:
        raise BadInput(f"--row {number}: the shards hold rows 0 to {manifest['rows'] - 1}")
    row = next(row for index, row in enumerate(shards.rows(folder, manifest)) if index == number)
    ids, a, b, L = row["input_ids"], row["text_length"], row["prompt_length"], manifest["target_length"]
    parts = positions.segments(np.array(row["position_ids"]))
    counts = coverage.pair_counts([parts], L)
    missing = coverage.gap(coverage.counted(counts), L)

    def shown(tokens: list[int]) -> str:
        text = tokenizer.decode(tokens)
        return text if len(text) <= 400 else f"{text[:200]} [...] {text[-200:]}"

    lines = [
        f"row {number}: {a} text tokens"
        + (f" + {b} of end prompt {row['prompt_name']}" if b else "")
        + f", from {', '.join(row['document_ids'][:4])}",
        f"text:       {shown(ids[:a])!r}",
        *([f"end prompt: {shown(ids[a:])!r}"] if b else []),
        f"positions:  {_listed(parts)} of 0..{L - 1}",
        f"distances:  {np.count_nonzero(counts)} of {L} supervised ({np.mean(counts > 0):.1%})"
        + (f"; never seen: {_listed(missing)}" if missing else ""),
        (
            f"loss:       {sum(weight > 0 for weight in row['loss_weights'])} targets, weights"
            f" {sorted(set(round(weight, 6) for weight in row['loss_weights']))}"
        ),
        f"closed form (paper Eq. 9): gap {_listed(coverage.gap(coverage.observed([parts]), L))}",
    ]
    return "\n".join(lines)


def _rows(
    recipe: Recipe, method: Method, tokenizer, folder: Path, strict: bool
) -> tuple[list[list[Span]], str]:
    """(segments of each row, where they come from): the shards in ``folder``, or the rows that ``prepare``
    would begin with.

    The plan asks nothing of the text but its length, so rows are sampled from a corpus of one endless blank.
    Raises BadInput if shards are there and damaged, or another setting's; unless ``strict``, rows are then
    sampled.
    """
    if (folder / shards.MANIFEST).exists():
        try:
            manifest = shards.read_manifest(folder)
            if differing := shards.disagreements(manifest, prepare.settings(recipe, method, tokenizer)):
                raise BadInput(
                    f"shards: {folder} do not belong to this recipe and method ({'; '.join(differing)});"
                    " inspect them under their own"
                )
            shards.verify(folder, manifest)
            shards.check_rows(folder, manifest)
            return [
                positions.segments(row) for row in shards.position_ids(folder, manifest)
            ], f"{manifest['rows']} prepared rows of {folder}"
        except BadInput:
            if strict:
                raise
    length = recipe.row_length(method)
    make = row_stream.row_maker(
        recipe, method, row_stream.end_prompts(recipe, tokenizer) if method.end_prompt else []
    )
    blank = row_stream.Cursor(repeat(("", np.zeros(recipe.lengths.target, np.int32))), 0, 0)
    count = max(1, min(recipe.data.tokens, SAMPLED_TOKENS) // length)
    rows = (make(number, blank) for number in range(count))
    return [
        positions.segments(row["position_ids"]) for row in rows if row is not None
    ], f"{count} sampled rows of {length} tokens (there are no shards)"


def describe_coverage(recipe: Recipe, method: Method, tokenizer, out: Path, number: int) -> str:
    """Which distances ``method`` supervises, and how often, as text: its shards below ``out`` if prepared,
    else sampled rows.

    Raises BadInput for a method without training, a row ``number`` that is not there, or shards of another
    setting.
    """
    if not method.trained:
        raise BadInput(
            f"--coverage: {method.name} trains nothing, so there are no distances to count; choose a method"
            " that trains"
        )
    rows, source = _rows(recipe, method, tokenizer, out / recipe.name / method.name / "shards", strict=True)
    if not 0 <= number < len(rows):
        raise BadInput(f"--row {number}: there are rows 0 to {len(rows) - 1}")
    L, row = recipe.lengths.target, rows[number]
    counts = coverage.pair_counts(rows, L)
    lines = [
        f"coverage of {method.name}: {source}",
        (
            f"never seen: {np.count_nonzero(counts == 0)} of the distances 0..{L - 1}"
            f" ({np.mean(counts == 0):.2%})"
        ),
        "",
        f"row {number}: positions {_listed(row)}",
        *(
            f"  queries {r}..{s} on keys {p}..{q}: distances {low}..{high}"
            for (r, s), (p, q), (low, high) in islice(coverage.contributions(row), 10)
        ),
    ]
    for title, some in ((f"row {number}", [row]), (f"all {len(rows)} rows", rows)):
        closed, seen = coverage.observed(some), coverage.counted(coverage.pair_counts(some, L))
        for name, equation, spans in (
            ("D_obs", 8, (closed, seen)),
            ("D_gap", 9, (coverage.gap(closed, L), coverage.gap(seen, L))),
        ):
            lines += [
                f"{name} of {title}, closed form (paper Eq. {equation}): {_listed(spans[0])}",
                f"{name} of {title}, counted: {_listed(spans[1])}",
            ]
    lines += ["", f"{'distances':<18} {'pairs':>16} {'of all pairs':>14} {'never seen':>12}"]
    edges = sorted({L * band // BANDS for band in range(BANDS + 1)})
    for low, high in pairwise(edges):
        part = counts[low:high]
        lines.append(
            f"{f'{low}..{high - 1}':<18} {part.sum():>16} {part.sum() / counts.sum():>14.3%}"
            f" {np.mean(part == 0):>12.1%}"
        )
    return "\n".join(lines)


def draw_coverage(recipe: Recipe, tokenizer, out: Path) -> bytes:
    """A PNG of how often every method that trains supervises each distance; its shards below ``out`` if
    prepared, else sampled rows.

    Raises BadInput if the recipe cannot make rows for one of them.
    """
    panels, L = [], recipe.lengths.target
    for method in filter(lambda method: method.trained, methods.METHODS.values()):
        rows, source = _rows(
            recipe, method, tokenizer, out / recipe.name / method.name / "shards", strict=False
        )
        tokens = sum(last - first + 1 for row in rows for first, last in row)
        panels.append(
            (f"{method.name}, {source.partition(' of ')[0]}", coverage.pair_counts(rows, L), tokens)
        )
    return coverage.picture(
        panels,
        f"{recipe.name}: distances supervised with rows of {recipe.lengths.physical} tokens and a window"
        f" of {L}",
    )
