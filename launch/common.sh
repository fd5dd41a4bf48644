#!/usr/bin/env bash
# Sourced by the launch scripts: errors, and commands run or only printed.

# Prints an error and leaves with 2, the code of every usage error.
die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

# Prints its arguments as one line that a shell reads back as the same words.
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

# Runs a command; with the caller's $dry_run prints it instead.
execute() {
    if [[ -n "$dry_run" ]]; then
        quote "$@"
        echo
        return
    fi
    "$@" || {
        local code=$?
        echo "$(basename "$0"): exit code $code from:" \
            "$(quote "${@:1:6}") ..." >&2
        exit "$code"
    }
}

# required FLAG EXAMPLE: refuses the caller's $command without FLAG's variable.
# shellcheck disable=SC2154
required() {
    local variable="${1#--}"
    if [[ -z "${!variable}" ]]; then
        die "$command needs $1, for instance $1 $2"
    fi
}
