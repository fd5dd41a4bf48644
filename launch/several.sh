#!/usr/bin/env bash
# Sourced, after setup.sh: run_several, which runs one job as several processes
# here, and free_port.

free_port() {
    "$TOPD_ENV/bin/python" - <<'PYTHON'
import socket

with socket.socket() as probe:
    probe.bind(("localhost", 0))
    print(probe.getsockname()[1])
PYTHON
}

# prefix_lines INDEX: copies stdin, every line with the process it is from. A
# carriage return, of a bar, ends a line. Outlives SIGTERM, so that a process's
# last words are printed.
prefix_lines() {
    trap '' TERM
    "$TOPD_ENV/bin/python" -c '
import sys

for line in open(0, errors="replace"):
    line = line.rstrip("\n")
    # One write a line, so that those of two processes never mix.
    sys.stdout.write(f"[{sys.argv[1]}] {line}\n")
    sys.stdout.flush()
' "$1"
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
    local group tenths=0 grace=$((10 * ${TOPD_GRACE:-30}))
    for group in "${SEVERAL_GROUPS[@]}"; do
        kill -TERM -- "-$group" 2>/dev/null || true
    done
    for group in "${SEVERAL_GROUPS[@]}"; do
        while kill -0 -- "-$group" 2>/dev/null; do
            if ((tenths++ == grace)); then
                echo "$(basename "$0"): still there after" \
                    "${TOPD_GRACE:-30} s: killing them" >&2
            fi
            if ((tenths > grace)); then
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
