"""Batches with an explicit mask.

Without a mask, transformers (4.53 to 5.23 at least) reads the jump in ``position_ids`` as a boundary between
packed documents and hides the text from the end prompt; the loss still falls.  A mask of ones keeps the row
whole.
"""

from dataclasses import dataclass

import numpy as np
import torch

from endprompt.positions import plans


@dataclass
class Collator:
    """Rows of the shard schema -> tensors [batch, length], padded on the right.

    input_ids, position_ids int64; attention_mask int64, 1 for tokens and 0 for padding; already shifted, so
    that column t speaks of token t + 1: shift_labels int64 (-100: no target), shift_weights float32,
    shift_prompt bool (an end-prompt token); row_numbers int64 [batch, 1] ([batch, length] sharded): the rows'
    numbers in the shards, for messages. A row marked ``filler`` (endprompt/training/dealing.py) has no
    targets, no weights and no prompt.
    sharded: for sequence parallelism, which takes no mask: none is sent, and DeepSpeed's data loader gets the
        ``labels`` that it shifts into the same shift_labels. Raises ValueError if a row's positions do not
        increase strictly inside [0, target_length), or, sharded, jump or need padding.
    """

    pad_token_id: int
    target_length: int
    sharded: bool = False

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), length)
        batch: dict[str, np.ndarray] = {
            "input_ids": np.full(shape, self.pad_token_id, np.int64),
            "position_ids": np.zeros(shape, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
            "shift_labels": np.full(shape, -100, np.int64),
            "shift_weights": np.zeros(shape, np.float32),
            "shift_prompt": np.zeros(shape, bool),
            "row_numbers": np.array([[row.get("row_number", -1)] for row in rows], np.int64),
        }
        for index, row in enumerate(rows):
            ids, n = np.asarray(row["input_ids"]), len(row["input_ids"])
            position_ids = np.asarray(row["position_ids"])
            plans.check(position_ids, self.target_length)
            batch["input_ids"][index, :n] = ids
            batch["position_ids"][index, :n] = position_ids
            batch["attention_mask"][index, :n] = 1
            if row.get("filler"):
                continue
            batch["shift_labels"][index, : n - 1] = ids[1:]
            batch["shift_weights"][index, : n - 1] = row["loss_weights"][1:]
            batch["shift_prompt"][index, max(row["text_length"] - 1, 0) : n - 1] = row["prompt_length"] > 0
        if self.sharded:
            if not batch.pop("attention_mask").all() or (np.diff(batch["position_ids"], axis=1) != 1).any():
                raise ValueError(
                    "sequence parallelism: a row has padding or a jump in its positions, which only a mask"
                    " could mend"
                )
            batch["row_numbers"] = np.repeat(
                batch["row_numbers"], length, axis=1
            )  # what is sharded is [batch, length]
            batch["labels"] = np.pad(batch["shift_labels"][:, :-1], ((0, 0), (1, 0)), constant_values=-100)
        return {name: torch.from_numpy(array) for name, array in batch.items()}
