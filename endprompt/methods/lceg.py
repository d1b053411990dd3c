"""LCEG's protocol (github.com/Leooyii/LCEG): full-length training under a held NTK scaling.

LCEG compares several scalings; the paper names "LCEG" without saying which it means.  NTK with the
frequencies of L held is the default here; rope.type linear or yarn, both at L / C, are the others.
"""

from endprompt.methods.base import Method, register
from endprompt.methods.plain import PlainRows


@register
class Lceg(Method):
    name = "lceg"
    summary = "LCEG's protocol: NTK scaling held at the target's frequencies, rows of the target length"
    Rows = PlainRows
    fills = "target"
    rope = "ntk"
    whole_factor = True
