"""`endprompt init`: a recipe for a model, a window and a machine."""

import os

from endprompt import BadInput, storage
from endprompt.commands.claiming import check_out

# The usual GPU of a memory in GB, for its peak.
GPU_OF = ((24, "4090"), (48, "L40S"), (80, "A100"), (94, "H100 NVL"))
LARGEST = "H200"


def gpu_of(memory: float) -> str:
    return next((name for most, name in GPU_OF if memory <= most), LARGEST)


def init(arguments) -> None:
    """Writes the recipe that fits, and says what it takes.  Raises BadInput, and then writes nothing."""
    from endprompt import methods
    from endprompt.planning import proposal, written
    from endprompt.planning.estimate import Machine
    from endprompt.recipe import schema, settings_file

    out = arguments.out
    settings_file.folder_name(out.stem, "--out: the file's name")
    if out.suffix not in (".yaml", ".yml"):
        raise BadInput(f"--out {out}: a recipe's name ends in .yaml; add it")
    if os.path.lexists(out):
        raise BadInput(f"--out: {out} is there already; remove it, or choose another name")
    check_out(out, out.absolute().parent, writes=True)
    asked = proposal.Asked(
        arguments.model,
        arguments.gguf,
        arguments.target,
        arguments.corpus,
        methods.get(arguments.method).name,
        arguments.tokens,
        arguments.train,
        out,
    )
    gpu = arguments.gpu or gpu_of(arguments.gpu_memory)
    found = proposal.propose(asked, Machine(arguments.gpus, arguments.gpu_memory, gpu, arguments.mfu))
    text = written.recipe(asked, found)
    name, tree = out.stem, settings_file.parse(text, str(out))
    schema.made(tree, name, out)  # what is written is read as it was meant
    out.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(out, text.encode())
    print(written.told(asked, found))
