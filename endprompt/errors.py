"""What ends a command with one line: input that the user can mend, and a run that a guard stops."""


class BadInput(Exception):
    """Input that the user can mend: the command line prints its one line and exits with code 2."""


class Failure(RuntimeError):
    """A run that a guard stops, or that lost a rank: the command line prints its one line, exit code 1.

    everywhere: whether every rank prints it, and not the first one alone.
    """

    everywhere = False
