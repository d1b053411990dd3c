"""The run's shards as a dataset, a row of it to probe, and a batch of its first row."""

import numpy as np
import torch

from endprompt import BadInput, storage
from endprompt.recipe.experiment import Experiment
from endprompt.rows import prepare, shards
from endprompt.rows.collate import Collator

CHECKED = (
    "checked-rows"  # the checksums of shards whose rows were looked at once, and the number of embeddings
)


def load_rows(experiment: Experiment, verify: bool):
    """(the run's shards as a memory-mapped dataset, their manifest).

    verify: whether this process checks them, once a node.  Raises BadInput where they are missing, damaged,
    of another recipe or tokenizer, or hold token ids without an embedding.
    """
    folder, embeddings = experiment.run / "shards", experiment.base.config.vocab_size
    manifest = shards.read_manifest(folder)
    if differing := shards.disagreements(manifest, prepare.settings(experiment)):
        raise BadInput(
            f"shards: {folder} do not belong to this recipe and method ({'; '.join(differing)}); prepare them"
            " again, or mend the recipe"
        )
    if verify:
        shards.verify(folder, manifest)
        checked, sums = (
            folder / ".cache" / CHECKED,
            "".join(shard["sha256"] + "\n" for shard in manifest["shards"]) + f"{embeddings}\n",
        )
        if not checked.is_file() or checked.read_text(errors="replace") != sums:
            shards.check_rows(folder, manifest, embeddings)
            checked.parent.mkdir(exist_ok=True)
            storage.write_atomically(checked, sums.encode())
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(
        "parquet",
        data_files=[str(path) for path in shards.files(folder, manifest)],
        split="train",
        cache_dir=str(folder / ".cache"),
        keep_in_memory=False,
    )
    return rows.add_column("row_number", np.arange(len(rows))), manifest


def first_with_jump(dataset, start: int, most: int = 64) -> int:
    """The number of the first row with a jump in its positions, from row ``start`` on, around the end, among
    ``most`` rows; ``start`` itself, around the end, where none of them has one.
    """
    for number in range(start, start + min(most, len(dataset))):
        if (np.diff(dataset[number % len(dataset)]["position_ids"]) != 1).any():
            return number % len(dataset)
    return start % len(dataset)


def sample(dataset, collator: Collator, ends: int = 64) -> dict[str, torch.Tensor]:
    """The first row's first and last ``ends`` tokens at their positions, as a batch; the same on every
    rank.
    """
    row = dict(dataset[0])
    kept = sorted({*range(len(row["input_ids"]))[:ends], *range(len(row["input_ids"]))[-ends:]})
    return collator(
        [
            {
                **row,
                **{
                    name: [row[name][index] for index in kept]
                    for name in ("input_ids", "position_ids", "loss_weights")
                },
            }
        ]
    )
