#!/usr/bin/env bash
# Sourced: run_several, which runs one job as several processes here.

# Grace between SIGTERM and SIGKILL, in tenths of a second.
readonly SEVERAL_GRACE=100

# prefix_lines INDEX: copies stdin, every line with the process it is from.
# Outlives SIGTERM, so that a process's last words are printed.
prefix_lines() {
    local line
    trap '' TERM
    while IFS= read -r line || [[ -n "$line" ]]; do
        printf '[%s] %s\n' "$1" "$line"
    done
}

# run_one INDEX COMMAND ...: then tells descriptor 3 "INDEX CODE". SIGTERM is
# trapped, not ignored: COMMAND gets it, and its code is still told.
run_one() {
    trap : TERM
    {
        trap : TERM
        {
            trap : TERM
            local code=0
            "${@:2}" 3>&- 4>&- </dev/null || code=$?
            echo "$1 $code" >&3
        } 2>&1 1>&4 | prefix_lines "$1" >&2
    } 4>&1 | prefix_lines "$1"
}

# Ends the process groups in SEVERAL_GROUPS and waits until they are gone.
stop_several() {
    local group tenths=0
    for group in "${SEVERAL_GROUPS[@]}"; do
        kill -TERM -- "-$group" 2>/dev/null || true
    done
    for group in "${SEVERAL_GROUPS[@]}"; do
        while kill -0 -- "-$group" 2>/dev/null; do
            if ((tenths++ == SEVERAL_GRACE)); then
                echo "$(basename "$0"): still there: SIGKILL" >&2
            fi
            if ((tenths > SEVERAL_GRACE)); then
                kill -KILL -- "-$group" 2>/dev/null || true
            fi
            sleep 0.1
        done
    done
}

# run_several COUNT COMMAND ...: COMMAND with --process=I added, for I in
# 0..COUNT-1, at once. When one fails all are stopped; returns its exit code.
run_several() {
    local count="$1" pipes index code
    shift
    SEVERAL_GROUPS=()
    pipes="$(mktemp -d)"
    mkfifo "$pipes/ended"
    exec 3<>"$pipes/ended"
    rm -r "$pipes"
    # Signals that reach this shell alone: every process has its own group.
    trap 'trap "" INT TERM HUP; stop_several; exit 130' INT
    trap 'trap "" INT TERM HUP; stop_several; exit 143' TERM HUP
    set -m
    for ((index = 0; index < count; index++)); do
        run_one "$index" "$@" --process="$index" &
        SEVERAL_GROUPS+=("$!")
    done
    set +m
    for ((; count > 0; count--)); do
        read -r index code <&3
        if ((code)); then
            echo "$(basename "$0"): process $index ended with exit code" \
                "$code: stopping the others" >&2
            stop_several
            return "$code"
        fi
    done
    wait
}
