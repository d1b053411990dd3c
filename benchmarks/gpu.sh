#!/usr/bin/env bash
# The cost evidence of issue 6 on a machine with one GPU and no network, in one command: carried wheels, if there are any, then benchmarks/gpu.py.
#   bash benchmarks/gpu.sh OUT [SECONDS] [gpu.py's other options]      # 540 seconds unless said; OUT is a folder, and what lies there is gone on with
# Environment: WHEELS (.whl, from benchmarks/gpu_wheels.sh), EARLIER (a folder with the files of an earlier call, to go on with), PYTHON (python3)
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
fi
out=$1 seconds=${2:-540}
shift $(($# > 1 ? 2 : 1))
case $seconds in '' | *[!0-9]*) echo "gpu.sh: SECONDS: $seconds is no whole number of seconds" >&2; exit 2 ;; esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-$root/.whl}
mkdir -p "$out"
if [ -n "${EARLIER:-}" ]; then
  [ -d "$EARLIER" ] || { echo "gpu.sh: EARLIER: there is no folder $EARLIER" >&2; exit 2; }
  cp "$EARLIER"/*.json "$out"/
fi
if compgen -G "$WHEELS/*.whl" >/dev/null; then
  site=${SITE:-$(mktemp -d)}
  "$PYTHON" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$WHEELS"/*.whl
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
[ -e "$root/endprompt/eval" ] || ln -s ../eval "$root/endprompt/eval"  # what an installation maps (setup.cfg)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
left=$((seconds - SECONDS))
if [ "$left" -lt 1 ]; then
  echo "gpu.sh: installing took ${SECONDS} s, and nothing of $seconds is left" >&2
  exit 1
fi
exec "$PYTHON" benchmarks/gpu.py --out "$out" --budget "$left" "$@"
