#!/usr/bin/env bash
# Trains a student by OPD and by TOPD in the small arithmetic world.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/local.sh [--setup-only] [ARGUMENT ...]

Sets topd_jax up (needs Python 3.11 or newer, nothing else), then runs
    topd sweep --config configs/tiny.py --workdir runs/tiny ARGUMENT ...
which trains the teacher and the warm start, then OPD and TOPD in both guidance
contexts on one seed, prints the table and tells where the pictures are.
The same command goes on where a stopped run ended.

  --setup-only   only make the virtual environment and install
  --help         this text
  ARGUMENT       handed to topd, for instance --config.train.steps=50 or
                 --workdir /elsewhere; paths start at the checkout

Environment: TOPD_VENV (virtual environment to use or make; default: the active
one if this checkout is installed there, else .venv), TOPD_PYTHON (interpreter
to make it with).
TEXT
}

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    usage
    exit 0
fi

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
topd_setup

if [[ "${1:-}" == --setup-only ]]; then
    echo "topd_jax is ready in $TOPD_ENV"
    exit 0
fi
# Without an accelerator, the libtpu that test.sh installs (to compile for
# TPUs) would look for one, and print pages about it.
accelerator() {
    compgen -G '/dev/accel*' || compgen -G '/dev/vfio/[0-9]*' ||
        compgen -G '/dev/nvidia[0-9]*' || compgen -G '/dev/kfd' ||
        compgen -G '/dev/dxg'
}
if [[ -z "${JAX_PLATFORMS:-}" ]] && ! accelerator >/dev/null; then
    export JAX_PLATFORMS=cpu
fi
exec "$TOPD_ENV/bin/topd" sweep --config configs/tiny.py \
    --workdir runs/tiny "$@"
