#!/bin/bash
# Trains on a Cloud TPU slice, from making the slice to deleting it. See `tpu_pod.sh --help`.
set -euo pipefail

# shellcheck disable=SC2016 # quoted commands, not substitutions
HELP='One training run on a Cloud TPU slice, from a machine with the gcloud command.

  tpu_pod.sh run NAME --zone=ZONE --accelerator=TYPE [OPTIONS] -- TRAINING ARGUMENTS
  tpu_pod.sh status|logs|stop|delete NAME --zone=ZONE [--dry-run]

run      Requests the slice NAME as a queued resource and waits for it, installs the last commit of this project on all
         hosts, starts experiments.train on them and watches it. After a preemption it requests the slice again and the
         run goes on from its last checkpoint. At the end it deletes the slice. The training does not depend on this
         command: after Ctrl-C or a lost connection, give the same command again to go on watching.
status   prints the state of the queued resource and what each host does
logs     prints the last messages of each host
stop     asks the training to save and end; the `run` that watches it then deletes the slice
delete   deletes the slice and the queued resource at once

  --zone=ZONE          for example europe-west4-b
  --accelerator=TYPE   for example v5litepod-16, v5p-8 or v6e-8
  --spot               cheaper, and may be preempted at any time
  --runtime=VERSION    software of the hosts (default: the one for JAX on this type)
  --create=FLAG        one more flag of `gcloud compute tpus queued-resources create`, such as --create=--network=mine;
                       may be given several times
  --keep               do not delete the slice at the end
  --poll-s=SECONDS     time between two looks at the slice (default: 60)
  --dry-run            print every command of a run with one preemption, and do none of it

example:
  experiments/launch/tpu_pod.sh run neuronet-a --zone=europe-west4-b --accelerator=v5litepod-16 --spot -- \
      --config=all_targets --workdir=gs://bucket/runs/a --config.data.store=gs://bucket/stores/ukb --config.batch=64

exit status: 0 the training has ended as it should; 1 the slice cannot be had; 2 wrong arguments; 3 gcloud or the hosts
did not answer for long; otherwise the status of the training, which failed more than three times, or with 2, 4 or 5 (see
`python -m experiments.train --help`)
'

RESTARTS=3   # of a training that failed on a healthy slice; preemptions are not counted
FAILURES=3   # of the request for a slice, one after the other
UNANSWERED=10 # looks at a slice, one after the other, before it is taken for lost
FOLDER=neuronet-jax # on the hosts, below the home folder

say() { echo "tpu_pod.sh: $*" >&2; }
fail() {
    say "$2"
    exit "$1"
}
wrong() { fail 2 "$1; see --help"; }

# Runs a command, or prints it as it could be typed.
call() {
    if [ "$dry" = yes ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}
note() { [ "$dry" = no ] || echo "# $*"; }
pause() { [ "$dry" = yes ] || sleep "$poll_s"; }

queue() { call gcloud compute tpus queued-resources "$1" "$name" --zone="$zone" --quiet "${@:2}"; }
ssh_all() { call gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --quiet --worker=all --command="$1"; }
on_hosts() { ssh_all "bash $FOLDER/experiments/launch/tpu_host.sh $1"; }

# Sets `state`: as gcloud names it, NONE where there is no such resource, UNKNOWN where gcloud gives no answer.
look() {
    local said
    if [ "$dry" = yes ]; then
        queue describe --format='value(state.state)'
        state=${played[0]}
        played=("${played[@]:1}")
        note "assume the answer $state"
    elif said=$(queue describe --format='value(state.state)' 2>&1); then
        state=$(tail -n 1 <<<"$said")
    else
        case $said in
        *NOT_FOUND*) state=NONE ;;
        *)
            say "gcloud: $(tail -n 1 <<<"$said")"
            state=UNKNOWN
            ;;
        esac
    fi
}

create() {
    restarts=0
    local flags=(--node-id="$name" --accelerator-type="$accelerator" --runtime-version="$runtime")
    [ "$spot" = no ] || flags+=(--spot)
    say "requesting $name, $accelerator"
    queue create "${flags[@]}" "${create[@]}"
}

delete() {
    say "deleting $name"
    queue delete --force
}

# Waits until the slice is there, requesting it where it is not.
obtain() {
    local failures=0 unanswered=0 before=
    while look; [ "$state" != ACTIVE ]; do
        [ "$state" = "$before" ] || say "$name is $state"
        before=$state
        case $state in
        NONE) create || failures=$((failures + 1)) ;;
        FAILED)
            failures=$((failures + 1))
            delete || true
            ;;
        SUSPENDED) delete || true ;;
        UNKNOWN) unanswered=$((unanswered + 1)) ;;
        *) unanswered=0 ;; # in the queue, being made, or being deleted
        esac
        [ "$failures" -lt "$FAILURES" ] || fail 1 "the slice cannot be had; gcloud said why, or says it with: status $name"
        [ "$unanswered" -lt "$UNANSWERED" ] || fail 3 "gcloud did not answer $UNANSWERED times in a row"
        pause
    done
    say "$name is ACTIVE"
}

# A command on all hosts, tried again for as long as a new host may need to let one in.
patiently() {
    local attempt
    for attempt in 1 2 3 4 5; do
        if "$@"; then return 0; fi
        say "attempt $attempt of 5 on the hosts failed"
        pause
    done
    return 1
}

install() {
    local host=$FOLDER/experiments/launch/tpu_host.sh stamp=$FOLDER/.installed-$commit lock=$FOLDER/training.lock
    say "installing on all hosts"
    patiently call gcloud compute tpus tpu-vm scp "$archive" "$name:$FOLDER.tar.gz" --zone="$zone" --quiet --worker=all &&
        # not where it is installed, nor under the feet of a training that runs
        patiently ssh_all "if [ -e $stamp ] || { [ -e $lock ] && ! flock --nonblock $lock true; }; then exit 0; fi; \
rm -rf $FOLDER && mkdir $FOLDER && tar -xzf $FOLDER.tar.gz -C $FOLDER && bash $host install && touch $stamp"
}

# Sets `reports`: the different answers of the hosts, a line each; nothing where not all hosts answer.
ask() {
    if [ "$dry" = yes ]; then
        on_hosts report
        reports=${answers[0]}
        answers=("${answers[@]:1}")
        note "assume the answer ${reports:-none}"
    else
        reports=$(on_hosts report 2>/dev/null) || reports=
        reports=$(grep '^training: ' <<<"$reports" | sort -u) || reports=
    fi
}

# Watches the training until it has ended. Sets `outcome`: ended, failed or lost, and `status` of a failed one.
watch() {
    local unanswered=0
    while :; do
        pause
        look
        case $state in
        ACTIVE) ask ;;
        UNKNOWN) reports= ;;
        *)
            say "$name is $state"
            outcome=lost
            return
            ;;
        esac
        if [ -z "$reports" ]; then
            unanswered=$((unanswered + 1))
            if [ "$unanswered" -ge "$UNANSWERED" ]; then
                [ "$state" = ACTIVE ] || fail 3 "gcloud did not answer $UNANSWERED times in a row; the training may go on"
                say "the hosts do not answer: taking $name for lost"
                delete || true
                outcome=lost
                return
            fi
            continue
        fi
        unanswered=0
        case $reports in
        *running*) ;; # where a host has lost its training, the others notice and end
        "training: ended 0")
            outcome=ended
            return
            ;;
        *)
            outcome=failed
            status=$(sed -n 's/^training: ended \([1-9][0-9]*\)$/\1/p' <<<"$reports" | tail -n 1)
            status=${status:-3} # a host went down and came back
            return
            ;;
        esac
    done
}

finish() {
    if [ "$keep" = yes ]; then
        say "keeping $name; delete it with: tpu_pod.sh delete $name --zone=$zone"
    else
        delete
    fi
    exit "$1"
}

run() {
    note "Here and below: until it is ACTIVE, every $poll_s s"
    trap 'say "the training goes on; the same command watches it again, and \"delete\" ends it"; exit 130' INT
    temporary=$(mktemp -d)
    trap 'rm -rf "$temporary"' EXIT
    archive=$temporary/$FOLDER.tar.gz
    commit=$(git -C "$project" rev-parse HEAD) # the same code after every restart
    git -C "$project" diff --quiet HEAD || say "changes that are not committed do not go to the hosts"
    call git -C "$project" archive --format=tar.gz --output="$archive" "$commit"

    while :; do
        obtain
        ask
        case $reports in
        *running*) say "the training is running" ;;
        *)
            if ! install || ! patiently on_hosts "start $training"; then
                look
                [ "$state" != ACTIVE ] || fail 3 "the hosts of $name do not let us in, or the installation fails; it is not deleted"
                continue
            fi
            say "the training is started"
            ;;
        esac
        watch
        case $outcome in
        ended)
            say "the training has ended"
            finish 0
            ;;
        failed)
            on_hosts logs || true
            restarts=$((restarts + 1))
            if [[ $status == [245] ]] || [ "$restarts" -gt "$RESTARTS" ]; then
                say "the training ended with status $status"
                finish "$status"
            fi
            say "the training ended with status $status; restart $restarts of $RESTARTS"
            ;;
        esac
    done
}

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
zone='' accelerator='' runtime='' spot=no keep=no poll_s=60 dry=no restarts=0 create=() command=${1:-} name=''
case $command in
-h | --help) printf '%s' "$HELP" && exit 0 ;;
run | status | logs | stop | delete) shift ;;
*) wrong "the first argument is run, status, logs, stop or delete, got '$command'" ;;
esac
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) printf '%s' "$HELP" && exit 0 ;;
    --zone=*) zone=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --create=*) create+=("${1#*=}") ;;
    --poll-s=*) poll_s=${1#*=} ;;
    --spot) spot=yes ;;
    --keep) keep=yes ;;
    --dry-run) dry=yes ;;
    --)
        shift
        break
        ;;
    -*) wrong "unknown option $1; training arguments come after --" ;;
    *)
        [ -z "$name" ] || wrong "one NAME, got '$name' and '$1'"
        name=$1
        ;;
    esac
    shift
done
[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] || wrong "NAME is of lower-case letters, digits and '-', got '$name'"
[ -n "$zone" ] || wrong "--zone=ZONE is missing"

case $command in
run)
    case $accelerator in
    '') wrong "--accelerator=TYPE is missing" ;;
    v5litepod-*) default=v2-alpha-tpuv5-lite ;;
    v5p-*) default=v2-alpha-tpuv5 ;;
    v6e-*) default=v2-alpha-tpuv6e ;;
    v[234]-*) default=tpu-ubuntu2204-base ;;
    *) default= ;;
    esac
    runtime=${runtime:-$default}
    [ -n "$runtime" ] || wrong "no runtime is known for $accelerator; name one with --runtime=VERSION"
    # The hosts and their disks go with the slice.
    [[ " $* " == *" --workdir=gs://"* ]] || wrong "the training needs --workdir=gs://…"
    [[ " $* " == *" --config.data.store=gs://"* ]] || wrong "the training needs --config.data.store=gs://…"
    training=$(printf '%q ' "$@")
    played=(NONE ACTIVE SUSPENDED SUSPENDED NONE ACTIVE ACTIVE)
    answers=('' '' 'training: ended 0')
    run
    ;;
status)
    queue describe --format='value(state.state)'
    on_hosts report
    ;;
logs | stop) on_hosts "$command" ;;
delete) delete ;;
esac
