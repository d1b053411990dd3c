#!/usr/bin/env bash
# The whole main job on the embedded default: an 8x extension by three methods at equal tokens, beside the
# untrained base.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
export OUT=${OUT:-runs} OMP_NUM_THREADS=1
PYTHON=${PYTHON:-$root/.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=python
export PYTHON
runs=$("$PYTHON" -m endprompt path recipes/tiny.yaml --out "$OUT")
logs=$runs/demo-logs
mkdir -p "$logs"
start=$(date +%s)
export logs start
say() { printf "[%3d s] %s\n" $(($(date +%s) - start)) "$*"; }
stage() { # stage method: one stage of one method, its output in a file that is shown if it fails
  local log=$logs/$2.$1.log
  if ! STAGES=$1 bash recipes/run.sh recipes/tiny.yaml "$2" >"$log" 2>&1; then
    cat "$log" >&2
    echo "demo: $1 $2 failed; its log is $log" >&2
    exit 1
  fi
  say "$1 $2"
}

export -f say stage

for method in short endprompt full_length; do
  stage prepare "$method"
  stage train "$method"
done
# Two evaluations at a time, one thread each.
for method in base interpolation short endprompt full_length; do echo "$method"; done |
  xargs -P 2 -I{} bash -c "stage evaluate {}"

echo
"$PYTHON" -m endprompt.reports.compare "$runs" --title "passkey retrieval, window 256 extended to 2048 (equal tokens)"
say "done"
