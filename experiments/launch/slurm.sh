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
#SBATCH --signal=B:USR1@300
set -euo pipefail

# Five minutes before the end this shell alone gets USR1 and hands it on: training saves, exits 0, and the job goes back into
# the queue. So it does where the signal ended a training that had not begun: 138 is 128 + USR1.
stopped=no
trap 'stopped=yes; [ -z "${!-}" ] || kill -USR1 "$!"' USR1
# --begin starts a fresh run where the workdir holds none yet.
srun --kill-on-bad-exit=1 python -m experiments.train "$@" --resume --begin &
training=$!
status=0
wait "$training" || status=$?
if [ "$stopped" = yes ]; then # the first wait ended with the signal, not with the training
    status=0
    wait "$training" || status=$?
    if [ "$status" -eq 0 ] || [ "$status" -eq 138 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
