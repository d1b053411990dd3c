"""A cluster that is not there, for the job scripts: programs in PATH that note how they are called and then
do what the real ones would.
"""

import os
import sys
from pathlib import Path

from conftest import REPOSITORY
from training import ENVIRONMENT

# As Apptainer: knows its options, opens an image, says inside that there is a container, passes signals on to
# the one process that it started, and ends as that does.
APPTAINER = """#!/bin/bash
echo "$*" | head -n 1 >>"{log}/apptainer"
[ "$1" = exec ] && shift || exit 255
clean=() hidden=''
while [[ $1 == -* ]]; do
  case $1 in
    --nv) shift ;;
    --cleanenv) clean=(env -i "PATH=$PATH" "PYTHONPATH=$PYTHONPATH"); shift ;;
    --hide) hidden=$2; shift 2 ;;
    --bind | --pwd) shift 2 ;;
    *) echo "Error for command \\"exec\\": unknown flag: $1" >&2; exit 1 ;;
  esac
done
[ -f "$1" ] || {{ echo "FATAL:   could not open image $1: no such file or directory" >&2; exit 255; }}
export APPTAINER_CONTAINER=$1
shift
args=("$@")
for ((i = 0; i + 1 < $#; i++)); do # what is not bound is another folder inside, if there is one
  if [[ ${{args[i]}} == "$hidden" && ${{args[i + 1]}} =~ ^[0-9]+$ ]]; then args[i + 1]=0; fi
done
set -- "${{args[@]}}"
(trap - INT && exec "${{clean[@]}}" "$@") &
child=$!
for name in TERM USR1 INT; do trap "kill -$name $child" $name; done
code=0
wait $child || code=$?
while kill -0 $child 2>/dev/null; do code=0; wait $child || code=$?; done
exit $code
"""
# A Python that notes whether a container is around it.
PYTHON = """#!/bin/bash
echo "${{APPTAINER_CONTAINER:-outside}} $*" | head -n 1 >>"{log}/python"
exec {python} "$@"
"""
# The same, but of endprompt's commands only what the scripts ask for.
ANSWERS = """#!/bin/bash
echo "${{APPTAINER_CONTAINER:-outside}} $*" | head -n 1 >>"{log}/python"
case "$*" in
  *" path "*) echo "$OUT/tiny/endprompt" ;;
  *" gpus"*) echo 0 ;;
  *" --list"*) echo passkey:1024 ;;
  -c*) exec {python} "$@" ;;
esac
"""
MODULE = """#!/bin/bash
echo "$*" >>"{log}/module"
case "$*" in *missing*) echo "Lmod has detected the following error: unknown module" >&2; exit 1 ;; esac
"""
SBATCH = """#!/bin/bash
echo "$*" >>"{log}/sbatch"
echo 7
"""
# On this machine, as the first node of one.  A requeue ends the job script, as Slurm does.
SRUN = """#!/bin/bash
echo "$*" >>"{log}/srun"
while [[ $1 == -* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "$*" >>"{log}/scontrol"
case $1 in
  show) echo localhost ;;
  requeue) kill -TERM $PPID ;;
esac
"""


class Site:
    """root: a folder that holds the repository's scripts, and where jobs are submitted from; bin: first in
    PATH; log: what each program was called with."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.log = folder / "repository", folder / "bin", folder / "log"
        for one in (self.root, self.bin, self.log):
            one.mkdir(parents=True)
        for name in ("recipes", "ds_configs", "endprompt"):
            (self.root / name).symlink_to(REPOSITORY / name)
        (self.root / "slurm").mkdir()
        for path in (REPOSITORY / "slurm").iterdir():
            if path.name != "site.sh":
                (self.root / "slurm" / path.name).symlink_to(path)
        self.image = folder / "image.sif"
        self.image.touch()
        self.out = folder / "runs"
        for name, text in {"apptainer": APPTAINER, "python": PYTHON, "python3": PYTHON}.items():
            self.program(name, text)

    def program(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(log=self.log, python=sys.executable))
        path.chmod(0o755)
        return path

    def environment(self, **more: str) -> dict[str, str]:
        plain = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("SLURM_")}
        for name in ("PYTHON", "ENDPROMPT_SITE", "VIRTUAL_ENV", "CONDA_PREFIX", "SHELLOPTS"):
            plain.pop(name, None)
        return {
            **plain,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "RECIPE": str(REPOSITORY / "recipes/tiny.yaml"),
            "OUT": str(self.out),
            "IMAGE": str(self.image),
            **{name: str(value) for name, value in more.items()},
        }

    def calls(self, program: str) -> list[str]:
        path = self.log / program
        return path.read_text().splitlines() if path.exists() else []
