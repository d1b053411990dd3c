#!/usr/bin/env bash
# The whole main job on the embedded default: an 8x extension at equal tokens, beside the untrained base.
#   bash recipes/tiny/demo.sh
# Environment: DEMO_METHODS ("base short endprompt full_length pose_sharp"), OUT (runs), PYTHON (python).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
export OUT=${OUT:-runs} OMP_NUM_THREADS=1
PYTHON=${PYTHON:-$root/.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=python
export PYTHON
read -ra chosen <<<"${DEMO_METHODS:-base short endprompt full_length pose_sharp}"
recipe=recipes/tiny.yaml
runs=$("$PYTHON" -m endprompt path "$recipe" --out "$OUT")
pairs=$("$PYTHON" -c 'import sys, yaml; asked = yaml.safe_load(open(sys.argv[1]))["eval"]; print(len(asked["tasks"]) * len(asked["lengths"]))' "$recipe")
export runs logs=$runs/demo-logs start recipe pairs
start=$(date +%s)
untrained=" $("$PYTHON" -c 'from endprompt.methods import METHODS; print(*(name for name in METHODS if not METHODS[name].trained))') "
for method in "${chosen[@]}"; do
  "$PYTHON" -m endprompt path "$recipe" "$method" --out "$OUT" >/dev/null # names what there is no method of
done
mkdir -p "$logs"
shown=pose_sharp # whose commands are named at the end
for method in "${chosen[@]}"; do
  if [[ $untrained != *" $method "* ]]; then shown=$method; fi
done

say() { printf "[%3d s] %s\n" $(($(date +%s) - start)) "$*"; }

# What a stage's own files say of how far it is: steps, or pairs of task and length.
how_far() { # stage method seconds-so-far
  "$PYTHON" -SE - "$runs/$2" "$1" "$3" "$pairs" <<'EOF'
import json, pathlib, sys
run, stage = pathlib.Path(sys.argv[1]), sys.argv[2]
try:
    found = json.loads((run / "status.json").read_text())
    if stage == "train" and found["command"] == "train" and found.get("tokens_per_second"):
        left = (found["max_steps"] - found["step"]) * found["tokens_per_step"] / found["tokens_per_second"]
        print(f"step {found['step']} of {found['max_steps']}, {left:.0f} s left")
except (OSError, ValueError, KeyError, TypeError):
    pass
if stage == "evaluate":
    done, seconds, pairs = len(list(run.glob("eval/*/*.json"))), *map(int, sys.argv[3:])
    left = f", {seconds * (pairs - done) / done:.0f} s left" if done else ""
    print(f"{done} of {pairs} scores{left}")
EOF
}

stage() { # stage method: one stage of one method, its output in a file that is shown if it fails
  local log=$logs/$2.$1.log code=0 began=$SECONDS pid
  STAGES=$1 bash recipes/run.sh "$recipe" "$2" >"$log" 2>&1 &
  pid=$!
  while [ -t 1 ] && kill -0 "$pid" 2>/dev/null; do
    printf "\r\033[K[%3d s] %s %s: %s" $(($(date +%s) - start)) "$1" "$2" "$(how_far "$1" "$2" $((SECONDS - began)))"
    sleep 1
  done
  wait "$pid" || code=$?
  [ ! -t 1 ] || printf "\r\033[K"
  if [ "$code" -ne 0 ]; then
    cat "$log" >&2
    echo "demo: $1 $2 failed; its log is $log" >&2
    exit 1
  fi
  say "$1 $2"
}
export -f say stage how_far

for method in "${chosen[@]}"; do
  if [[ $untrained == *" $method "* ]]; then continue; fi
  stage prepare "$method"
  stage train "$method"
done
# Two evaluations at a time, one thread each.
printf '%s\n' "${chosen[@]}" | xargs -P 2 -I{} bash -c "stage evaluate {}"

echo
"$PYTHON" -m endprompt.reports.readings "$runs" --title "passkey retrieval, window 256 extended to 2048 (equal tokens)"
cat <<EOF

Next:
  .venv/bin/endprompt inspect $recipe $shown --row 3        # a row: intact text, a jump, its distances
  .venv/bin/endprompt plan recipes/llama3-8b-64k.yaml $shown --gpus 8 --gpu-memory 80    # what it costs at 8B
  .venv/bin/endprompt export $runs/$shown --to served       # a copy for serving (docs/engines.md)
EOF
say "done"
