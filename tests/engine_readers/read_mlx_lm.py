"""A saved model in mlx-lm, on the CPU build of mlx."""

import importlib.metadata

import mlx.core as mx
import numpy as np
from common import answer, log_softmax
from mlx_lm.utils import load

mx.set_default_device(mx.cpu)


def read(folder: str, request: dict):
    network, tokenizer = load(folder)
    logits = network(mx.array([request["ids"]]))[0].astype(mx.float32)
    about = {
        "version": importlib.metadata.version("mlx-lm"),
        "window": None,  # it has none
        "ids": tokenizer.encode(request["text"]),
    }
    return log_softmax(np.array(logits)[request["positions"]]), about


answer(read)
