"""The liveness probe: proof, on the real model and batch, that the end of a row sees its beginning."""

import contextlib

import torch

from endprompt import Failure
from endprompt.training import loss


@contextlib.contextmanager
def same_draws(device: torch.device):
    """Inside, torch draws the same random numbers every time, on the CPU and on ``device``; afterwards it
    goes on as if nothing had been drawn.  Dropout, in modules, functions and kernels alike, then hits the
    same places, and two passes differ in their input alone.
    """
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(0)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


@torch.no_grad()
def probe(model, batch: dict[str, torch.Tensor]) -> float:
    """Replaces the first part of a row by other tokens and measures how far the last part's logits move.

    The first part is everything before the last jump in ``position_ids`` (the text before an end prompt), or
    the first half of a row without a jump (with shifted sparse attention, where one half of the heads has a
    border the other has none, so some token beyond the middle sees across it in every layer).  batch: one
    collator output; only its first row is used, at the batch's device.  Under ZeRO-3 all ranks must call it
    together.  Dropout stays on, alike in both passes.  Returns the largest change in units of the logits'
    standard deviation (0.0 exactly when cut off). Raises Failure if it is below 1e-3: the run would train
    segments that cannot see each other.
    """
    inputs = {
        name: batch[name][:1] for name in ("input_ids", "position_ids", "attention_mask") if name in batch
    }
    ids = inputs["input_ids"]
    used = int(batch["attention_mask"][0].sum()) if "attention_mask" in batch else ids.shape[1]
    if "attention_mask" in batch:
        inputs["attention_mask"] = loss.seen_by_all(inputs["attention_mask"])  # as training does
    jumps = torch.nonzero(
        inputs["position_ids"][0, 1:used] - inputs["position_ids"][0, : used - 1] != 1
    ).flatten()
    boundary = int(jumps[-1]) + 1 if len(jumps) else used // 2
    changed = ids.clone()
    # + 1 modulo the vocabulary changes every token, without a random generator that would disturb the run's
    # own.
    changed[:, :boundary] = (changed[:, :boundary] + 1) % model.config.vocab_size
    at = slice(boundary, used)

    def run(tokens):
        with same_draws(ids.device):
            hidden = model.get_decoder()(**{**inputs, "input_ids": tokens}, use_cache=False).last_hidden_state
            return model.get_output_embeddings()(hidden[:, at]).float()

    before, after = run(ids), run(changed)
    moved = float((after - before).abs().max() / before.std().clamp_min(1e-12))
    if not moved >= 1e-3:
        raise Failure(
            f"liveness probe: changing all {boundary} tokens of the first segment moves the logits of the"
            f" other {used - boundary} by {moved:.1e} standard deviations, so the segments cannot see each"
            f" other (attention {model.config._attn_implementation!r}); is attention_mask missing from the"
            " batch?"
        )
    return moved
