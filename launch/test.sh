#!/usr/bin/env bash
# Runs ruff and the tests.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/test.sh [--setup-only] [ARGUMENT ...]

Sets topd_jax up with its test extra (needs Python 3.11 or newer, nothing else),
then runs ruff over the checkout and
    pytest ARGUMENT ...
which is, with no argument, every test that is neither slow nor a benchmark. Two
processes share the files; -n 0 leaves all to one, as -m benchmark wants it.
All but benchmarks compile quickly rather than well (tests/conftest.py).

  --setup-only   only make the virtual environment and install
  --help         this text
  ARGUMENT       handed to pytest, for instance -m slow, or tests/test_losses.py

Environment: TOPD_VENV, TOPD_PYTHON (see launch/local.sh --help);
JAX_PLATFORMS (default: cpu, so that a machine with a TPU or GPU tests the same
thing).
TEXT
}

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    usage
    exit 0
fi

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
topd_setup test

if [[ "${1:-}" == --setup-only ]]; then
    echo "topd_jax is ready in $TOPD_ENV"
    exit 0
fi
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# In front of what is given, which may say otherwise.
export PYTEST_ADDOPTS="--numprocesses=2 --dist=loadfile ${PYTEST_ADDOPTS:-}"
failed=0
"$TOPD_ENV/bin/python" -m ruff check . || failed=$?
"$TOPD_ENV/bin/python" -m pytest "$@" || failed=$?
exit "$failed"
