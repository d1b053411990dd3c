"""A copy of a run's model for serving: in another number format, averaged with the base, with attention that
is sharpened by position, or as a GGUF file.

Sharpening multiplies all queries by a constant, ln L / ln C, which helps at L and costs a little at C.
Ministral 3 multiplies them by 1 + beta ln(1 + floor(p / C)) at position p.  With beta = 1 / ln C that is
log-n attention in steps of C: 1 inside the window, ln L / ln C at L.  transformers, mlx-lm and vLLM compute
it, so no code of ours comes with the model.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from endprompt import BadInput, Failure, storage
from endprompt.bases import older_readers, sharpen
from endprompt.bases.unreadable import reason
from endprompt.runs import card, checkpoint_files, gguf_file

DTYPES = ("float32", "bfloat16", "float16")
# Families whose network Ministral 3 computes, where no layer has a bias.
QUERIES = ("self_attn.q_proj.weight", "self_attn.q_proj.bias")  # of PLAIN
PLAIN = ("llama", "mistral")
# What a disk, a quota or a limit says that takes no more, whichever file an error names: that of a copy that
# fails is the file that was read.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
CONVERTERS = ("convert_hf_to_gguf.py", "llama-convert-hf-to-gguf")


@dataclass(frozen=True)
class Position:
    """Attention that is sharpened by position.  by: what the queries have been multiplied by; start: the
    window C in tokens from which it grows."""

    by: float
    start: int

    @property
    def beta(self) -> float:
        return 1 / math.log(self.start)


@dataclass(frozen=True)
class Average:
    """An average with the base.  share: of the base's weights; before: those, by name; queries: by what the
    model's are sharpened, and those of ``before`` are not yet."""

    share: float
    before: dict[str, Any]
    queries: sharpen.Queries | None


@dataclass(frozen=True)
class Form:
    """What a copy is in place of what the model is; None: as it is.  dtype: one of DTYPES, of all weights."""

    dtype: str | None = None
    position: Position | None = None
    average: Average | None = None


def export(
    run: Path,
    to: Path,
    position_dependent: bool = False,
    dtype: str | None = None,
    share: float | None = None,
    gguf: bool = False,
) -> Path:
    """Writes the model of ``run`` into the new folder ``to``, and beside it model.gguf if ``gguf``.

    dtype: one of DTYPES, of all weights; None: as they are.  share: of the base's weights, above 0 and below
    1, with which those that were trained are averaged; None: they are not.  Raises BadInput if there is no
    model, ``to`` is there already, or the model cannot be had in that form, Failure if ``to`` cannot be
    written to its end; nothing is left then.
    """
    model, to = run / "model", Path(os.path.abspath(to))
    if not (model / "config.json").is_file():
        raise BadInput(f"export: {run} has no model/; name the folder of a run that was trained to its end")
    if os.path.lexists(to) and (not to.is_dir() or any(to.iterdir())):
        raise BadInput(f"--to: {to} is there already; name a new folder")
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("config.json is no mapping")
        position = _position(model, config) if position_dependent else None
        converter = _converter(config, position) if gguf else None
        average = _average(run, config, share, position) if share is not None else None
        with _whole(to) as partial:
            _copy(run, partial, config, Form(dtype, position, average))
            if converter:
                _convert(converter, partial)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"export: {model} cannot be read: {reason(error)}; train it again") from None
    return to


@contextlib.contextmanager
def _whole(to: Path) -> Iterator[Path]:
    """A folder beside ``to`` that gets its name at the end, or, if anything is raised, is not there.  Raises
    BadInput if there can be none, Failure if what was raised is that it cannot be written."""
    partial = to.with_name(f".{to.name}.part")
    made = [folder for folder in partial.parents if not folder.exists()]  # innermost first
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"--to: {to} cannot be made ({error.strerror}); name another folder") from None
    try:
        yield partial
        os.replace(partial, to)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: someone else's by now
            for folder in made:
                folder.rmdir()
        if isinstance(error, OSError) and _of_writing(error, partial):
            raise Failure(
                f"--to: {to} could not be written ({error.strerror}); nothing half-written was kept, and the"
                " model is untouched; make room, or name a folder elsewhere"
            ) from None
        raise


def _of_writing(error: OSError, folder: Path) -> bool:
    """Whether ``error`` is of what was written into ``folder``, and not of what was read."""
    named = (Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if name)
    return error.errno in FULL or any(path.is_relative_to(folder) for path in named)


def _save(tensors: dict[str, Any], path: Path, metadata: dict | None) -> None:
    """Writes a safetensors file.  Raises OSError, where safetensors has an error that it has of damaged files
    too."""
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else reason(error), str(path)) from None


def _copy(run: Path, to: Path, config: dict, form: Form) -> None:
    """The files of the run's model in the folder ``to``, those of sub-folders too: transformers 5 saves all
    chat templates but the first in one."""
    model = run / "model"
    for path in sorted(model.rglob("*")):
        made_anew = path.parent == model and (path.suffix == ".safetensors" or path.name == "config.json")
        if path.is_file() and not made_anew:
            copy = to / path.relative_to(model)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    _write_weights(run, to, form)
    _write_config(to, config, form)
    card.renew(to, [] if form.position or form.average else None)  # another model scores otherwise


def _position(model: Path, config: dict) -> Position:
    """Raises BadInput unless the model is one that Ministral 3 can compute, sharpened by ln L / ln C."""
    from safetensors import safe_open

    def refuse(why: str) -> NoReturn:
        raise BadInput(f"--position-dependent: {why}; export the model without it")

    if (kind := config["model_type"]) not in PLAIN:
        refuse(f"Ministral 3 computes the layers of {' and '.join(PLAIN)}, and this is a {kind}")
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        if biased := [name for name in names if name.endswith(".bias")]:
            refuse(f"Ministral 3 has no biases, and this model has {biased[0]}")
    note = config.get("endprompt") or {}
    by, start = note.get("sharpened"), note.get("sharpened_from", note.get("original_length"))
    if by is None or start is None:
        refuse("the model's attention is not sharpened, so there is no constant to put in its place")
    wanted = sharpen.factor(1.0, start, note["target_length"])
    if start < 2 or not math.isclose(by, wanted, rel_tol=1e-6):
        refuse(f"its queries are multiplied by {by:.4f}, and the scale stands for ln L / ln C, {wanted:.4f}")
    first = config["rope_parameters"].get("original_max_position_embeddings", start)
    if first != start:
        refuse(f"its RoPE counts from {first} tokens and its sharpening from {start}, one key for both")
    return Position(by, start)


def _average(run: Path, config: dict, share: float, position: Position | None) -> Average:
    """Raises BadInput if the ``share`` is none, the model is an average already, or its base cannot be had or
    is another by now."""
    from transformers import AutoConfig

    from endprompt.recipe import experiment
    from endprompt.runs import averaging

    note = config.get("endprompt") or {}
    if not 0 < share < 1:
        raise BadInput(f"--share: a number above 0 and below 1 is wanted (given: {share})")
    if before := note.get("base_share"):
        raise BadInput(
            f"--share: the model is an average with {before:.1%} of the base already; train with"
            " train.base_share=0, or export it without --share"
        )
    method = note.get("method")
    if not isinstance(method, str):
        raise BadInput("--share: config.json does not name the method, so the base is not known; train again")
    found = experiment.resolve(run / "recipe.yaml", [], method)
    _same_base(run, found)
    own = sharpen.inherited(found.base.config).get("sharpened", 1.0)
    by = (1.0 if position else note.get("sharpened", own)) / own
    network = AutoConfig.from_pretrained(run / "model", trust_remote_code=False)
    return Average(share, averaging.weights(found, False), sharpen.Queries(network, by) if by != 1 else None)


def _same_base(run: Path, found) -> None:
    """Raises BadInput if the base of the experiment ``found`` is not the one that train.json notes."""
    try:
        before = storage.read_json(run / "train.json").get("base")
    except (OSError, ValueError, AttributeError):
        return
    if before is not None and before != found.base.fingerprint:
        raise BadInput(
            f"--share: {found.base.name!r} in {run / 'recipe.yaml'} is another base now than the one that was"
            " trained; put that one back, or start from the folder that training was started from"
        )


def _averaged(tensors: dict[str, Any], average: Average) -> dict[str, Any]:
    from endprompt.runs import averaging

    try:
        return averaging.mixed(tensors, average.before, average.share, average.queries)
    except Failure as error:
        raise BadInput(
            f"--share: {error}; it is another base than the one that was trained: put that one back where"
            " model.name_or_path in the run's recipe.yaml names it"
        ) from None


def _write_weights(run: Path, to: Path, form: Form) -> None:
    """The weights of the run's model in ``to``, in the same files."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    dtype, position = form.dtype, form.position
    kind = getattr(torch, dtype) if dtype else None
    exact = _unsharpened(run, position.by) if position else {}
    size = 0
    for path in sorted((run / "model").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        kinds = {
            name: kind if kind and tensor.is_floating_point() else tensor.dtype
            for name, tensor in tensors.items()
        }
        if position:
            for name in filter(lambda name: name.endswith(QUERIES), tensors):
                # Divided where no copy is known that was never multiplied.
                tensors[name] = exact[name] if name in exact else (tensors[name].float() / position.by)
        if form.average:
            tensors = _averaged({name: tensor.float() for name, tensor in tensors.items()}, form.average)
        for name, whole in tensors.items():
            cast = whole.to(kinds[name])
            if cast.is_floating_point() and not cast.isfinite().all():
                raise BadInput(f"--dtype {dtype}: {name} has values that it cannot hold; use bfloat16")
            tensors[name] = cast.contiguous()
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        _save(tensors, to / path.name, metadata)
    for path in to.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text())
        index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        storage.write_json(path, index)


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()


def _unsharpened(run: Path, by: float) -> dict[str, Any]:
    """The query weights of the run's newest checkpoint, if they are those that the model's were made of:
    times ``by`` they are the model's, bit for bit, and so is every other tensor.  Empty where they are not
    (LoRA, whose checkpoints hold adapters beside the base), or there is none."""
    newest = checkpoint_files.newest(run / "checkpoints")
    if newest is None or not (newest / "config.json").is_file():
        return {}
    note = json.loads((newest / "config.json").read_text(encoding="utf-8")).get("endprompt") or {}
    before = dict(_tensors(newest))
    if "sharpened" in note:
        return {}
    found = {}
    for name, tensor in _tensors(run / "model"):
        own = before.get(name)
        if own is None or own.shape != tensor.shape:
            return {}
        if name.endswith(QUERIES):
            found[name], own = own, own.float() * by
        if not own.to(tensor.dtype).equal(tensor):
            return {}
    return found


def _write_config(folder: Path, config: dict, form: Form) -> None:
    """config.json, of Ministral 3 if attention is sharpened by position."""
    position = form.position
    if form.dtype:
        config = {**config, "dtype": form.dtype}
        config.pop("torch_dtype", None)
    if form.average:
        config = {**config, "endprompt": {**config["endprompt"], "base_share": form.average.share}}
    if position is None:
        storage.write_json(folder / "config.json", config)
        return
    from transformers import AutoConfig

    # With every default of the family written out: Ministral 3 has others.
    storage.write_json(folder / "config.json", config)
    whole = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    without = "_name_or_path attention_bias auto_map mlp_bias pretraining_tp rope_scaling rope_theta".split()
    without.append("use_sliding_window")
    constant = ("sharpened", "sharpened_from")  # not the factors of heads, which stay in the weights
    note = {key: value for key, value in config["endprompt"].items() if key not in constant}
    parameters = {
        **config["rope_parameters"],
        "original_max_position_embeddings": position.start,
        "llama_4_scaling_beta": position.beta,
    }
    if parameters["rope_type"] == "yarn":
        parameters["mscale_all_dim"] = 0.0  # as without it; llama.cpp's converter asks for it
    config = {
        **{key: value for key, value in whole.items() if key not in without},
        "model_type": "ministral3",
        "architectures": ["Ministral3ForCausalLM"],
        "head_dim": whole.get("head_dim") or whole["hidden_size"] // whole["num_attention_heads"],
        # A Llama does not heed the key, which Ministral 3 does.
        "sliding_window": whole.get("sliding_window") if config["model_type"] == "mistral" else None,
        "rope_parameters": parameters,
        # Where vLLM looks for it.
        "llama_4_scaling": {"original_max_position_embeddings": position.start, "beta": position.beta},
        "endprompt": {**note, "sharpened_beyond": position.start, "beta": position.beta},
    }
    storage.write_json(folder / "config.json", config)
    older_readers.state_rope(folder)


def _converter(config: dict, position: Position | None) -> Path:
    """llama.cpp's program that writes GGUF files.  Raises BadInput if there is none, or it would refuse."""
    if position and config["rope_parameters"]["rope_type"] != "yarn":
        raise BadInput(
            "--gguf: llama.cpp sharpens by position under YaRN alone (rope.type yarn); leave out"
            " --position-dependent, or --gguf"
        )
    folder = os.environ.get("LLAMA_CPP")
    places = [Path(folder, name) for name in CONVERTERS] if folder else []
    places += [Path(found) for name in CONVERTERS if (found := shutil.which(name))]
    converter = next((place for place in places if place.is_file()), None)
    if converter is None:
        raise BadInput(
            f"--gguf: llama.cpp's {CONVERTERS[0]} is not on PATH; set LLAMA_CPP to a copy of llama.cpp's"
            " source (a clone, or the folder vendor/llama.cpp in the source of the package llama-cpp-python)"
        )
    return converter


def _convert(converter: Path, folder: Path) -> None:
    command = [str(converter), str(folder), "--outfile", str(folder / "model.gguf")]
    done = subprocess.run(
        [sys.executable, *command] if converter.suffix == ".py" else command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode or not (folder / "model.gguf").is_file():
        if full := next((number for number in FULL if os.strerror(number) in done.stdout), None):
            raise OSError(full, os.strerror(full), str(folder / "model.gguf"))
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise BadInput(f"--gguf: {converter} cannot convert the model: {last}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    gguf_file.verify(folder / "model.gguf", config)
