"""The frozen base as teacher within its window: the student reads rows with jumps, the teacher plain ones.

The loss is the cross entropy of ``pose``'s rows and a Kullback-Leibler divergence to what the base predicts
for the same tokens at 0..n-1 under its own RoPE, which rows of at most its window C allow.  It is meant
against the loss inside the window.  With adapters the teacher is the model without them, and costs no memory;
else every rank holds the base a second time, whole.

The idea is that of arXiv 2604.06070, known from its abstract alone: there a teacher of 17B and a student of
1.1B, short rows packed into 128K, and a base frequency raised by phases.  Open are the weight of the
divergence, its direction, and how positions are packed.
"""

import contextlib

from endprompt import BadInput
from endprompt.bases import loading, model, sharpen
from endprompt.methods import distilling
from endprompt.methods.base import register
from endprompt.methods.pose import Chunked, PoseRows


class Beside:
    """The base as a network of its own."""

    def __init__(self, network):
        self.network = network.requires_grad_(False).eval()

    def hidden_states(self, batch: dict):
        device = batch["input_ids"].device
        if self.network.device != device:
            self.network.to(device)
        return distilling.hidden_states(self.network, batch, distilling.contiguous(batch))

    @property
    def head(self):
        return self.network.get_output_embeddings()


class Within:
    """The base inside a network with adapters, which are off for its predictions, as are the student's RoPE
    and its learnt factors of heads (``rope.sharpen_heads``)."""

    head = None  # the network's own, which no adapter changes

    def __init__(self, network, config):
        self.network = network
        self.rotary = type(network.get_decoder().rotary_emb)(config)

    def hidden_states(self, batch: dict):
        decoder = self.network.get_decoder()
        self.rotary.to(batch["input_ids"].device)
        with self._without_what_is_learnt():
            students, decoder.rotary_emb = decoder.rotary_emb, self.rotary
            try:
                return distilling.hidden_states(self.network, batch, distilling.contiguous(batch))
            finally:
                decoder.rotary_emb = students

    @contextlib.contextmanager
    def _without_what_is_learnt(self):
        from peft.tuners.lora import LoraLayer

        layers = [module for module in self.network.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            layer._disable_adapters = True
        try:
            with sharpen.heads_off(self.network):
                yield
        finally:
            for layer in layers:
                layer._disable_adapters = False


class DistilledRows(PoseRows):
    def recorded(self):
        return distilling.of_rows(self.options)


@register
class SelfDistil(Chunked):
    name = "self_distil"
    summary = "pose, whose predictions are held to those of the frozen base within its window"
    Options = distilling.DistillingOptions
    Rows = DistilledRows
    reads_hidden = True

    def work(self, options):
        return 4 / 3

    def base_beside(self, adapters):
        return adapters is None or adapters.train_embed_norm

    def before_training(self, network, experiment, cuda):
        base, length = experiment.base, experiment.row_length
        if length > base.window:
            raise BadInput(
                f"lengths.physical: the teacher of {self.name} reads at most its window of {base.window}"
                f" tokens, and rows have {length}; lower it"
            )
        if not self.base_beside(experiment.adapters):
            network.teacher = Within(network, base.config)
            return
        with loading.whole_loading():
            network.teacher = Beside(model.build(base, base.own_scheme, network.dtype, cuda))

    def loss_term(self, network, batch, outputs, options):
        import torch

        with torch.no_grad():
            target = network.teacher.hidden_states(batch)
        own, weights = outputs["hidden"], batch["shift_weights"]
        return options.kl_weight * distilling.divergence(network, own, target, weights, network.teacher.head)
