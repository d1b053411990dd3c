"""A saved model in transformers 4."""

import torch
import transformers
from common import answer, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("4.")


@torch.no_grad()
def read(folder: str, request: dict):
    network = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    logits = network(torch.tensor([request["ids"]])).logits[0, request["positions"]]
    about = {
        "version": transformers.__version__,
        "window": network.config.max_position_embeddings,
        "ids": AutoTokenizer.from_pretrained(folder)(request["text"])["input_ids"],
    }
    return log_softmax(logits.numpy()), about


answer(read)
