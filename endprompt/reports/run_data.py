"""What a run's folder holds for its report: what was logged, what was scored, which distances its rows
supervised, and its settings.  Whatever is not there is left out."""

import contextlib
import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from endprompt import BadInput, storage
from endprompt.evaluation import results
from endprompt.evaluation.results import Results
from endprompt.positions import coverage, plans
from endprompt.recipe import settings_file
from endprompt.rows import shards
from endprompt.runs import checkpoint_files, runfolder

# What makes a folder a run's own, beside results: a model that was scored without a recipe leaves none.
OWN = ("train.json", "recipe.yaml", "shards", "checkpoints", "model", runfolder.STATUS)
ROWS_COUNTED = 2000  # whose distances are counted: rows are drawn alike, so the first stand for all


@dataclass
class Coverage:
    """counts: int64 [L], query-key pairs of ``rows`` rows at each distance; tokens: of these rows."""

    counts: np.ndarray
    rows: int
    tokens: int
    of_all: bool

    @property
    def never(self) -> float:
        return float(np.mean(self.counts == 0))


@dataclass
class Run:
    """label: what the page calls it; history: what was logged, by step; scored: results by the name of the
    model that they are of; settings: of its recipe, by dotted keys."""

    folder: Path
    label: str
    state: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    scored: dict[str, Results] = field(default_factory=dict)
    covered: Coverage | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of what was logged as ``key``."""
        number = results.number
        found = [entry for entry in self.history if number(entry.get(key)) and number(entry.get("step"))]
        return [entry["step"] for entry in found], [entry[key] for entry in found]

    @property
    def versions(self) -> dict[str, Any]:
        """Of the training, else of a result; with commit and device."""
        stamps = [self.summary, *(file for one in self.scored.values() for file in one.found.values())]
        stamp = next((one for one in stamps if isinstance(one.get("versions"), dict)), {})
        own = {key: stamp[key] for key in ("commit", "device") if stamp.get(key)}
        return own | stamp.get("versions", {})


def read(folders: list[Path]) -> list[Run]:
    """Raises BadInput on a folder that is no run's, is named twice, or holds what cannot be read."""
    seen: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in seen:
            raise BadInput(f"report: {folder} is named twice; name each run once")
        seen[folder.resolve()] = folder
    found = [_read(folder) for folder in folders]
    _name(found)
    return found


def _name(runs: list[Run]) -> None:
    """Gives each the shortest end of its path that tells it from the others."""
    for parts in range(1, 64):
        labels = ["/".join(run.folder.resolve().parts[-parts:]) for run in runs]
        if len(set(labels)) == len(labels):
            break
    for run, label in zip(runs, labels, strict=True):
        run.label = label


def _read(folder: Path) -> Run:
    scored = _scored(folder)
    summary = results.training(folder) or {}
    if not scored and not any((folder / name).exists() for name in OWN):
        raise BadInput(
            f"report: {folder} is no run's folder; name one that a command wrote, OUT/<recipe>/<method>"
        )
    state = {}
    with contextlib.suppress(BadInput):  # a folder of results alone has no state
        state = runfolder.summary(folder)
    history = summary.get("history") or _of_checkpoint(folder)
    return Run(
        folder,
        folder.name,
        state,
        summary,
        [entry for entry in history if isinstance(entry, dict)],
        scored,
        _covered(folder),
        _settings(folder / "recipe.yaml"),
    )


def _of_checkpoint(folder: Path) -> list[dict]:
    """What a run that is under way has logged until its last checkpoint."""
    whole = checkpoint_files.newest(folder / "checkpoints")
    try:
        state = storage.read_json(whole / "trainer_state.json") if whole else {}
        return [entry for entry in state.get("log_history", []) if "loss" in entry]
    except (OSError, ValueError, AttributeError, TypeError):
        return []


def _scored(folder: Path) -> dict[str, Results]:
    """Results by the model that they are of, those of the run's own, "", first."""
    found = {name: one for path, name in results.folders(folder).items() if (one := results.read(path)).found}
    if len(found) == 1 and not any((folder / name).exists() for name in OWN):
        found = {"": next(iter(found.values()))}  # of a model that was scored without a recipe
    return found


def _covered(folder: Path) -> Coverage | None:
    """Of the first rows of the shards; None where there are none that can be read."""
    try:
        manifest = shards.read_manifest(folder / "shards")
        L = int(manifest["target_length"])
        rows = [
            plans.segments(row)
            for row in islice(shards.position_ids(folder / "shards", manifest), ROWS_COUNTED)
        ]
        if not rows:
            return None
        tokens = sum(last - first + 1 for row in rows for first, last in row)
        return Coverage(coverage.pair_counts(rows, L), len(rows), tokens, len(rows) == manifest["rows"])
    except (BadInput, OSError, ValueError, KeyError, TypeError):
        return None


def _settings(path: Path) -> dict[str, Any]:
    """The keys of a resolved recipe, dotted; none where it is not there."""
    try:
        tree = settings_file.parse(settings_file.read(path), str(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}); restore it, or remove it") from None
    if not isinstance(tree, dict):
        raise BadInput(f"{path} is no recipe; restore it, or remove it")
    return dict(_flat(tree))


def _flat(tree: dict, before: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def shown(value: Any) -> str:
    """A setting as a page shows it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
