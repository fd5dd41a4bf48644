#!/usr/bin/env bash
# Trains a student by OPD and by TOPD in the small arithmetic world.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/local.sh [FLAG ...] [ARGUMENT ...]

Sets topd_jax up (needs Python 3.11 or newer, nothing else), then runs
    topd sweep --config configs/tiny.py --workdir runs/tiny ARGUMENT ...
which trains the teacher and the warm start, then OPD and TOPD in both guidance
contexts on one seed, prints the table and tells where the pictures are.
The same command goes on where a stopped run ended.

  --processes N  run one training as N processes of one program instead, as a
                 pod of N hosts does, on this machine's CPU:
                     topd train --config configs/tiny.py
                         --workdir runs/tiny-processes ARGUMENT ...
                 Every line says which process it is from. When one fails all
                 are stopped. On Ctrl-C all save after the step and stop; the
                 same command resumes.
  --dry-run      print every command, run none
  --setup-only   only make the virtual environment and install
  --help         this text
  ARGUMENT       handed to topd, for instance --config.train.steps=50 or
                 --workdir /elsewhere; paths start at the checkout

Exit codes: 2 for wrong usage, else that of the process that failed first.

Environment: TOPD_VENV (virtual environment to use or make; default: the active
one if this checkout is installed there, else .venv), TOPD_PYTHON (interpreter
to make it with), TOPD_GRACE (seconds that stopped processes get before they are
killed; default 30), XLA_FLAGS (for instance
--xla_force_host_platform_device_count=4: CPU devices of every process).
TEXT
}

top="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/setup.sh
source "$top/launch/setup.sh"
# shellcheck source=launch/several.sh
source "$top/launch/several.sh"

processes="" dry_run="" setup_only="" arguments=()
while (($#)); do
    case "$1" in
        --help | -h) usage && exit 0 ;;
        --setup-only) setup_only=yes ;;
        --dry-run) dry_run=yes ;;
        --processes=*) processes="${1#*=}" ;;
        --processes)
            (($# > 1)) || die "--processes needs a value, for instance 2"
            processes="$2"
            shift
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
if [[ -n "$processes" && ! "$processes" =~ ^[1-9][0-9]{0,2}$ ]]; then
    die "--processes=$processes must be a number in 1..999"
fi
if [[ ! "${TOPD_GRACE:-30}" =~ ^[0-9]{1,5}$ ]]; then
    die "TOPD_GRACE=$TOPD_GRACE must be a number of seconds"
fi

# Without an accelerator, the libtpu that test.sh installs (to compile for
# TPUs) would look for one, and print pages about it.
accelerator() {
    compgen -G '/dev/accel*' || compgen -G '/dev/vfio/[0-9]*' ||
        compgen -G '/dev/nvidia[0-9]*' || compgen -G '/dev/kfd' ||
        compgen -G '/dev/dxg'
}
# Several processes cannot share one accelerator.
if [[ -z "${JAX_PLATFORMS:-}" ]] &&
    { [[ -n "$processes" ]] || ! accelerator >/dev/null; }; then
    export JAX_PLATFORMS=cpu
fi

if [[ -n "$processes" ]]; then
    line=(train --config configs/tiny.py --workdir runs/tiny-processes)
else
    line=(sweep --config configs/tiny.py --workdir runs/tiny)
fi
line+=(${arguments[@]+"${arguments[@]}"})

if [[ -n "$dry_run" ]]; then
    if [[ -z "$processes" ]]; then
        quote topd "${line[@]}"
        echo
    fi
    for ((index = 0; index < ${processes:-0}; index++)); do
        quote topd "${line[@]}" --coordinator=localhost:PORT \
            --processes="$processes" --process="$index"
        echo
    done
    exit 0
fi
topd_setup
if [[ -n "$setup_only" ]]; then
    echo "topd_jax is ready in $TOPD_ENV"
    exit 0
fi
if [[ -z "$processes" ]]; then
    exec "$TOPD_ENV/bin/topd" "${line[@]}"
fi
port="$(free_port)"
run_several "$processes" "$TOPD_ENV/bin/topd" "${line[@]}" \
    --coordinator="localhost:$port" --processes="$processes"
