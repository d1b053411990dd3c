"""What a run will cost, before it is submitted, and what a training step costs where it is measured.

In come an experiment with a machine, or a model's shape.  Out go memory, FLOPs, hours and step times, for
``endprompt plan`` and the cost tables.

Do not touch lightly: the formulas and what they leave out.  Published figures were made by them.
"""
