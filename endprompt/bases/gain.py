"""What a base gains from context: the loss of tokens after little context minus that after much.

The measure of LongFilter (arXiv 2510.25804, known from its abstract alone), within the window that the base
came with, so that no scaling is involved.  ``endprompt.evaluation.far_gain`` asks the same of a trained model
beyond that window, of texts in place of tokens.
"""

import functools

import numpy as np

from endprompt.bases import families, model
from endprompt.bases.model import Base

TOKENS = {"cuda": 2**16, "cpu": 2**12}  # read at a time, in rows of equal length
LOGITS = 2**24  # held at a time


class Reader:
    """The base as it came, which reads rows of tokens: in bfloat16 on a GPU, in float32 on CPU.

    Its weights are loaded when it is first asked.
    """

    def __init__(self, base: Base):
        self.base = base

    @functools.cached_property
    def network(self):
        """Raises BadInput and Failure, see ``model.build``."""
        import torch

        cuda = torch.cuda.is_available()
        dtype = torch.bfloat16 if cuda else torch.float32
        network = model.build(self.base, self.base.own_scheme, dtype, cuda)
        return network.requires_grad_(False).eval().to("cuda" if cuda else "cpu")

    @functools.cached_property
    def divisor(self) -> float:
        """Of the logits."""
        key = families.of(self.base.config).divisor
        return 1.0 if key is None else float(getattr(self.base.config, key))

    def losses(self, rows: np.ndarray, scored: int) -> np.ndarray:
        """Float64 [n]: the mean loss in nats of the last ``scored`` tokens of each of ``rows`` [n, length],
        token ids of texts without padding; scored is below length.

        A row's loss depends on how many rows are given with it in the last digits.
        """
        import torch

        device = self.network.device
        many = max(1, TOKENS.get(device.type, TOKENS["cpu"]) // rows.shape[1])
        with torch.inference_mode():
            found = [
                self._losses(torch.from_numpy(rows[start : start + many].astype(np.int64)).to(device), scored)
                for start in range(0, len(rows), many)
            ]
            return torch.cat(found).double().cpu().numpy()

    def _losses(self, ids, scored: int):
        """Float32 [n] of ``losses``, for ids int64 [n, length] that are read at once."""
        import torch

        hidden = self.network.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        hidden, labels = hidden[:, -scored:].flatten(0, 1), ids[:, -scored:].flatten()
        head = self.network.get_output_embeddings()
        chunk = max(16, LOGITS // head.weight.shape[0])
        nats = [
            torch.nn.functional.cross_entropy(
                head(hidden[start : start + chunk]).float() / self.divisor,
                labels[start : start + chunk],
                reduction="none",
            )
            for start in range(0, len(hidden), chunk)
        ]
        return torch.cat(nats).view(len(ids), scored).mean(1)
