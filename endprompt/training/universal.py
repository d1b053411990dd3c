"""A ZeRO checkpoint of N ranks in the form that any number of ranks can load: DeepSpeed's universal
checkpoint (arXiv 2406.18820).

    # a process of its own: the converter keeps much in memory
    python -m endprompt.training.universal CHECKPOINT

It leaves global_step<N>_universal and latest_universal beside what is there.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path


def convert(checkpoint: Path) -> None:
    """Raises what the converter raises; nothing under the final names is left then."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.checkpoint import ds_to_universal

    from endprompt import storage
    from endprompt.runs import checkpoint_files
    from endprompt.training.checkpoint import weights_only

    checkpoint_files.refuse_foreign(checkpoint)
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    target, partial = checkpoint / f"{tag}_universal", checkpoint / f"{tag}_universal.part"
    for left in (partial, target):
        shutil.rmtree(left, ignore_errors=True)
    with weights_only():
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(checkpoint / tag),
                output_folder=str(partial),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    (checkpoint / "latest_universal").unlink(missing_ok=True)  # the converter's own names the partial folder
    partial.rename(target)
    storage.write_atomically(checkpoint / "latest_universal", target.name.encode())


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
