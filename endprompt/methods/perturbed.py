"""Two views of a row held together: positions with jumps, and the same tokens without (arXiv 2604.14339).

The view with jumps is that of ``pose``.  It has the cross entropy, and its predictions are held by a
Kullback-Leibler divergence to those of the same tokens at 0..n-1, which are constants of a step.

Known from the abstract alone: clean positions, the same tokens with stretches shifted in order, the loss of
one view and a weight times the divergence of both.  Open are the weight, how far stretches are shifted, which
view has the loss, which of the two is the constant, and the direction of the divergence.
"""

from typing import Literal

from pydantic import Field

from endprompt.methods import distilling
from endprompt.methods.base import register
from endprompt.methods.pose import Chunked, PoseRows


class PerturbedOptions(distilling.DistillingOptions):
    kl_target: Literal["clean", "perturbed"] = Field(
        "clean", description="the view whose predictions are the constant; the other's are held to them"
    )


class PerturbedRows(PoseRows):
    def recorded(self):
        return distilling.of_rows(self.options)


@register
class Perturbed(Chunked):
    name = "perturbed"
    summary = "pose, whose predictions are held to those of the same tokens without jumps"
    Options = PerturbedOptions
    Rows = PerturbedRows
    reads_hidden = True

    def work(self, options):
        return 4 / 3 if options.kl_target == "clean" else 2.0

    def loss_term(self, network, batch, outputs, options):
        import torch

        moves = options.kl_target == "perturbed"
        with torch.set_grad_enabled(moves and torch.is_grad_enabled()):
            clean = distilling.hidden_states(network, batch, distilling.contiguous(batch))
        own, target = (clean, outputs["hidden"]) if moves else (outputs["hidden"], clean)
        return options.kl_weight * distilling.divergence(network, own, target, batch["shift_weights"])
