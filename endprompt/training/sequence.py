"""Sequence parallelism: a row's tokens spread over N ranks, by DeepSpeed's Ulysses (ALST) as the HF Trainer
and accelerate drive it.

Around attention, all-to-all exchanges swap a share of the tokens for a share of the heads, so that every rank
attends over whole rows with some of the heads.  Ulysses drops the attention mask, so rows must be contiguous,
equally long and without padding.

DeepSpeed's data loader deals every rank its own micro-batch, then lets the N ranks of a group work through
their N micro-batches.  With several groups, N consecutive steps therefore hold the rows that they would hold
without, but in another order, unless gradient_accumulation_steps is a multiple of N. Sources:
arXiv:2309.14509, arXiv:2506.13996; deepspeed/runtime/sequence_parallel/ulysses_sp.py.
"""

import itertools

import torch
from transformers import TrainerCallback

from endprompt import BadInput, Failure
from endprompt.bases import families
from endprompt.recipe.experiment import Experiment
from endprompt.training import probe as attention


def check(experiment: Experiment, attention: str, ranks: int, manifest: dict) -> None:
    """Raises BadInput naming ``train.sequence_parallel`` unless the method, the model, the shards and the
    ranks allow it.

    attention: the implementation that will train; ranks: of the whole world; manifest: of the shards.
    """
    recipe, length = experiment.recipe, experiment.row_length
    n, key = recipe.sequence_parallel, "train.sequence_parallel"
    if n == 1:
        return
    if not recipe.train.get("deepspeed"):
        raise BadInput(
            f"{key}: it is DeepSpeed's; set train.deepspeed, for example to ds_configs/zero3.json, or remove"
            " the key"
        )
    if why := experiment.method.refuses_shared_rows():
        raise BadInput(
            f"{key}: {experiment.method.name} {why}, and Ulysses attends without a mask; it serves"
            " full_length, lceg and short, so remove the key"
        )
    if ranks % n:
        raise BadInput(
            f"{key}: {n} does not divide the {ranks} ranks; start a multiple of {n}, or choose another"
        )
    config = experiment.base.config
    if families.of(config).local:
        raise BadInput(
            f"{key}: some layers of a {config.model_type} model have a sliding window, and Ulysses attends"
            " without a mask; remove the key"
        )
    heads, kv = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if heads % n or (kv % n and n % kv):
        raise BadInput(
            f"{key}: {n} does not divide the model's {heads} attention heads ({kv} of keys and values);"
            " choose a number that does"
        )
    if attention == "eager":
        raise BadInput(
            f"{key}: Ulysses takes no eager attention; set model.attn_implementation to sdpa or null"
        )
    if length % n:
        raise BadInput(f"{key}: {n} does not divide rows of {length} tokens; choose a number that does")
    if manifest["tokens"] != manifest["rows"] * length:
        raise BadInput(
            f"{key}: rows of different lengths would need padding, which Ulysses does not mask; set"
            " data.packing to cut"
        )


def parallelism(n: int, attention: str, ranks: int):
    """The ``parallelism_config`` of TrainingArguments for ``n`` ranks a row."""
    from accelerate import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    # accelerate computes DeepSpeed's train_batch_size from dp_shard_size, so it has to be said.
    return ParallelismConfig(
        sp_size=n,
        sp_backend="deepspeed",
        dp_shard_size=ranks // n,
        sp_handler=DeepSpeedSequenceParallelConfig(
            sp_seq_length_is_variable=True, sp_attn_implementation=attention
        ),
    )


def averaged_ranks(arguments, n: int) -> int:
    """By how many ranks DeepSpeed divides the sum of all ranks' gradients when ``n`` share a row.

    ZeRO-3's reduce_scatter divides by all of them (reduce_scatter_coalesced), the other stages by those that
    do not share rows (world_size / sequence_parallel_size); DeepSpeed 0.19.  tests/test_sequence_parallel.py
    measures both. Raises BadInput for ZeRO-3 without reduce_scatter, where the divisor depends on a tensor's
    size.
    """
    if n == 1:
        return arguments.world_size
    zero = arguments.hf_deepspeed_config.config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        return arguments.world_size // n
    if not zero.get("reduce_scatter", True):
        raise BadInput(
            'train.sequence_parallel: it needs ZeRO-3\'s reduce_scatter; take "reduce_scatter": false out of'
            " train.deepspeed's file"
        )
    return arguments.world_size


def skip_first_batches(dataloader, count: int = 0):
    """What accelerate's function of this name does, for DeepSpeed's data loader too, which it cannot skip in:
    those batches are read and dropped.
    """
    from accelerate import skip_first_batches as skip
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter

    return (
        itertools.islice(dataloader, count, None)
        if isinstance(dataloader, UlyssesSPDataLoaderAdapter)
        else skip(dataloader, count)
    )


class NewEpoch(TrainerCallback):
    """Starts DeepSpeed's data loader afresh, in the epoch's order.

    It hides ``set_epoch`` from the Trainer, and, since the Trainer asks for no more batches than an epoch
    has, it would begin every later epoch with the end of the one before: no batch at all.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dl.set_epoch(int(state.epoch))
        train_dataloader.iter = iter(train_dataloader.dl)
        train_dataloader.micro_batches.clear()


@torch.no_grad()
def probe(model, batch: dict[str, torch.Tensor], last: int = 64) -> float:
    """Replaces the tokens of the first rank's shard by others and measures how far the logits of every other
    rank's shard move.

    batch: whole rows, the same on all ranks of a group, as many as a micro-batch has.  All ranks must call it
    together, the model in training mode (outside it, DeepSpeed attends within a shard).  Returns the largest
    change of the last ``last`` tokens of the first row's shard, in units of the logits' standard deviation,
    on the rank where it is least (0.0 exactly when cut off). Raises Failure on all ranks if that is below
    1e-3: the run would train shards that cannot see each other.
    """
    from deepspeed.utils import groups

    group, n, rank = (
        groups._get_sequence_parallel_group(),
        groups._get_sequence_parallel_world_size(),
        groups._get_sequence_parallel_rank(),
    )
    part = batch["input_ids"].shape[1] // n
    here = slice(part * rank, part * (rank + 1))
    ids, position_ids = batch["input_ids"][:, here], batch["position_ids"][:, here]
    changed = (ids + 1) % model.config.vocab_size if rank == 0 else ids

    def run(tokens):
        with attention.same_draws(ids.device):
            hidden = model.get_decoder()(
                input_ids=tokens, position_ids=position_ids, use_cache=False
            ).last_hidden_state
            return model.get_output_embeddings()(hidden[:1, -last:]).float()

    before, after = run(ids), run(changed)
    moved = (after - before).abs().max() / before.std().clamp_min(1e-12)
    # The first shard moves by itself.  Not a number counts as nothing, since a minimum might pass it over.
    least = (
        torch.where(moved.isnan(), 0.0, moved)
        if rank
        else torch.full_like(moved, torch.finfo(moved.dtype).max)
    )
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group)
    if not float(least) >= 1e-3:
        raise Failure(
            f"liveness probe: changing all {part} tokens of the first rank's shard moves the logits of"
            f" another rank's by {float(least):.1e} standard deviations, so the shards cannot see each other"
            f" (attention {model.config._attn_implementation!r}, train.sequence_parallel {n})"
        )
    return float(least)
