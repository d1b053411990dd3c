"""Numbers of tokens, as people write them on the command line."""

from collections.abc import Callable
from decimal import Decimal, DecimalException

from endprompt import BadInput

MOST = 2**63  # below it, so that no text stands for a number that takes minutes to write out


def tokens(text: str, where: str) -> int:
    """The number of tokens that ``text`` says: 100000000, 100_000_000, 1e8 and 1.0e8 are one number.

    Raises BadInput beginning with ``where`` on what is no whole number, is negative, or beyond MOST.
    """
    try:
        found = Decimal(text) if text.isascii() else None
    except DecimalException:
        found = None
    if found is None or not found.is_finite() or not 0 <= found < MOST or found != found.to_integral_value():
        raise BadInput(f"{where}: give a whole number of tokens, not negative, for example 65536 or 1e8")
    return int(found)


def of(option: str) -> Callable[[str], int]:
    """``tokens`` as argparse takes it, for ``option``."""
    return lambda text: tokens(text, f"{option} {text:.60}")
