"""The tables of endprompt.reports.findings that ask which RoPE, which method and which part of it wins."""

import re
from collections.abc import Callable

from endprompt import methods
from endprompt.reports.findings_tables import SHARPENED, cell, grid, keys, longer, perplexity

PLAIN = "plain"
BASELINES = ("full_length", "lceg")  # on every RoPE and at every learning rate: what is to be beaten
# What is measured of an entry: (task, length by its place in the list of lengths, or None for the mean), and
# whether less is better.
MEASURES = (
    ("passkey", -1, False),
    ("passkey", None, False),
    ("multikey", -1, False),
    ("multikey", None, False),
    ("perplexity", -1, True),
)
SCALINGS = (PLAIN, "linear", "yarn", "theta")
NEIGHBOURS = ("randpos", "cream", "longrecipe", "e2llm", "drope", "longrope2", "perturbed", "self_distil")
# Of the settings, those that take or change one part of a method.
PARTS = re.compile(
    r"(.+-)?(sharpened|unsharpened|factorless|heads|half|chunks-\d+|pieces-\d+|share-\d+|by-(position|gain))"
)
RATES = re.compile(r"(.+-)?lr-(low|high)")
STEPS = re.compile(
    r"(.+-)?decay-\d+(-by-position|-lr-(low|high))?"
)  # smaller steps, at a learning rate that falls


def settings(entries: list[dict], wanted: Callable[[str], object]) -> list[dict]:
    """The entries of settings that are ``wanted``, after those of the settings that they differ from, where
    these were run with the same method."""
    asked = {(origin(entry["setting"]), entry["method"]) for entry in entries if wanted(entry["setting"])}
    return [
        entry for entry in entries if wanted(entry["setting"]) or (entry["setting"], entry["method"]) in asked
    ]


def origin(setting: str) -> str:
    """The setting that ``setting`` differs from in one thing: "theta" of "theta-lr-low"."""
    for pattern in (PARTS, RATES, STEPS):
        if found := pattern.fullmatch(setting):
            return (found[1] or "").removesuffix("-") or PLAIN
    return PLAIN


def by_method(entries: list[dict]) -> list[dict]:
    """The entries of each kind of RoPE, a method's together."""
    return sorted(
        (entry for entry in entries if entry["setting"] in SCALINGS),
        key=lambda entry: list(methods.METHODS).index(entry["method"]),
    )


def scalings(entries: list[dict]) -> list[dict]:
    """Methods that were run on several kinds of RoPE, but for the neighbours, which have tables of their
    own."""
    several = {entry["method"] for entry in by_method(entries) if entry["setting"] != PLAIN}
    return by_method([entry for entry in entries if entry["method"] in several - set(NEIGHBOURS)])


def neighbours(entries: list[dict]) -> list[dict]:
    """The neighbours of the method on any RoPE, beside ``pose`` and ``pose_sharp``; none if there is none."""
    chosen = by_method([entry for entry in entries if entry["method"] in (*NEIGHBOURS, "pose", "pose_sharp")])
    return chosen if any(entry["method"] in NEIGHBOURS for entry in chosen) else []


def value(entry: dict, task: str, place: int | None) -> dict | None:
    """The cell of an entry for one of MEASURES."""
    scores = entry["scores"][task]
    if place is None:
        return entry[task].get("mean") if scores else None
    return scores[sorted(scores)[place]] if scores else None


def goals(entries: list[dict]) -> str:
    """Every trained entry by the measures of the goal; bold where its interval is better than, and apart
    from, the best baseline's in that measure; the last column is the perplexity at the least length against
    ``short``.
    """
    trained = [entry for entry in entries if methods.METHODS[entry["method"]].trained]
    baselines = [entry for entry in trained if entry["method"] in BASELINES]
    control = next((entry for entry in entries if entry["name"] == "short"), None)
    best = []
    for task, place, less in MEASURES:
        found = [here for entry in baselines if (here := value(entry, task, place))]
        best.append((min if less else max)(found, key=lambda here: here["mean"], default=None))
    rows = []
    for entry in trained:
        shown = []
        for (task, place, less), bar in zip(MEASURES, best, strict=True):
            here = value(entry, task, place)
            text = cell(here, "{:.2f}" if task == "perplexity" else "{:.0f}")
            ahead = here and bar and (here["high"] < bar["low"] if less else here["low"] > bar["high"])
            shown.append(f"**{text}**" if ahead else text)
        against = cell(longer(entry, control), "{:+.1f}") if control and control is not entry else "-"
        rows.append([f"`{entry['name']}`", *shown, against])
    return grid(["method", *map(_measure, MEASURES), "perplexity at C against `short`, %"], rows)


def _measure(measure: tuple[str, int | None, bool]) -> str:
    task, place, _ = measure
    return f"{task}, mean" if place is None else f"{task} at L"


def tables(entries: list[dict]) -> dict[str, str]:
    """{name of the place: table} of what there is to say of these questions."""

    def part(setting: str) -> bool:
        return bool(PARTS.fullmatch(setting)) and setting not in SHARPENED and not STEPS.fullmatch(setting)

    def rate(setting: str) -> bool:
        return bool(RATES.fullmatch(setting)) and not STEPS.fullmatch(setting)

    found = {"goals": goals(entries)}
    for name, chosen in (
        ("scalings", scalings(entries)),
        ("neighbours", neighbours(entries)),
        ("parts", settings(entries, part)),
        ("rates", settings(entries, rate)),
        ("steps", settings(entries, STEPS.fullmatch)),
    ):
        found[name] = keys(chosen)
        found[f"{name}-multikey"] = keys(chosen, "multikey")
        found[f"{name}-perplexity"] = perplexity(chosen)
    return {name: table for name, table in found.items() if table.count("\n") > 1}
