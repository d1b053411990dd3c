"""The Markdown tables of endprompt.reports.findings, by the name of their place in a page."""

import math

from endprompt.evaluation import intervals, passkey
from endprompt.reports import markdown

STEPS = (8, 16, 32, 64, 128, 192)  # at which the losses of the end prompt are named
# (one, another): is one better?  By the names of the entries; the questions of docs/findings.md, in their
# order.
CONTRASTS = (
    ("endprompt", "short"),
    ("endprompt", "full_length"),
    ("short", "full_length"),
    ("endprompt_random", "endprompt"),
    ("pose", "endprompt"),
    ("endprompt_pose", "endprompt"),
    ("pose", "full_length"),
    ("endprompt_pose", "full_length"),
    ("endprompt, weight-0", "endprompt"),
    ("endprompt, weight-1", "endprompt"),
    ("endprompt, prompt-short", "endprompt"),
    ("endprompt, prompt-long", "endprompt"),
    ("endprompt, prompts-3", "endprompt"),
    ("full_length, sharpened", "full_length"),
    ("pose, sharpened", "pose"),
    ("endprompt_pose, sharpened", "endprompt_pose"),
    ("pose_sharp", "pose"),
    ("pose_recall", "pose_sharp"),
    ("pose_sharp, by-position", "pose_sharp"),
    ("pose_matched, by-position", "pose_matched"),
    ("pose_sharp", "short"),
    ("pose_sharp", "endprompt"),
    ("pose_sharp", "full_length"),
    ("pose_sharp", "full_length, sharpened"),
    ("pose_sharp", "full_length, yarn-sharpened"),
    ("pose_recall", "full_length"),
    ("pose_matched", "pose_sharp"),
    ("pose_matched", "short"),
    ("pose_matched", "endprompt"),
    ("pose_matched", "full_length"),
    ("pose_matched", "full_length, sharpened"),
    ("pose_matched", "full_length, yarn-sharpened"),
    ("lceg", "full_length"),
    ("longlora", "full_length"),
    ("endprompt", "lceg"),
    ("pose_sharp", "lceg"),
    ("pose_recall", "lceg"),
    ("pose_matched", "lceg"),
    ("lceg, sharpened", "lceg"),
    ("pose_sharp", "lceg, sharpened"),
    ("pose_matched", "lceg, sharpened"),
    ("endprompt, yarn", "short, yarn"),
    ("short, yarn", "short"),
    ("pose_sharp", "short, yarn"),
    ("pose_matched", "short, yarn"),
    ("full_length, yarn-decay-8", "full_length, yarn"),
    ("full_length, decay-8", "full_length, yarn-decay-8"),
    ("pose_matched, theta-decay-4", "pose_matched, theta"),
    ("endprompt, theta-decay-4", "short, theta-decay-4"),
    ("pose_sharp, theta-decay-4", "short, theta-decay-4"),
    ("pose_matched, theta-decay-4", "short, theta-decay-4"),
    ("pose_matched, theta-decay-4", "pose_sharp, theta-decay-4"),
    ("pose_matched, theta-decay-4", "full_length, yarn-decay-8"),
    ("pose_matched, theta-decay-4", "full_length, decay-8"),
    ("pose_matched, theta-decay-4-by-position", "pose_matched, theta-decay-4"),
    ("pose_matched, theta-decay-4-half", "pose_matched, theta-decay-4"),
    ("pose_matched, theta-decay-4-unsharpened", "pose_matched, theta-decay-4"),
    ("pose_matched, theta-decay-4-by-position", "short, theta-decay-4"),
    ("pose_matched, theta-decay-4-by-position", "full_length, yarn-decay-8"),
)

# Settings whose recipe is that of another one: their models are those, exported.
BY_POSITION = "by-position"
EXPORTED = "export --position-dependent"
# Settings of the scaling or the sharpness of attention that the table "sharpened" shows.
SHARPENED = ("sharpened", "unsharpened", BY_POSITION, "yarn", "yarn-sharpened")


def grid(head: list[str], rows: list[list[str]]) -> str:
    return markdown.grid(head[0], head[1:], [(row[0], row[1:]) for row in rows])


def cell(value: dict | None, form: str = "{:.0f}") -> str:
    """ "mean [low, high]", or a dash; the mean alone where nothing is known of its spread."""
    if value is None:
        return "-"
    mean = form.format(value["mean"])
    if value["low"] == value["high"]:
        return mean
    return f"{mean} [{form.format(value['low'])}, {form.format(value['high'])}]"


def _name(entry: dict) -> str:
    return f"`{entry['name']}`"


def _lengths(entries: list[dict], task: str) -> list[int]:
    return sorted({length for entry in entries for length in entry["scores"][task]})


def _greatest(entries: list[dict]) -> list[int]:
    """The greatest length of multikey, if it was scored."""
    return _lengths(entries, "multikey")[-1:]


def _seeds(entry: dict) -> str:
    return str(
        max(
            (
                found["seeds"]
                for task in (*passkey.TASKS, "perplexity")
                for found in entry["scores"][task].values()
            ),
            default=0,
        )
    )


def keys(entries: list[dict], task: str = "passkey") -> str:
    """A row an entry: keys found in % by length and over all lengths."""
    lengths = _lengths(entries, task)
    return grid(
        ["method", "seeds", *map(str, lengths), "mean"],
        [
            [
                _name(entry),
                _seeds(entry),
                *[cell(entry["scores"][task].get(length)) for length in lengths],
                cell(entry[task].get("mean")),
            ]
            for entry in entries
            if entry["scores"][task]
        ],
    )


def perplexity(entries: list[dict]) -> str:
    """A row an entry: perplexity by length, and the losses at the end of training in nats a token."""
    lengths = _lengths(entries, "perplexity")
    losses = ("final_text_loss", "final_end_prompt_loss")
    return grid(
        ["method", "seeds", *map(str, lengths), "text loss", "end-prompt loss"],
        [
            [
                _name(entry),
                _seeds(entry),
                *[cell(entry["scores"]["perplexity"].get(length), "{:.3f}") for length in lengths],
                *[
                    f"{entry['scores']['training'][key]:.3f}" if key in entry["scores"]["training"] else "-"
                    for key in losses
                ],
            ]
            for entry in entries
            if entry["scores"]["perplexity"]
        ],
    )


def prompt_losses(entries: list[dict]) -> str:
    """Losses of the end prompt in nats a token at some steps, mean with least and greatest seed: of all its
    tokens, and without the first.
    """
    kinds = {"end_prompt_loss": "all", "end_prompt_later_loss": "all but the first"}
    return grid(
        ["method", "tokens", *[f"step {step}" for step in STEPS]],
        [
            [_name(entry), tokens, *[cell(series.get(step), "{:.3f}") for step in STEPS]]
            for entry in entries
            for key, tokens in kinds.items()
            if (series := entry["losses"].get(key))
        ],
    )


def seen(entries: list[dict]) -> str:
    """Keys found in % at distances that training rows have and at those they lack, for each length where a
    method has both.
    """
    return grid(
        ["method", "length", "at distances seen", "at distances never seen"],
        [
            [_name(entry), str(length), cell(entry["passkey"]["seen"].get(length)), cell(found)]
            for entry in entries
            for length, found in entry["passkey"].get("unseen", {}).items()
        ],
    )


def paired(one: dict[str, float], other: dict[str, float], samples: int) -> dict | None:
    """The cell of the differences ``one`` - ``other`` (percent of ``samples`` keys) of the seeds that both
    have; None if there are none.

    Where all of them agree there is no spread to judge by: the interval is then Newcombe's (1998), of two
    proportions, from all seeds' samples.
    """
    common = sorted(one.keys() & other.keys())
    if not common:
        return None
    means, bounds = [], []
    for scores in (one, other):
        mean = math.fsum(scores[seed] for seed in common) / len(common)
        low, high = intervals.wilson(round(mean / 100 * samples * len(common)), samples * len(common))
        means.append(mean)
        bounds.append((100 * low, 100 * high))
    (a, b), ((low_a, high_a), (low_b, high_b)) = means, bounds
    alone = (a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b))
    return intervals.over_seeds([one[seed] - other[seed] for seed in common], alone, -100.0, 100.0)


def mean(by_length: dict[int, dict[str, float]]) -> dict[str, float]:
    """{seed: mean over the lengths} of the seeds that have all of them."""
    seeds = set.intersection(*map(set, by_length.values())) if by_length else set()
    return {
        seed: math.fsum(scores[seed] for scores in by_length.values()) / len(by_length)
        for seed in sorted(seeds)
    }


def difference(one: dict, other: dict, task: str, length: int | None) -> dict | None:
    """``paired`` of two entries at a length, or of the mean over the lengths (None)."""
    a, b = (entry["values"][task] for entry in (one, other))
    if length is None:
        if a.keys() != b.keys():  # means over other lengths
            return None
        return paired(mean(a), mean(b), sum(one["samples"][task].values()))
    return paired(a.get(length, {}), b.get(length, {}), one["samples"][task].get(length, 1))


def longer(one: dict, other: dict) -> dict | None:
    """By how many percent ``one``'s perplexity at the least length is above ``other``'s, over the seeds that
    both have.
    """
    lengths = _lengths([one], "perplexity")
    a, b = (entry["values"]["perplexity"].get(lengths[0], {}) if lengths else {} for entry in (one, other))
    common = sorted(a.keys() & b.keys())
    if not common:
        return None
    ratios = [100 * (a[seed] / b[seed] - 1) for seed in common]
    return intervals.over_seeds(ratios, (ratios[0], ratios[0]), -math.inf)


def _apart(one: dict | None, other: dict | None) -> bool:
    if not one or not other:
        return False
    return one["low"] > other["high"] or one["high"] < other["low"]


def contrasts(entries: list[dict], pairs: tuple[tuple[str, str], ...] = CONTRASTS) -> str:
    """Differences in points of two entries' keys found, paired by seed, and of perplexity at the least length
    in %; bold where their own intervals are apart.
    """
    known = {entry["name"]: entry for entry in entries}
    chosen = [(known[one], known[other]) for one, other in pairs if one in known and other in known]
    lengths, rows = _lengths(entries, "passkey"), []
    for one, other in chosen:
        row = [f"`{one['name']}` - `{other['name']}`"]
        for task, length in [
            *(("passkey", length) for length in [*lengths, None]),
            *(("multikey", length) for length in [*_greatest(entries), None]),
        ]:
            ends = [
                entry["scores"][task].get(length) if length else entry[task].get("mean")
                for entry in (one, other)
            ]
            shown = cell(difference(one, other, task, length), "{:+.0f}")
            row.append(f"**{shown}**" if _apart(*ends) else shown)
        rows.append([*row, cell(longer(one, other), "{:+.1f}")])
    least = next(iter(_lengths(entries, "perplexity")), "")
    return grid(
        [
            "one - another",
            *map(str, lengths),
            "mean",
            *[f"multikey {length}" for length in _greatest(entries)],
            "multikey, mean",
            f"perplexity {least}, %",
        ],
        rows,
    )


def plain(entries: list[dict]) -> list[dict]:
    return [entry for entry in entries if entry["setting"] == "plain"]


def prompts(entries: list[dict]) -> list[dict]:
    """``endprompt`` under all settings of the end prompt, with the control."""
    return [
        entry
        for entry in entries
        if entry["name"] == "short"
        or entry["method"] == "endprompt"
        and not entry["different"].startswith("rope")
    ]


def sharpened(entries: list[dict]) -> list[dict]:
    """What differs in the scaling or the sharpness of attention, after the same methods without."""

    kinds = {entry["method"] for entry in entries if entry["setting"] in SHARPENED}
    return [
        entry
        for entry in entries
        if entry["setting"] in SHARPENED or entry["setting"] == "plain" and entry["method"] in kinds
    ]


def settings(entries: list[dict]) -> str:
    """A row a setting: what differs from the plain one."""
    return grid(
        ["setting", "differs in"],
        [
            [f"`{name}`", f"`{different}`"]
            for name, different in {
                entry["setting"]: entry["different"] for entry in entries if entry["different"]
            }.items()
        ],
    )


def evidence(entries: list[dict]) -> str:
    """The few rows of the README: keys found at the least and the greatest length and their mean, named keys
    at the greatest, perplexity at the least.
    """
    known = {entry["name"]: entry for entry in entries}
    asked, scored = _lengths(entries, "passkey"), _lengths(entries, "perplexity")
    rows, lengths = [], sorted({*asked[:1], *asked[-1:]})
    for name in (
        "short",
        "endprompt",
        "pose",
        "full_length",
        "full_length, sharpened",
        "lceg",
        "longlora",
        "pose_sharp",
        "pose_matched",
        "full_length, decay-8",
        "full_length, yarn-decay-8",
        "pose_matched, theta-decay-4",
    ):
        if entry := known.get(name):
            method, _, setting = name.partition(", ")
            scaling, steps, _ = setting.rpartition("decay")
            rows.append(
                [
                    f"`{method}` {scaling or 'linear-'}decay" if steps else f"`{name}`",
                    *[cell(entry["scores"]["passkey"].get(length)) for length in lengths],
                    cell(entry["passkey"].get("mean")),
                    *[cell(entry["scores"]["multikey"].get(length)) for length in _greatest(entries)],
                    cell(entry["scores"]["perplexity"].get(scored[0]), "{:.3f}") if scored else "-",
                ]
            )
    return grid(
        [
            "method",
            *[f"passkey {length}" for length in lengths],
            "mean",
            *[f"multikey {length}" for length in _greatest(entries)],
            f"perplexity {scored[0]}" if scored else "perplexity",
        ],
        rows,
    )


def tables(entries: list[dict]) -> dict[str, str]:
    """{name of the place: table} of all that there is to say."""
    found = {
        "passkey": keys(plain(entries)),
        "multikey": keys(plain(entries), "multikey"),
        "perplexity": perplexity(plain(entries)),
        "prompt-losses": prompt_losses(prompts(entries)),
        "seen": seen(plain(entries)),
        "contrasts": contrasts(entries),
        "prompts": keys(prompts(entries)),
        "sharpened": keys(sharpened(entries)),
        "sharpened-multikey": keys(sharpened(entries), "multikey"),
        "settings": settings(entries),
        "evidence": evidence(entries),
    }
    return {name: table for name, table in found.items() if table.count("\n") > 1}
