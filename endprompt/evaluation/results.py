"""What an evaluation left in its folder, checked, and means of it with their intervals."""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endprompt import BadInput, methods
from endprompt.evaluation import longbench_scores
from endprompt.recipe import task_names

# What two results of one model may differ in, for they may come from different machines.
_MACHINE = ("dtype", "attention")

# What tables and pictures show of the parts of a result.
_PARTS = {
    **dict.fromkeys(("passkey", "multikey", task_names.NAMED_KEYS), ("depth", "correct", "total")),
    task_names.DISTANCE: ("distance", "total", "score", "low", "high", "nats", "nats_low", "nats_high"),
}

# Tasks of which no result is without a length.
_LENGTHS = (*_PARTS, "perplexity", task_names.FAR_GAIN)

# The folder of another model's results: its name, and the hash of where it is.
_NAME = re.compile(r"\d+|any")  # of a result's file; others are copies that someone made
_OTHER = re.compile(r"eval-(.+)-[0-9a-f]{8}", re.DOTALL)

# Of the harness' own data: MMLU's 57 tests, GSM8K test, HellaSwag validation, HumanEval.
SHORT_TEXT_SAMPLES = {"mmlu": 14042, "gsm8k": 1319, "hellaswag": 10042, "humaneval": 164}


def full_samples(task: str) -> int:
    """Samples of a whole evaluation: RULER's protocol has 500 a length, tasks of keys as many here; LongBench
    and short text what their data hold; 0 for perplexity and far_gain.
    """
    keys = ("passkey", "multikey", task_names.DISTANCE, task_names.NAMED_KEYS)
    if task in keys or task.startswith("ruler_"):
        return 500
    if (name := task.removeprefix("longbench_")) in longbench_scores.TASKS:
        return longbench_scores.TASKS[name].samples
    return SHORT_TEXT_SAMPLES.get(task, 0)


@dataclass(frozen=True)
class Estimate:
    """A score with its 95 % interval, from ``samples`` samples (of each part, the fewest, where it is a
    mean); ``files``: what it was read from.
    """

    score: float
    low: float
    high: float
    samples: int | None = None
    files: tuple[dict, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Missing:
    """No figure, and why."""

    reason: str = "not run"


@dataclass
class Results:
    """The results of the model that was scored last in ``folder``: {(task, length or None): the file's
    content}; ``older``: files of other models.
    """

    folder: Path
    found: dict[tuple[str, int | None], dict] = field(default_factory=dict)
    older: int = 0

    def mean(self, parts: list[tuple[str, int | None]]) -> Estimate | Missing:
        """The plain mean over ``parts`` if every one of them is there.

        Its interval adds up the squares of the parts' distances to their ends, each side for itself (MOVER,
        Zou & Donner 2008): the parts' samples are different ones.
        """
        absent = [part for part in parts if part not in self.found]
        if absent:
            if len(absent) == len(parts):
                return Missing()
            shown = ", ".join(
                f"{task}" + (f" at {length}" if length else "") for task, length in absent[:6]
            ) + (", ..." if len(absent) > 6 else "")
            return Missing(f"not run, for {len(absent)} of {len(parts)} results are missing: {shown}")
        files = [self.found[part] for part in parts]
        scores = [file["scores"] for file in files]
        score = math.fsum(one["score"] for one in scores) / len(scores)
        down, up = (
            math.sqrt(math.fsum((one["score"] - one[end]) ** 2 for one in scores)) / len(scores)
            for end in ("low", "high")
        )
        return Estimate(score, score - down, score + up, min(one["samples"] for one in scores), tuple(files))

    def rows(self, task: str) -> list[dict]:
        """The results of ``task``, by length.  Raises BadInput for one whose parts are not what tables and
        pictures of the task show."""
        found = [self.found[task, length] for length in self.lengths(task)]
        for result in found:
            _check_parts(self.folder / task / f"{result['scores']['length'] or 'any'}.json", result["scores"])
        return found

    def lengths(self, task: str) -> list[int | None]:
        return sorted((length for name, length in self.found if name == task), key=lambda length: length or 0)


def evaluation_folder(run: Path, model: str | None = None) -> Path:
    """Where `endprompt evaluate` puts the results of the run's own model, or of the one named by its
    --model: a folder by where it is, an id of the hub by itself, from whatever folder it is asked.
    """
    if model is None:
        return run / "eval"
    path = Path(os.path.expanduser(model))
    is_path = path.is_dir() or model.startswith((".", "/", "~")) or str(path).count("/") > 1
    return _folder_of(run, path.resolve() if is_path else path)


def _folder_of(run: Path, named: Path) -> Path:
    return run / f"eval-{named.name}-{hashlib.sha256(str(named).encode()).hexdigest()[:8]}"


def scored_folder(run: Path, model: str | None) -> Path:
    """Where the results of ``model`` are: ``evaluation_folder``, or where they were put while ``model`` was a
    folder that has been removed since."""
    found = evaluation_folder(run, model)
    before = found if model is None else _folder_of(run, Path(os.path.expanduser(model)).resolve())
    return before if before.is_dir() and not found.is_dir() else found


def folders(run: Path) -> dict[Path, str]:
    """{folder: the name of its model} of the folders of results in ``run``, by name; the run's own model has
    none.

    Models whose folders have one name keep what tells them apart: the hash of their path.  Copies of such a
    folder under other names (eval.bak, eval-old) are none.
    """
    others = {path: found for path in sorted(run.glob("eval-*")) if (found := _OTHER.fullmatch(path.name))}
    hashed = {path: path.name.removeprefix("eval-") for path in others}
    short = {path: found[1] for path, found in others.items()}
    taken = [*short.values(), *hashed.values()]
    named = {path: hashed[path] if taken.count(name) > 1 else name for path, name in short.items()}
    return {path: name for path, name in {run / "eval": "", **named}.items() if path.is_dir()}


def check(path: Path) -> dict:
    """The content of a result file, of a task's folder.  Raises BadInput if it is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        scores, model = result["scores"], result["question"]["model"]
        numbers = [scores[key] for key in ("score", "low", "high", "samples")]
        whole = all(map(number, numbers)) and scores["samples"] > 0
        if (
            not whole
            or not isinstance(model, dict | str)
            or not isinstance(result["date"], str)
            or type(scores["length"]) not in (int, type(None))
            or (scores["length"] is None and path.parent.name in _LENGTHS)
        ):
            raise ValueError("score, low, high and samples are numbers, length a number or null")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise BadInput(f"{path} is no result file ({reason}); delete it and evaluate again") from None
    return result


def number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def cells(scores: dict, *keys: str) -> list[dict]:
    """The parts of a result that have all ``keys`` as numbers, of none a total of 0; none if one part lacks
    one."""
    found = scores.get("cells")
    if not isinstance(found, list) or not all(isinstance(cell, dict) for cell in found):
        return []
    whole = all(number(cell.get(key)) for cell in found for key in keys)
    return found if whole and all(cell.get("total", 1) > 0 for cell in found) else []


def _check_parts(path: Path, scores: dict) -> None:
    """Raises BadInput if a task that has parts lacks them, or one of their figures."""
    keys = _PARTS.get(path.parent.name, ())
    parts = cells(scores, *keys)
    whole = bool(parts)
    if path.parent.name == task_names.DISTANCE:
        whole = whole and all(span(cell.get("between")) for cell in parts) and _shown(scores.get("coverage"))
    if keys and not whole:
        raise BadInput(
            f"{path} is no result file (its cells are not whole: each has {', '.join(keys)}); delete it and"
            " evaluate again"
        )


def _shown(coverage: Any) -> bool:
    """Whether ``coverage`` is what distance says of its rows: spans of distances, or none that are known."""
    found = [coverage.get(key) for key in ("supervised", "gap")] if isinstance(coverage, dict) else [0]
    return all(spans is None or isinstance(spans, list) and all(map(span, spans)) for spans in found)


def span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(number, value))


def model_of(result: dict) -> dict | str:
    """What a result file says of its model; where the weights' fingerprint is known, without where they
    lay.
    """
    model = result["question"]["model"]
    return (
        {key: value for key, value in model.items() if key != "name_or_path"}
        if isinstance(model, dict) and model.get("fingerprint")
        else model
    )


def identity(scored: Results) -> str | None:
    """What the results that count say of their model; None where there are none."""
    return _identity(next(iter(scored.found.values()))) if scored.found else None


def _identity(result: dict) -> str:
    model = model_of(result)
    return json.dumps(
        {key: model[key] for key in model if key not in _MACHINE} if isinstance(model, dict) else model,
        sort_keys=True,
    )


def read(folder: Path) -> Results:
    """The results in ``folder``/<task>/<length or any>.json.  Raises BadInput for a file that is no
    result.
    """
    written = [path for path in sorted(folder.glob("*/*.json")) if _NAME.fullmatch(path.stem)]
    results = [(path.parent.name, check(path)) for path in written]
    if not results:
        return Results(folder)
    newest = _identity(max((result for _, result in results), key=lambda result: result["date"]))
    kept = {
        (task, result["scores"]["length"]): result for task, result in results if _identity(result) == newest
    }
    return Results(folder, kept, len(results) - len(kept))


def read_run(run: Path, model: str | None = None, after: str = "") -> Results:
    """The results of a run's own model; of another (``model``), none where it was not scored there; or of the
    one that stage ``after`` made in the run's folder.
    """
    if after:
        there = evaluation_folder(run, str(run / after))
        moved = [path for path in folders(run) if (name := _OTHER.fullmatch(path.name)) and name[1] == after]
        return read(next(iter(moved), there) if not there.is_dir() else there)
    return read(scored_folder(run, model))


def other_words(scored: dict[str, Results], task: str) -> str | None:
    """A sentence on which cells of ``task`` are not of the same words, of {name: results}; None if all are.

    What perplexity and far_gain score is what fits behind the greatest of the lengths that were asked for
    together.
    """
    groups: dict[tuple, list[str]] = {}
    known: dict[tuple, set[str]] = {}
    for name, one in scored.items():
        for length in one.lengths(task):
            asked = one.found[task, length]["question"]
            if "longest" in asked:
                text, words = (str(asked["longest"]), str(asked.get("data"))), str(asked.get("words", ""))
                groups.setdefault((*text, words), []).append(f"{name} at {length}")
                known.setdefault(text, set()).add(words)
    # Results from before the words were noted are of those that are the only ones known of the same text.
    if len(known) < 2 and all(len(words - {""}) < 2 for words in known.values()):
        return None
    told = "; ".join(
        f"{', '.join(cells)} (greatest length {longest})" for (longest, *_), cells in groups.items()
    )
    return f"{task} is not of the same words everywhere: {told}; score them with the same eval.lengths"


FIGURES = (int, float, type(None))  # of a training that may have diverged


def _is_step(entry: Any) -> bool:
    """Whether ``entry`` is what a training logs of a step."""
    return (
        isinstance(entry, dict)
        and number(entry.get("step"))
        and all(type(value) in FIGURES for key, value in entry.items() if key.endswith("loss"))
    )


def training(run: Path) -> dict | None:
    """The content of train.json, without what is no step in its history; None without one.  Raises BadInput
    if it cannot be read."""
    path = run / "train.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or type(found.get("seconds")) not in (int, float):
            raise ValueError("it has no seconds")
        figures = [key for key in found if key == "tokens" or key.startswith("final_")]
        if wrong := [key for key in figures if type(found[key]) not in FIGURES]:
            raise ValueError(f"{wrong[0]} is no number")
        steps = found.get("history", [])
        if not isinstance(steps, list):
            raise ValueError("its history is no list of steps")
        return {**found, "history": list(filter(_is_step, steps))}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no training summary ({str(error).splitlines()[0]}); delete it") from None


def recipes(runs: Path, given: dict[str, str] | None = None) -> list[str]:
    """The recipes of which ``runs`` holds an evaluated method, by name.  given: {method: a model that may
    have been scored in place of the run's own}.
    """
    found = []
    for run in _runs(runs):
        named = (given or {}).get(run.name)
        folders = [evaluation_folder(run), *([scored_folder(run, named)] if named else [])]
        if any(any(folder.glob("*/*.json")) for folder in folders):
            found.append(run.parent.name)
    return sorted(set(found))


def _runs(runs: Path) -> list[Path]:
    return [run for run in runs.glob("*/*") if run.name in methods.METHODS]


def _scored_runs(runs: Path, method: str, model: str) -> list[Path]:
    return [run for run in _runs(runs) if run.name == method and scored_folder(run, model).is_dir()]


def stand_in(runs: Path, run: Path, model: str | None) -> str | None:
    """``model`` if it stands in for the own one of ``run``, a run below ``runs``: not where it was scored for
    other recipes alone, whose own runs are then there beside it."""
    scored = _scored_runs(runs, run.name, model) if model else []
    return model if run in scored or not scored else None


def check_models(runs: Path, given: dict[str, str]) -> None:
    """Raises BadInput if one of ``given``, {method: model}, was scored in no run below ``runs``."""
    for method, model in given.items():
        if not _scored_runs(runs, method, model):
            raise BadInput(
                f"--model {method}={model}: {runs} holds no results of this model; score it first with"
                f" `endprompt evaluate RECIPE {method} --model {model} --out {runs}`, or mend its path"
            )


def models(given: list[str]) -> dict[str, str]:
    """{method: model} of METHOD=DIR arguments.  Raises BadInput."""
    found = {}
    for item in given:
        method, equals, model = item.partition("=")
        if not equals or not model:
            raise BadInput(
                f"--model {item}: write it as METHOD=DIR, for example --model"
                " endprompt=runs/tiny/endprompt/model"
            )
        found[methods.get(method).name] = model
    return found
