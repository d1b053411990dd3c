#!/usr/bin/env bash
# Trains what is missing, evaluates, and writes every table and figure of the paper, ours beside the printed ones; what is finished is skipped.
#   bash eval/run_all.sh [--recipe R] [--methods M ...] [--samples N] [--lengths N ...] [--tables main|all] [--model METHOD=DIR] [--dry-run]
#                        [--out DIR] [--results DIR] [--set key=value ...]
# --model (may be repeated) scores a model you have in the place of training the method.  Environment: STAGES, NPROC, PYTHON, as recipes/run.sh.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() {
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
export PYTHON

recipe=$root/recipes/tiny.yaml
chosen="base short endprompt endprompt_pose pose full_length lceg longlora"
tables=main out=${OUT:-runs} results=results dry=
overrides=() models=()
while [ $# -gt 0 ]; do
  [ "$1" = --dry-run ] || [ $# -gt 1 ] || usage
  case $1 in
    --recipe) recipe=$2 ;;
    --methods | --lengths)
      option=$1 several=
      shift
      while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do
        several="$several $1"
        shift
      done
      [ -n "$several" ] || usage
      if [ "$option" = --methods ]; then
        chosen=$several
      else
        read -ra numbers <<<"$several"
        overrides+=(--set "eval.lengths=[$(IFS=,; echo "${numbers[*]}")]")
      fi
      continue ;;
    --samples) overrides+=(--set "eval.samples=$2") ;;
    --tables) tables=$2 ;;
    --model) models+=("$2") ;;
    --out) out=$2 ;;
    --results) results=$2 ;;
    --set) overrides+=(--set "$2") ;;
    --dry-run) dry=yes; shift; continue ;;
    *) usage ;;
  esac
  shift 2
done
read -ra names <<<"$chosen"
plan() { "$PYTHON" -m endprompt.eval.plan --recipe "$recipe" --methods "${names[@]}" --out "$out" --tables "$tables" "${overrides[@]}" "$@"; }
name=$(basename "$recipe"); name=${name%.*}

commands=$(plan --commands)
for model in "${models[@]}"; do
  if [[ $model != *=* || ! -d ${model#*=} ]]; then
    echo "run_all.sh: --model $model: write METHOD=DIR with a folder that holds a model" >&2
    exit 2
  fi
  method=${model%%=*}
  # The given model takes the place of a trained one: the run's folder gets a link to it.
  if [ -z "$dry" ] && [ ! -e "$out/$name/$method/model" ]; then
    mkdir -p "$out/$name/$method"
    ln -s "$(cd "${model#*=}" && pwd)" "$out/$name/$method/model"
  fi
done
if [ -n "$dry" ]; then
  plan
  echo "then: python -m endprompt.eval.tables --runs $out --recipe $name --out $results"
  exit 0
fi
while IFS=$'\t' read -r -a line; do
  folder=${line[0]} method=${line[2]}
  logs=$folder/logs
  mkdir -p "$logs"
  log=$logs/$(basename "${line[1]}" .yaml)-$method.log
  start=$SECONDS
  stages=${STAGES:-prepare train evaluate}
  for model in "${models[@]}"; do
    [ "${model%%=*}" != "$method" ] || stages=evaluate
  done
  if ! STAGES=$stages OUT=$folder bash "$root/recipes/run.sh" "${line[@]:1}" >"$log" 2>&1 </dev/null; then
    tail -n 30 "$log" >&2
    echo "run_all.sh: $method failed; its log is $log; the same command goes on from there" >&2
    exit 1
  fi
  printf '%-20s %-18s %5d s\n' "$(basename "${line[1]}" .yaml)" "$method" $((SECONDS - start))
done <<<"$commands"
"$PYTHON" -m endprompt.eval.tables --runs "$out" --recipe "$name" --out "$results"
