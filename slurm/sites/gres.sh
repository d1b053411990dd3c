# shellcheck shell=bash
# A cluster on which GPUs have types, or that wants other options than #SBATCH lines give.  Copy to
# slurm/site.sh, or name it: ENDPROMPT_SITE=slurm/sites/gres.sh.  Change: type, number, partition.
#
# submit_all.sh reads these.  For one job: sbatch --gres=gpu:a100:4 slurm/train_64k.sbatch; what stands on the
# command line goes before the script's own line.  recipes/run.sh counts the GPUs that it was given.
# shellcheck disable=SC2034 # slurm/submit_all.sh reads them
TRAIN_OPTIONS=${TRAIN_OPTIONS:---gres=gpu:${GPU_TYPE:-a100}:${GPUS:-4} --partition=${PARTITION:-gpu}}
EVAL_OPTIONS=${EVAL_OPTIONS:---gres=gpu:${GPU_TYPE:-a100}:1 --partition=${PARTITION:-gpu}}
