#!/usr/bin/env bash
# Run topd on a Cloud TPU slice, from this machine, through gcloud.
#
# Every worker has in ~/topd_jax: src (the checkout), venv, runs, train.log, and
# of the last start train.command and train.pid.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/tpu.sh COMMAND --name NAME --zone ZONE [FLAG ...] [-- ARG...]

  create    create the TPU slice NAME                 (needs --type)
  install   copy the checkout to every worker and install it
  run       start topd on every worker, detached (needs --config)
  logs      follow the log of one worker
  stop      stop the training on every worker, and the keeper
  delete    delete the slice with its disks, and stop the keeper
  all       create, install, run, logs
  keep      do all of it until the training is done: wait for the slice, retry
            where there is no capacity, resume from the last checkpoint after a
            preemption or a failure. Runs in the background and survives the
            terminal; rerun the command to follow it again
  paper     keep, of the paper's whole recipe: launch/paper.sh, --config that of
            its second stage

  --name NAME        the slice
  --zone ZONE        for instance us-west4-a
  --project PROJECT  default: the one that gcloud is configured with
  --type TYPE        accelerator type, for instance v5litepod-8, v6e-16, v4-32
  --version VERSION  runtime version; the default depends on the type
  --spot, --reserved use spot capacity, or a reservation
  --queued           request the slice through a queued resource of the same
                     name, and delete that (create returns before the slice
                     exists; keep waits for it)
  --branch REF       the commit to install (default: HEAD); uncommitted changes
                     are not copied
  --config FILE      the config, a path in the checkout
  --topd COMMAND     what to run, for instance generate or eval (default: train)
  --workdir DIR      default runs/NAME. A relative path starts at ~/topd_jax on
                     each worker; several workers need a directory that all of
                     them share: gs://BUCKET/PATH, or Filestore
  --worker N         whose log to show (default 0)
  --no-follow        of logs: print the end of the log and return; of keep:
                     return while the keeper runs
  --prepare COMMAND  run this on every worker before each start, to mount the
                     disk of --workdir; it must tolerate repetition
  --every SECONDS    how often keep polls (default 60)
  --restarts N       keep gives up after N failures (default 10); preemptions
                     and missing capacity do not count
  --delete-when-done of keep: delete the slice when the training is done
  --foreground       of keep: stay in the foreground
  --dry-run          print every command, run none
  -- ARG ...         passed to topd, for instance --config.train.steps=9

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

launch="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/setup.sh
source "$launch/setup.sh"
# shellcheck source=launch/keep.sh
source "$launch/keep.sh"
name="" zone="" project="" type="" version="" branch=HEAD config="" workdir=""
topd=train worker=0 follow=yes dry_run="" queued="" capacity=() arguments=()
prepare="" every=60 restarts=10 delete_when_done="" foreground=""

# Prints its arguments as one line that a shell parses into the same words.
quote() {
    local word separator="" one="'" escaped="'\\''"
    for word in "$@"; do
        if [[ -z "$word" || "$word" == *[!A-Za-z0-9_./:=@%+,-]* ]]; then
            word="'${word//$one/$escaped}'"
        fi
        printf '%s%s' "$separator" "$word"
        separator=" "
    done
}

# Runs a command; with --dry-run prints it.
execute() {
    if [[ -n "$dry_run" ]]; then
        quote "$@"
        echo
        return
    fi
    "$@" || {
        local code=$?
        echo "tpu.sh: exit code $code from: $(quote "${@:1:6}") ..." >&2
        exit "$code"
    }
}

# tpus VERB ...: one gcloud call about the slice.
tpus() {
    execute gcloud compute tpus "$@" --zone="$zone" \
        ${project:+"--project=$project"}
}

# on_worker WORKER SCRIPT: the worker's login shell runs SCRIPT in ~/topd_jax.
on_worker() {
    tpus tpu-vm ssh "$name" --worker="$1" --command="$worker_prelude
$2"
}

parse() {
    while (($#)); do
        if [[ "$1" == --?*=* ]]; then
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
        fi
        case "$1" in
            --spot | --reserved) capacity+=("$1") ;;
            --queued) queued=yes ;;
            --dry-run) dry_run=yes ;;
            --no-follow) follow="" ;;
            --delete-when-done) delete_when_done=yes ;;
            --foreground) foreground=yes ;;
            --help | -h) usage && exit 0 ;;
            --) arguments=("${@:2}") && break ;;
            --name | --zone | --project | --type | --version | --branch | \
                --config | --topd | --workdir | --worker | --prepare | \
                --every | --restarts)
                if (($# < 2)) || [[ "$2" == --* || -z "$2" ]]; then
                    die "$1 needs a value, for instance $1=..."
                fi
                printf -v "${1#--}" '%s' "$2"
                shift
                ;;
            *) die "unknown argument $1: see --help; arguments of topd go" \
                "after --" ;;
        esac
        shift
    done
}

# required FLAG EXAMPLE: refuses $command where FLAG was not given.
required() {
    local variable="${1#--}"
    [[ -n "${!variable}" ]] || die "$command needs $1, for instance $1 $2"
}

check() {
    case "$command" in
        create | install | run | logs | stop | delete | all | keep) ;;
        *) die "unknown command $command: one of create, install, run, logs," \
            "stop, delete, all, keep, paper (see --help)" ;;
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
    if [[ "$command" == keep && "$workdir" != /* && "$workdir" != *://* ]]; then
        die "--workdir=$workdir is lost with the slice: keep needs the" \
            "absolute path of a disk that outlives it, mounted by --prepare," \
            "or gs://BUCKET/PATH"
    fi
    local flag
    for flag in restarts worker every; do
        if [[ ! "${!flag}" =~ ^[0-9]+([.][0-9]+)?$ ]] ||
            [[ "$flag" != every && "${!flag}" == *.* ]]; then
            die "--$flag=${!flag} must be a number, 0 or more"
        fi
    done
    if ((${#capacity[@]} > 1)); then
        die "--spot and --reserved exclude each other: give one"
    fi
    if [[ "$command" == all && -n "$queued" ]]; then
        die "all cannot wait for a queued resource: use keep"
    fi
    if [[ -z "$dry_run" ]] && ! command -v gcloud >/dev/null; then
        die "gcloud is not on PATH: install the Google Cloud CLI and log in" \
            "(gcloud auth login), or try --dry-run"
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

# Worker scripts. The worker expands them, hence the single quotes.
# shellcheck disable=SC2016
readonly worker_prelude='set -eu; mkdir -p "$HOME/topd_jax"; cd "$HOME/topd_jax"
fail() { echo "$(hostname): $1" >&2; exit 2; }
running() { pid=$(cat train.pid 2>/dev/null || echo none)
grep -qs topd "/proc/$pid/cmdline"; }' \
    refuse_if_running='if running; then
fail "training runs (process $pid): follow it with logs, or stop it"; fi' \
    install_on_worker='# Remove the old checkout with modules that are no more.
rm -rf src installed; tar -xzf "$HOME/topd_jax.tar.gz"; cd src
TOPD_VENV="$HOME/topd_jax/venv" TOPD_FETCH_PYTHON=1 bash launch/setup.sh tpu
touch ../installed' \
    start_on_worker='# A session without a terminal: training outlives ssh. The
# wrapper logs the exit code; its trap lets topd exit first.
start() { export PATH="$HOME/topd_jax/venv/bin:$PATH"
setsid nohup bash -c '\''trap : TERM; "$@";
echo "topd: exit code $?"'\'' topd "$@" >>../train.log 2>&1 </dev/null &
echo $! >../train.pid; }' \
    stop_on_worker='if ! running; then
echo "$(hostname): no training runs"; exit 0; fi; kill -TERM -- "-$pid"
for _ in $(seq 600); do
kill -0 -- "-$pid" 2>/dev/null || exit 0; sleep 0.2; done
echo "$(hostname): process $pid still runs 120 s after SIGTERM" >&2; exit 1' \
    report_on_worker='# For keep: absent, fresh, running, ended CODE, or other,
# where another command line than $wanted runs.
report() { echo "topd-state: $*"; exit 0; }
[ -e installed ] || report absent
same=; [ "$(cat train.command 2>/dev/null)" = "$wanted" ] && same=yes
if running; then [ -n "$same" ] && report running; report other; fi
[ -n "$same" ] || report fresh
report ended "$(tail -n 1 train.log | sed -n "s/^topd: exit code //p")"'

check_commit() {
    git -C "$TOPD_TOP" rev-parse --verify --quiet "$branch^{commit}" \
        >/dev/null || die "--branch=$branch is no commit of $TOPD_TOP: see" \
        "git branch"
    if [[ -n "$(git -C "$TOPD_TOP" status --porcelain)" ]]; then
        echo "tpu.sh: note: the checkout has uncommitted changes; the workers" \
            "get $branch without them" >&2
    fi
}

install() {
    local archive="$TOPD_TOP/runs/launch/$name.tar.gz"
    if [[ -z "$dry_run" ]]; then
        check_commit
    fi
    execute mkdir -p "$TOPD_TOP/runs/launch"
    execute git -C "$TOPD_TOP" archive --format=tar.gz --prefix=src/ \
        --output="$archive" "$branch"
    tpus tpu-vm scp "$archive" "$name:topd_jax.tar.gz" --worker=all
    on_worker all "$refuse_if_running
$install_on_worker"
}

# What the workers run, for their shell in the checkout.
worker_command() {
    local program="topd $topd"
    local home="\"\$HOME\"/topd_jax/" directory="${workdir:-runs/$name}"
    if [[ "$directory" == /* || "$directory" == *://* ]]; then
        home=""
    fi
    [[ "$topd" != paper ]] || program="bash launch/paper.sh"
    printf '%s' "$program --distributed" \
        " --config $(quote "$config") --workdir $home$(quote "$directory")"
    if ((${#arguments[@]})); then
        printf ' %s' "$(quote "${arguments[@]}")"
    fi
}

run() {
    local line file
    line="$(worker_command)"
    file="$(quote "${config%%:*}")" # after a colon comes the config's argument
    on_worker all "$refuse_if_running
[ -e installed ] || fail 'topd_jax is not installed: run tpu.sh install'
[ -f src/$file ] || fail 'no config '$file
${prepare:+($prepare
)
}# Written last: until it starts, the log ends as the command before it did.
# shellcheck disable=SC2016
printf '%s' $(quote "$line") >train.command
cd src
$start_on_worker
start $line"
}

# What the workers say of the training, for keep.
report() {
    on_worker all "wanted=$(quote "$(worker_command)")
$report_on_worker"
}

logs() {
    on_worker "$worker" "tail -n 50 ${follow:+-F }train.log"
}

stop_training() {
    on_worker all "$stop_on_worker"
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
case "$command" in
    "") usage >&2 && exit 2 ;;
    --help | -h) usage && exit 0 ;;
    paper) command=keep && set -- keep --topd paper "${@:2}" ;;
esac
given=("${@:2}")
parse ${given[@]+"${given[@]}"}
check
record="$TOPD_TOP/runs/launch/$name" errors="$TOPD_TOP/runs/launch/$name.err.$$"
"$command"
