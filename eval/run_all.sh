#!/usr/bin/env bash
# Trains and evaluates what is missing, then makes the paper's tables and figures beside ours; what is
# finished is skipped.
#   bash eval/run_all.sh [--recipe FILE] [--methods M ...] [--samples N] [--lengths N ...]
#                        [--model METHOD=DIR ...] [--tables main|all] [--out DIR] [--results DIR]
#                        [--set key=value ...] [--dry-run] [--gpu NAME] [--gpus N] [--mfu X]
# --recipe: recipes/tiny.yaml, which runs whole on two CPU cores.  --methods: the paper's, base and short.
# --model: evaluates a model that is there in the place of training METHOD.  --tables all: also the ablations,
# the 32K figure and the fine-tuned models.  --dry-run: prints what is to be run with estimated GPU hours (of
# --gpus GPUs of a name like A800 or H100 at the share --mfu of their peak) and does nothing.
# Environment: NPROC, STAGES and PYTHON as in recipes/run.sh; OUT (runs) and RESULTS (results) where --out and
# --results are not given.
set -euo pipefail

usage() {
  sed -n '2,/^[^#]/s/^# //p' "$0" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
# A step that changes the folder must still find it.
[[ $PYTHON != */* ]] || PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
export PYTHON
command_line="bash eval/run_all.sh$([ $# -eq 0 ] || printf ' %q' "$@")"
recipe=$root/recipes/tiny.yaml out=${OUT:-runs} results=${RESULTS:-results} dry=
plan=() hours=() models=()
while [ $# -gt 0 ]; do
  option=$1
  shift
  case $option in
    --dry-run) dry=1 ;;
    --recipe | --out | --results | --samples | --tables | --gpu | --gpus | --mfu | --model | --set)
      if [ $# -eq 0 ] || [[ $1 == --* ]] || [ -z "$1" ]; then
        echo "run_all.sh: $option needs a value" >&2
        usage
      fi
      case $option in
        --recipe) recipe=$1 ;;
        --out) out=$1 ;;
        --results) results=$1 ;;
        --gpu | --gpus | --mfu) hours+=("$option" "$1") ;;
        --model) models+=(--model "$1") ;;
        *) plan+=("$option" "$1") ;;
      esac
      shift ;;
    --methods | --lengths)
      values=()
      while [ $# -gt 0 ] && [[ $1 != --* ]]; do
        values+=("$1")
        shift
      done
      if [ ${#values[@]} -eq 0 ]; then
        echo "run_all.sh: $option needs at least one value" >&2
        usage
      fi
      plan+=("$option" "${values[@]}") ;;
    *)
      echo "run_all.sh: there is no option '$option'" >&2
      usage ;;
  esac
done

plan=("$PYTHON" -m endprompt.reports.plan --recipe "$recipe" --out "$out" "${plan[@]}" "${models[@]}")
if [ -n "$dry" ]; then
  exec "${plan[@]}" "${hours[@]}"
fi
steps=$("${plan[@]}" --steps)

gpus=$("$PYTHON" -m endprompt gpus)
[ "$gpus" -gt 0 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

follow() { # follow KIND RECIPE METHOD OUT MODEL LOG RUN SETTING ...: one step of the plan
  local kind=$1 recipe=$2 method=$3 folder=$4 model=$5 run=$7 setting settings=()
  shift 7
  for setting in "$@"; do settings+=(--set "$setting"); done
  case $kind in
    run) OUT=$folder bash "$root/recipes/run.sh" "$recipe" "$method" "${settings[@]}" ;;
    train)
      OUT=$folder STAGES="prepare train" bash "$root/recipes/run.sh" "$recipe" "$method" "${settings[@]}" ;;
    evaluate)
      "$PYTHON" -m endprompt evaluate "$recipe" "$method" --out "$folder" --model "$model" "${settings[@]}" ;;
    sft)
      [ ! -d "$model" ] || model=$(absolute "$model")  # else an id of the hub
      local ranks=${NPROC:-$((gpus > 0 ? gpus : 2))}
      (cd "$root" && "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$ranks" \
        -m trl.scripts.sft --config recipes/sft.yaml --model_name_or_path "$model" \
        --output_dir "$(absolute "$run/sft")") ;;
  esac
}

start_folder=$PWD
absolute() { if [[ $1 == /* ]]; then echo "$1"; else echo "$start_folder/$1"; fi; }

# Their own descriptor: what runs inside may read standard input.
while IFS=$'\x1f' read -r -u 3 -a step; do
  [ ${#step[@]} -gt 0 ] || continue
  log=${step[5]} start=$SECONDS code=0
  mkdir -p "$(dirname "$log")"
  follow "${step[@]}" >"$log" 2>&1 || code=$?
  if [ "$code" -ne 0 ]; then
    tail -n 30 "$log" >&2
    more="; the same command goes on from there"
    [ "$code" -ne 2 ] || more=
    echo "run_all.sh: ${step[0]} ${step[2]} failed; its log is $log$more" >&2
    exit "$code"
  fi
  printf '%-8s %-50s %6d s\n' "${step[0]}" "${step[6]}" $((SECONDS - start))
done 3<<<"$steps"

"$PYTHON" -m endprompt.reports.tables --runs "$out" --out "$results" --command "$command_line" "${models[@]}"
