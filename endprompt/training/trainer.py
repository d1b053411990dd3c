"""The HF Trainer with the weighted loss, its logs, and the probe before its first step."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from endprompt.bases import counting
from endprompt.training import checkpoint, dealing, sequence
from endprompt.training import probe as attention
from endprompt.training.dataset import first_with_jump

# Dense bf16 peak of one device in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}


def flops_per_token(config, attended: int, layers_frozen: bool = False, head_frozen: bool = False) -> float:
    """Training FLOPs a token: 6 per weight of every matrix product that it goes through (the output layer's
    too, the embedding look-up none; of experts, those that it is sent to), and causal attention's 6 x layers
    x heads x head_dim x attended (QK^T and AV, forward and backward, half of the square; less in layers with
    a window of their own).

    attended: the row's length, or the group's in shifted sparse attention.  A frozen weight costs 4, having
    no gradient of its own; the adapters' share, some r / hidden_size of it, is left out.
    """
    matrices = (4 if layers_frozen else 6) * counting.products(config) + (
        4 if head_frozen else 6
    ) * config.vocab_size * config.hidden_size
    return matrices + 6 * counting.attended(config, attended)


def kinds(target: torch.Tensor, is_prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks [rows, columns] of the targets of text, of the prompt, and of the prompt without its first token
    in a row.
    """
    later = is_prompt.clone()
    later[:, 1:] &= is_prompt[:, :-1]
    later[:, 0] = False
    return target & ~is_prompt, is_prompt, later


def is_over(state) -> bool:
    """Whether a run has all of its steps."""
    return state.global_step >= state.max_steps


class WeightedTrainer(Trainer):
    """The HF Trainer with the loss of Eq. 11, divided by the weights of the whole global batch: the step is
    the same however rows are split over ranks and accumulation.  Text loss and end-prompt loss are logged
    apart (mean nats a token, unweighted), and of the latter also the mean without the prompt's first token:
    where the text ends cannot be foretold, what follows the first token can.
    """

    def __init__(
        self,
        *args,
        token_flops: float,
        sequence_parallel: int = 1,
        loss_term=None,
        reads_hidden=False,
        **kwargs,
    ):
        """loss_term: (network, batch, outputs) -> a scalar added to the batch's sum, or None; see Method."""
        super().__init__(*args, **kwargs)
        self.asked = {"with_hidden": True} if reads_hidden else {}
        self.token_flops, self.sequence_parallel = token_flops, sequence_parallel
        self.loss_term = loss_term
        self.averaged = sequence.averaged_ranks(self.args, sequence_parallel)
        self.loss_is_scaled_for_ga = True
        self.last_metrics: dict[str, float] = {}
        # Nats and targets of text, prompt, prompt without its first token, and all tokens of rows; this rank,
        # since the last log.
        self._sums = torch.zeros(7, dtype=torch.float64, device="cpu")
        self._since = time.perf_counter()
        self.micro_batches: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # of the step under way, for the watch

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoint.load_renamed(model or self.model, Path(resume_from_checkpoint))

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        dealing.fill_evenly(loader, self.args.world_size)
        return loader

    def set_initial_training_values(self, args, dataloader, *more):
        """The Trainer's values, for as many micro-batches an epoch as hold a row where ranks share rows."""
        values = super().set_initial_training_values(args, dataloader, *more)
        if self.sequence_parallel == 1 or args.dataloader_drop_last:
            return values
        _, _, examples, samples, rows_per_step, _, _ = values
        micro = dealing.shared_micro_batches(
            len(self.train_dataset), args.per_device_train_batch_size, args.world_size, self.sequence_parallel
        )
        steps = math.ceil(micro / args.gradient_accumulation_steps)
        most = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)
        return math.ceil(most / steps), steps, examples, samples, rows_per_step, micro, most

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # The Trainer asks only after a step: from the last checkpoint, it would train one more.
        if is_over(self.state):
            self.control.should_training_stop = True
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        weights = sum(
            (batch["shift_weights"].sum(dtype=torch.float64) for batch in batches),
            torch.zeros((), dtype=torch.float64, device="cpu"),
        ).to(device)
        return batches, self.accelerator.reduce(weights, "sum")

    def _prepare_input(self, data):
        # Under DeepSpeed the Trainer casts floats to the model's dtype: in bf16 the loss would refuse the
        # weights, and 0.1 be another number than in the divisor.
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        is_prompt, rows = inputs.pop("shift_prompt"), inputs.pop("row_numbers")
        outputs = model(**inputs, **self.asked)
        loss_sum = outputs["loss_sum"]
        with self.accelerator.autocast():  # the term may call parts of the network, around which nothing is
            network = self.accelerator.unwrap_model(model)
            more = self.loss_term(network, inputs, outputs) if self.loss_term else None
        if more is not None:
            loss_sum = loss_sum + more
        self.micro_batches.append((rows, loss_sum.detach()))
        # DeepSpeed averages gradients over so many ranks; the divisor already counts all ranks' weights.
        total = loss_sum * (self.averaged / num_items_in_batch).to(torch.float32)
        with torch.no_grad():
            target = inputs["shift_labels"] >= 0
            tokens = target.any(1).sum() * target.shape[1]  # a filler has no targets
            if outputs["nll"] is None:  # a kernel that only sums; all of it is text
                sums = [outputs["loss_sum"], target.sum(), *[target.new_zeros(())] * 4, tokens]
            else:
                sums = [
                    *(
                        value
                        for kind in kinds(target, is_prompt)
                        for value in ((outputs["nll"] * kind).sum(), kind.sum())
                    ),
                    tokens,
                ]
            self._sums = self._sums.to(target.device) + torch.stack([value.double() for value in sums])
        return (total, outputs) if return_outputs else total

    def training_step(self, *args, **kwargs):
        # What is logged is the mean of this over all ranks.
        return super().training_step(*args, **kwargs) * (self.args.world_size / self.averaged)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            text, texts, prompt, prompts, later, laters, tokens = self.accelerator.reduce(
                self._sums, "sum"
            ).tolist()
            seconds = time.perf_counter() - self._since
            speed = tokens / seconds
            logs = {**logs, "text_loss": text / max(texts, 1), "tokens_per_second": round(speed, 1)}
            if prompts:
                logs |= {"end_prompt_loss": prompt / prompts, "end_prompt_later_loss": later / max(laters, 1)}
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
            self._since = time.perf_counter()
        super().log(logs, start_time)


class Probe(TrainerCallback):
    """Runs the liveness probe on every rank, on the wrapped model and a batch of the collator, before the
    first step.
    """

    def __init__(self, dataset, collator, sequence_parallel: int):
        self.dataset, self.collator, self.sequence_parallel, self.moved = (
            dataset,
            collator,
            sequence_parallel,
            None,
        )
        self.trainer: Any = None  # set once it is built

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        shared = self.sequence_parallel > 1
        number = rank // self.sequence_parallel % len(self.dataset)
        # Only a jump can be read as a boundary: a row without one says nothing of the others.  Rows that
        # ranks share have none.
        row = self.dataset[number if shared else first_with_jump(self.dataset, number)]
        # Ulysses is built for micro-batches of one size.
        batch = self.collator([row] * (args.per_device_train_batch_size if shared else 1))
        training = model.training
        model.train()  # attention may differ between training and inference; what trains is what is probed
        with (
            self.trainer.accelerator.autocast()
        ):  # the probe calls the decoder itself, not the forward that accelerate wraps
            self.moved = (sequence if shared else attention).probe(
                model, {name: tensor.to(args.device) for name, tensor in batch.items()}
            )
        model.train(training)
