"""Models as they come: found, read, refused if they cannot be used, and built with a scaled RoPE.

In come the ``model`` section of a recipe, and a scaling.  Out go config, tokenizer and network, and
sharpened weights of a saved model.

Do not touch lightly: what is refused (foreign code, pickles, configs that contradict themselves), and that
the scaling enters the config before the network is built, for afterwards it does nothing.
"""
