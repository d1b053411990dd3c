"""What the readers share.  Each runs in its engine's environment, which has no endprompt."""

import json
import sys
import traceback
from pathlib import Path

import numpy as np


def answer(function) -> None:
    """Calls ``function(folder, request)`` for each model of the request that argv names, and writes down what
    it returns: (log-probabilities [positions, vocabulary], {"version": ..., "window": ..., "ids": those of
    the request's text})."""
    request = json.loads(Path(sys.argv[1]).read_text())
    out, told = Path(request["out"]), {}
    for model, folder in request["models"].items():
        try:
            rows, about = function(folder, request)
        except Exception as error:
            traceback.print_exc()
            told[model] = {"error": f"{type(error).__name__}: {error}"}
            continue
        np.save(out / f"{model}.npy", np.asarray(rows, np.float32))
        told[model] = about
    (out / "answers.json").write_text(json.dumps(told))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
