"""Batches: every column, to the exact token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import row

from endprompt.rows.collate import Collator
from endprompt.training.trainer import kinds

PAD, TARGET = 0, 512
COLUMNS = {
    "row_numbers": torch.int64,
    "input_ids": torch.int64,
    "position_ids": torch.int64,
    "attention_mask": torch.int64,
    "shift_labels": torch.int64,
    "shift_weights": torch.float32,
    "shift_prompt": torch.bool,
}


def collate(*rows):
    return Collator(PAD, TARGET)(list(rows))


def test_a_row_by_hand():
    batch = collate(
        {
            "input_ids": [1, 7, 8, 9, 5, 6],
            "position_ids": [0, 1, 2, 3, 510, 511],
            "loss_weights": [0, 1, 1, 1, 0.5, 0.25],
            "text_length": 4,
            "prompt_length": 2,
        }
    )
    assert {name: tensor.dtype for name, tensor in batch.items()} == COLUMNS
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 7, 8, 9, 5, 6]],
        "position_ids": [[0, 1, 2, 3, 510, 511]],
        "attention_mask": [[1] * 6],
        "shift_labels": [[7, 8, 9, 5, 6, -100]],
        "shift_weights": [[1, 1, 1, 0.5, 0.25, 0]],
        "row_numbers": [[-1]],
        "shift_prompt": [[False, False, False, True, True, False]],
    }  # the last text token predicts the first prompt token


def test_padding_on_the_right():
    short, long = row(5, 3, TARGET, 90, seed=1), row(9, 4, TARGET, 90, seed=2)
    batch = collate(short, long)
    assert all(tensor.shape == (2, 13) for name, tensor in batch.items() if name != "row_numbers") and batch[
        "row_numbers"
    ].shape == (2, 1)
    padding = slice(8, None)
    assert (batch["input_ids"][0, padding] == PAD).all() and (batch["attention_mask"][0, padding] == 0).all()
    assert (
        (batch["position_ids"][0, padding] == 0).all()
        and not batch["shift_weights"][0, padding].any()
        and not batch["shift_prompt"][0, padding].any()
    )
    assert (batch["shift_labels"][0, 7:] == -100).all() and (batch["shift_labels"][:, -1] == -100).all()
    alone = collate(short)
    assert all(torch.equal(batch[name][:1, :8], alone[name]) for name in batch)


def test_contiguous_rows_have_no_prompt():
    batch = collate(row(12, 0, TARGET, 90), row(7, 0, TARGET, 90))
    assert not batch["shift_prompt"].any()
    assert batch["position_ids"][0].tolist() == list(range(12))
    assert batch["shift_weights"][0].tolist() == [1] * 11 + [0]


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_columns_speak_of_the_next_token(shapes, seed):
    rows = [row(a, b, TARGET, 90, seed + i) for i, (a, b) in enumerate(shapes)]
    batch = collate(*rows)
    for i, (a, b) in enumerate(shapes):
        n, ids = a + b, batch["input_ids"][i]
        assert batch["attention_mask"][i].sum() == n and (batch["attention_mask"][i, :n] == 1).all()
        targets = torch.nonzero(batch["shift_labels"][i] >= 0).flatten()
        assert targets.tolist() == list(range(n - 1)) and torch.equal(
            batch["shift_labels"][i, targets], ids[targets + 1]
        )
        assert torch.nonzero(batch["shift_prompt"][i]).flatten().tolist() == list(range(a - 1, n - 1))[:b]
        np.testing.assert_array_equal(
            batch["shift_weights"][i, : n - 1], np.array(rows[i]["loss_weights"][1:], np.float32)
        )
        assert int(batch["shift_prompt"][i].sum()) == b and batch["position_ids"][i, n - 1] == (
            TARGET - 1 if b else n - 1
        )


@pytest.mark.parametrize(
    "positions, complaint",
    [
        ([0, 1, 2, 2], "do not increase at token 3"),
        ([0, 2, 1, 3], "do not increase at token 2"),
        ([0, 1, 2, 512], r"leave \[0, 511\]"),
        ([-1, 0, 1, 2], r"leave \[0, 511\]"),
    ],
)
def test_positions_are_checked(positions, complaint):
    with pytest.raises(ValueError, match=complaint):
        collate(row(4, 0, TARGET, 90), {**row(4, 0, TARGET, 90), "position_ids": positions})


def test_rows_without_tokens_are_refused():
    with pytest.raises(ValueError, match="without tokens"):
        collate(
            {"input_ids": [], "position_ids": [], "loss_weights": [], "text_length": 0, "prompt_length": 0}
        )


def test_numpy_columns_do_as_well_as_lists():
    plain = row(10, 3, TARGET, 90)
    arrays = {
        **plain,
        "input_ids": np.array(plain["input_ids"], np.int32),
        "position_ids": np.array(plain["position_ids"], np.int32),
        "loss_weights": np.array(plain["loss_weights"], np.float32),
    }
    one, other = collate(plain), collate(arrays)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_kinds_of_targets():
    """The prompt's first token is counted apart in every row, wherever the row's padding begins; a row may be
    prompt from its first target on.
    """
    prompt = torch.tensor(
        [[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool
    )
    target = torch.tensor(
        [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]], dtype=torch.bool
    )
    text, every, later = (mask.int().tolist() for mask in kinds(target, prompt))
    assert (
        text == [[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
        and every == prompt.int().tolist()
    )
    assert later == [[0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
