#!/bin/bash
# A search on SLURM: `sbatch tune_mnist/deploy/slurm.sh --space default --trials 500`, from a folder
# that the nodes share, in an environment with this package. Given again, or requeued, it goes on.
#SBATCH --job-name=tune_mnist
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=08:30:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tune_mnist.log
# For GPUs: --gpus-per-node above, and --gpus-per-trial 0.25 among the arguments.
set -euo pipefail
if [ -f results/slurm/search.yaml ]; then
  set -- --resume results/slurm
else
  set -- --run slurm "$@"
fi
export RAY_AUTH_MODE=token RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
ray get-auth-token --generate > /dev/null # in the home folder, which the nodes share as well
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" \
  -- python -m tune_mnist.search --address auto --time-budget 8h "$@"
