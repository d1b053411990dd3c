"""What a prepared row looks like to a person: decoded text, positions, and the distances that rows
supervise.
"""

import contextlib
import sys
from collections.abc import Sequence
from itertools import islice, pairwise, repeat
from pathlib import Path

import numpy as np

from endprompt import BadInput, methods
from endprompt.positions import coverage, plans
from endprompt.positions.coverage import Span
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.schema import Recipe
from endprompt.rows import corpus, prepare, shards
from endprompt.rows.stream import Cursor
from endprompt.rows.tokenizing import tokenized

SAMPLED_TOKENS = 2**24
SAMPLED_TEXT = 2**20  # where text has to be read for it
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
    parts = plans.segments(np.array(row["position_ids"]))
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


def _rows(experiment: Experiment, strict: bool) -> tuple[list[list[Span]], str]:
    """(segments of each row, where they come from): the run's shards, or the rows that ``prepare``
    would begin with.

    As a rule the plan asks nothing of the text but its length, so rows are sampled from a corpus of one
    endless blank; where it asks more, from the beginning of the corpus.  Raises BadInput if shards are there
    and damaged, or another setting's; unless ``strict``, rows are then sampled.
    """
    folder = experiment.run / "shards"
    if (folder / shards.MANIFEST).exists():
        try:
            manifest = checked(experiment)
            segments = [plans.segments(row) for row in shards.position_ids(folder, manifest)]
            return segments, f"{manifest['rows']} prepared rows of {folder}"
        except BadInput:
            if strict:
                raise
    make, length = experiment.rows(), experiment.row_length
    most = SAMPLED_TEXT if make.of_text else SAMPLED_TOKENS
    count = max(1, min(experiment.recipe.data.tokens, most) // length)
    blank = repeat(("", np.zeros(experiment.target_length, np.int32)))
    with _text(experiment) if make.of_text else contextlib.nullcontext(blank) as stream:
        cursor = Cursor(stream, 0, 0)
        made = (make(number, cursor) for number in range(count))
        segments = [plans.segments(row["position_ids"]) for row in made if row is not None]
    return segments, f"{len(segments)} sampled rows of {length} tokens (there are no shards)"


def _text(experiment: Experiment):
    """The corpus' documents as ids, inside a context."""
    recipe = experiment.recipe
    documents = corpus.documents(recipe, corpus.local_files(recipe))
    return contextlib.closing(tokenized(documents, experiment.base.tokenizer, 1))


def _is_here(recipe: Recipe) -> bool:
    """Whether the corpus lies on this machine."""
    try:
        return corpus.local_files(recipe) is not None
    except BadInput:
        return False


def checked(experiment: Experiment) -> dict:
    """The manifest of the run's shards.  Raises BadInput if they are damaged, or another setting's."""
    folder = experiment.run / "shards"
    manifest = shards.read_manifest(folder)
    if differing := shards.disagreements(manifest, prepare.settings(experiment)):
        raise BadInput(
            f"shards: {folder} do not belong to this recipe and method ({'; '.join(differing)}); inspect them"
            " under their own"
        )
    shards.verify(folder, manifest)
    shards.check_rows(folder, manifest)
    return manifest


def describe_coverage(experiment: Experiment, number: int) -> str:
    """Which distances the method supervises, and how often, as text: of its shards if prepared, else of
    sampled rows.

    Raises BadInput for a method without training, a row ``number`` that is not there, or shards of another
    setting.
    """
    name = experiment.method.name
    if not experiment.method.trained:
        raise BadInput(
            f"--coverage: {name} trains nothing, so there are no distances to count; choose a method that"
            " trains"
        )
    rows, source = _rows(experiment, strict=True)
    if not 0 <= number < len(rows):
        raise BadInput(f"--row {number}: there are rows 0 to {len(rows) - 1}")
    L, row = experiment.target_length, rows[number]
    counts = coverage.pair_counts(rows, L)
    never = f"{np.count_nonzero(counts == 0)} of the distances 0..{L - 1} ({np.mean(counts == 0):.2%})"
    lines = [
        f"coverage of {name}: {source}",
        f"never seen: {never}",
        "",
        f"row {number}: positions {_listed(row)}",
    ]
    for (r, s), (p, q), (low, high) in islice(coverage.contributions(row), 10):
        lines.append(f"  queries {r}..{s} on keys {p}..{q}: distances {low}..{high}")
    lines += _both_ways(row, number, rows, L)
    return "\n".join([*lines, "", *_bands(counts)])


def _both_ways(row: list[Span], number: int, rows: list[list[Span]], L: int) -> list[str]:
    """Observed distances and gaps, of ``row`` and of all ``rows``, in closed form and counted."""
    lines = []
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
    return lines


def _bands(counts: np.ndarray) -> list[str]:
    """A table of ``counts`` [L] in a few bands of distances."""
    L = len(counts)
    lines = [f"{'distances':<18} {'pairs':>16} {'of all pairs':>14} {'never seen':>12}"]
    edges = sorted({L * band // BANDS for band in range(BANDS + 1)})
    for low, high in pairwise(edges):
        part = counts[low:high]
        lines.append(
            f"{f'{low}..{high - 1}':<18} {part.sum():>16} {part.sum() / counts.sum():>14.3%}"
            f" {np.mean(part == 0):>12.1%}"
        )
    return lines


def draw_coverage(experiment: Experiment) -> bytes:
    """A PNG of how often every method that trains supervises each distance under the recipe: of its shards if
    prepared, else of sampled rows.

    Other methods than the experiment's are left out where the corpus is not here and their rows ask for
    text, and, named on stderr, where the recipe does not suit them.  Raises BadInput if it does not suit the
    experiment's own.
    """
    panels, L, recipe = [], experiment.target_length, experiment.recipe
    for method in filter(lambda method: method.trained, methods.METHODS.values()):
        try:
            own = experiment.with_method(method.name) if method is not experiment.method else experiment
            if own is not experiment and own.rows().of_text and not _is_here(recipe):
                continue
            rows, source = _rows(own, strict=False)
        except BadInput as error:
            if method is experiment.method:
                raise
            print(f"warning: the picture leaves out {method.name} ({error})", file=sys.stderr)
            continue
        tokens = sum(last - first + 1 for row in rows for first, last in row)
        counts = coverage.pair_counts(rows, L)
        panels.append((f"{method.name}, {source.partition(' of ')[0]}", counts, tokens))
    title = f"distances supervised with rows of {recipe.lengths.physical} tokens and a window of {L}"
    return coverage.picture(panels, f"{recipe.name}: {title}")
