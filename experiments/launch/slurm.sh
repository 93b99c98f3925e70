#!/bin/bash
# One training run over the GPUs of several nodes, continued by itself after a preemption or the end of its time:
#
#   sbatch --nodes=4 --gpus-per-node=8 experiments/launch/slurm.sh --config=all_targets --workdir=/shared/runs/a \
#       --config.data.store=/shared/stores/ukb --config.batch=64
#
# One task per node drives all of its GPUs; the processes find each other through Slurm's own variables. The store and the
# workdir must be visible to every node.
#SBATCH --job-name=neuronet
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
set -euo pipefail

# USR1, five minutes before the end, makes training save and exit 0; a step that is not the last one asks for a requeue.
requeue() { asked=yes; }
trap requeue USR1
asked=no

# --resume starts a fresh run where the workdir holds none yet.
srun --kill-on-bad-exit=1 python -m experiments.train "$@" --resume &
step=$!
while kill -0 "$step" 2>/dev/null; do
    # the batch shell gets the signal only (Slurm sends it to the steps as well unless B: is given)
    wait "$step" && status=0 || status=$?
done
if [ "$asked" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "${status:-0}"
