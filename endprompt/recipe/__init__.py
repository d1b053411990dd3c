"""What the user asks for: a strict recipe, and the experiment that a command makes of it.

In come a YAML file, overrides and the name of a method.  Out goes one frozen ``Experiment``, which everything
after it takes, and the resolved recipe that is kept beside the results.

Do not touch lightly: names of keys (earlier ones live on in ``former_keys``), defaults, and the refusal of
whatever is not known to have its effect.
"""
