#!/usr/bin/env bash
# Run ruff and the tests.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/test.sh [--setup-only] [ARGUMENT ...]

Install topd_jax with its test extra (needs Python 3.11 or newer, nothing else),
then run ruff on the checkout and
    pytest ARGUMENT ...
Without arguments these are all tests that are not slow. Two processes share
the test files. Benchmarks are a command: python -m tests.benchmarks.

  --setup-only   only make the virtual environment and install
  --help         print this text
  ARGUMENT       passed to pytest, for instance -m slow or tests/test_launch.py

Environment: TOPD_VENV, TOPD_PYTHON (see launch/local.sh --help);
JAX_PLATFORMS (default: cpu, so that every machine tests the same).
TEXT
}

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
topd_arguments test "$@"

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# The user's own options come last and win.
export PYTEST_ADDOPTS="--numprocesses=2 --dist=loadfile ${PYTEST_ADDOPTS:-}"
failed=0
"$TOPD_ENV/bin/python" -m ruff check . || failed=$?
"$TOPD_ENV/bin/python" -m pytest "$@" || failed=$?
exit "$failed"
