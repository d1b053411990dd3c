"""What a command says when it ends early: one line."""

import sys
import time

PATIENCE = 2.0  # seconds


def say_or_wait(error: Exception | str, speaks: bool) -> None:
    """Says ``error`` on the rank that speaks.  The others wait, for torchrun ends all ranks as soon as it
    sees one end, and the message would be lost.
    """
    if speaks:
        say(error)
    else:
        time.sleep(PATIENCE)


def say(error: Exception | str) -> None:
    line = " ".join(str(error).split())  # names of files and columns may hold what a terminal would obey
    print(
        "endprompt:",
        "".join(character if character.isprintable() else repr(character)[1:-1] for character in line),
        file=sys.stderr,
    )
