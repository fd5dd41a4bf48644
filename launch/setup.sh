#!/usr/bin/env bash
# The set-up that local.sh, test.sh and the TPU workers share: find or make the
# virtual environment, install topd_jax into it when setup.py has changed.
#
# Sourced, it gives topd_setup; by hand: bash launch/setup.sh [extra]
#   TOPD_VENV    environment to use or make (default: .venv in the checkout,
#                or the active one if this checkout is installed there)
#   TOPD_PYTHON  interpreter to make it with (default: the first of python3.11
#                to python3.14 and python3 that is new enough)
#   TOPD_FETCH_PYTHON=1  where there is none, fetch one (with the package uv)
set -euo pipefail

TOPD_TOP="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly TOPD_TOP

# shellcheck source=launch/common.sh
source "$TOPD_TOP/launch/common.sh"

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Whether the environment $1 holds this very checkout. Asked from /, because
# python -c finds whatever lies in the current directory.
holds_checkout() {
    (cd / && "$1/bin/python" - "$TOPD_TOP" 2>/dev/null) <<'PYTHON'
import importlib.util
import pathlib
import sys

spec = importlib.util.find_spec("topd_jax")
found = spec and spec.origin and pathlib.Path(spec.origin).resolve()
sys.exit(not (found and found.parents[1] == pathlib.Path(sys.argv[1])))
PYTHON
}

# Prints the environment's absolute path.
choose_environment() {
    local chosen="$TOPD_TOP/.venv"
    if [[ -n "${TOPD_VENV:-}" ]]; then
        chosen="$TOPD_VENV"
    elif [[ -n "${VIRTUAL_ENV:-}" ]] && holds_checkout "$VIRTUAL_ENV"; then
        chosen="$VIRTUAL_ENV"
    fi
    case "$chosen" in
        /*) printf '%s\n' "$chosen" ;;
        *) printf '%s\n' "$PWD/$chosen" ;;
    esac
}

# Prints an interpreter that can make an environment, or explains what is wrong.
choose_python() {
    local candidate lacking=""
    local candidates=(
        python3.11 python3.12 python3.13 python3.14 python3 python
    )
    if [[ -n "${TOPD_PYTHON:-}" ]]; then
        candidates=("$TOPD_PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        if ! command -v "$candidate" >/dev/null || ! new_enough "$candidate"
        then
            continue
        fi
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        lacking="${lacking:-$candidate}"
    done
    if [[ -n "$lacking" ]]; then
        die "$lacking has no venv module: install it (Debian and Ubuntu: apt" \
            "install ${lacking##*/}-venv), or set TOPD_VENV to an environment" \
            "you made"
    fi
    die "needs Python 3.11 or newer, found none in: ${candidates[*]}; install" \
        "one, or set TOPD_PYTHON to its path"
}

make_environment() {
    local environment="$1" python
    if [[ -n "${TOPD_FETCH_PYTHON:-}" ]] &&
        ! (choose_python >/dev/null 2>&1); then
        echo "no Python 3.11 here: fetching one with uv"
        python3 -m pip install --quiet --user uv
        python3 -m uv venv --quiet --seed --python 3.11 "$environment"
        return
    fi
    python="$(choose_python)"
    echo "making the virtual environment $environment with $python"
    "$python" -m venv "$environment"
}

# What an installation depends on, as one line.
installation_key() {
    "$1/bin/python" - "$TOPD_TOP" <<'PYTHON'
import hashlib
import pathlib
import sys

setup = pathlib.Path(sys.argv[1], "setup.py").read_bytes()
print(hashlib.sha256(setup).hexdigest(), sys.argv[1])
PYTHON
}

# topd_setup [extra]: afterwards TOPD_ENV/bin has python and topd, is first on
# PATH, and the current directory is the checkout's top.
topd_setup() {
    local extra="${1:-}" key quiet=()
    TOPD_ENV="$(choose_environment)"
    cd "$TOPD_TOP"
    if [[ ! -x "$TOPD_ENV/bin/python" ]]; then
        if [[ ! -e "$TOPD_ENV/pyvenv.cfg" && -e "$TOPD_ENV" ]] &&
            [[ -n "$(ls -A "$TOPD_ENV")" ]]; then
            die "$TOPD_ENV exists and is no virtual environment: set" \
                "TOPD_VENV to another path"
        fi
        make_environment "$TOPD_ENV"
    fi
    new_enough "$TOPD_ENV/bin/python" ||
        die "the environment $TOPD_ENV has a Python older than 3.11: delete" \
            "it, or set TOPD_VENV to another path"
    # Environments that uv made, or whose making was stopped, have no pip.
    "$TOPD_ENV/bin/python" -m pip --version >/dev/null 2>&1 ||
        "$TOPD_ENV/bin/python" -m ensurepip >/dev/null ||
        die "the environment $TOPD_ENV has no pip and cannot get it: set" \
            "TOPD_VENV to another path"
    key="$(installation_key "$TOPD_ENV")"
    # An installation with an extra holds the plain one as well.
    local stamps=("$TOPD_ENV/.topd-installed${extra:+-$extra}")
    if [[ -z "$extra" ]]; then
        stamps=("$TOPD_ENV"/.topd-installed*)
    fi
    if ! grep -qsxF "$key" "${stamps[@]}"; then
        echo "installing topd_jax${extra:+ with the extra $extra} into" \
            "$TOPD_ENV (minutes, the first time)"
        if [[ ! -t 1 ]]; then
            quiet=(--quiet)
        fi
        "$TOPD_ENV/bin/python" -m pip install --disable-pip-version-check \
            ${quiet[@]+"${quiet[@]}"} -e ".${extra:+[$extra]}" || {
            local code=$?
            echo "$(basename "$0"): pip failed (exit $code): the reason is" \
                "above; the same command goes on from there" >&2
            exit "$code"
        }
        printf '%s\n' "$key" >"$TOPD_ENV/.topd-installed${extra:+-$extra}"
    fi
    export VIRTUAL_ENV="$TOPD_ENV" PATH="$TOPD_ENV/bin:$PATH"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    topd_setup "$@"
fi
