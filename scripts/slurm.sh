#!/usr/bin/env bash
#SBATCH --job-name=prompt_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@300
set -euo pipefail

usage() {
  cat >&2 <<'END'
Runs one prompt-jax command on all nodes of a Slurm job, as one program.

  sbatch scripts/slurm.sh train --gin_file=... --model_dir=/shared/DIR ...
  sbatch scripts/slurm.sh study FILE.gin --model_dir=/shared/DIR

A copy to change, or flags of sbatch before the script's name: --nodes, --time,
--partition, ... One task a node drives all of its GPUs; a task a GPU is
--ntasks-per-node=8 with --gpus-per-node=8. SETUP has shell commands to come
before, e.g. '. ~/venv/bin/activate'.

Also eval, infer and score. --model_dir and the checkpoint are on a file system
that all nodes share. Five minutes before the time is up training saves and
leaves; the same command goes on. The cells of a study are trained one after the
other, by all tasks together, which its recipes must say: together = 1. For many
small cells, each on a machine of its own: prompt-jax study --runner=slurm.
END
  exit 2
}

refuse() {
  printf 'slurm.sh: %s\n\n' "$1" >&2
  usage
}

[[ $# -ge 1 ]] || refuse 'no command is given.'
case $1 in
  eval | infer | score) ;;
  train | study)
    case " $*" in
      *' --model_dir='* | *' --model_dir '*) ;;
      *) refuse '--model_dir is missing.' ;;
    esac
    ;;
  *) refuse "'$1' is none of train, eval, infer, score, study." ;;
esac
if [[ $1 == study ]]; then
  set -- "$@" --workers=0
fi
[[ -n ${SLURM_JOB_NODELIST:-} ]] ||
  refuse 'not in a job of Slurm: give this file to sbatch.'

if ! read -r host < <(scontrol show hostnames "$SLURM_JOB_NODELIST"); then
  echo "slurm.sh: scontrol names no host of $SLURM_JOB_NODELIST." >&2
  exit 1
fi
# Other jobs on that node have other ports.
export JAX_COORDINATOR_ADDRESS="$host:$((20000 + SLURM_JOB_ID % 20000))"
if [[ ${SLURM_NTASKS_PER_NODE:-1} -eq 1 && -n ${SLURM_GPUS_ON_NODE:-} ]]; then
  # JAX takes one GPU a task on Slurm unless it is told.
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
if [[ -n ${SETUP:-} ]]; then
  eval "$SETUP"
fi
# Every task sees the GPUs of its node; the numbers are those of each task.
# shellcheck disable=SC2016
exec srun --gpu-bind=none bash -c '
  export JAX_NUM_PROCESSES=$SLURM_NTASKS JAX_PROCESS_ID=$SLURM_PROCID
  exec prompt-jax "$@"
' prompt-jax "$@"
