#!/usr/bin/env bash
# Install topd_jax: find or make the virtual environment, run pip where setup.py
# has changed. Shared by local.sh, test.sh and the TPU workers; tpu.sh takes
# die and TOPD_TOP from it.
#
# By hand: bash launch/setup.sh [extra]
#   TOPD_VENV    environment to use or make (default: the active one if this
#                checkout is installed there, else .venv in the checkout)
#   TOPD_PYTHON  interpreter to make it with (default: the first of python3.11
#                to python3.14 and python3 that is new enough)
#   TOPD_FETCH_PYTHON=1  download an interpreter (with uv) where there is none
set -euo pipefail

TOPD_TOP="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly TOPD_TOP

# Prints an error and exits with 2, the code of every usage error.
die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Whether this checkout is installed in the environment $1. Asked from /,
# because python -c imports from the current directory first.
holds_checkout() {
    local module
    module="$(cd / && "$1/bin/python" -c 'from importlib.util import find_spec
print(find_spec("topd_jax").origin)' 2>/dev/null)" &&
        [[ "$module" -ef "$TOPD_TOP/topd_jax/__init__.py" ]]
}

# Prints the environment's absolute path.
choose_environment() {
    local chosen="${TOPD_VENV:-$TOPD_TOP/.venv}"
    if [[ -z "${TOPD_VENV:-}" && -n "${VIRTUAL_ENV:-}" ]] &&
        holds_checkout "$VIRTUAL_ENV"; then
        chosen="$VIRTUAL_ENV"
    fi
    [[ "$chosen" == /* ]] || chosen="$PWD/$chosen"
    printf '%s\n' "$chosen"
}

# Prints an interpreter that can make an environment, or explains what is wrong.
choose_python() {
    local candidate no_venv=""
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
        no_venv="${no_venv:-$candidate}"
    done
    [[ -z "$no_venv" ]] ||
        die "$no_venv has no venv module: install it (Debian and Ubuntu: apt" \
            "install ${no_venv##*/}-venv), or set TOPD_VENV to an existing" \
            "environment"
    die "needs Python 3.11 or newer, found none in: ${candidates[*]}; install" \
        "one, or set TOPD_PYTHON to its path"
}

make_environment() {
    local environment="$1" python
    if [[ -e "$environment" && ! -e "$environment/pyvenv.cfg" &&
        -n "$(ls -A "$environment")" ]]; then
        die "$environment exists and is no virtual environment: set" \
            "TOPD_VENV to another path"
    fi
    if [[ -n "${TOPD_FETCH_PYTHON:-}" ]] &&
        ! (choose_python >/dev/null 2>&1); then
        echo "no Python 3.11 on this machine: downloading one with uv"
        python3 -m pip install --quiet --user uv
        python3 -m uv venv --quiet --seed --python 3.11 "$environment"
        return
    fi
    python="$(choose_python)"
    echo "making the virtual environment $environment with $python"
    "$python" -m venv "$environment"
}

# topd_setup [extra]: afterwards TOPD_ENV/bin has python and topd, is first on
# PATH, and the current directory is the top of the checkout.
topd_setup() {
    local extra="${1:-}" key stamp quiet=()
    TOPD_ENV="$(choose_environment)"
    cd "$TOPD_TOP"
    if [[ ! -x "$TOPD_ENV/bin/python" ]]; then
        rm -f "$TOPD_ENV"/.topd-installed* # into a Python that is gone
        make_environment "$TOPD_ENV"
    fi
    new_enough "$TOPD_ENV/bin/python" ||
        die "the environment $TOPD_ENV has a Python older than 3.11: delete" \
            "it, or set TOPD_VENV to another path"
    # Environments made by uv, or made halfway, have no pip.
    "$TOPD_ENV/bin/python" -m pip --version >/dev/null 2>&1 ||
        "$TOPD_ENV/bin/python" -m ensurepip >/dev/null ||
        die "the environment $TOPD_ENV has no pip and cannot get it: set" \
            "TOPD_VENV to another path"
    key="$(cksum <setup.py) $TOPD_TOP"
    local stamps=("$TOPD_ENV/.topd-installed${extra:+-$extra}")
    # An installation with an extra contains the one without.
    [[ -n "$extra" ]] || stamps+=("$TOPD_ENV"/.topd-installed-*)
    if ! grep -qsxF "$key" "${stamps[@]}"; then
        echo "installing topd_jax${extra:+ with the extra $extra} into" \
            "$TOPD_ENV (takes minutes the first time)"
        # What another checkout, or another setup.py, has there ends.
        for stamp in "$TOPD_ENV"/.topd-installed*; do
            grep -qsxF "$key" "$stamp" || rm -f "$stamp"
        done
        [[ -t 1 ]] || quiet=(--quiet)
        "$TOPD_ENV/bin/python" -m pip install --disable-pip-version-check \
            ${quiet[@]+"${quiet[@]}"} -e ".${extra:+[$extra]}" || {
            local code=$?
            echo "$(basename "$0"): pip failed (exit code $code), see above;" \
                "rerun the command to retry" >&2
            exit "$code"
        }
        printf '%s\n' "$key" >"${stamps[0]}"
    fi
    export VIRTUAL_ENV="$TOPD_ENV" PATH="$TOPD_ENV/bin:$PATH"
}

# topd_arguments EXTRA ARGUMENT ...: sets up, unless --help; and exits after
# either that or --setup-only. Expects the caller's usage().
topd_arguments() {
    case "${2:-}" in
        --help | -h) usage && exit 0 ;;
    esac
    topd_setup "$1"
    if [[ "${2:-}" == --setup-only ]]; then
        echo "topd_jax is ready in $TOPD_ENV"
        exit 0
    fi
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    topd_setup "$@"
fi
