"""Context-window extension of LLaMA-family models from short rows (EndPrompt, arXiv 2605.14589)."""

__version__ = "0.1.0"


class BadInput(Exception):
    """Input that the user can mend: the command line prints its one line and exits with code 2."""


class Failure(RuntimeError):
    """A run that a guard stops, or that lost a rank: the command line prints its one line and exits with code
    1.

    everywhere: whether every rank prints it, and not the first one alone.
    """

    everywhere = False
