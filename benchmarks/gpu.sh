#!/usr/bin/env bash
# Measures one GPU in one command, wherever the package is installed: starts benchmarks/gpu.py with a budget.
#   bash benchmarks/gpu.sh OUT [SECONDS] [gpu.py's other options]      # 540 seconds unless said
# OUT is a folder; what lies there is gone on with.
# Environment: PYTHON (that of .venv where there is one, else python3)
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,5s/^# //p' "$0" >&2
  exit 2
fi
out=$1 seconds=${2:-540}
shift $(($# > 1 ? 2 : 1))
case $seconds in
  '' | *[!0-9]*) echo "gpu.sh: SECONDS: $seconds is no whole number of seconds" >&2 && exit 2 ;;
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
if ! "$PYTHON" -P -c 'import endprompt.evaluation' 2>/dev/null; then
  echo "gpu.sh: endprompt is not installed for $PYTHON; install it (see README), or set PYTHON=" >&2
  exit 2
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$PYTHON" "$root/benchmarks/gpu.py" --out "$out" --budget "$seconds" --spent "$SECONDS" "$@"
