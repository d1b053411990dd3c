"""What a command says when it ends early: one line."""

import sys


def say(error: Exception | str) -> None:
    line = " ".join(str(error).split())  # names of files and columns may hold what a terminal would obey
    print(
        "endprompt:",
        "".join(character if character.isprintable() else repr(character)[1:-1] for character in line),
        file=sys.stderr,
    )
