"""Methods of plain text: untrained, the short-row control, and training on rows of the target length."""

from endprompt.methods.base import Method, Rows, register
from endprompt.positions import plans


class PlainRows(Rows):
    """Text at 0..a-1."""

    contiguous = True

    def build(self, cursor, rng):
        if (taken := self.take(cursor, self.length)) is None:
            return None
        text, documents = taken
        return self.row(text, plans.contiguous(len(text), 0, self.target_length, rng), documents)


@register
class Base(Method):
    name = "base"
    summary = "the model as it came: neither scaled nor trained"
    rope = None


@register
class Interpolation(Method):
    name = "interpolation"
    summary = "position interpolation alone, no training"


@register
class Short(Method):
    name = "short"
    summary = "the control: interpolation, trained on plain short rows"
    Rows = PlainRows


@register
class FullLength(Method):
    name = "full_length"
    summary = "interpolation, trained on rows of the target length"
    Rows = PlainRows
    fills = "target"
