"""DroPE (arXiv 2512.12167, github.com/SakanaAI/DroPE): a trained model goes on training without positions.

A linear factor of 10^9 turns no pair by more than 10^-9 a position, so that any engine reads the model as one
without RoPE.  Layers with a sliding window and a RoPE of their own keep both.

There Llama-2-7B takes 10B tokens at a learning rate of 1e-4, which is far more than the other methods get.
Rows of the base's window are assumed.  How attention is kept sharp beyond them is open here; ``rope.sharpen``
is what there is.
"""

from endprompt import BadInput
from endprompt.methods.base import Method, register
from endprompt.methods.plain import PlainRows
from endprompt.positions.rope import Asked, Default, Linear

FACTOR = 1e9


@register
class Drope(Method):
    name = "drope"
    summary = "plain short rows without positions"
    Rows = PlainRows

    def scaling(self, asked, own, window, target_length):
        if asked != Asked(None):
            raise BadInput(f"rope: {self.name} trains without positions; remove type, theta and long_factor")
        if not isinstance(own, Default):
            raise BadInput(
                f"rope: the model's RoPE is scaled by {own.name} already, which {self.name} would have to"
                " take back; start from the unscaled base model"
            )
        return Linear(FACTOR)
