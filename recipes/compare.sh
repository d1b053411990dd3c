#!/usr/bin/env bash
# Every method of the method table, trained and evaluated with several seeds, then one table and its pictures;
# what is finished is skipped.
#   bash recipes/compare.sh [RECIPE] [--set key=value ...]     (RECIPE: recipes/tiny.yaml)
# Environment: SEEDS ("0 1 2"), METHODS (default: all rows of the table), OUT (runs), PYTHON (python), and
# what run.sh takes.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
recipe=$root/recipes/tiny.yaml
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  recipe=$1
  shift
fi
if [ ! -f "$recipe" ] || { [ $# -gt 0 ] && [ "$1" != --set ]; }; then
  sed -n '2,/^[^#]/s/^# //p' "$0" >&2
  exit 2
fi
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
export PYTHON
read -ra seeds <<<"${SEEDS:-0 1 2}"
OUT=${OUT:-runs}
METHODS=${METHODS:-$("$PYTHON" -c 'from endprompt.methods import METHODS; print(*METHODS)')}
# The seed orders and draws training rows: it is nothing to a method that trains nothing, so that one seed is
# all of these.
untrained=" $("$PYTHON" -c 'from endprompt.methods import UNTRAINED; print(*UNTRAINED)') "

folders=()
for seed in "${seeds[@]}"; do
  runs=$("$PYTHON" -m endprompt path "$recipe" --out "$OUT/seed$seed")
  logs=$runs/logs
  mkdir -p "$logs"
  for method in $METHODS; do
    if [ "$seed" != "${seeds[0]}" ] && [[ $untrained == *" $method "* ]]; then
      continue
    fi
    start=$SECONDS
    log=$logs/$method.log options=("$@" --set "data.seed=$seed") code=0
    OUT=$OUT/seed$seed bash "$root/recipes/run.sh" "$recipe" "$method" "${options[@]}" >"$log" 2>&1 || code=$?
    if [ "$code" -ne 0 ]; then
      tail -n 30 "$log" >&2
      more="; the same command goes on from there"
      [ "$code" -ne 2 ] || more=
      echo "compare.sh: $method with seed $seed failed; its log is $log$more" >&2
      exit "$code"
    fi
    printf 'seed %s  %-18s %5d s\n' "$seed" "$method" $((SECONDS - start))
  done
  # Nothing but untrained methods: only the first seed has results.
  found=("$runs"/*/eval)
  if [ -e "${found[0]}" ]; then
    folders+=("$runs")
  fi
done
"$PYTHON" -m endprompt.reports.compare "${folders[@]}" --title "$(basename "$runs") over seeds ${seeds[*]}"
