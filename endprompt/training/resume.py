"""Where a run goes on after it was stopped or killed, and whether it may."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from endprompt import BadInput
from endprompt.recipe.experiment import Experiment
from endprompt.runs import checkpoint_files


@dataclass(frozen=True)
class Resume:
    """Where a run goes on.  newest: the checkpoint, None at the start; before: its marker."""

    newest: Path | None
    before: dict
    world_size: int

    @property
    def name(self) -> str | None:
        return self.newest.name if self.newest else None

    @property
    def resized(self) -> bool:
        """Whether the checkpoint is of another number of ranks."""
        return self.before["world_size"] != self.world_size

    @classmethod
    def of(cls, experiment: Experiment, world_size: int, main: bool, made: str) -> "Resume":
        """Raises BadInput if there are checkpoints and none can be gone on with, or if the one that would be
        was trained on other shards than ``made``, the digest of those that are there."""
        newest = checkpoint_files.to_resume(experiment.run / "checkpoints", sys.stderr if main else None)
        before = (checkpoint_files.marker(newest) if newest else None) or {"world_size": world_size}
        if newest:
            checkpoint_files.refuse_foreign(newest)
            checkpoint_files.refuse_other_shards(newest, before.get("shards"), made)
        found = cls(newest, before, world_size)
        if found.resized and experiment.recipe.sequence_parallel > 1:
            raise BadInput(
                f"train.sequence_parallel: {newest} is of {before['world_size']} ranks, and a run that shares"
                f" rows cannot go on with {world_size}; start as many as before"
            )
        return found


def same_base(experiment: Experiment, resume: Resume) -> dict[str, str]:
    """What a marker says of the base where checkpoints leave its weights out, since they are in 4 bits.

    All ranks call it, with the processes started.  Raises BadInput if the checkpoint is of another base.
    """
    if not (experiment.adapters and experiment.adapters.quantize):
        return {}
    said = [experiment.base.fingerprint if int(os.environ["RANK"]) == 0 else ""]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(said)
    if resume.newest and resume.before.get("base") != said[0]:
        raise BadInput(
            f"checkpoints: {resume.newest} is of adapters on other weights than {experiment.base.name} has"
            " now; restore those, or start with another --out"
        )
    return {"base": said[0]}
