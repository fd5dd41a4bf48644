#!/usr/bin/env bash
# Compare OPD with TOPD in the toy world, on this machine.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/local.sh [--setup-only] [ARGUMENT ...]

Install topd_jax (needs Python 3.11 or newer, nothing else), then run
    topd sweep --config configs/tiny.py --workdir runs/tiny ARGUMENT ...
which trains the tiny world's student by OPD and by TOPD in both guidance
contexts on one seed, draws its curves after each, and prints a table.
Rerun the command to resume.

  --setup-only   only make the virtual environment and install
  --help         print this text
  ARGUMENT       passed to topd, for instance --config.train.steps=50 or
                 --workdir /elsewhere; relative paths start at the checkout

Environment: TOPD_VENV (virtual environment to use or make; default: the active
one if this checkout is installed there, else .venv), TOPD_PYTHON (interpreter
to make it with).
TEXT
}

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
topd_arguments "" "$@"

# Without an accelerator, the libtpu of the test extra (which compiles for TPUs)
# would search for one and print warnings.
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
