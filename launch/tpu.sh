#!/usr/bin/env bash
# Trains on a Cloud TPU slice, from this machine, through gcloud.
#
# On every worker: ~/topd_jax/src (the checkout), ~/topd_jax/venv,
# ~/topd_jax/runs, ~/topd_jax/train.log and train.pid.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/tpu.sh COMMAND --name NAME --zone ZONE [FLAG ...] [-- ARG...]

  create    make the TPU slice NAME                   (needs --type)
  install   copy the checkout to every worker, install it there
  run       start topd train on every worker, detached (needs --config)
  logs      follow the log of one worker
  stop      end the training on every worker
  delete    delete the slice, and with it its disks
  all       create, install, run, logs
  keep      all of it until the training is done: waits for the slice, asks
            again where there is no capacity, and after a preemption or a
            failure begins anew from the last checkpoint. Runs in the
            background, survives the terminal, and goes on when started again

  --name NAME        the slice
  --zone ZONE        for instance us-west4-a
  --project PROJECT  default: gcloud's own
  --type TYPE        accelerator type, for instance v5litepod-8, v6e-16, v4-32
  --version VERSION  runtime; default: by the type
  --spot, --reserved spot capacity, or out of a reservation
  --queued           ask for the slice by a queued resource of the same name,
                     and delete that (create returns before the slice exists;
                     keep waits for it)
  --branch REF       the commit to install (default: HEAD); what is not
                     committed is not copied
  --config FILE      the config, a path in the checkout
  --workdir DIR      default runs/NAME. A relative path is in ~/topd_jax of
                     each worker; with several workers give a directory that
                     all of them see (Filestore, or a bucket under gcsfuse)
  --worker N         whose log (default 0)
  --no-follow        print the end of the log and return; of keep: return
  --prepare COMMAND  run on every worker before each start of the training, to
                     mount the disk of --workdir; must bear being repeated
  --every SECONDS    how often keep looks (default 60)
  --restarts N       failures after which keep gives up (default 10); those
                     of a preemption or for want of capacity do not count
  --delete-when-done of keep: delete the slice in the end
  --foreground       of keep: in this process
  --dry-run          print every command, run none
  -- ARG ...         handed to topd train, for instance --config.train.steps=9

Exit codes: 2 for wrong usage, else that of the command that failed.
Example:
  bash launch/tpu.sh all --name t1 --zone us-west4-a --type v5litepod-8 \
      --config configs/tiny.py --spot
  bash launch/tpu.sh keep --name t1 --zone us-west4-a --type v5litepod-16 \
      --queued --spot --config configs/qwen3_8b_to_1p7b.py \
      --prepare 'mountpoint -q /mnt/d || sudo mount 10.0.0.2:/vol -m /mnt/d' \
      --workdir /mnt/d/t1 --delete-when-done
TEXT
}

top="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/common.sh
source "$top/launch/common.sh"
# shellcheck source=launch/keep.sh
source "$top/launch/keep.sh"
name="" zone="" project="" type="" version="" branch=HEAD config="" workdir=""
worker=0 follow=yes dry_run="" queued="" capacity=() arguments=()
prepare="" every=60 restarts=10 delete_when_done="" foreground=""

# tpus VERB ...: one gcloud call about the slice.
tpus() {
    execute gcloud compute tpus "$@" --zone="$zone" \
        ${project:+"--project=$project"}
}

# on_worker WORKER SCRIPT: SCRIPT is read by the worker's login shell.
on_worker() {
    tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
}

parse() {
    while (($#)); do
        if [[ "$1" == --?*=* ]]; then
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
        fi
        case "$1" in
            --spot | --reserved) capacity+=("$1") && shift && continue ;;
            --queued) queued=yes && shift && continue ;;
            --dry-run) dry_run=yes && shift && continue ;;
            --no-follow) follow="" && shift && continue ;;
            --delete-when-done) delete_when_done=yes && shift && continue ;;
            --foreground) foreground=yes && shift && continue ;;
            --help | -h) usage && exit 0 ;;
            --) arguments=("${@:2}") && break ;;
            --name | --zone | --project | --type | --version | --branch | \
                --config | --workdir | --worker | --prepare | --every | \
                --restarts) ;;
            *) die "unknown argument $1: see --help; what is meant for topd" \
                "goes after --" ;;
        esac
        if (($# < 2)) || [[ "$2" == --* || -z "$2" ]]; then
            die "$1 needs a value, for instance $1=..."
        fi
        printf -v "${1#--}" '%s' "$2"
        shift 2
    done
}

check() {
    case "$command" in
        create | install | run | logs | stop | delete | all | keep) ;;
        *) die "unknown command $command: one of create, install, run, logs," \
            "stop, delete, all, keep (see --help)" ;;
    esac
    required --name my-tpu
    required --zone us-west4-a
    if [[ " create all keep " == *" $command "* ]]; then
        required --type v5litepod-8
        choose_version
    fi
    if [[ " run all keep " == *" $command "* ]]; then
        required --config configs/tiny.py
    elif ((${#arguments[@]})); then
        die "$command takes no arguments after --; run, all and keep do"
    fi
    if [[ "$command" == keep && "$workdir" != /* ]]; then
        die "--workdir=$workdir is lost with the slice: keep needs the" \
            "absolute path of a disk that outlives it, mounted by --prepare"
    fi
    if [[ ! "$restarts" =~ ^[0-9]+$ ||
        ! "$every" =~ ^[0-9]+([.][0-9]+)?$ ]]; then
        die "--restarts=$restarts and --every=$every must be numbers, 0 or more"
    fi
    if ((${#capacity[@]} > 1)); then
        die "--spot and --reserved exclude each other: give one"
    fi
    if [[ "$workdir" == *://* ]]; then
        die "--workdir=$workdir must be a directory on the workers: mount the" \
            "bucket there (gcsfuse) and give the place where it is mounted"
    fi
    if [[ "$command" == all && -n "$queued" ]]; then
        die "all cannot wait for a queued resource: keep can"
    fi
    if [[ ! "$worker" =~ ^[0-9]+$ ]]; then
        die "--worker=$worker must be a worker's number, 0 or more"
    fi
    if [[ -z "$dry_run" ]] && ! command -v gcloud >/dev/null; then
        die "gcloud is not on PATH: install the Google Cloud CLI and log in" \
            "(gcloud auth login), or look with --dry-run"
    fi
}

# The runtimes that Cloud TPU's page on software versions gives for JAX.
choose_version() {
    if [[ -n "$version" ]]; then
        return
    fi
    case "$type" in
        v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
        v5litepod-*) version=v2-alpha-tpuv5-lite ;;
        v5p-*) version=v2-alpha-tpuv5 ;;
        v6e-*) version=v2-alpha-tpuv6e ;;
        *) die "--type=$type has no known runtime: give --version; gcloud" \
            "compute tpus tpu-vm versions list --zone=$zone lists them" ;;
    esac
}

create() {
    if [[ -n "$queued" ]]; then
        tpus queued-resources create "$name" --node-id="$name" \
            --accelerator-type="$type" --runtime-version="$version" \
            ${capacity[@]+"${capacity[@]}"}
    else
        tpus tpu-vm create "$name" --accelerator-type="$type" \
            --version="$version" ${capacity[@]+"${capacity[@]}"}
    fi
}

# Worker scripts. They are the worker's to expand, hence the single quotes.
# shellcheck disable=SC2016
readonly refuse_if_running='set -eu;
mkdir -p "$HOME/topd_jax"; cd "$HOME/topd_jax";
pid=$(cat train.pid 2>/dev/null || echo none);
if grep -qs topd "/proc/$pid/cmdline"; then
echo "$(hostname): training runs (process $pid): see logs, or stop it" >&2
exit 2; fi'
# The old checkout goes, so that no module of it is left behind.
# shellcheck disable=SC2016
readonly install_here='rm -rf src installed;
tar -xzf "$HOME/topd_jax.tar.gz"; cd src;
TOPD_VENV="$HOME/topd_jax/venv" TOPD_FETCH_PYTHON=1 bash launch/setup.sh tpu;
touch ../installed'
# shellcheck disable=SC2016
readonly need_install='if [ ! -x venv/bin/topd ]; then
echo "$(hostname): topd_jax is not here: tpu.sh install" >&2; exit 2; fi;'
# A session of its own, and nothing open to the terminal: ssh returns, and the
# training outlives it. The wrapper writes how it ended; its own trap lets topd
# end first.
# shellcheck disable=SC2016
readonly run_here='start() { setsid nohup bash -c '\''trap : TERM; "$@";
echo "topd: exit code $?"'\'' topd "$@" >>../train.log 2>&1 </dev/null &
echo $! >../train.pid; };'
# shellcheck disable=SC2016
readonly stop_here='pid=$(cat "$HOME/topd_jax/train.pid" || echo none);
if ! grep -qs topd "/proc/$pid/cmdline"; then
echo "$(hostname): nothing runs"; exit 0; fi;
kill -TERM -- "-$pid";
for _ in $(seq 120); do kill -0 -- "-$pid" 2>/dev/null || exit 0; sleep 1; done;
echo "$(hostname): process $pid is still there after 120 s" >&2; exit 1'

# What the keeper asks: absent, fresh, running, ended CODE, or other, where
# another command line runs. Expects the wanted one in $wanted.
# shellcheck disable=SC2016
readonly look_here='cd "$HOME/topd_jax" 2>/dev/null || mkdir "$HOME/topd_jax";
state() { echo "topd-state: $*"; exit 0; };
[ -x venv/bin/topd ] && [ -e src/setup.py ] && [ -e installed ] || state absent;
same=; [ "$(cat train.command 2>/dev/null)" = "$wanted" ] && same=yes;
pid=$(cat train.pid 2>/dev/null || echo none);
if grep -qs topd "/proc/$pid/cmdline"; then
[ -n "$same" ] && state running; state other; fi;
[ -n "$same" ] || state fresh;
state ended "$(tail -n 1 train.log | sed -n "s/^topd: exit code //p")"'

check_commit() {
    git -C "$top" rev-parse --verify --quiet "$branch^{commit}" >/dev/null ||
        die "--branch=$branch is no commit of $top: git branch lists them"
    if [[ -n "$(git -C "$top" status --porcelain)" ]]; then
        echo "tpu.sh: note: the checkout has changes that are not committed;" \
            "$branch goes to the workers without them" >&2
    fi
}

install() {
    local archive="$top/runs/launch/$name.tar.gz"
    if [[ -z "$dry_run" ]]; then
        check_commit
    fi
    execute mkdir -p "$top/runs/launch"
    execute git -C "$top" archive --format=tar.gz --prefix=src/ \
        --output="$archive" "$branch"
    tpus tpu-vm scp "$archive" "$name:topd_jax.tar.gz" --worker=all
    on_worker all "$refuse_if_running; $install_here"
}

# The training's command line, for the worker's shell in the checkout.
train_command() {
    local place="\"\$HOME\"/topd_jax/" directory="${workdir:-runs/$name}"
    if [[ "$directory" == /* ]]; then
        place=""
    fi
    printf '%s' "../venv/bin/topd train --distributed" \
        " --config $(quote "$config") --workdir $place$(quote "$directory")"
    if ((${#arguments[@]})); then
        printf ' %s' "$(quote "${arguments[@]}")"
    fi
}

run() {
    local train file
    train="$(train_command)"
    file="$(quote "${config%%:*}")" # what follows a colon is its argument
    on_worker all "$refuse_if_running; $need_install
[ -f src/$file ] || { echo \"\$(hostname): no config\" $file >&2; exit 2; }
# shellcheck disable=SC2016
printf '%s' $(quote "$train") >train.command
${prepare:+($prepare)
}cd src; $run_here
start $train"
}

logs() {
    # shellcheck disable=SC2016
    on_worker "$worker" "tail -n 50 ${follow:+-F }"'"$HOME/topd_jax/train.log"'
}

stop_training() {
    on_worker all "$stop_here"
}

stop() {
    end_keeper
    stop_training
}

delete_slice() {
    if [[ -n "$queued" ]]; then
        tpus queued-resources delete "$name" --force --quiet
    else
        tpus tpu-vm delete "$name" --quiet
    fi
}

delete() {
    end_keeper
    delete_slice
}

all() {
    create
    install
    run
    logs
}

command="${1:-}"
if [[ -z "$command" ]]; then
    usage >&2
    exit 2
fi
if [[ "$command" == --help || "$command" == -h ]]; then
    usage
    exit 0
fi
shift
given=("$@")
parse "$@"
check
record="$top/runs/launch/$name" errors="$top/runs/launch/$name.errors.$$"
"$command"
