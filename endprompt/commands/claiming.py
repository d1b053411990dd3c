"""A run's folder and the one setting that it belongs to."""

import contextlib
import os
import tempfile
from pathlib import Path

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
    if isinstance(found.get("train.deepspeed"), str):  # the same file has another path in another clone
        found["train.deepspeed"] = Path(found["train.deepspeed"]).name
    return found


def _trained(run: Path) -> list[str]:
    """What of a training lies in ``run``: checkpoints that were whole, a model, or nothing.

    The folder alone says nothing: the Trainer makes it before its first step.
    """
    checkpoints = ["checkpoints/"] if checkpoint_files.marked(run / "checkpoints") else []
    return [*checkpoints, *(["model/"] if (run / "model").exists() else [])]


def _refuse_other_setting(path: Path, before: bytes, text: str, method) -> None:
    """Raises BadInput if the run whose recipe was ``before`` was trained under another setting than
    ``text``.
    """
    import yaml

    from endprompt.recipe import settings_file

    old, new = settings_file.parse(before.decode(errors="replace"), str(path)), yaml.safe_load(text)
    if not isinstance(old, dict) or not all(isinstance(old.get(key) or {}, dict) for key in SECTIONS):
        raise BadInput(f"{path} is no recipe; restore it, or delete the folder")
    flat = [_flat(old, method), _flat(new, method)]
    keys = flat[0].keys() | flat[1].keys()
    if differing := sorted(key for key in keys if flat[0].get(key) != flat[1].get(key)):
        raise BadInput(
            f"{path.parent} was trained under another setting ({', '.join(differing)}); choose another --out,"
            f" or delete its {' and '.join(_trained(path.parent))} to start anew (the shards stay)"
        )


@contextlib.contextmanager
def claim(experiment):
    """Keeps the resolved recipe in the run's folder, unless what is done in this context is refused; refuses
    a folder whose training belongs to another recipe.
    """
    run = experiment.run
    path, text = run / "recipe.yaml", experiment.dump()
    if os.path.lexists(path) and not path.is_file():
        raise BadInput(f"{path} is no recipe; restore it, or delete the folder")
    before = path.read_bytes() if path.exists() else None
    if before is not None and _trained(run):
        _refuse_other_setting(path, before, text, experiment.method)
    run.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(path, text.encode())
    try:
        yield
    except BadInput:
        # The results that are there still belong to the recipe before.
        if before is None:
            path.unlink(missing_ok=True)
        else:
            storage.write_atomically(path, before)
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
