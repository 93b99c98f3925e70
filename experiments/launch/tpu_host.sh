#!/bin/bash
# What tpu_pod.sh runs on each host of a slice, in the project's folder: one training, which outlives the ssh connection.
#
#   tpu_host.sh install            makes .venv with this project in it
#   tpu_host.sh start ARGUMENTS…   starts experiments.train in the background, unless it is running
#   tpu_host.sh report             prints one line: "training: running", "training: ended STATUS" or "training: none"
#   tpu_host.sh stop               asks the training to save and end
#   tpu_host.sh logs               prints the last lines of its messages
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# The training and its shell hold this lock for as long as they live. A process number would mean nothing after a reboot.
running() { ! flock --nonblock training.lock true; }

case ${1:-} in
install)
    # The hosts' own Python is 3.10; uv brings a newer one.
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv # newer Ubuntus ask for that
    python3 -m uv venv --quiet --python 3.12 .venv
    python3 -m uv pip install --quiet --python .venv/bin/python --constraint constraints.txt '.[tpu,gcs]'
    ;;
start)
    shift
    exec 9>training.lock
    flock --nonblock 9 || exit 0
    rm -f training.ended
    setsid nohup bash experiments/launch/tpu_host.sh train "$@" </dev/null >>training.log 2>&1 &
    ;;
train)
    shift
    # When the host shuts down, SIGTERM ends this shell too: the training saves, but is not reported as ended.
    status=0
    # shellcheck disable=SC2016 # the inner shell expands these
    bash -c 'echo $$ >training.pid; exec "$@"' train .venv/bin/python -m experiments.train "$@" --resume --begin || status=$?
    echo "$status" >training.ended
    ;;
report)
    if running; then
        echo "training: running"
    elif [ -s training.ended ]; then
        echo "training: ended $(cat training.ended)"
    else
        echo "training: none"
    fi
    ;;
stop) running && kill -USR1 "$(cat training.pid)" ;;
logs) tail -n 20 training.log ;;
*)
    echo "tpu_host.sh: install, start, report, stop or logs; tpu_pod.sh runs it" >&2
    exit 2
    ;;
esac
