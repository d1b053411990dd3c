"""LongLoRA (arXiv 2309.12307): shifted sparse attention in training, LoRA with embeddings and norms
trained.
"""

import contextlib

from pydantic import Field

from endprompt import BadInput
from endprompt.bases import families
from endprompt.methods.base import Method, Options, register
from endprompt.methods.plain import PlainRows


class GroupOptions(Options):
    s2_group_size: int | None = Field(
        None, gt=1, description="tokens that attend to each other; null: a quarter of a row"
    )


class LongRows(PlainRows):
    def recorded(self):
        return {}  # groups change no row


@register
class LongLora(Method):
    name = "longlora"
    summary = "shifted sparse attention, LoRA with embeddings and norms trained, rows of the target length"
    Options = GroupOptions
    Rows = LongRows
    fills = "target"
    whole_factor = True
    adapters = {"r": 8, "alpha": 16.0, "train_embed_norm": True}

    def attended(self, options, length):
        return options.s2_group_size or max(2, length // 4)

    @contextlib.contextmanager
    def attention(self, network, options, length):
        from endprompt.methods.longlora import s2

        if families.of(network.config).local:
            raise BadInput(
                f"{self.name}: some layers of a {network.config.model_type} model have a sliding window,"
                " which shifted sparse attention would replace; choose another method or base"
            )
        before = s2.install(network, self.attended(options, length))
        yield
        s2.uninstall(network, before)

    def refuses_shared_rows(self):
        return "shifts its own attention"

    def note(self, options, length):
        return {"s2_group_size": self.attended(options, length)}
