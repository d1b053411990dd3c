"""Where tokens stand: the position of every token of a row, and the RoPE that turns positions into angles.

In come lengths and a random generator.  Out go strictly increasing positions below the target length, and
frequencies with the parameters that a config of Hugging Face needs for them.

Do not touch lightly: the order of random draws in ``plans`` (shards must stay the same byte for byte), and
the two checks, ``plans.check`` of positions and ``rope.verify`` of a built model's frequencies.
"""
