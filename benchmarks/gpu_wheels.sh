#!/usr/bin/env bash
# Gathers what benchmarks/gpu.sh installs on a machine without a network that has Python 3.12, torch 2.11, transformers 5.17, accelerate and peft (wheels of
# one version each, as the running pip finds them; the folder is ignored by git), and prints their sizes against what may travel.
#   bash benchmarks/gpu_wheels.sh [FOLDER [NAME ...]]            # .whl; NAME: what else is to be there
# The efficiency harness needs pydantic (with pydantic-core and annotated-types), liger-kernel serves --kernels liger; the rest is for ``endprompt train``.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-$root/.whl}
python=${PYTHON:-python3}
[ $# -lt 1 ] || shift
limit_mib=64
pure=(liger-kernel pydantic annotated-types hjson datasets multiprocess dill)
binary=(pydantic-core zstandard)
mkdir -p "$folder"
rm -f "$folder"/*.whl

version() { # the one that constraints.txt names, which CI tests
  sed -n "s/^$(echo "$1" | tr '_-' '..')==\(.*\)$/==\1/Ip" "$root/constraints.txt"
}
fetch() {
  "$python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any --dest "$folder" "$1$(version "$1")"
}
for name in "${pure[@]}" "${binary[@]}" "$@"; do fetch "$name"; done
# DeepSpeed publishes its source alone; its wheel, without compiled operations, is of no platform.
DS_BUILD_OPS=0 "$python" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir "$folder" "deepspeed$(version deepspeed)"

du -k "$folder"/*.whl | awk -v folder="$folder" -v limit="$limit_mib" \
  '{ print; total += $1 } END { printf "%s: %.1f MiB; %d MiB may travel in a call, the working tree included\n", folder, total / 1024, limit; exit total / 1024 > limit }'
