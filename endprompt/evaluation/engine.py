"""What runs the models: lm-evaluation-harness, made safe for long prompts.

The harness' HF backend cuts a prompt that is too long from the left without failing, pads prompts of
different length in one batch, and keeps float32 logits of whole prompts (a 64K window over 128,256 words is
31 GiB).  ``LongLM`` cuts nothing, keeps the scored logits alone, and reads prompts without padding: those of
one length together, or, on a GPU, one after another into a common cache, from which they are answered
together.

Of a model's generation_config.json nothing counts but the tokens that end an answer: a repetition penalty or
a forced token in it would make "greedy" answers others than the model's own.
"""

import contextlib
import functools
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import DynamicCache, GenerationConfig

from endprompt import BadInput
from endprompt.bases import model
from endprompt.evaluation import prompts
from endprompt.positions import rope

# Tokens in a batch of generation, and the logits of a batch that is scored in one piece.
TOKENS_AT_ONCE = 16384
LOGIT_BYTES = 2**30
# of a GPU's free memory, for the keys and values of prompts that are answered together; each new token copies
# a layer's
CACHE_SHARE = 0.4
NO_LIMIT = 2**31 - 1
LONGEST_ANSWER = 512  # tokens that the summarization tasks of LongBench generate

TASKS = Path(__file__).parent / "tasks"

for name in (
    "lm_eval",
    "lm-eval",
):  # warnings that a model object was passed, that metadata exist, on every call
    logging.getLogger(name).setLevel(logging.ERROR)


def table(network) -> int | None:
    """Positions that ``network`` has a table for (GPT-2, OPT, GPT-J; MPT: of distances), beyond which it
    cannot read; None for one that computes them."""
    if network.config.model_type == "mpt":
        return network.config.max_seq_len
    tables = ("wpe", "embed_positions", "position_embeddings")
    embeddings = (name for name, module in network.named_modules() if isinstance(module, torch.nn.Embedding))
    buffers = (name for name, _ in network.named_buffers())
    found = any(name.rpartition(".")[2] in tables for names in (embeddings, buffers) for name in names)
    return network.config.max_position_embeddings if found else None


def shares_cache(network) -> bool:
    """Whether rows of ``network`` may be read one after another into a common cache: keys and values of all
    tokens in every layer, and frequencies that are not those of the longest row."""
    config, rotary = network.config, getattr(network.get_decoder(), "rotary_emb", None)
    plain = config.model_type in model.SUPPORTED and not getattr(config, "sliding_window", None)
    return plain and rotary is not None and rotary.rope_type not in ("dynamic", "longrope")


def ends(generation_config, tokenizer) -> list[int]:
    """The tokens that end an answer, sorted: those of a model's generation config (None: it has none), and
    the tokenizer's end of sequence.
    """
    named = getattr(generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in (*named, tokenizer.eos_token_id) if token is not None})


class Prompting:
    """The harness' ``tok_encode`` of one text or a list of them, which ends in the text's own last token
    (endprompt/evaluation/prompts.py).
    """

    tokenizer: Any  # the harness' model has it

    def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **_):
        if not isinstance(string, str):
            return [self.tok_encode(one, add_special_tokens, left_truncate_len) for one in string]
        if add_special_tokens is None:
            ids = prompts.encode(self.tokenizer, string)
        else:
            ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
            ids = prompts.frame(self.tokenizer)[0] + ids if add_special_tokens else ids
        return ids[-left_truncate_len:] if left_truncate_len else ids


class LongLM(Prompting, HFLM):
    """The harness' HF model that never cuts a prompt, whatever window its config names, and decodes greedily
    whatever its folder asks for; same scores otherwise.  ``network``'s generation config is replaced.
    """

    def __init__(self, network, tokenizer):
        super().__init__(pretrained=network, tokenizer=tokenizer, max_length=NO_LIMIT, batch_size=1)
        given = network.generation_config
        network.generation_config = GenerationConfig(
            bos_token_id=given.bos_token_id,
            pad_token_id=given.pad_token_id,
            eos_token_id=ends(given, tokenizer) or None,
        )
        # Tokens whose keys and values one batch may hold, or 0: batches are read whole.  Dynamic frequencies
        # are those of the longest row, for every row.
        self.cached_tokens = 0
        self.positions = table(network)
        if self.device.type == "cuda" and shares_cache(network):
            config = network.config
            bytes_a_token = (
                2
                * config.num_hidden_layers
                * config.num_key_value_heads
                * rope.head_dimension(config)
                * network.dtype.itemsize
            )
            self.cached_tokens = int(CACHE_SHARE * torch.cuda.mem_get_info()[0] / bytes_a_token)

    def tok_batch_encode(
        self, strings, padding_side: str = "left", left_truncate_len=None, truncation: bool = False
    ):
        """(ids, mask), both int64 [texts, longest], as ``tok_encode`` writes each text; ``truncation`` is not
        done.
        """
        rows = [self.tok_encode(text, left_truncate_len=left_truncate_len) for text in strings]
        shape = len(rows), max(map(len, rows))
        ids = torch.full(shape, self.tokenizer.pad_token_id, device="cpu")
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(shape[1] - len(row), None) if padding_side == "left" else slice(len(row))
            ids[number, place], mask[number, place] = ids.new_tensor(row), 1
        return ids, mask

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations of ``requests``, in order.  Nothing is padded while it is read."""
        disable_tqdm = disable_tqdm or not sys.stderr.isatty()  # bars only fill a log
        groups: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            self._embedded(ids)
            groups[len(ids)].append(index)
        results: list[str] = [""] * len(requests)
        for length, indices in self._batches(groups):
            self.batch_size_per_gpu = max(1, max(self.cached_tokens, TOKENS_AT_ONCE) // length)
            for index, text in zip(
                indices,
                super().generate_until([requests[index] for index in indices], disable_tqdm),
                strict=True,
            ):
                results[index] = text
        return results

    def _embedded(self, ids: list[int]) -> None:
        model.check_ids(
            ids, self.tokenizer, self.model.get_input_embeddings().weight.shape[0], "evaluate: a prompt"
        )

    def _batches(self, groups: dict[int, list[int]]) -> list[tuple[int, list[int]]]:
        """(longest length, requests) of what may share batches, longest first: requests of one length, or
        neighbours by length as far as the cache reaches.
        """
        ordered = sorted(groups.items(), reverse=True)
        if not self.cached_tokens:
            return ordered
        found: list[tuple[int, list[int]]] = []
        for length, indices in ordered:
            for index in indices:
                if not found or (len(found[-1][1]) + 1) * found[-1][0] > self.cached_tokens:
                    found.append((length, []))
                found[-1][1].append(index)
        return found

    @torch.no_grad()
    def _read(self, ids, mask):
        """The cache after all tokens but the last of each row of ``ids`` [rows, tokens], padded on the left
        where ``mask`` is 0; each row is read alone, unpadded.
        """
        rows, tokens = len(ids), ids.shape[1] - 1
        layers: list[tuple] = []
        for row in range(rows):
            own = ids[row : row + 1, int((mask[row] == 0).sum()) : -1]
            if not own.shape[1]:
                continue
            cache = self.model(
                own, attention_mask=torch.ones_like(own), use_cache=True, logits_to_keep=1
            ).past_key_values
            if not layers:
                layers = [
                    tuple(
                        part.new_zeros(rows, part.shape[1], tokens, part.shape[3])
                        for part in (layer.keys, layer.values)
                    )
                    for layer in cache.layers
                ]
            for whole, layer in zip(layers, cache.layers, strict=True):
                for into, part in zip(whole, (layer.keys, layer.values), strict=True):
                    into[row, :, -own.shape[1] :] = part[0]
        found = DynamicCache()
        for number in range(len(layers)):
            found.update(*layers.pop(0), number)  # which copies them: a layer at a time is held twice
        return found

    def _fits(self, tokens: int) -> None:
        if self.positions is not None and tokens > self.positions:
            raise ValueError(
                f"a prompt with its answer has {tokens} tokens, and the model a table of {self.positions} "
                "positions"
            )

    # The score of a sample must not depend on what was scored before it.
    def _model_call(self, *ids, **options):
        self._fits(ids[0].shape[1])
        rope.forget(self.model)
        return super()._model_call(*ids, **options)

    def _model_generate(self, context, **options):
        self._fits(options["max_length"])
        rope.forget(self.model)
        if self.cached_tokens and context.shape[1] > 1:
            mask = options["attention_mask"]
            options |= {
                "past_key_values": self._read(context, mask),
                "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            }
        return super()._model_generate(context, **options)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        disable_tqdm = disable_tqdm or not sys.stderr.isatty()
        for _, context, continuation in requests:
            self._embedded([*context, *continuation])
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        batch = LOGIT_BYTES // (longest * self.model.config.get_text_config().vocab_size * 4)
        if batch:
            self.batch_size_per_gpu = min(64, batch, max(1, TOKENS_AT_ONCE // longest))
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        results = []
        for _, context, continuation in requests:
            self._fits(len(context) + len(continuation) - 1)
            rope.forget(self.model)
            ids = torch.tensor([context + continuation], device=self.device)
            logits = (
                self.model(
                    ids[:, :-1],
                    attention_mask=torch.ones_like(ids[:, :-1]),
                    use_cache=False,
                    logits_to_keep=len(continuation),
                )
                .logits[0]
                .float()
            )
            targets = ids[0, -len(continuation) :]
            results.append(
                (
                    -torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item(),
                    bool((logits.argmax(-1) == targets).all()),
                )
            )
        return results


def vllm(source: str, longest: int, trust_remote_code: bool = False):
    """The harness' vLLM model of the folder or hub id ``source``, for prompts up to ``longest`` tokens with
    their answers.

    Raises BadInput if vLLM is not installed, or ``longest`` is beyond the model's positions there.
    """
    try:
        import vllm  # noqa: F401 (whether it is there)
    except ImportError as error:
        raise BadInput(
            f"eval.backend: vllm cannot be imported ({error}); install it (pip install vllm, on a machine"
            " with a GPU), or use eval.backend=hf"
        ) from None

    reach = positions_in_vllm(source, trust_remote_code)
    if reach is not None and longest > reach:
        raise BadInput(
            f"eval.lengths: prompts have up to {longest} tokens, and vLLM computes {reach} positions of"
            f" {source}, beyond which its answers are no numbers; lower the lengths, or use eval.backend=hf"
        )
    # One more than fits: vLLM counts the token after the last, which it never reads.  A model of just these
    # positions is not granted it, unless its config says so.
    return _served()(
        pretrained=source,
        trust_remote_code=trust_remote_code,
        max_model_len=longest + 1,
        hf_overrides={"model_max_length": longest + 1},
        dtype="bfloat16",
        batch_size="auto",
        gpu_memory_utilization=0.9,
        generation_config="vllm",
    )


def positions_in_vllm(source: str, trust_remote_code: bool = False) -> int | None:
    """Positions that vLLM has a RoPE table for, of the model in the folder or under the hub id ``source``;
    None where its config names no window.

    A linear scaling multiplies the window (docs/footguns.md, 9), YaRN counts from the original one.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).get_text_config()
    window, parameters = getattr(config, "max_position_embeddings", None), rope_parameters(config)
    if window is None:
        return None
    match parameters.get("rope_type"):
        case "linear":
            return int(window * parameters["factor"])
        case "yarn":
            return min(window, int(parameters["original_max_position_embeddings"] * parameters["factor"]))
    return window


def rope_parameters(config) -> dict:
    """Those of the layers that attend to everything."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)


def saved_ends(source: str, tokenizer, trust_remote_code: bool = False) -> list[int]:
    """``ends`` of the model in the folder or under the hub id ``source``, as transformers would load it."""
    from transformers import AutoConfig

    try:
        return ends(GenerationConfig.from_pretrained(source), tokenizer)
    except OSError:  # it has none
        return ends(AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code), tokenizer)


@functools.cache
def _served():
    """The class of the harness' vLLM model that asks as ``LongLM`` does; importing it needs vLLM."""
    from lm_eval.models.vllm_causallms import VLLM

    class Served(Prompting, VLLM):
        def __init__(self, pretrained: str, **options):
            super().__init__(pretrained=pretrained, **options)
            # generation_config="vllm" keeps what is in the folder's file out, and its end tokens with it.
            self.ends = saved_ends(pretrained, self.tokenizer, options.get("trust_remote_code", False))

        def modify_gen_kwargs(self, *arguments, **options):
            kwargs, until, tokens = super().modify_gen_kwargs(*arguments, **options)
            return (
                kwargs | {"stop_token_ids": sorted({*kwargs.get("stop_token_ids", ()), *self.ends})},
                until,
                tokens,
            )

        # The harness cuts what does not fit from the left, with a warning in a log.
        def _fits(self, tokens: int) -> None:
            if tokens > self.max_length - 1:
                raise ValueError(
                    f"a prompt and its answer are {tokens} tokens, and vLLM was started for"
                    f" {self.max_length - 1}; raise the greatest of eval.lengths, or use eval.backend=hf"
                )

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            for text, options in (request.args for request in requests):
                self._fits(len(self.tok_encode(text)) + int(options.get("max_gen_toks", self.max_gen_toks)))
            return super().generate_until(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False):
            for _, context, continuation in requests:
                self._fits(len(context) + len(continuation))
            return super()._loglikelihood_tokens(requests, disable_tqdm)

    return Served


@functools.cache
def _own_tasks():
    """The harness' own tasks; finding them takes some seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def run(
    lm, task: str, metadata: dict, *, generation: dict | None = None, chat_template: bool = False
) -> dict[str, list[dict]]:
    """{task: the harness' samples} of one of the tasks in endprompt/evaluation/tasks on ``lm``, greedy.

    ``metadata`` reaches the task's data function (tokenizer, max_seq_lengths, samples, seed, ...).
    ``generation``: what is passed to ``generate`` beyond the task's own settings.  Errors of the data
    function pass through.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return _samples(lm, task, manager, gen_kwargs=generation, apply_chat_template=chat_template)


def run_own(
    lm,
    task: str,
    *,
    few_shots: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    unsafe_code: bool = False,
) -> dict[str, list[dict]]:
    """{task or subtask: the harness' samples} of one of the harness' own tasks on ``lm``, greedy.

    ``limit``: samples a subtask; None: all.  ``unsafe_code``: whether code that the model writes may run.
    """
    return _samples(
        lm,
        task,
        _own_tasks(),
        num_fewshot=few_shots,
        limit=limit,
        apply_chat_template=chat_template,
        confirm_run_unsafe_code=unsafe_code,
    )


def _samples(lm, task: str, manager, **options) -> dict[str, list[dict]]:
    """What ``manager``'s ``task`` gives under the harness' ``options``, without its own intervals."""
    from lm_eval import simple_evaluate

    with _unlisted():
        found = simple_evaluate(
            lm, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True, **options
        )
    return found["samples"]


@contextlib.contextmanager
def _unlisted() -> Iterator[None]:
    """Inside, the harness does not ask pip for all packages, which takes seconds a call; results carry the
    versions that matter (``provenance.stamp``)."""
    from lm_eval import evaluator

    asked = evaluator.add_env_info
    evaluator.add_env_info = lambda results: None
    try:
        yield
    finally:
        evaluator.add_env_info = asked
