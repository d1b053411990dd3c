#!/usr/bin/env bash
# A comparison of methods on a bare machine with one GPU, no network, small uploads and calls of ten minutes (docs/gpu.md).
#   here:   bash recipes/gpu/gpu.sh pack TRAIN HELDOUT [--samples 50]         parts into .gpu, and the calls to make
#   there:  bash recipes/gpu/gpu.sh unpack .gpu/1                             each part once, in any order
#   there:  bash recipes/gpu/gpu.sh run METHOD --out DIR --budget 540         prepare, train, evaluate; again: goes on (exit code 75: not all is done)
#   here:   bash recipes/gpu/gpu.sh collect FILE.tar.gz ...                   results into docs/results/smollm2-gpu, table and heatmaps
# Environment: ENDPROMPT_GPU (/tmp/endprompt-gpu), the folder there that everything goes into; PYTHON.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
case ${1:-} in
  pack | unpack | run | collect) ;;
  *) sed -n '2,7s/^# //p' "$0" >&2; exit 2 ;;
esac
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
[ -e "$root/endprompt/eval" ] || ln -s ../eval "$root/endprompt/eval"  # what an installation maps (setup.cfg)
home=${ENDPROMPT_GPU:-/tmp/endprompt-gpu}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
verb=$1
shift
if [ "$verb" = run ]; then
  # What was carried comes first: a wheel's version is the one that was tested.
  export PYTHONPATH=$home/site:$home/files/scorers:$PYTHONPATH HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
fi
exec "$PYTHON" "$root/recipes/gpu/$verb.py" "$@"
