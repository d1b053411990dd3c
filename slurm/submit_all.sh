#!/usr/bin/env bash
# Submits prepare (in parts) -> train -> evaluate for each method, chained by their dependencies, and prints
# the job numbers; of a method that trains nothing, evaluate alone.
#   bash slurm/submit_all.sh [METHOD ...]                      (endprompt)
# Environment: RECIPE, OUT, PYTHON and ENDPROMPT_SITE as in train_64k.sbatch; PARTS (8) tasks that prepare;
# EVALS (5) tasks that evaluate; NODES (1) that train; PREPARE_OPTIONS, TRAIN_OPTIONS, EVAL_OPTIONS: more
# options of sbatch for that job, for example "--partition=gpu --account=me"; the site's file may set them
# too.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
if [ $# -gt 0 ] && [[ $1 == -* ]]; then
  sed -n '2,/^[^#]/s/^# //p' "$0" >&2
  exit 2
fi
if ! command -v sbatch >/dev/null; then
  echo "submit_all.sh: there is no sbatch on this machine; run it on a cluster's login node, or use" \
    "recipes/run.sh here" >&2
  exit 2
fi
# shellcheck source=slurm/environment.sh
source slurm/environment.sh
export RECIPE
read -ra prepare_options <<<"${PREPARE_OPTIONS:-}"
read -ra train_options <<<"${TRAIN_OPTIONS:-}"
read -ra eval_options <<<"${EVAL_OPTIONS:-}"

untrained=" $(in_job "$PYTHON" -c 'from endprompt.methods import UNTRAINED; print(*UNTRAINED)') "

for METHOD in "${@:-endprompt}"; do
  export METHOD
  # A wrong recipe or method ends here, not in the queue.
  in_job "$PYTHON" -m endprompt prepare "$RECIPE" "$METHOD" --dry-run >/dev/null
  prepare=- train=- after=()
  if [[ $untrained != *" $METHOD "* ]]; then
    prepare=$(sbatch --parsable --array="1-${PARTS:-8}" "${prepare_options[@]}" slurm/prepare.sbatch)
    prepare=${prepare%%;*} # behind it, a federation's cluster
    train=$(sbatch --parsable --dependency="afterok:$prepare" --nodes="${NODES:-1}" "${train_options[@]}" \
      slurm/train_64k.sbatch)
    train=${train%%;*}
    after=(--dependency="afterok:$train")
  fi
  evaluate=$(sbatch --parsable "${after[@]}" --array="0-$((${EVALS:-5} - 1))" "${eval_options[@]}" \
    slurm/eval.sbatch)
  printf '%-18s prepare %s  train %s  evaluate %s\n' "$METHOD" "$prepare" "$train" "${evaluate%%;*}"
done
