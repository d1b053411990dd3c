"""The tasks distance, named_keys and far_gain of several runs side by side: tables, and pictures of keys
found over distance.

    python -m endprompt.reports.distances RUN [RUN ...] --out DIR
    python -m endprompt.reports.distances DIR/distances.json --out DIR --page docs/realmodel.md \\
        --picture untrained=own,untrained-yarn --control short --control theta-short

RUN is a run's folder, OUT/<recipe>/<method>, or NAME=RUN; runs under one name are an arm's seeds, and their
mean is shown with Student's interval over them, or of two with one that holds both seeds' own.  Without
names, an arm is called by as much of its folder as tells the runs apart.  A distances.json that was written
before gives the same without the runs; of several sources, a later one's arm stands in the place of an
earlier one's.  A page takes those tables that it has a place for, between ``<!-- name -->`` and
``<!-- /name -->``: found-<target>, filled-in-<target>, paired-<target>, named_keys, far_gain, perplexity,
inside, prompt-loss, and two a picture: its name, and brief-<name> with few distances.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import yaml

from endprompt import BadInput, methods, storage
from endprompt.evaluation import distance_figures, results
from endprompt.recipe import task_names
from endprompt.reports import compare, distance_tables, markdown
from endprompt.rows import corpus
from endprompt.runs import provenance

Arms = dict[str, list[dict]]

VERSIONS = ("model", "code", "lm_eval")  # in which results of one question may differ
# In which those of two arms may: other models, more questions, other distances, and what other_words tells.
UNLIKE = (
    *VERSIONS,
    *("tokenizer", "chat_template", "samples", "distances", "target", "length", "original"),
    *("data", "words", "longest"),
)
LAST = 6  # logged steps whose text loss is averaged
HEADINGS = {
    task_names.NAMED_KEYS: ("Named keys by length: found in %, and loss", distance_tables.keys),
    task_names.FAR_GAIN: ("Gain from far context by length, nats a token", distance_tables.gain),
    "perplexity": ("Perplexity by length", distance_tables.perplexity),
}


def named(given: list[str]) -> dict[str, list[Path]]:
    """{name of an arm: its runs} of NAME=RUN and RUN arguments.  Raises BadInput if a folder is no run's."""
    pairs: list[tuple[str, Path]] = []
    for text in given:
        name, equals, path = text.partition("=")
        pairs.append((name, Path(path)) if equals and not Path(text).exists() else ("", Path(text)))
    for _, folder in pairs:
        if not (folder / "eval").is_dir():
            raise BadInput(f"{folder} holds no results; name a run's folder that was evaluated, or NAME=RUN")
    short = _told_apart([folder.absolute() for name, folder in pairs if not name])
    arms: dict[str, list[Path]] = {}
    for name, folder in pairs:
        arms.setdefault(name or short[folder.absolute()], []).append(folder)
    return arms


def _told_apart(folders: list[Path]) -> dict[Path, str]:
    """As many last parts of each folder's path as tell all of ``folders`` apart."""
    most = max((len(folder.parts) for folder in folders), default=0)
    for count in range(1, most + 1):
        names = {folder: "/".join(folder.parts[-count:]) for folder in folders}
        if len(set(names.values())) == len(names):
            return names
    return {folder: str(folder) for folder in folders}


def entry(run: Path) -> dict:
    """What is kept of a run: {"run": the last parts of its folder, "results": {"task:length": scores},
    "training": tokens, steps, seconds, settings and losses or None, "commit", "device", "versions"}."""
    scored = results.read_run(run)
    scored.rows(task_names.DISTANCE)  # what cannot be shown is refused
    found = scored.found
    one = next(iter(found.values()), {})
    for (task, length), file in found.items():
        if task == task_names.DISTANCE:
            _add_numbered(file["scores"], run / "eval" / task / f"{length}.jsonl")
    return {
        "run": "/".join(run.absolute().parts[-4:]),
        "results": {f"{task}:{length or ''}": file["scores"] for (task, length), file in found.items()},
        "training": _training(run),
        **{key: one[key] for key in ("commit", "device", "versions") if key in one},
    }


def _add_numbered(scores: dict, answers: Path) -> None:
    """Notes in each cell of distance's ``scores`` the share of ``answers`` in percent that hold a digit: a
    model that knows a position may yet have lost the habit of answering with a number.  Nothing where the
    answers are not there.  Raises BadInput if they are none.
    """
    if not answers.is_file():
        return
    by_distance: dict[int, list[bool]] = {}
    for number, answer in corpus.jsonl(answers):
        try:
            by_distance.setdefault(answer["distance"], []).append(bool(re.search(r"\d", answer["pred"])))
        except (KeyError, TypeError):
            raise BadInput(
                f"{answers} line {number} is no answer of distance; delete the results and evaluate again"
            ) from None
    for cell in scores["cells"]:
        if held := by_distance.get(cell["distance"]):
            cell["numbered"] = 100 * sum(held) / len(held)


def _training(run: Path) -> dict | None:
    record = results.training(run)
    if record is None:
        return None
    history = record.get("history", [])
    text = [step["text_loss"] for step in history if "text_loss" in step][-LAST:]
    return {
        **{key: record.get(key) for key in ("tokens", "steps", "seconds")},
        "settings": _settings(run),
        "text_loss": sum(text) / len(text) if text else None,
        "end_prompt_loss": {
            str(step["step"]): step["end_prompt_loss"] for step in history if "end_prompt_loss" in step
        },
    }


def _settings(run: Path) -> dict:
    """What arms differ in: {"rope", "method_options", "train"} of the recipe that the run was trained by; the
    method's own RoPE where the recipe names none."""
    setting = compare.run_setting(run / "recipe.yaml")[1]
    if not setting:
        return {}
    method = methods.get(yaml.safe_load((run / "recipe.yaml").read_text())["method"])
    rope = {**setting["rope"], "type": setting["rope"]["type"] or method.rope}
    return {"rope": rope, **{section: setting[section] for section in ("method_options", "train")}}


def read(path: Path) -> Arms:
    """The arms of a distances.json.  Raises BadInput if it is none."""
    try:
        arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
        if not all(isinstance(run["results"], dict) for arm in arms.values() for run in arm):
            raise ValueError("a run has no results")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise BadInput(
            f"{path} is no distances.json ({reason}); make it from runs with endprompt.reports.distances"
        ) from None
    return arms


def _check(fresh: dict[str, list[Path]], scored: dict[Path, results.Results]) -> None:
    """Raises BadInput if a run stands twice in an arm, or was asked otherwise than another: within an arm in
    anything but the model, between arms in more than what UNLIKE names too."""
    before: dict[str, tuple[dict, Path]] = {}
    for folders in fresh.values():
        twice = {folder.resolve() for folder in folders}
        if len(twice) < len(folders):
            raise BadInput(f"{folders[0]} stands twice in an arm; a seed counts once")
        for folder in folders:
            for (task, length), file in scored[folder].found.items():
                if task not in task_names.PIECEWISE:
                    continue
                for group, left_out in ((f"{folders[0]} {task} {length}", VERSIONS), (task, UNLIKE)):
                    here = {key: value for key, value in file["question"].items() if key not in left_out}
                    other, where = before.setdefault(group, (here, folder))
                    if unlike := sorted(key for key in {**other, **here} if other.get(key) != here.get(key)):
                        raise BadInput(
                            f"{where} and {folder} were asked different questions ({task}:"
                            f" {', '.join(unlike)}); evaluate them alike"
                        )


def gathered(given: list[str]) -> Arms:
    """The arms of files and of runs.  Raises BadInput if runs were scored on other words, or asked
    otherwise."""
    files = [Path(text) for text in given if text.endswith(".json")]
    arms: Arms = {}
    for path in files:
        arms |= read(path)
    fresh = named([text for text in given if not text.endswith(".json")])
    scored = {run: results.read_run(run) for folders in fresh.values() for run in folders}
    for task in ("perplexity", task_names.FAR_GAIN):
        if said := results.other_words({str(run): one for run, one in scored.items()}, task):
            raise BadInput(said)
    _check(fresh, scored)
    for name, folders in fresh.items():
        arms[name] = [entry(folder) for folder in folders]
    return arms


def chosen(pictures: list[str], arms: Arms) -> dict[str, list[str]]:
    """{name of a picture: its arms} of NAME=ARM,ARM arguments.  Raises BadInput if one names no arm."""
    found = {}
    for text in pictures:
        name, _, listed = text.partition("=")
        found[name] = [arm for arm in listed.split(",") if arm]
        unknown = [arm for arm in found[name] if arm not in arms]
        if unknown or not found[name]:
            raise BadInput(
                f"--picture {text}: there is no arm {', '.join(unknown) or 'named'}; write NAME=ARM,ARM with"
                f" {', '.join(arms)}"
            )
    return found


def _scaling(arm: list[dict]) -> str | None:
    """The RoPE that an arm was trained with, as its recipe names it."""
    settings = [(run.get("training") or {}).get("settings") or {} for run in arm]
    return next((one["rope"]["type"] for one in settings if "rope" in one), None)


def compared(arms: Arms, controls: list[str]) -> dict[str, str]:
    """{arm: the one of ``controls`` that was trained with the same RoPE}."""
    plain = {_scaling(arms[name]): name for name in reversed(controls) if name in arms}
    return {
        name: plain[scaling]
        for name, arm in arms.items()
        if name not in controls and (scaling := _scaling(arm)) in plain
    }


def tables(
    arms: Arms, controls: list[str], pictures: dict[str, list[str]]
) -> tuple[dict[str, str], dict[str, dict]]:
    """({name of its place: table}, {name of a picture: its arms' results of distance}).  Raises BadInput if
    no arm has results of these tasks."""
    found: dict[str, str | None] = {}
    drawn: dict[str, dict] = {}
    by_arm = {name: distance_tables.by_length(arm, task_names.DISTANCE) for name, arm in arms.items()}
    targets = sorted({length for cells in by_arm.values() for length in cells})
    for target in targets:
        shown = {
            name: distance_tables.joined(cells[target]) for name, cells in by_arm.items() if target in cells
        }
        drawn[f"distances-{target}"] = shown
        found[f"found-{target}"] = distance_tables.distances(shown)
        found[f"filled-in-{target}"] = distance_tables.filled_in(shown, compared(arms, controls))
        found[f"paired-{target}"] = distance_tables.paired(arms, target, compared(arms, controls))
        for name, listed in pictures.items():
            if part := {arm: shown[arm] for arm in listed if arm in shown}:
                place = name if len(targets) == 1 else f"{name}-{target}"
                drawn[place], found[place] = part, distance_tables.distances(part)
                found[f"brief-{place}"] = distance_tables.brief(part)
    for task, (_, form) in HEADINGS.items():
        found[task] = distance_tables.lengths(arms, task, form)
    if not any(found.values()):
        tasks = ", ".join(task_names.PIECEWISE)
        raise BadInput(f"none of the runs has results of {tasks}; add them to eval.tasks and evaluate")
    found["inside"] = distance_tables.inside(arms)
    found["prompt-loss"] = distance_tables.prompt_loss(arms)
    return {name: table for name, table in found.items() if table}, drawn


def _heading(place: str) -> str:
    name, _, target = place.rpartition("-")
    if place in HEADINGS:
        return HEADINGS[place][0]
    if place == "inside":
        return "Training, and tasks of short text"
    if place == "prompt-loss":
        return "Loss of the end prompt by step, nats a token"
    if name == "found":
        return f"Distance, up to {target}"
    if name == "paired":
        return f"Differences paired by seed, up to {target}"
    return f"Distances filled in, up to {target}" if name == "filled-in" else place


def report(arguments: argparse.Namespace) -> None:
    """Writes distances.md, distances.json (where there are runs among the sources), a distances-<target>.png
    for each target length and the pictures that were asked for into ``--out``, and tables into pages.
    Raises BadInput if a folder is no run's, or no run has results of these tasks.
    """
    out: Path = arguments.out
    arms = gathered(arguments.run)
    found, drawn = tables(arms, arguments.control or ["short"], chosen(arguments.picture, arms))
    pages = {page: markdown.filled(page, found) for page in arguments.page}
    storage.output_folder(out)
    blocks = [
        f"## {_heading(place)}\n\n{table}" for place, table in found.items() if not place.startswith("brief-")
    ]
    text = "\n\n".join([f"# {arguments.title or 'Distances'}", *blocks]) + "\n"
    storage.write_atomically(out / "distances.md", text.encode())
    if not all(source.endswith(".json") for source in arguments.run):
        storage.write_json(out / "distances.json", {"arms": arms, **provenance.stamp()})
    for name, shown in drawn.items():
        draw = distance_figures.panels if name.startswith("distances-") else distance_figures.overlay
        draw(shown, out / f"{name}.png", arguments.title)
    for page, content in pages.items():
        page.write_text(content, encoding="utf-8")
    print(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", help="OUT/<recipe>/<method>, NAME=RUN, or a distances.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--title", default=None)
    parser.add_argument(
        "--picture",
        action="append",
        default=[],
        metavar="NAME=ARM,ARM",
        help="a picture of these arms, a line each",
    )
    parser.add_argument(
        "--control",
        action="append",
        metavar="ARM",
        help="what arms of the same RoPE are compared with (default: short); may be given for each RoPE",
    )
    parser.add_argument(
        "--page", type=Path, action="append", default=[], metavar="PAGE", help="whose tables are replaced"
    )
    try:
        report(parser.parse_args(argv))
    except BadInput as error:
        print(f"distances: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
