#!/usr/bin/env bash
# prepare -> train -> evaluate for one recipe and method; stages that are finished are skipped.
#   bash recipes/run.sh RECIPE METHOD [--set key=value ...]
# Environment: STAGES ("prepare train evaluate"), NPROC (ranks on this machine; default: its GPUs, or 2 on
# CPU), OUT (runs), PYTHON (python); for training on several nodes, on each of them NNODES, NODE_RANK
# (default: Slurm's), MASTER_ADDR and MASTER_PORT, with OUT on shared storage.
# Exit codes: 0 done, 2 bad input, 3 a guard ended the training (a loss that is no number, a full disk), 75
# stopped on request, 1 anything else. After 75 and 1 the same command goes on from the last checkpoint.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,/^[^#]/s/^# //p' "$0" >&2
  exit 2
fi
recipe=$1 method=$2
shift 2

STAGES=${STAGES:-prepare train evaluate}
OUT=${OUT:-runs}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
gpus=$("$PYTHON" -m endprompt gpus)
NPROC=${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)}
# On CPU, ranks that each start a thread a core slow each other down.
[ "$gpus" -gt 0 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}

run=$("$PYTHON" -m endprompt path "$recipe" "$method" --out "$OUT")

train() {
  # Nothing is launched for what is finished or has no shards: the command itself says so, once.
  if [ -d "$run/model" ] || [ ! -f "$run/shards/manifest.json" ]; then
    if [ "$NODE_RANK" -eq 0 ]; then "$PYTHON" -m endprompt train "$recipe" "$method" --out "$OUT" "$@"; fi
    return
  fi
  local rendezvous=(--standalone) code=0 ends
  if [ "$NNODES" -gt 1 ]; then
    rendezvous=(--nnodes="$NNODES" --node_rank="$NODE_RANK" --master_addr="${MASTER_ADDR:?the first node}" --master_port="${MASTER_PORT:?a free port of it}")
  fi
  # torchrun ends with 1 whatever its ranks end with: they leave their 2 or 3 in a file of this start's own.
  ends=$(mktemp -d)
  # shellcheck disable=SC2064 # the folder of now
  trap "rm -rf '$ends'" EXIT
  # Slurm signals every process of a step, and the code of one that a signal ends would hide what another node
  # says.
  [ -z "${SLURM_STEP_ID:-}" ] || trap : TERM
  ENDPROMPT_EXIT_CODE_FILE=$ends/code \
    "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node="$NPROC" -m endprompt train "$recipe" "$method" --out "$OUT" "$@" || code=$?
  if [ "$code" -ne 0 ]; then
    [ ! -s "$ends/code" ] || exit "$(cat "$ends/code")"
    exit 1
  fi
  [ -d "$run/model" ] || exit 75
}

for stage in $STAGES; do
  case $stage in
    prepare | evaluate)
      "$PYTHON" -m endprompt "$stage" "$recipe" "$method" --out "$OUT" "$@" ;;
    train)
      train "$@" ;;
    *)
      echo "run.sh: STAGES: there is no stage '$stage'; use prepare, train, evaluate" >&2
      exit 2 ;;
  esac
done
