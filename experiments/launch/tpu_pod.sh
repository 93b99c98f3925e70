#!/bin/bash
# The same training command on every host of a Cloud TPU pod slice, from a machine with the gcloud command:
#
#   TPU=my-slice ZONE=europe-west4-b experiments/launch/tpu_pod.sh --config=all_targets \
#       --workdir=gs://bucket/runs/a --config.data.store=gs://bucket/stores/ukb --config.batch=256
#
# The hosts need this project installed with `pip install '.[tpu]'` in the folder PROJECT (default: neuronet-jax). They find
# each other through the slice's own metadata; run it again after a preemption and it continues.
set -euo pipefail
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}"
PROJECT=${PROJECT:-neuronet-jax}

arguments=$(printf '%q ' "$@")
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="cd $PROJECT && python -m experiments.train $arguments --resume"
