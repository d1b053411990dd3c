#!/usr/bin/env bash
# Which distances each method teaches a real pretrained model: every setting and method below with several
# seeds, then tables and a picture; what is finished is skipped.
#   CORPUS=... HELD_OUT=... bash recipes/realmodel.sh [SETTING ...]    (SETTING: of those below; default: all)
# Environment: CORPUS (text to train on), HELD_OUT (documents of at least 16384 tokens; without it, no
# far_gain and no perplexity), TOKENS (131072), SEEDS ("0 1"), JOBS (arms at a time, one process and one
# thread each; 2), METHODS (only these), QUESTIONS (a distance; 200), SAMPLES (of named_keys a length; 16),
# LENGTHS (of named_keys and far_gain, "4096 8192 16384"; empty: neither), WINDOW (the length of perplexity;
# 8192), SHORT_TEXT (tasks such as hellaswag, 500 samples each; none), SHOTS (examples before each of these,
# 0: ten take hours an arm), BF16 (true: train in bfloat16, 1.6 times as fast where lscpu shows avx512_bf16,
# slow elsewhere; false), RECIPE (recipes/smollm2-135m-64k-cpu.yaml), OUT (runs/realmodel), PYTHON (python).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
export PYTHON root NPROC=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export RECIPE=${RECIPE:-$root/recipes/smollm2-135m-64k-cpu.yaml} OUT=${OUT:-runs/realmodel}
export TOKENS=${TOKENS:-131072} WINDOW=${WINDOW:-8192} BF16=${BF16:-false}
export CORPUS=${CORPUS:-} HELD_OUT=${HELD_OUT:-} QUESTIONS=${QUESTIONS:-200} SAMPLES=${SAMPLES:-16}
export LENGTHS=${LENGTHS-4096 8192 16384} SHORT_TEXT=${SHORT_TEXT:-} SHOTS=${SHOTS:-0}
SEEDS=${SEEDS:-0 1}
JOBS=${JOBS:-2}

# By setting: its methods, what differs from the recipe (parted by |).  *-unsharpened (where pose_sharp is
# pose) and *-half (averaged with the base) train as the setting that they are named after, whose last
# checkpoint they take if there is one.
all='short endprompt endprompt_random endprompt_pose pose_sharp pose_matched'
declare -A methods=(
  [own]=base [own-sharpened]=base
  [untrained-linear]=interpolation [untrained-linear-sharpened]=interpolation
  [untrained-yarn]=interpolation [untrained-yarn-sharpened]=interpolation
  [untrained-theta]=interpolation [untrained-theta-sharpened]=interpolation
  [linear]='short endprompt endprompt_pose pose'
  [yarn]=$all [yarn-weight-0]=endprompt [yarn-weight-1]=endprompt
  [yarn-unsharpened]='pose_sharp pose_matched' [yarn-half]='short pose_sharp pose_matched'
  [yarn-small-steps]=pose_matched
  [theta]=$all [theta-weight-0]=endprompt [theta-weight-1]=endprompt
  [theta-unsharpened]='pose_sharp pose_matched' [theta-half]='short pose_sharp pose_matched'
)
# A row a step at a rate that falls to 0, and checkpoints after as many tokens as in the recipe.
small_steps='train.per_device_train_batch_size=1|train.lr_scheduler_type=linear'
small_steps+='|train.warmup_steps=8|train.save_steps=32'
declare -A different=(
  [own]='' [own-sharpened]='rope.sharpen=1.0'
  [linear]='rope.type=linear'
  [yarn]='rope.type=yarn'
  [yarn-unsharpened]='rope.type=yarn|rope.sharpen=0.0'
  [yarn-half]='rope.type=yarn|train.base_share=0.5'
  [yarn-weight-0]='rope.type=yarn|method_options.prompt_loss_weight=0.0'
  [yarn-weight-1]='rope.type=yarn|method_options.prompt_loss_weight=1.0'
  [yarn-small-steps]="rope.type=yarn|$small_steps"
  [theta]='rope.type=theta'
  [theta-unsharpened]='rope.type=theta|rope.sharpen=0.0'
  [theta-half]='rope.type=theta|train.base_share=0.5'
  [theta-weight-0]='rope.type=theta|method_options.prompt_loss_weight=0.0'
  [theta-weight-1]='rope.type=theta|method_options.prompt_loss_weight=1.0'
)
for kind in linear yarn theta; do
  different[untrained-$kind]="rope.type=$kind"
  different[untrained-$kind-sharpened]="rope.type=$kind|rope.sharpen=1.0"
done
order=(
  own own-sharpened untrained-linear untrained-linear-sharpened untrained-yarn untrained-yarn-sharpened
  linear yarn yarn-unsharpened yarn-half yarn-small-steps yarn-weight-0 yarn-weight-1
  untrained-theta untrained-theta-sharpened theta theta-unsharpened theta-half theta-weight-0 theta-weight-1
)
[ $# -gt 0 ] && order=("$@")

arm() {  # setting seed: where its runs are
  case $1 in
    own* | untrained*) echo "$OUT/$1/seed$2" ;;
    *) echo "$OUT/$1-$TOKENS/seed$2" ;;
  esac
}
asked() {  # what is evaluated, of the arm of one(), which calls it
  nice -n 10 "$PYTHON" -m endprompt evaluate "$RECIPE" "$method" --out "$out" "${options[@]}" "$@"
}
export -f arm asked

one() {  # setting method seed differences
  local setting=$1 method=$2 seed=$3 out keys key run other='' start=$SECONDS marker
  out=$(arm "$setting" "$seed")
  run=$("$PYTHON" -m endprompt path "$RECIPE" "$method" --out "$out") || exit 255
  if [[ $setting = *-unsharpened || $setting = *-half ]]; then
    other=$(arm "${setting%-*}" "$seed")
    other=$("$PYTHON" -m endprompt path "$RECIPE" "$method" --out "$other") || exit 255
  fi
  local options=(--set "data.seed=$seed" --set "data.tokens=$TOKENS")
  [ "$BF16" = false ] || options+=(--set "train.bf16=$BF16")
  [ -z "$CORPUS" ] || options+=(--set "data.corpus=$CORPUS")
  IFS='|' read -ra keys <<<"$4"
  for key in "${keys[@]}"; do options+=(--set "$key"); done
  local far=(--set 'eval.tasks=[distance]' --set "eval.samples=$QUESTIONS")
  local near=(--set "eval.samples=$SAMPLES" --set "eval.lengths=[${LENGTHS// /, }]") real=named_keys
  local inside=(--set "eval.lengths=[$WINDOW]" --set eval.short_text_samples=500) tasks=${SHORT_TEXT// /, }
  if [ -n "$HELD_OUT" ]; then
    near+=(--set "eval.perplexity_corpus=$HELD_OUT" --set eval.far_gain_texts=16)
    real='named_keys, far_gain'
    inside+=(--set "eval.perplexity_corpus=$HELD_OUT")
    tasks=perplexity${tasks:+, $tasks}
  fi
  [ -z "$SHORT_TEXT" ] || inside+=(--set "eval.short_text_shots=$SHOTS")
  near+=(--set "eval.tasks=[$real]")
  inside+=(--set "eval.tasks=[$tasks]")
  # The same command after other settings goes on with what they ask for.
  marker=$({ printf '%s ' "${options[@]}" "${far[@]}" "${near[@]}" "${inside[@]}" && cat "$RECIPE"; } | cksum)
  marker=$run/.study-${marker%% *}
  if [ -f "$marker" ]; then return; fi
  mkdir -p "$run"
  if [ -d "$other/model" ] && [ ! -d "$run/checkpoints" ]; then
    cp -r "$other/shards" "$other/checkpoints" "$run/"
  fi
  {
    STAGES='prepare train' OUT=$out nice -n 10 bash "$root/recipes/run.sh" "$RECIPE" "$method" \
      "${options[@]}" \
      && asked "${far[@]}" \
      && { [ -z "$LENGTHS" ] || asked "${near[@]}"; } \
      && { [ -z "$tasks" ] || asked "${inside[@]}"; }
  } >>"$run/study.log" 2>&1 || {
    local code=$? more="; the same command goes on from there"
    [ "$code" -ne 2 ] || more=
    tail -n 15 "$run/study.log" >&2
    echo "realmodel.sh: $setting $method seed $seed failed; its log is $run/study.log$more" >&2
    over "$code"
  }
  touch "$marker"
  printf '%-28s %-18s seed %s %6d s\n' "$setting" "$method" "$seed" $((SECONDS - start))
}
over() {  # code: ends this run, and has xargs start no more
  [ -s "$ended" ] || echo "$1" >"$ended"
  exit 255
}
export -f one over

# The exit code of the run that ended it all: xargs has one of its own.
ended=$(mktemp)
export ended
trap 'rm -f "$ended"' EXIT

untrained=" $("$PYTHON" -c 'from endprompt.methods import UNTRAINED; print(*UNTRAINED)') "
first=${SEEDS%% *}
for setting in "${order[@]}"; do
  if [ -z "${methods[$setting]:-}" ]; then
    echo "realmodel.sh: there is no setting '$setting'; use ${!methods[*]}" >&2
    exit 2
  fi
done
jobs=() shown=()
for setting in "${order[@]}"; do
  for seed in $SEEDS; do
    for method in ${methods[$setting]}; do
      if [ -n "${METHODS:-}" ] && [[ " $METHODS " != *" $method "* ]]; then continue; fi
      # The seed is nothing to a method that trains nothing.
      if [ "$seed" != "$first" ] && [[ $untrained == *" $method "* ]]; then continue; fi
      jobs+=("$setting" "$method" "$seed" "${different[$setting]}")
      run=$("$PYTHON" -m endprompt path "$RECIPE" "$method" --out "$(arm "$setting" "$seed")")
      shown+=("$setting/$method=$run")
    done
  done
done
if [ "${#jobs[@]}" -eq 0 ]; then
  echo "realmodel.sh: METHODS: none of ${METHODS:-} is in the settings ${order[*]}" >&2
  exit 2
fi
printf '%s\0' "${jobs[@]}" | xargs -0 -r -n 4 -P "$JOBS" bash -c 'one "$@"' one \
  || { code=$(cat "$ended"); exit "${code:-1}"; }
"$PYTHON" -m endprompt.reports.distances "${shown[@]}" --out "$OUT/distances" \
  --title "${RECIPE##*/}, $TOKENS tokens, seeds $SEEDS"
