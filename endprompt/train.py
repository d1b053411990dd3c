"""Training: the HF Trainer on DeepSpeed, with a weighted loss and the guards that run before the first step."""

import json
import math
import os
import sys
import time
import warnings
from fractions import Fraction
from pathlib import Path

import torch
import transformers.trainer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from endprompt import BadInput, attention, checkpoint, lora, loss, model, prepare, provenance, s2, sequence, shards
from endprompt.collate import Collator
from endprompt.config import Recipe
from endprompt.methods import Method

CHECKED = "checked-rows"  # the checksums of shards whose rows were looked at once

# The paper's (appendix A.1), where a recipe does not say otherwise.
DEFAULTS = {"learning_rate": 2e-5, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20, "weight_decay": 0.0, "num_train_epochs": 1,
            "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "logging_steps": 10, "save_steps": 200,
            "save_total_limit": 2, "report_to": ["tensorboard"]}

# Dense bf16 peak of one device in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "4090": 165e12}


def batch_shape(recipe: Recipe, method: Method) -> tuple[int, int]:
    """(per_device_train_batch_size, gradient_accumulation_steps) that keep the recipe's tokens a step when rows are longer or shared.

    The recipe counts rows of ``physical_length`` a device; a method with rows of ``target_length`` takes fewer of them, and N devices
    that share rows (sequence parallelism) take N times as many together.
    Raises BadInput if the recipe's step holds less than one such row for each of those that share it.
    """
    rows, accumulation = recipe.train.get("per_device_train_batch_size", 1), recipe.train.get("gradient_accumulation_steps", 1)
    ratio = Fraction(recipe.row_length(method), recipe.lengths.physical * recipe.sequence_parallel)
    if ratio == 1:
        return rows, accumulation
    total = rows * accumulation / ratio
    if total.denominator != 1:
        raise BadInput(f"train: {rows} x {accumulation} rows of {recipe.lengths.physical} tokens are {float(total):g} rows of {recipe.row_length(method)}, which "
                       f"{method.name} trains on; make per_device_train_batch_size x gradient_accumulation_steps a multiple of {ratio.numerator}")
    wide = math.gcd(int(total), max(1, int(rows / ratio)))
    return wide, int(total) // wide


def flops_per_token(config, attended: int, layers_frozen: bool = False, head_frozen: bool = False) -> float:
    """Training FLOPs a token: 6 per weight of every matrix product (the output layer's too, the embedding look-up none), and causal
    attention's 6 x layers x heads x head_dim x attended (QK^T and AV, forward and backward, half of the square).

    attended: the row's length, or the group's in shifted sparse attention.  A frozen weight costs 4, having no gradient of its own;
    the adapters' share, some r / hidden_size of it, is left out.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv = config.num_attention_heads * head_dim, (config.num_key_value_heads or config.num_attention_heads) * head_dim
    layer = config.hidden_size * (2 * heads + 2 * kv) + 3 * config.hidden_size * config.intermediate_size
    matrices = (4 if layers_frozen else 6) * config.num_hidden_layers * layer + (4 if head_frozen else 6) * config.vocab_size * config.hidden_size
    return matrices + 6 * config.num_hidden_layers * heads * attended


class WeightedTrainer(Trainer):
    """The HF Trainer with the loss of Eq. 11, divided by the weights of the whole global batch: the step is the same however rows
    are split over ranks and accumulation.  Text loss and end-prompt loss are logged apart (mean nats a token, unweighted)."""

    def __init__(self, *args, token_flops: float, sequence_parallel: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.token_flops = token_flops
        self.averaged = sequence.averaged_ranks(self.args, sequence_parallel)
        self.loss_is_scaled_for_ga = True
        self.last_metrics: dict[str, float] = {}
        self._sums = torch.zeros(4, dtype=torch.float64)  # text nats, text targets, prompt nats, prompt targets; this rank, since the last log
        self._tokens, self._since = 0, time.perf_counter()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        weights = sum((batch["shift_weights"].sum(dtype=torch.float64) for batch in batches), torch.zeros((), dtype=torch.float64)).to(device)
        return batches, self.accelerator.reduce(weights, "sum")

    def _prepare_input(self, data):
        # Under DeepSpeed the Trainer casts floats to the model's dtype: in bf16 the loss would refuse the weights, and 0.1 be another number than in the divisor.
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        is_prompt = inputs.pop("shift_prompt")
        outputs = model(**inputs)
        # DeepSpeed averages gradients over so many ranks; the divisor already counts all ranks' weights.
        total = outputs["loss_sum"] * (self.averaged / num_items_in_batch).to(torch.float32)
        with torch.no_grad():
            target = inputs["shift_labels"] >= 0
            if outputs["nll"] is None:  # a kernel that only sums; all of it is text
                sums = [outputs["loss_sum"], target.sum(), target.new_zeros(()), target.new_zeros(())]
            else:
                text = target & ~is_prompt
                sums = [(outputs["nll"] * text).sum(), text.sum(), (outputs["nll"] * is_prompt).sum(), is_prompt.sum()]
            self._sums = self._sums.to(target.device) + torch.stack([value.double() for value in sums])
        self._tokens += inputs["input_ids"].numel()
        return (total, outputs) if return_outputs else total

    def training_step(self, *args, **kwargs):
        # What is logged is the mean of this over all ranks.
        return super().training_step(*args, **kwargs) * (self.args.world_size / self.averaged)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            text, texts, prompt, prompts = self.accelerator.reduce(self._sums, "sum").tolist()
            seconds = time.perf_counter() - self._since
            speed = self._tokens * self.args.world_size / seconds
            logs = {**logs, "text_loss": text / max(texts, 1), "tokens_per_second": round(speed, 1)}
            if prompts:
                logs["end_prompt_loss"] = prompt / prompts
            if torch.cuda.is_available():
                name = torch.cuda.get_device_name()
                peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
                if peak:
                    logs["mfu"] = round(speed * self.token_flops / (peak * self.args.world_size), 4)
                logs["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
            else:
                import resource

                logs["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
            self.last_metrics = {key: value for key, value in logs.items() if isinstance(value, int | float)}
            self._sums.zero_()
            self._tokens, self._since = 0, time.perf_counter()
        super().log(logs, start_time)


class Probe(TrainerCallback):
    """Runs the liveness probe on every rank, on the wrapped model and a batch of the collator, before the first step."""

    def __init__(self, dataset, collator, sequence_parallel: int):
        self.dataset, self.collator, self.sequence_parallel, self.moved = dataset, collator, sequence_parallel, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        row, shared = self.dataset[rank // self.sequence_parallel % len(self.dataset)], self.sequence_parallel > 1
        # Ulysses is built for micro-batches of one size.
        batch = self.collator([row] * (args.per_device_train_batch_size if shared else 1))
        training = model.training
        model.train()  # attention may differ between training and inference; what trains is what is probed
        self.moved = (sequence if shared else attention).probe(model, {name: tensor.to(args.device) for name, tensor in batch.items()})
        model.train(training)


def set_up_environment() -> bool:
    """Decides GPU or CPU and tells DeepSpeed, which reads its environment on import; returns whether there is a GPU."""
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed calls collectives by names that newer torch renamed; at every step and layer, that is a flood.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    return cuda


def training_arguments(recipe: Recipe, method: Method, run: Path, cuda: bool) -> TrainingArguments:
    rows, accumulation = batch_shape(recipe, method)
    given = {key: value for key, value in recipe.train.items() if key not in ("lora", "sequence_parallel")}
    platform = {"bf16": True, "optim": "adamw_torch_fused"} if cuda else {"bf16": False, "use_cpu": True, "ddp_backend": "gloo", "optim": "adamw_torch"}
    # transformers 5.23 renamed gradient_checkpointing; the old name serves all of 5.x.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
    # The Trainer reads the TensorBoard folder from the environment.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "logs")
    try:
        return TrainingArguments(**{
            "seed": recipe.data.seed, **DEFAULTS, **platform, **given, "output_dir": str(run / "checkpoints"), "remove_unused_columns": False,
            "per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, "logging_nan_inf_filter": False, "do_train": True,
            # The loss stays ours: Liger's patched forward would not know the weights.
            **({"liger_kernel_config": {"fused_linear_cross_entropy": False, "cross_entropy": False, **(recipe.train.get("liger_kernel_config") or {})}}
               if recipe.train.get("use_liger_kernel") else {}),
            **({"parallelism_config": sequence.parallelism(recipe.sequence_parallel, model.attention_implementation(recipe, cuda), int(os.environ["WORLD_SIZE"]))}
               if recipe.sequence_parallel > 1 else {}),
            "label_names": ["shift_labels"], "disable_tqdm": recipe.train.get("disable_tqdm", not sys.stderr.isatty())})
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise BadInput(f"train: transformers refuses these arguments: {str(error).strip().splitlines()[0]}") from None


def load_rows(recipe: Recipe, method: Method, tokenizer, folder: Path, verify: bool):
    """The shards as a memory-mapped dataset.  Raises BadInput where they are missing, damaged, or of another recipe or tokenizer."""
    manifest = shards.read_manifest(folder)
    if differing := shards.disagreements(manifest, prepare.settings(recipe, method, tokenizer)):
        raise BadInput(f"shards: {folder} do not belong to this recipe and method ({'; '.join(differing)}); prepare them again, or mend the recipe")
    if verify:
        shards.verify(folder, manifest)
        checked, sums = folder / ".cache" / CHECKED, "".join(shard["sha256"] + "\n" for shard in manifest["shards"])
        if not checked.is_file() or checked.read_text(errors="replace") != sums:
            shards.check_rows(folder, manifest)
            checked.parent.mkdir(exist_ok=True)
            shards.write_atomically(checked, sums.encode())
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset("parquet", data_files=[str(path) for path in shards.files(folder, manifest)], split="train",
                                 cache_dir=str(folder / ".cache"), keep_in_memory=False), manifest


def sample(dataset, collator: Collator, ends: int = 64) -> dict[str, torch.Tensor]:
    """The first row's first and last ``ends`` tokens at their positions, as a batch; the same on every rank."""
    row = dict(dataset[0])
    kept = sorted({*range(len(row["input_ids"]))[:ends], *range(len(row["input_ids"]))[-ends:]})
    return collator([{**row, **{name: [row[name][index] for index in kept] for name in ("input_ids", "position_ids", "loss_weights")}}])


def train(recipe: Recipe, method: Method, run: Path) -> dict:
    """Trains ``method`` on the shards in ``run`` and leaves a plain HF model in ``run/model``; returns the summary it wrote to train.json.

    Goes on from the newest whole checkpoint.  Raises BadInput on unusable input, RuntimeError when a guard refuses the run.
    """
    cuda = set_up_environment()
    main = int(os.environ["RANK"]) == 0
    tokenizer = model.load_tokenizer(recipe)
    dataset, manifest = load_rows(recipe, method, tokenizer, run / "shards", verify=int(os.environ["LOCAL_RANK"]) == 0)
    config, shared = model.load_config(recipe), recipe.sequence_parallel
    model.check_vocabulary(tokenizer, config, f"model: the tokenizer of {recipe.model.name_or_path!r}")
    sequence.check(recipe, method, config, model.attention_implementation(recipe, cuda), int(os.environ["WORLD_SIZE"]), manifest)
    arguments = training_arguments(recipe, method, run, cuda)
    if arguments.deepspeed:
        import deepspeed

        if not cuda:
            # DeepSpeed would compile a C++ all-reduce over shared memory first; gloo does it, and the first run starts a minute earlier.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Partitioned loading below asks DeepSpeed for the number of ranks; on CPU accelerate has not told it yet.
        deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    scaling, theta = model.scaling(recipe, method, config), config.rope_parameters["rope_theta"]
    network = model.build(recipe, method, torch.bfloat16 if arguments.bf16 else torch.float32, cuda)
    loss.attach(network, uniform=not method.end_prompt)
    adapters, group = recipe.lora(method), recipe.group_size(method)
    if adapters:
        lora.inject(network, adapters, arguments.seed)
    own_attention = s2.install(network, group) if group else None
    if shared > 1:
        plain_attention = ALL_ATTENTION_FUNCTIONS[network.config._attn_implementation]  # DeepSpeed puts its own in this place
        sequence.hold_frequencies(network, recipe.row_length(method))
        transformers.trainer.skip_first_batches = sequence.skip_first_batches
    network.config.endprompt = {"method": method.name, "original_length": model.original_length(recipe, config),
                                "physical_length": recipe.row_length(method), "target_length": recipe.lengths.target,
                                **({"lora": adapters.model_dump()} if adapters else {}), **({"s2_group_size": group} if group else {})}
    collator = Collator(model.pad_token_id(tokenizer), recipe.lengths.target, sharded=shared > 1)
    probe = Probe(dataset, collator, shared)
    trainer = WeightedTrainer(model=network, args=arguments, train_dataset=dataset, data_collator=collator, sequence_parallel=shared,
                              token_flops=flops_per_token(network.config, group or recipe.row_length(method), bool(adapters),
                                                          not network.get_output_embeddings().weight.requires_grad),
                              callbacks=[probe, checkpoint.MarkComplete(), *([sequence.NewEpoch()] if shared > 1 else [])])
    newest = checkpoint.newest_complete(run / "checkpoints", sys.stderr if main else None)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    seconds = time.perf_counter() - started
    if shared > 1:
        ALL_ATTENTION_FUNCTIONS[network.config._attn_implementation] = plain_attention
        collator.sharded = False
    if own_attention:
        s2.uninstall(network, own_attention)
    merged = checkpoint.save_final(trainer, tokenizer, run / "model", scaling, theta, sample(dataset, collator) if adapters else None)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    summary = {"recipe": recipe.name, "method": method.name, "steps": trainer.state.global_step, "resumed_from": newest.name if newest else None,
               "rows": manifest["rows"], "tokens": manifest["tokens"], "world_size": arguments.world_size, "seconds": round(seconds, 1), "probe": probe.moved,
               **({"merge_difference": merged} if adapters else {}),
               **{f"final_{key}": value for key, value in trainer.last_metrics.items() if key not in ("epoch",)}, "history": history, **provenance.stamp()}
    if main:
        shards.write_json(run / "train.json", summary)
        print(json.dumps({key: value for key, value in summary.items() if key not in ("history", "versions")}), flush=True)
    return summary
