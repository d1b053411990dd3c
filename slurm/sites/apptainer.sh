# shellcheck shell=bash
# A container.  Copy to slurm/site.sh, or name it: ENDPROMPT_SITE=slurm/sites/apptainer.sh.  Change: the image
# and the folders that are bound.  The image needs Python 3.11, a GPU build of torch and what
# `pip install -c constraints.txt .` installs; the code itself is the repository's, which is bound.

# Slurm's own commands stay outside; every Python of a job, torchrun and its ranks run inside, one container
# a node.  --nv: the driver's libraries.  No --cleanenv, since recipes/run.sh reads its environment, and no
# --pid, so that Slurm's signals reach the ranks.  --bind: the repository and OUT; add the folders of model
# and corpus.
mkdir -p "$OUT"
# shellcheck disable=SC2034 # slurm/environment.sh reads it
launcher=(apptainer exec --nv --bind "$PWD,$OUT${BINDS:+,$BINDS}" --pwd "$PWD"
  "${IMAGE:-$HOME/images/endprompt.sif}")
export PYTHON=python3
