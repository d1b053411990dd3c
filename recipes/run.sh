#!/usr/bin/env bash
# prepare -> train -> evaluate for one recipe and method; stages that are finished are skipped.
#   bash recipes/run.sh RECIPE METHOD [--set key=value ...]
# Environment: STAGES ("prepare train evaluate"), NPROC (ranks on this machine; default: its GPUs, or 2 on
# CPU), OUT (runs), PYTHON (python); on several nodes, on each of them the same command with NNODES, NODE_RANK
# (default: Slurm's), MASTER_ADDR and MASTER_PORT, and OUT on shared storage: all train, the first does the
# rest.
# SIGTERM stops the training after its step, with a checkpoint.
# Exit codes: 0 done, 2 bad input, 3 a guard ended the training (a loss that is no number, a full disk), 75
# stopped on request, 1 anything else. After 75 and 1 the same command goes on from the last checkpoint.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,/^[^#]/s/^# //p' "$0" >&2
  exit 2
fi
recipe=$1 method=$2
shift 2
# This script asks for the run's folder by OUT, and looks there for what is to be done.
for option in "$@"; do
  case $option in
    --o | --ou | --out | --o=* | --ou=* | --out=*)
      echo "run.sh: $option: the folder of all runs comes from the environment; leave it out, and set" \
        "OUT=DIR before the command" >&2
      exit 2 ;;
  esac
done

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

child='' stage='' wished='' signals=0
# shellcheck disable=SC2317,SC2329 # the trap calls it
stop() {
  wished=yes signals=$((signals + 1))
  if [ "$stage" != train ]; then
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true # what it has finished stays
  elif [ -z "${SLURM_STEP_ID:-}" ]; then # Slurm signals the ranks themselves
    touch "$run/stop" # all nodes' ranks look for it; torchrun would give its own 30 seconds
  fi
}
trap stop TERM
trap 'signals=$((signals + 1))' INT # the terminal signals the command too

# A command in the background, so that SIGTERM is heard at once: a container's first process alone gets it.
go() {
  (trap - INT QUIT && exec "$@") &
  child=$!
  local code heard=''
  until [ "$heard" = "$signals" ]; do # a signal ends the waiting, not the command
    code=0 heard=$signals
    wait "$child" || code=$?
  done
  child=''
  return "$code"
}

train() {
  # Nothing is launched for what is finished or has no shards: the command itself says so, once.
  if [ -d "$run/model" ] || [ ! -f "$run/shards/manifest.json" ]; then
    if [ "$NODE_RANK" -eq 0 ]; then go "$PYTHON" -m endprompt train "$recipe" "$method" --out "$OUT" "$@"; fi
    return
  fi
  local rendezvous=(--standalone) code=0 ends
  if [ "$NNODES" -gt 1 ]; then
    rendezvous=(--nnodes="$NNODES" --node_rank="$NODE_RANK" --master_addr="${MASTER_ADDR:?the first node}")
    rendezvous+=(--master_port="${MASTER_PORT:?a free port of it}")
  fi
  # torchrun ends with 1 whatever its ranks end with: they leave their 2 or 3 in a file of this start's own.
  ends=$(mktemp -d)
  # shellcheck disable=SC2064 # the folder of now
  trap "rm -rf '$ends'" EXIT
  # A wish that an earlier start did not live to hear.  In Slurm the job script removes it.
  [ -n "${SLURM_STEP_ID:-}" ] || [ "$NODE_RANK" -ne 0 ] || rm -f "$run/stop"
  ENDPROMPT_EXIT_CODE_FILE=$ends/code \
    go "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node="$NPROC" \
    -m endprompt train "$recipe" "$method" --out "$OUT" "$@" || code=$?
  if [ "$code" -ne 0 ]; then
    [ ! -s "$ends/code" ] || exit "$(cat "$ends/code")"
    exit 1
  fi
  [ -d "$run/model" ] || exit 75
}

evaluate() { # by the first node
  [ "$NODE_RANK" -ne 0 ] || go "$PYTHON" -m endprompt evaluate "$recipe" "$method" --out "$OUT" "$@"
}

prepare() { # by the first node; the others wait for it
  if [ "$NODE_RANK" -eq 0 ]; then
    go "$PYTHON" -m endprompt prepare "$recipe" "$method" --out "$OUT" "$@"
  elif [ ! -f "$run/shards/manifest.json" ]; then
    echo "run.sh: node $NODE_RANK waits until the first has prepared $run/shards"
    until [ -f "$run/shards/manifest.json" ] || [ -n "$wished" ]; do sleep 2; done
  fi
}

for stage in $STAGES; do
  [ -z "$wished" ] || exit 75
  case $stage in
    prepare)
      prepare "$@" ;;
    train)
      train "$@" ;;
    evaluate)
      evaluate "$@" ;;
    *)
      echo "run.sh: STAGES: there is no stage '$stage'; use prepare, train, evaluate" >&2
      exit 2 ;;
  esac
done
