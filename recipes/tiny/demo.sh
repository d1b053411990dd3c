#!/usr/bin/env bash
# The whole main job on the embedded default: an 8x extension at equal tokens, beside the untrained base.
#   bash recipes/tiny/demo.sh
# Environment: DEMO_METHODS ("base short endprompt full_length pose_matched"), OUT (runs/demo), PYTHON
# (python).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
# Two methods at a time, each on one rank with one thread, take half the time of one method on two ranks.
export OUT=${OUT:-runs/demo} NPROC=1 OMP_NUM_THREADS=1
PYTHON=${PYTHON:-$root/.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=python
export PYTHON
read -ra chosen <<<"${DEMO_METHODS:-base short endprompt full_length pose_matched}"
recipe=recipes/tiny.yaml
runs=$("$PYTHON" -m endprompt path "$recipe" --out "$OUT")
pairs=$("$PYTHON" -c 'import sys, yaml
asked = yaml.safe_load(open(sys.argv[1]))["eval"]
print(len(asked["tasks"]) * len(asked["lengths"]))' "$recipe")
export runs logs=$runs/demo-logs start recipe pairs
start=$(date +%s)
untrained=" $("$PYTHON" -c 'from endprompt.methods import UNTRAINED; print(*UNTRAINED)') "
for method in "${chosen[@]}"; do
  "$PYTHON" -m endprompt path "$recipe" "$method" --out "$OUT" >/dev/null # names what there is no method of
done
mkdir -p "$logs"
shown=pose_matched # whose commands are named at the end
for method in "${chosen[@]}"; do
  if [[ $untrained != *" $method "* ]]; then shown=$method; fi
done

clear=''
[ ! -t 1 ] || clear=$'\r\033[K'
say() { printf "%s[%3d s] %s\n" "$clear" $(($(date +%s) - start)) "$*"; }

# What the files of the stages that are running say of how far they are: steps, or pairs of task and length.
how_far() {
  "$PYTHON" -SE - "$runs" "$logs" "$pairs" <<'EOF'
import json, os, pathlib, sys, time
runs, logs, pairs = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
found = []
for path in sorted(logs.glob("*.now")):
    method = path.stem
    try:
        stage, began = path.read_text().split()
        about = ""
        if stage == "train":
            state = json.loads((runs / method / "status.json").read_text())
            if state["command"] == "train" and state.get("tokens_per_second"):
                left = (state["max_steps"] - state["step"]) * state["tokens_per_step"]
                left /= state["tokens_per_second"]
                about = f": step {state['step']} of {state['max_steps']}, {left:.0f} s left"
        elif stage == "evaluate":
            done = len(list((runs / method).glob("eval/*/*.json")))
            left = (time.time() - int(began)) * (pairs - done) / done if done else None
            about = f": {done} of {pairs} scores" + (f", {left:.0f} s left" if left else "")
    except (OSError, ValueError, KeyError, TypeError):
        about = ""
    found.append(f"{stage} {method}{about}")
try:
    width = os.get_terminal_size(2).columns
except OSError:
    width = 80
print("; ".join(found)[: width - 10], end="")  # a line that wraps would not be cleared
EOF
}

stage() { # stage method: its output goes to a file that is shown if it fails
  local log=$logs/$2.$1.log options=(--set train.per_device_train_batch_size=16 --set eval.samples=60)
  echo "$1 $(date +%s)" >"$logs/$2.now"
  # Rows a step as on the two ranks that the recipe is for; fewer keys, for time.
  if ! STAGES=$1 bash recipes/run.sh "$recipe" "$2" "${options[@]}" >"$log" 2>&1; then
    cat "$log" >&2
    echo "demo: $1 $2 failed; its log is $log" >&2
    touch "$logs/failed"
    exit 255 # xargs starts no more
  fi
  rm "$logs/$2.now"
  say "$1 $2"
}
job() { # train or evaluate, method
  local run=$runs/$2
  if [ "$1" = train ]; then
    stage prepare "$2"
    stage train "$2"
    return
  fi
  until [[ $untrained == *" $2 "* ]] || [ -d "$run/model" ]; do
    [ ! -e "$logs/failed" ] || exit 255
    sleep 1
  done
  stage evaluate "$2"
}
export -f say stage job
export untrained clear

rm -f "$logs"/*.now "$logs/failed"
# The method with the longest rows is trained first; what is trained is evaluated meanwhile.
trained=() scored=()
for method in "${chosen[@]}"; do
  if [[ $untrained == *" $method "* ]]; then
    scored=("$method" "${scored[@]}")
  elif [ "$method" = full_length ]; then
    trained=("$method" "${trained[@]}")
  else
    trained+=("$method")
  fi
done
scored+=("${trained[@]}")
{
  [ ${#trained[@]} -eq 0 ] || printf 'train\0%s\0' "${trained[@]}"
  printf 'evaluate\0%s\0' "${scored[@]}"
} | xargs -0 -n 2 -P 2 bash -c 'job "$@"' job &
jobs=$!
while [ -t 1 ] && kill -0 "$jobs" 2>/dev/null; do
  printf "%s[%3d s] %s" "$clear" $(($(date +%s) - start)) "$(how_far)"
  sleep 1
done
wait "$jobs" || exit 1

echo
title="passkey retrieval, window 256 extended to 2048 (equal tokens)"
"$PYTHON" -m endprompt.reports.readings "$runs" --title "$title"
cat <<EOF

Next:
  .venv/bin/endprompt inspect $recipe $shown --out $OUT --row 3    # a row: intact text, a jump, its distances
  .venv/bin/endprompt plan recipes/llama3-8b-64k.yaml $shown --gpus 8 --gpu-memory 80    # what it costs at 8B
  .venv/bin/endprompt export $runs/$shown --to served       # a copy for serving (docs/engines.md)
EOF
say "done"
