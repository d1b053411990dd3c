"""A saved model in llama.cpp: through its converter, and as its server answers."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import numpy as np
import xllamacpp
from common import answer

SOURCE = next((Path(sys.prefix) / "source").glob("*/vendor/llama.cpp"))


def convert(folder: str, out: str) -> Path:
    """The GGUF file of the model in ``folder``; where it is one already, that file."""
    if folder.endswith(".gguf"):
        return Path(folder)
    path = Path(out) / f"{abs(hash(folder))}.gguf"
    command = [
        sys.executable,
        SOURCE / "convert_hf_to_gguf.py",
        folder,
        "--outfile",
        path,
        "--outtype",
        "f32",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"the converter: {done.stdout.strip().splitlines()[-1]}")
    return path


def trained_window(path: Path) -> int:
    """What n_ctx = 0 stands for."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return int(next(field for name, field in fields.items() if name.endswith(".context_length")).contents())


def read(folder: str, request: dict):
    path = convert(folder, request["out"])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 0  # the model's own window
    parameters.n_gpu_layers = 0
    parameters.n_parallel = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 2
    parameters.warmup = False
    server = xllamacpp.Server(parameters)
    rows = []
    for position in request["positions"]:
        told = server.handle_completions(
            {
                "prompt": request["ids"][: position + 1],
                "n_predict": 1,
                "temperature": 0,
                "n_probs": request["vocabulary"],
                "cache_prompt": True,
            }
        )
        row = np.full(request["vocabulary"], -np.inf)
        for token in told["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[token["id"]] = token["logprob"]
        rows.append(row)
    about = {
        "version": f"{importlib.metadata.version('xllamacpp')}, converter of {SOURCE.parents[1].name}",
        "window": trained_window(path),
        "ids": None,
    }
    return np.stack(rows), about


answer(read)
