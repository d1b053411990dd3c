"""A run's folder, and what surrounds the process that works in it.

In come the folder and the environment of a launcher.  Out go locks, status, the checkpoint to resume from,
the rank, the stamp (commit, versions, device, date) that every result carries, the model card, and copies of
the model for serving.

Do not touch lightly: names in the folder, the marker that makes a checkpoint whole, and who may hold what.
No module here imports torch as it is loaded, for ``endprompt status`` must be quick.
"""
