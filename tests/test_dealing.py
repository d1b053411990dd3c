"""Rows that the ranks do not divide: every one is trained on once an epoch, on any number of ranks."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from training import assert_same, losses, prepared, run, weights

from endprompt import Failure
from endprompt.rows.collate import Collator
from endprompt.training import dealing

# -- batches -----------------------------------------------------------------------------------------


def loaders(rows: int, batch_size: int, ranks: int, fill: bool = True, drop_last: bool = False) -> list:
    """What each of ``ranks`` reads, as the Trainer has accelerate prepare it; a row is its number."""
    found = []
    for rank in range(ranks):
        loader = torch.utils.data.DataLoader(range(rows), batch_size, shuffle=True, drop_last=drop_last)
        loader = prepare_data_loader(
            loader,
            num_processes=ranks,
            process_index=rank,
            use_seedable_sampler=True,
            data_seed=3,
            put_on_device=False,
        )
        if fill:
            dealing.fill_evenly(loader, ranks)
        found.append(loader)
    return found


def dealt(found: list, epoch: int = 0) -> list[list[list[int]]]:
    """[rank][batch][row] of an epoch."""
    for loader in found:
        loader.set_epoch(epoch)
    return [[list(batch) for batch in loader.batch_sampler] for loader in found]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows, batch_size", [(44, 1), (44, 3), (44, 8), (45, 2), (1, 4), (5, 16), (48, 2)])
def test_every_row_is_dealt_once(rows, batch_size, ranks):
    batches = dealt(loaders(rows, batch_size, ranks))
    counts = {len(batch) for batch in batches}
    assert len(counts) == 1, "a rank with fewer batches hangs the others"
    assert ranks == 1 or {len(batch) for rank in batches for batch in rank} == {batch_size}
    flat = [row for rank in batches for batch in rank for row in batch if row != dealing.FILLER]
    assert sorted(flat) == list(range(rows))
    # A step holds the rows that it holds on one rank: in turn, a batch from each.
    order = [
        row for turn in zip(*batches, strict=True) for batch in turn for row in batch if row != dealing.FILLER
    ]
    assert order == [row for batch in dealt(loaders(rows, batch_size, 1))[0] for row in batch]


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_twin_accelerate_repeats_rows(ranks):
    flat = [row for rank in dealt(loaders(44, 3, ranks, fill=False)) for batch in rank for row in batch]
    assert len(flat) > 44 and len(set(flat)) == 44


@pytest.mark.parametrize("rows, ranks", [(48, 1), (48, 2), (48, 3), (48, 4)])
def test_what_divides_evenly_is_dealt_as_before(rows, ranks):
    for epoch in (0, 1):
        assert dealt(loaders(rows, 4, ranks), epoch) == dealt(loaders(rows, 4, ranks, fill=False), epoch)


def test_what_is_left_over_is_dropped_where_the_recipe_says_so():
    assert dealt(loaders(44, 3, 2, drop_last=True)) == dealt(loaders(44, 3, 2, fill=False, drop_last=True))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_skipped_batches_leave_the_rest_of_their_own_epoch(ranks):
    whole = [dealt(loaders(44, 3, ranks), epoch) for epoch in (0, 1)]
    assert whole[0] != whole[1]
    for epoch in (0, 1):
        skipped = [skip_first_batches(loader, 2) for loader in loaders(44, 3, ranks)]
        assert dealt(skipped, epoch) == [batches[2:] for batches in whole[epoch]]


def test_batches_that_somebody_else_deals_are_refused():
    loader = torch.utils.data.DataLoader(range(8), 2)
    dealing.fill_evenly(loader, 1)
    with pytest.raises(Failure, match="BatchSampler deals the batches"):
        dealing.fill_evenly(loader, 2)


@pytest.mark.parametrize(
    "rows, batch_size, ranks, group",
    [(44, 2, 4, 2), (44, 3, 4, 2), (44, 3, 4, 4), (9, 2, 4, 2), (48, 2, 4, 2)],
)
def test_shared_micro_batches_all_hold_a_row(rows, batch_size, ranks, group):
    batches = dealt(loaders(rows, batch_size, ranks))
    # DeepSpeed's turns: a batch from each rank, then one member after the other of all groups.
    turns = [
        [batches[start + member][index] for start in range(0, ranks, group)]
        for index in range(len(batches[0]))
        for member in range(group)
    ]
    held = [any(row != dealing.FILLER for batch in turn for row in batch) for turn in turns]
    count = dealing.shared_micro_batches(rows, batch_size, ranks, group)
    assert all(held[:count]) and not any(held[count:])


def test_a_filler_has_no_targets_and_no_weight():
    row = {
        "input_ids": [5, 6, 7, 8],
        "position_ids": [0, 1, 8, 9],
        "loss_weights": [1.0, 1.0, 0.5, 0.5],
        "text_length": 2,
        "prompt_length": 2,
        "row_number": 0,
    }
    rows = dealing.Rows([row])
    assert len(rows) == 1 and rows[0] == row
    batch = Collator(0, 16)([rows[0], rows[dealing.FILLER]])
    assert (
        (batch["shift_labels"][0] >= 0).any()
        and bool(batch["shift_prompt"][0].any())
        and batch["shift_weights"][0].sum() > 0
    )
    assert (
        not (batch["shift_labels"][1] >= 0).any()
        and not batch["shift_prompt"][1].any()
        and not batch["shift_weights"][1].any()
    )
    for name in ("input_ids", "position_ids", "attention_mask"):
        assert torch.equal(batch[name][0], batch[name][1])


# -- runs ---------------------------------------------------------------------------------------

# 44 rows, 12 a step: the fourth and the eighth step have 8.
SHAPES = {1: (12, 1), 2: (3, 2), 3: (2, 2)}
RECORD = """
import json, os
from endprompt.training import trainer
plain = trainer.WeightedTrainer.log
def log(self, logs, start_time=None):
    sums = self.accelerator.reduce(self._sums, "sum").tolist() if "loss" in logs else None
    if sums and os.environ["RANK"] == "0":
        with open({path!r}, "a") as file:
            file.write(json.dumps(sums) + "\\n")
    plain(self, logs, start_time)
trainer.WeightedTrainer.log = log
{more}
from endprompt.cli import main
main()
"""


@pytest.fixture(scope="module")
def recipe(train_recipe, tmp_path_factory) -> Path:
    tree = yaml.safe_load(train_recipe.read_text())
    tree["data"]["tokens"] = 44 * 128
    tree["train"] |= {"num_train_epochs": 2, "save_steps": 3}
    path = tmp_path_factory.mktemp("uneven") / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def shards(recipe, tmp_path_factory) -> Path:
    folder = prepared(recipe, "endprompt", tmp_path_factory.mktemp("shards"))
    assert json.loads((folder / "shards/manifest.json").read_text())["rows"] == 44
    return folder


@pytest.fixture(scope="module")
def trained(recipe, shards, tmp_path_factory):
    """trained(ranks, *options, more="") -> (folder, sums of each step).

    Sums: nats and targets of text, of prompt, of prompt without its first token, and tokens.
    """

    def start(ranks: int, *options, more: str = "", folder: Path | None = None) -> tuple[Path, list]:
        if folder is None:
            folder = tmp_path_factory.mktemp("run") / "small/endprompt"
            shutil.copytree(shards, folder)
        out = folder.parents[1]
        (out / "script.py").write_text(RECORD.format(path=str(out / "sums"), more=more))
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        size, accumulation = SHAPES[ranks]
        run(
            [
                *launcher,
                out / "script.py",
                "train",
                recipe,
                "endprompt",
                "--out",
                out,
                *options,
                "--set",
                f"train.per_device_train_batch_size={size}",
                "--set",
                f"train.gradient_accumulation_steps={accumulation}",
            ]
        )
        return folder, [json.loads(line) for line in (out / "sums").read_text().splitlines()]

    return start


@pytest.fixture(scope="module")
def one(trained):
    return trained(1)


@pytest.fixture(scope="module")
def two(trained):
    return trained(2)


def assert_like_one(found, one) -> None:
    assert len(losses(found[0])) == len(losses(one[0])) == 8
    for mine, theirs in zip(losses(found[0]), losses(one[0]), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)
    for mine, theirs in zip(found[1], one[1], strict=True):
        assert mine[1:6:2] == theirs[1:6:2]  # targets of text, prompt, and prompt without its first token
        assert mine[:6:2] == pytest.approx(theirs[:6:2], rel=2e-4)
    # Padding differs with a micro-batch's longest row; fillers would be four rows more.
    assert found[1][3][6] <= 8 * 128 and found[1][0][6] > 0
    assert_same(weights(found[0]), weights(one[0]), tolerance=2e-3)


@pytest.mark.distributed
def test_44_rows_on_two_ranks_give_the_losses_of_one(two, one):
    assert_like_one(two, one)


@pytest.mark.slow
@pytest.mark.distributed
def test_44_rows_on_three_ranks_give_the_losses_of_one(trained, one):
    assert_like_one(trained(3), one)


@pytest.mark.distributed
def test_a_run_goes_on_inside_its_second_epoch_to_the_same_weights(trained, two, tmp_path):
    folder = tmp_path / "small/endprompt"
    shutil.copytree(two[0], folder, ignore=shutil.ignore_patterns("model", "train.json", "checkpoint-8"))
    trained(2, folder=folder)
    assert json.loads((folder / "train.json").read_text())["resumed_from"] == "checkpoint-6"
    assert losses(folder) == losses(two[0])
    assert_same(weights(folder), weights(two[0]), tolerance=0)


@pytest.mark.distributed
def test_the_twin_without_fillers_two_ranks_train_on_something_else(trained, one):
    folder, sums = trained(
        2,
        "--set",
        "train.num_train_epochs=1",
        "--set",
        "train.lr_scheduler_type=constant_with_warmup",
        more="trainer.dealing.fill_evenly = lambda loader, ranks: None",
    )
    assert sums[2][1] == one[1][2][1] and sums[3][1] > one[1][3][1] and sums[3][6] > 8 * 40
