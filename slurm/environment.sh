# shellcheck shell=bash
set -euo pipefail
# Sourced by the job scripts in this folder: what all of them need from their environment.
# Slurm runs a copy of the script, so the repository is the folder it runs in, where sbatch was called.
root=$PWD
RECIPE=${RECIPE:-$root/recipes/llama3-8b-64k.yaml} METHOD=${METHOD:-endprompt}
export OUT=${OUT:-$root/runs}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
export PYTHON
if [ ! -f "$RECIPE" ]; then
  echo "${SLURM_JOB_NAME:-slurm}: RECIPE: there is no file $RECIPE; recipes/ holds the ones that come with the repository" >&2
  exit 2
fi
