# shellcheck shell=bash
# A cluster with environment modules.  Copy to slurm/site.sh, or name it:
# ENDPROMPT_SITE=slurm/sites/modules.sh.  Change: where `module` comes from, the modules' names, and the
# Python that has endprompt.

# A batch script is no login shell, and sbatch --export=NONE leaves it without `module`.
if ! command -v module >/dev/null; then
  # shellcheck source=/dev/null
  source "${MODULES_INIT:-/etc/profile.d/modules.sh}" # Lmod: /etc/profile.d/lmod.sh
fi
module purge
# DeepSpeed compiles with them when it offloads.
module load "${MODULES_CUDA:-cuda/12.8}" "${MODULES_GCC:-gcc/13}"
export PYTHON=${PYTHON:-$PWD/.venv/bin/python}
