"""A few random kills of every stage; `make chaos N=100` does many, and docs/results/chaos.json holds what
that gave.
"""

import json

import chaos
import pytest
from conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_kills_at_random_moments_lose_nothing_and_change_nothing(tmp_path):
    found = chaos.Chaos(tmp_path, seed=1)
    result = found.run(4)
    assert result["kills"] == 4 and all(counts["kills"] for counts in result["stages"].values())
    assert (result["lost"], result["differing"]) == (0, 0), found.faults


def test_the_committed_result_is_of_a_hundred_kills():
    result = json.loads((REPOSITORY / "docs/results/chaos.json").read_text())
    assert (
        result["kills"] >= 100 and result["lost"] == 0 and result["differing"] == 0 and result["faults"] == []
    )
    train = result["stages"]["train"]
    assert set(train["kills_between_the_last_checkpoint_and_the_model"]) == set(chaos.ENDS)
    assert min(train["kills_between_the_last_checkpoint_and_the_model"].values()) >= 1
    assert train["kills_while_a_checkpoint_was_written"] >= 5 and not result["commit"].endswith("+changes")
