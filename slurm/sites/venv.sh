# shellcheck shell=bash
# A virtual environment, or one of conda, outside the repository.  Copy to slurm/site.sh, or name it:
# ENDPROMPT_SITE=slurm/sites/venv.sh.  Change: its folder, which every node must see.

# shellcheck source=/dev/null
source "${VENV:-$HOME/envs/endprompt}/bin/activate"

# conda instead:
#   source "$HOME/miniforge3/etc/profile.d/conda.sh"
#   conda activate endprompt

# Caches on a fast disk of the node, where the home folder is small or slow:
#   export TRITON_CACHE_DIR=/tmp/$USER/triton TORCH_EXTENSIONS_DIR=/tmp/$USER/torch
