#!/usr/bin/env bash
# prepare -> train -> evaluate for one recipe and method; stages that are finished are skipped.
#   bash recipes/run.sh RECIPE METHOD [--set key=value ...]
# Environment: STAGES ("prepare train evaluate"), NPROC (ranks on this machine; default: its GPUs, or 2 on CPU), OUT (runs), PYTHON (python).
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,4s/^# //p' "$0" >&2
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
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
NPROC=${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)}
# On CPU, ranks that each start a thread a core slow each other down.
[ "$gpus" -gt 0 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

name=$(basename "$recipe"); name=${name%.*}
for stage in $STAGES; do
  case $stage in
    prepare | evaluate)
      "$PYTHON" -m endprompt "$stage" "$recipe" "$method" --out "$OUT" "$@" ;;
    train)
      # Nothing is launched for what is finished or has no shards: the command itself says so.
      if [ -d "$OUT/$name/$method/model" ] || [ ! -f "$OUT/$name/$method/shards/manifest.json" ]; then
        "$PYTHON" -m endprompt train "$recipe" "$method" --out "$OUT" "$@"
      else
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" -m endprompt train "$recipe" "$method" --out "$OUT" "$@"
      fi ;;
    *)
      echo "run.sh: STAGES: there is no stage '$stage'; use prepare, train, evaluate" >&2
      exit 2 ;;
  esac
done
