"""What runs the models: lm-evaluation-harness, made safe for long prompts.

The harness' HF backend cuts a prompt that is too long from the left without failing, pads prompts of different length in one batch, and keeps
float32 logits of whole prompts (a 64K window over 128,256 words is 31 GiB).  ``LongLM`` cuts nothing, groups prompts by length, and keeps the scored logits alone.
"""

import functools
import logging
import sys
from collections import defaultdict
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM

from endprompt import BadInput, rope

# Tokens in a batch of generation, and the logits of a batch that is scored in one piece.
TOKENS_AT_ONCE = 16384
LOGIT_BYTES = 2**30
NO_LIMIT = 2**31 - 1
LONGEST_ANSWER = 512  # tokens that the summarization tasks of LongBench generate

TASKS = Path(__file__).parent / "tasks"

for name in ("lm_eval", "lm-eval"):  # warnings that a model object was passed, that metadata exist, on every call
    logging.getLogger(name).setLevel(logging.ERROR)


class LongLM(HFLM):
    """The harness' HF model that never cuts a prompt, whatever window its config names; same scores otherwise."""

    def __init__(self, network, tokenizer):
        super().__init__(pretrained=network, tokenizer=tokenizer, max_length=NO_LIMIT, batch_size=1)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations of ``requests``, in order.  Prompts of equal length share a batch, so that nothing is padded."""
        disable_tqdm = disable_tqdm or not sys.stderr.isatty()  # bars only fill a log
        groups: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[len(self.tok_encode(request.args[0]))].append(index)
        results: list[str] = [""] * len(requests)
        for length, indices in sorted(groups.items(), reverse=True):
            self.batch_size_per_gpu = max(1, TOKENS_AT_ONCE // length)
            for index, text in zip(indices, super().generate_until([requests[index] for index in indices], disable_tqdm), strict=True):
                results[index] = text
        return results

    # The score of a sample must not depend on what was scored before it.
    def _model_call(self, *ids, **options):
        rope.forget(self.model)
        return super()._model_call(*ids, **options)

    def _model_generate(self, *ids, **options):
        rope.forget(self.model)
        return super()._model_generate(*ids, **options)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None) -> list[tuple[float, bool]]:
        disable_tqdm = disable_tqdm or not sys.stderr.isatty()
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        batch = LOGIT_BYTES // (longest * self.model.config.vocab_size * 4)
        if batch:
            self.batch_size_per_gpu = min(64, batch, max(1, TOKENS_AT_ONCE // longest))
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        results = []
        for _, context, continuation in requests:
            rope.forget(self.model)
            ids = torch.tensor([context + continuation], device=self.device)
            logits = self.model(ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1]), use_cache=False, logits_to_keep=len(continuation)).logits[0].float()
            targets = ids[0, -len(continuation):]
            results.append((-torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item(), bool((logits.argmax(-1) == targets).all())))
        return results


def vllm(source: str, longest: int, trust_remote_code: bool = False):
    """The harness' vLLM model of the folder or hub id ``source``, for prompts up to ``longest`` tokens with their answers.

    Raises BadInput if vLLM is not installed.
    """
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise BadInput(f"eval.backend: vllm cannot be imported ({error}); install it (pip install vllm, on a machine with a GPU), or use eval.backend=hf") from None
    from lm_eval.models.vllm_causallms import VLLM

    # One more than fits: vLLM counts the token after the last.  Its own idea of the window is too long for scaled models (docs/footguns.md, 9).
    return VLLM(pretrained=source, trust_remote_code=trust_remote_code, max_model_len=longest + 1, dtype="bfloat16", batch_size="auto", gpu_memory_utilization=0.9)


@functools.cache
def _own_tasks():
    """The harness' own tasks; finding them takes some seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def run(lm, task: str, metadata: dict, *, defaults: bool = False, few_shots: int | None = None, generation: dict | None = None, limit: int | None = None,
        chat_template: bool = False, unsafe_code: bool = False) -> dict[str, list[dict]]:
    """{task or subtask: the harness' samples} of ``task`` on ``lm``, greedy.

    ``metadata`` reaches the task's data function (tokenizer, max_seq_lengths, samples, seed, ...).  ``defaults``: whether ``task`` is one of the
    harness' own, not of eval/tasks.  ``generation``: what is passed to ``generate`` beyond the task's own settings.  Errors of the data function
    pass through.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = _own_tasks() if defaults else TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    found = simple_evaluate(lm, tasks=[task], num_fewshot=few_shots, gen_kwargs=generation, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True,
                            apply_chat_template=chat_template, confirm_run_unsafe_code=unsafe_code)
    return found["samples"]
