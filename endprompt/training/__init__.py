"""From shards and a scaled model to a trained one.

In come an experiment and its shards.  Out go checkpoints, logs, ``train.json`` and a folder ``model/`` that
plain transformers loads.

Do not touch lightly: the guards before the first step (liveness, frequencies, manifest) and after the last
(the saved model is read back), how the loss is divided among rows and ranks, and the order of rows.
"""
