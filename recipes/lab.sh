#!/usr/bin/env bash
# The laboratory of docs/findings.md: every setting and method below with several seeds, then tables and
# pictures; what is finished is skipped.
#   bash recipes/lab.sh [SETTING ...]      (SETTING: some of those below, plain first; default: all)
# Environment: SEEDS ("0 1 2 3 4"), JOBS (trainings at a time, one process and one thread each; 2), METHODS
# (only these), TARGET, TOKENS and CORPUS (in place of the recipe's; each with an OUT of its own, which
# endprompt.reports.scaling sets side by side), TASKS ("passkey, multikey, perplexity"; "passkey, multikey"
# with TARGET=8192, as no held-out document of tiny.yaml holds so many tokens), OUT (runs/lab), FINDINGS
# (OUT/findings), PYTHON (python), RECIPE (recipes/tiny.yaml).
# With the second base, which the head of its recipe says how to make:
#   RECIPE=recipes/novels-cpu.yaml OUT=runs/lab-novels SEEDS="0 1 2" \
#     METHODS="base interpolation short endprompt pose_matched full_length" bash recipes/lab.sh \
#     plain theta-decay-4 yarn-decay-8
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
RECIPE=${RECIPE:-$root/recipes/tiny.yaml}
export PYTHON NPROC=1 root RECIPE OUT=${OUT:-runs/lab} TASKS=${TASKS:-passkey, multikey, perplexity}
SEEDS=${SEEDS:-0 1 2 3 4}
JOBS=${JOBS:-2}
EP_1='This is the end of text, please pay attention here.'

# decay-N: N rows of C tokens a step, and a learning rate that falls to 0; a row of L = 8C is worth 8 of them.
decay='train.lr_scheduler_type=linear|train.per_device_train_batch_size'

# By setting: its methods, what differs from the recipe (parted by |), and the setting with the same
# training: there, a run whose model only needs other sharpening finds its last checkpoint.
neighbours='randpos cream longrecipe e2llm perturbed self_distil'
declare -A methods=(
  [plain]="base interpolation short endprompt endprompt_random pose endprompt_pose pose_sharp pose_recall
    pose_matched full_length lceg longlora drope longrope2 $neighbours"
  [sharpened]='full_length lceg short endprompt pose endprompt_pose'
  [unsharpened]='pose_sharp pose_recall pose_matched'
  [by-position]='pose_sharp pose_matched' [factorless]='pose_sharp pose_matched'
  [linear]='pose_sharp pose_recall pose_matched'
  [yarn]="full_length endprompt_pose short endprompt endprompt_random longlora $neighbours"
  [yarn-sharpened]='full_length endprompt_pose'
  [theta]="full_length pose_matched pose_sharp pose_recall pose short endprompt endprompt_random
    endprompt_pose longlora $neighbours"
  [theta-by-position]='pose_sharp pose_matched'
  [theta-unsharpened]='pose_sharp pose_matched' [theta-sharpened]='full_length'
  [theta-chunks-4]=pose_sharp [theta-pieces-2]=pose_matched [theta-share-10]=pose_recall
  [lr-low]='full_length pose_matched' [lr-high]='full_length pose_matched'
  [yarn-lr-low]=full_length [yarn-lr-high]=full_length
  [theta-lr-low]='full_length pose_matched' [theta-lr-high]='full_length pose_matched'
  [decay-4]='short endprompt pose pose_sharp pose_recall pose_matched'
  [theta-decay-4]='short endprompt pose_sharp pose_recall pose_matched'
  [theta-decay-4-by-position]=pose_matched [theta-decay-4-unsharpened]=pose_matched
  [theta-decay-4-heads]=pose_matched [theta-decay-4-half]=pose_matched [theta-decay-4-by-gain]=pose_matched
  [theta-decay-2]=pose_matched [theta-decay-1]=pose_matched
  [decay-8]='full_length lceg' [yarn-decay-8]=full_length [theta-decay-8]=full_length
  [yarn-decay-8-lr-low]=full_length [yarn-decay-8-lr-high]=full_length
  [weight-0]=endprompt [weight-1]=endprompt
  [prompt-short]=endprompt [prompt-long]=endprompt [prompts-3]=endprompt
)
declare -A different=(
  [plain]=''
  [sharpened]='rope.sharpen=1.0'
  [unsharpened]='rope.sharpen=0.0'
  [by-position]='' [factorless]='rope.yarn_factor=false'
  [linear]='rope.type=linear'
  [yarn]='rope.type=yarn'
  [yarn-sharpened]='rope.type=yarn|rope.sharpen=1.0'
  [theta]='rope.type=theta'
  [theta-by-position]='rope.type=theta'
  [theta-unsharpened]='rope.type=theta|rope.sharpen=0.0' [theta-sharpened]='rope.type=theta|rope.sharpen=1.0'
  [theta-chunks-4]='rope.type=theta|method_options.pose_chunks=4'
  [theta-pieces-2]='rope.type=theta|method_options.match_pieces=2'
  [theta-share-10]='rope.type=theta|method_options.recall_share=0.1'
  [lr-low]='train.learning_rate=5.0e-4' [lr-high]='train.learning_rate=2.0e-3'
  [yarn-lr-low]='rope.type=yarn|train.learning_rate=5.0e-4'
  [yarn-lr-high]='rope.type=yarn|train.learning_rate=2.0e-3'
  [theta-lr-low]='rope.type=theta|train.learning_rate=5.0e-4'
  [theta-lr-high]='rope.type=theta|train.learning_rate=2.0e-3'
  [decay-4]="$decay=4" [theta-decay-4]="rope.type=theta|$decay=4"
  [theta-decay-4-by-position]="rope.type=theta|$decay=4"
  [theta-decay-4-unsharpened]="rope.type=theta|$decay=4|rope.sharpen=0.0"
  [theta-decay-4-heads]="rope.type=theta|$decay=4|rope.sharpen_heads=true"
  [theta-decay-4-half]="rope.type=theta|$decay=4|train.base_share=0.5"
  [theta-decay-4-by-gain]="rope.type=theta|$decay=4|method_options.match_by=gain"
  [theta-decay-2]="rope.type=theta|$decay=2" [theta-decay-1]="rope.type=theta|$decay=1"
  [decay-8]="$decay=8" [yarn-decay-8]="rope.type=yarn|$decay=8" [theta-decay-8]="rope.type=theta|$decay=8"
  [yarn-decay-8-lr-low]="rope.type=yarn|$decay=8|train.learning_rate=5.0e-4"
  [yarn-decay-8-lr-high]="rope.type=yarn|$decay=8|train.learning_rate=2.0e-3"
  [weight-0]='method_options.prompt_loss_weight=0.0'
  [weight-1]='method_options.prompt_loss_weight=1.0'
  [prompt-short]='method_options.end_prompts=[EP_3]'
  [prompt-long]="method_options.end_prompts=[\"$EP_1 $EP_1 $EP_1 $EP_1\"]"
  [prompts-3]='method_options.end_prompts=[EP_1, EP_3, "This is the end of the day. The end."]'
)
declare -A trained=(
  [sharpened]=plain [unsharpened]=plain [by-position]=plain [yarn-sharpened]=yarn
  [theta-by-position]=theta [theta-unsharpened]=theta [theta-sharpened]=theta
  [theta-decay-4-by-position]=theta-decay-4 [theta-decay-4-unsharpened]=theta-decay-4
  [theta-decay-4-half]=theta-decay-4
)
order=(
  plain sharpened unsharpened by-position factorless linear yarn yarn-sharpened
  theta theta-by-position theta-unsharpened theta-sharpened theta-chunks-4 theta-pieces-2 theta-share-10
  lr-low lr-high yarn-lr-low yarn-lr-high theta-lr-low theta-lr-high
  decay-4 theta-decay-4 theta-decay-4-by-position theta-decay-4-unsharpened theta-decay-4-heads
  theta-decay-4-half theta-decay-4-by-gain theta-decay-2 theta-decay-1
  decay-8 yarn-decay-8 theta-decay-8 yarn-decay-8-lr-low yarn-decay-8-lr-high
  weight-0 weight-1 prompt-short prompt-long prompts-3
)
[ $# -gt 0 ] && order=("$@")

# The exit code of the run that ended it all: xargs has one of its own.
ended=$(mktemp)
export ended
trap 'rm -f "$ended"' EXIT

over() {  # code: ends this run, and has xargs start no more
  [ -s "$ended" ] || echo "$1" >"$ended"
  exit 255
}

one() {  # setting method seed differences trained
  local setting=$1 method=$2 seed=$3 out=$OUT/$1/seed$3 other='' start=$SECONDS keys key run marker
  run=$("$PYTHON" -m endprompt path "$RECIPE" "$method" --out "$out") || over $?
  [ -z "$5" ] || other=$("$PYTHON" -m endprompt path "$RECIPE" "$method" --out "$OUT/$5/seed$3") || over $?
  local options=(--set "data.seed=$3")
  # That recipe's 8 rows a step are for each of two ranks, and its tokens are those of the demo.
  if [ "${RECIPE##*/}" = tiny.yaml ]; then
    options+=(--set train.per_device_train_batch_size=16 --set data.tokens=786432)
  fi
  [ -z "${TOKENS:-}" ] || options+=(--set "data.tokens=$TOKENS")
  [ -z "${CORPUS:-}" ] || options+=(--set "data.corpus=$CORPUS")
  [ -z "${TARGET:-}" ] || options+=(--set "lengths.target=$TARGET" --set "eval.lengths=[$lengths]")
  options+=(--set "eval.tasks=[$TASKS]")
  IFS='|' read -ra keys <<<"$4"
  for key in "${keys[@]}"; do options+=(--set "$key"); done
  # The same command after another recipe, corpus or task goes on with what they ask for.
  marker=$run/.lab-$({ printf '%s ' "${options[@]}" && cat "$RECIPE"; } | cksum | cut -d ' ' -f 1)
  if [ -f "$marker" ]; then return; fi
  mkdir -p "$run"
  local stages='prepare train evaluate'
  if [[ $setting = *by-position ]]; then
    stages=evaluate
    by_position "$other" "$run" >>"$run/lab.log" 2>&1 || stopped "$@"
  elif [ -n "$5" ] && [ -d "$other/model" ] && [ ! -d "$run/checkpoints" ]; then
    cp -r "$other/shards" "$other/checkpoints" "$run/"
  fi
  STAGES=$stages OUT=$out bash "$root/recipes/run.sh" "$RECIPE" "$method" "${options[@]}" \
    >>"$run/lab.log" 2>&1 || stopped "$@"
  touch "$marker"
  printf '%-14s %-18s seed %s %6d s\n' "$setting" "$method" "$seed" $((SECONDS - start))
}

by_position() {  # trained run, this run: the same model, sharpened by position in place of the constant
  if [ ! -d "$1/model" ]; then
    echo "lab.sh: $1 has no model; run the setting it was trained in first" >&2
    return 2
  fi
  [ -d "$2/model" ] && return
  cp -r "$1/shards" "$1/train.json" "$1/recipe.yaml" "$2/"
  "$PYTHON" -m endprompt export "$1" --to "$2/model" --position-dependent
}

stopped() {  # as one(), which it ends
  local code=$? log more="; the same command goes on from there"
  [ "$code" -ne 2 ] || more=
  log=$("$PYTHON" -m endprompt path "$RECIPE" "$2" --out "$OUT/$1/seed$3")/lab.log
  tail -n 15 "$log" >&2
  echo "lab.sh: $1 $2 seed $3 failed; its log is $log$more" >&2
  over "$code"
}
export -f one by_position stopped over

# The methods that train nothing, and the lengths to evaluate: the recipe's, or doubled from its shortest to
# TARGET.
told=$("$PYTHON" -c 'import sys
from endprompt.methods import UNTRAINED
from endprompt.recipe import schema
lengths, target = sorted(schema.load(sys.argv[1]).eval.lengths), sys.argv[2]
if target:
    shortest = lengths[0]
    lengths = [shortest << n for n in range(32) if target.isdecimal() and shortest << n <= int(target)]
    if not lengths or str(lengths[-1]) != target:
        sys.stderr.write(f"lab.sh: TARGET={target} is not {shortest} doubled;")
        sys.stderr.write(f" use {shortest * 2}, {shortest * 4}\n")
        sys.exit(2)
print(*UNTRAINED)
print(*lengths, sep=", ")' "$RECIPE" "${TARGET:-}")
untrained=" ${told%$'\n'*} "
export lengths=${told##*$'\n'} TARGET TOKENS CORPUS
known=" ${METHODS:-} "
for setting in "${order[@]}"; do
  if [ -z "${methods[$setting]:-}" ]; then
    echo "lab.sh: there is no setting '$setting'; use ${!methods[*]}" >&2
    exit 2
  fi
  for method in ${methods[$setting]}; do known=${known// $method / }; done
done
read -ra known <<<"$known"
if [ "${#known[@]}" -gt 0 ]; then
  echo "lab.sh: METHODS: ${known[*]} is in none of the settings ${order[*]}" >&2
  exit 2
fi
first=${SEEDS%% *}
for setting in "${order[@]}"; do
  for seed in $SEEDS; do
    for method in ${methods[$setting]}; do
      if [ -n "${METHODS:-}" ] && [[ " $METHODS " != *" $method "* ]]; then continue; fi
      # The seed is nothing to a method that trains nothing.
      if [ "$seed" != "$first" ] && [[ $untrained == *" $method "* ]]; then continue; fi
      printf '%s\0' "$setting" "$method" "$seed" "${different[$setting]}" "${trained[$setting]:-}"
    done
  done | xargs -0 -r -n 5 -P "$JOBS" bash -c 'one "$@"' one || { code=$(cat "$ended"); exit "${code:-1}"; }
done
name=${RECIPE##*/}
name=${name%.yaml}
"$PYTHON" -m endprompt.reports.findings "$OUT" --out "${FINDINGS:-$OUT/findings}" \
  --title "$name over seeds $SEEDS"
