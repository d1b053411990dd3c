"""Writes the tables of this folder's README.md and docs/speed.md, and their picture, from results/.

    python benchmarks/table.py            # write
    python benchmarks/table.py --check    # exit code 1 if they are not what results/ says

A target that is not met stands there as such; what was not measured on a machine is left out of its table.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import measure

from endprompt.reports.markdown import replaced

RESULTS = Path(__file__).resolve().parent / "results"
PAGES = {
    Path(__file__).resolve().parent / "README.md": "benchmarks",
    measure.REPOSITORY / "docs/speed.md": "costs",
}
PICTURE = measure.REPOSITORY / "docs" / "costs.png"


def _at(found: dict, *keys):
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


Row = tuple[str, str, str, bool | None]


def rows(found: dict) -> list[Row]:
    """(what, measured, target, met) of what one machine's file holds; met is None where there is no
    target.
    """
    made: list[Row] = []

    def row(what: str, value, shown: str, target: str = "-", met=None) -> None:
        if value is not None:
            made.append((what, shown.format(value), target, None if met is None else bool(met(value))))

    for shape, result in sorted((found.get("efficiency") or {}).items()):
        _steps(row, shape, result)
    if loss := found.get("loss"):
        _loss(row, loss)
    if prepare := found.get("prepare"):
        _prepare(row, prepare)
    row(
        "command to the first step, tiny recipe",
        _at(found, "startup", "first_step_seconds"),
        "{:.1f} s",
        "<= 15 s",
        lambda value: value <= 15,
    )
    row(
        "`endprompt --help`",
        _at(found, "startup", "help_seconds"),
        "{:.2f} s",
        "<= 0.5 s",
        lambda value: value <= 0.5,
    )
    if ruler := found.get("ruler"):
        whole = (ruler["tasks"], ruler["samples"], ruler["length"]) == (13, 500, 65536)
        row(
            f"RULER's samples: {ruler['tasks']} tasks x {ruler['samples']} at {ruler['length']}",
            ruler["seconds"] / 60,
            "{:.1f} minutes",
            "<= 20" if whole else "-",
            (lambda value: value <= 20) if whole else None,
        )
        row("the same, from the cache", ruler["seconds_from_cache"], "{:.1f} s")
    return made


def _steps(row: Callable[..., None], shape: str, result: dict) -> None:
    gpu, ratios = not result["device"].startswith("CPU"), result["ratios"]
    for target, ratio in sorted(
        ((int(key), value) for key, value in ratios.items() if key.isdigit()), key=lambda pair: pair[0]
    ):
        met = (lambda value: value >= 3) if gpu and shape == "llama-3.2-1b" and target == 65536 else None
        row(
            f"`endprompt` against `full_length`, {shape}, target {target}: tokens/s",
            ratio["speedup"],
            f"{{:.2f}} times (arithmetic {ratio['arithmetic']:.2f})",
            ">= 3" if met else "-",
            met,
        )
        for way in ("none", "full"):
            if f"memory_share_{way}" in ratio:
                limit = (lambda value: value <= 0.14) if _windows(shape, target) == 8 else None
                row(
                    f"memory above the states, {shape}, target {target}, checkpointing {way}",
                    ratio[f"memory_share_{way}"],
                    "{:.1%} of `full_length`'s",
                    "<= 14 %" if limit else "-",
                    limit,
                )
    row(
        f"`endprompt`, {shape}: time a token at its slowest target against its fastest",
        ratios.get("endprompt_slowest_of_fastest_target"),
        "{:.3f}",
        "<= 1.02",
        lambda value: value <= 1.02,
    )
    best = max(
        (entry["mfu"] for entry in result["entries"] if entry["fits"] and entry.get("mfu")), default=None
    )
    row(
        f"best MFU, {shape}",
        best,
        "{:.1%}",
        ">= 50 %" if shape == "llama-3.2-1b" else "-",
        (lambda value: value >= 0.5) if shape == "llama-3.2-1b" else None,
    )


def _loss(row: Callable[..., None], loss: dict) -> None:
    size = f"{loss['tokens']} tokens x {loss['vocabulary']}, width {loss['width']}"
    row(
        f"chunked loss, {size}: memory",
        loss["memory_share"],
        "{:.1%} of full logits'",
        "<= 5 %",
        lambda value: value <= 0.05,
    )
    row(
        f"chunked loss, {size}: time",
        loss["time_ratio"],
        "{:.2f} of full logits'",
        "<= 1",
        lambda value: value <= 1,
    )


def _prepare(row: Callable[..., None], prepare: dict) -> None:
    text = f"{prepare['documents']} documents"
    start, speed = (
        prepare["prepare_first"]["seconds"],
        prepare["prepare_without_start_up_tokens_per_second"],
    )
    row(
        f"`prepare`, {text}, its {start:.1f} s of start-up included: tokens/s",
        prepare["prepare_once_of_bare"],
        "{:.2f} of the bare tokenizer's",
        ">= 0.8",
        lambda value: value >= 0.8,
    )
    row(
        "the same, without start-up",
        prepare["prepare_without_start_up_of_bare"],
        "{:.1f} times the bare tokenizer's",
        ">= 0.8",
        lambda value: value >= 0.8,
    )
    row(
        "the same against a plain `datasets.map`, which is timed without start-up too",
        speed / prepare["map"]["tokens_per_second"],
        "{:.1f} times",
        ">= 1.9",
        lambda value: value >= 1.9,
    )
    row(
        "`prepare` where fastokens is not installed, without start-up",
        prepare["tokenizers_without_start_up_of_bare"],
        "{:.2f} of the bare tokenizer's",
        ">= 0.8",
        lambda value: value >= 0.8,
    )
    row(
        "`prepare`: memory at 8 times the documents against once",
        prepare["prepare_memory_8_times_of_once"],
        "{:.2f}",
        "flat (<= 1.1)",
        lambda value: value <= 1.1,
    )
    row(
        "position columns' share of shard bytes",
        _at(prepare, "prepare_8", "position_share_of_bytes"),
        "{:.3%}",
        "<= 1 %",
        lambda value: value <= 0.01,
    )


def _windows(shape: str, target: int) -> float:
    from endprompt.planning.efficiency import SHAPES

    return target / SHAPES[shape][6]


def figure_4() -> list[str]:
    """Markdown lines: what `endprompt plan` computes for the 8B at 64K on 8 A800, beside the paper's Figure
    4.
    """
    from endprompt.planning import estimate
    from endprompt.recipe import schema
    from endprompt.recipe.experiment import Experiment
    from endprompt.reports import paper
    from endprompt.training.trainer import PEAK_FLOPS

    recipe, printed = (
        schema.load(measure.REPOSITORY / "recipes/llama3-8b-64k.yaml"),
        paper.tables()["figure_4_64k"].printed,
    )
    about = estimate.shape(recipe)
    lines = [
        (
            "| method | GB a GPU, 1 row of 8K | 2 rows | 4 rows (the recipe) | the paper | hours at 40 % MFU"
            " | the paper |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("endprompt", "full_length", "longlora", "lceg"):
        experiment = Experiment.of(recipe, name)
        counts = [rows if experiment.row_length == recipe.lengths.physical else 1 for rows in (1, 2, 4)]
        memory = [estimate.training_memory(experiment, about, 8, rows=rows).total / 1e9 for rows in counts]
        shown = (
            [f"{value:.1f}" for value in memory]
            if len(set(counts)) > 1
            else [f"{memory[0]:.1f} (a row of 64K)", "", ""]
        )
        flops = estimate.token_flops(experiment, about)
        hours = flops * recipe.data.tokens / (PEAK_FLOPS["A800"] * 8 * 0.4) / 3600
        lines.append(
            f"| `{name}` | {' | '.join(shown)} | {printed[name]['memory_gb']} | {hours:.1f} |"
            f" {printed[name]['hours']} |"
        )
    return lines


def _parts(found: dict) -> list[dict]:
    return [
        *(value for key, value in found.items() if key != "efficiency"),
        *(found.get("efficiency") or {}).values(),
    ]


def _when(found: dict) -> str:
    return (
        ", ".join(sorted({str(part.get("date"))[:10] for part in _parts(found)}))
        + ", commits "
        + ", ".join(sorted({str(part.get("commit"))[:7] for part in _parts(found)}))
    )


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 108, break_long_words=False, break_on_hyphens=False)


def blocks(files: list[Path]) -> dict[str, str]:
    """The generated Markdown by its name: "benchmarks" with every machine, "costs" with the last (a GPU's, if
    there is one: cpu-..., then h100-...).
    """
    machines = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    text = []
    for name, found in machines.items():
        devices = sorted({part["device"] for part in _parts(found)})
        text += [
            f"## {name}",
            "",
            _paragraph(f"{'; '.join(devices)} ({_when(found)}); file [{name}.json](results/{name}.json)."),
            "",
            "| what | measured | target | |",
            "|---|---|---|---|",
        ]
        text += [
            f"| {what} | {value} | {target} | {'' if met is None else 'met' if met else '**not met**'} |"
            for what, value, target, met in rows(found)
        ]
        text.append("")
    text += [
        "## What `endprompt plan` says, beside the paper's Figure 4",
        "",
        _paragraph(
            "Llama-3-8B, 64K, 8 A800 of 80 GB, ZeRO-3, activation checkpointing; computed, not measured. The"
            " paper prints no rows a GPU, and not whether it makes full logits (65,536 of them in bf16 are"
            " 16.8 GB); it says 36.5 and 76.0 GB."
        ),
        "",
        *figure_4(),
        "",
    ]
    found = list(machines.values())[-1]
    short = [
        "| what | measured | target |",
        "|---|---|---|",
        *(
            f"| {what} | {value} | {target}{'' if met is None else ', met' if met else ', **not met**'} |"
            for what, value, target, met in rows(found)
        ),
    ]
    return {"benchmarks": "\n".join(text).strip(), "costs": "\n".join(short)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    made, stale = blocks(sorted(RESULTS.glob("*.json"))), []
    for path, name in PAGES.items():
        page = path.read_text(encoding="utf-8")
        if (new := replaced(page, name, made[name])) != page:
            stale.append(path.name)
            if not arguments.check:
                path.write_text(new, encoding="utf-8")
    if arguments.check:
        if stale:
            print(
                f"{', '.join(stale)}: not what results/ says; run python benchmarks/table.py", file=sys.stderr
            )
        raise SystemExit(bool(stale))
    from endprompt.reports import costs

    for path in sorted(
        RESULTS.glob("*.json")
    ):  # the last one stays: a GPU's, if there is one (cpu-..., then h100-...)
        for result in (json.loads(path.read_text(encoding="utf-8")).get("efficiency") or {}).values():
            costs.draw(result, PICTURE)


if __name__ == "__main__":
    main()
