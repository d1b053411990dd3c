"""A run's folder and the one setting that it belongs to."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from endprompt import BadInput, storage
from endprompt.runs import checkpoint_files

# How often to report or save, how far ahead to read, and how long to wait do not change what is trained.
HARMLESS = {
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "save_steps",
    "save_total_limit",
    "report_to",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_multiprocessing_context",
    "torch_empty_cache_steps",
    "ddp_timeout",
}
# The same of DeepSpeed's options: what is printed, and how files are read.
HARMLESS_ZERO = {
    "wall_clock_breakdown",
    "memory_breakdown",
    "steps_per_print",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "aio",
}
RECIPE, ZERO = "recipe.yaml", "deepspeed.json"
SECTIONS = ("model", "lengths", "data", "method_options", "rope", "train")


def _flat(tree: dict, method) -> dict:
    """What a resolved recipe says of training, by dotted keys; a key that came after it had its default."""
    from endprompt.recipe import experiment, former_keys, schema

    former = former_keys.taken(tree)
    options = experiment.options(method, tree.get("method_options") or {}, former).model_dump(mode="json")
    tree = {**tree, "method_options": options}
    found = schema.defaults() | {
        f"{section}.{key}": value
        for section in SECTIONS
        for key, value in (tree.get(section) or {}).items()
        if key not in HARMLESS
    }
    return found


def _dotted(options: dict) -> dict[str, Any]:
    """DeepSpeed's options by dotted keys, without those that change nothing of what is trained."""
    waiting, found = [("train.deepspeed", options)], dict[str, Any]()
    while waiting:
        where, tree = waiting.pop()
        for key, value in tree.items():
            if tree is options and key in HARMLESS_ZERO:
                continue
            if isinstance(value, dict):
                waiting.append((f"{where}.{key}", value))
            else:
                found[f"{where}.{key}"] = value
    return found


def _kept_zero(run: Path) -> dict | None:
    """What the ZeRO file of ``run``'s training held; None where it was not kept.  Raises BadInput."""
    path = run / ZERO
    if not path.exists():
        return None
    try:
        found = storage.read_json(path)
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise BadInput(f"{path} cannot be read; delete it, then the ZeRO file is known by its name alone")
    return found


def _zero(run: Path, given: list, now: dict | None) -> list[dict[str, Any]]:
    """What DeepSpeed was told in ``run``'s training, and what it would be told now, by dotted keys.

    given: ``train.deepspeed`` of both; now: DeepSpeed's options.  Earlier versions did not keep what a file
    held: its name stands for it, as the same file has another path in another clone.
    """
    before = given[0]
    if isinstance(before, str):
        before = _kept_zero(run)
        if before is None:
            return [{"train.deepspeed": Path(one).name if isinstance(one, str) else one} for one in given]
    if not isinstance(before, dict) or now is None:
        return [{"train.deepspeed": one} for one in (before, now)]
    return [_dotted(before), _dotted(now)]


def _trained(run: Path) -> list[str]:
    """What of a training lies in ``run``: checkpoints that were whole, a model, or nothing.

    The folder alone says nothing: the Trainer makes it before its first step.
    """
    checkpoints = ["checkpoints/"] if checkpoint_files.marked(run / "checkpoints") else []
    return [*checkpoints, *(["model/"] if (run / "model").exists() else [])]


def _refuse_other_setting(run: Path, before: bytes, experiment) -> None:
    """Raises BadInput if ``run``, whose recipe was ``before``, was trained under another setting than
    ``experiment``'s.
    """
    import yaml

    from endprompt.recipe import settings_file

    old = settings_file.parse(before.decode(errors="replace"), str(run / RECIPE))
    if not isinstance(old, dict) or not all(isinstance(old.get(key) or {}, dict) for key in SECTIONS):
        raise BadInput(f"{run / RECIPE} is no recipe; restore it, or delete the folder")
    flat = [_flat(tree, experiment.method) for tree in (old, yaml.safe_load(experiment.dump()))]
    given = [each.pop("train.deepspeed", None) for each in flat]
    zero = _zero(run, given, experiment.recipe.deepspeed)
    flat = [each | more for each, more in zip(flat, zero, strict=True)]
    keys = flat[0].keys() | flat[1].keys()
    if differing := sorted(key for key in keys if flat[0].get(key) != flat[1].get(key)):
        averaged = differing == ["train.base_share"] and not flat[0].get("train.base_share")
        raise BadInput(
            f"{run} was trained under another setting ({', '.join(differing)}); choose another --out, or"
            f" delete its {' and '.join(_trained(run))} to start anew (the shards stay)"
            + ("; what is trained is averaged by endprompt export --share" if averaged else "")
        )


def _put(path: Path, data: bytes | None) -> None:
    """``data`` as the file ``path``; None: no such file."""
    if data is None:
        path.unlink(missing_ok=True)
    else:
        storage.write_atomically(path, data)


@contextlib.contextmanager
def claim(experiment):
    """Keeps the resolved recipe, and what its ZeRO file holds, in the run's folder, unless what is done in
    this context is refused; refuses a folder whose training belongs to another recipe.
    """
    run, zero = experiment.run, experiment.recipe.deepspeed
    said = {RECIPE: experiment.dump().encode(), ZERO: zero and json.dumps(zero, indent=2).encode()}
    for path in (run / name for name in said):
        if os.path.lexists(path) and not path.is_file():
            raise BadInput(
                f"{path} is no {'recipe' if path.name == RECIPE else 'file'}; restore it, or delete"
                " the folder"
            )
    before = {name: (run / name).read_bytes() if (run / name).exists() else None for name in said}
    recipe = before[RECIPE]
    if recipe is not None and _trained(run):
        _refuse_other_setting(run, recipe, experiment)
    run.mkdir(parents=True, exist_ok=True)
    for name, data in said.items():
        _put(run / name, data)
    try:
        yield
    except BadInput:
        # The results that are there still belong to the recipe before.
        for name, data in before.items():
            _put(run / name, data)
        raise


def check_out(out: Path, run: Path, writes: bool) -> None:
    """Raises BadInput unless ``run`` is a folder or can become one and, if the command ``writes``, takes
    files; leaves nothing.
    """
    for above in [run, *run.parents]:
        try:
            if os.path.lexists(above) and not above.is_dir():
                raise BadInput(f"--out: {above} is a file, not a folder; choose another")
            if above.is_dir():
                if writes:
                    tempfile.TemporaryFile(dir=above).close()
                return
        except (OSError, ValueError) as error:
            raise BadInput(
                f"--out: nothing can be written to {str(out)[:200]}"
                f" ({getattr(error, 'strerror', None) or error}); choose another folder"
            ) from None
