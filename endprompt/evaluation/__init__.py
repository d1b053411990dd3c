"""From a model to scores, by lm-evaluation-harness.

In come an experiment, or any other model's folder, and benchmark data.  Out go one JSON file a task and
length, the answers beside it in the official fields, and pictures.

Do not touch lightly: prompts, scorers, seeds of samples and the fields of result files.  A score is made
again wherever ``question`` says that its code or data changed.
"""
