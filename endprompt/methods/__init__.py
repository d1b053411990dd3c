"""Ways of extending a window, one file each; ``base.Method`` says what a method may own.

In come a setting (options, lengths, seed, tokenizer) and a cursor of the corpus.  Out go rows, and what
the method does to RoPE, attention, adapters, loss and trained model.

Do not touch lightly: the order of random draws in a ``build``, and the names of options, which stand in
manifests.  Nothing outside this room asks which method it has.
"""

from endprompt.methods.table import METHODS, UNTRAINED, Method, get, register

__all__ = ["METHODS", "UNTRAINED", "Method", "get", "register"]
