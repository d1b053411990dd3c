"""Trains recipes one after another in the processes of one launch: family_ranks.py OUT RECIPE...

A process keeps what DeepSpeed and accelerate set up; only what belongs to a run is made anew.
"""

import sys
from pathlib import Path

from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.training import run


def main(out: Path, recipes: list[str]) -> None:
    from accelerate.state import AcceleratorState
    from transformers.integrations import deepspeed

    for recipe in recipes:
        AcceleratorState._reset_state()
        deepspeed.unset_hf_deepspeed_config()
        run.train(Experiment.of(schema.load(recipe), "endprompt", out))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
