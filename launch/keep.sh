#!/usr/bin/env bash
# Sourced by tpu.sh: trains until it is done, whatever becomes of the slice.
#
# Nothing is remembered but how often it failed. What there is to do next is
# read off the cloud and the workers every time, so that a keeper which is
# started again, here or on another machine, goes on where the last one was.
# shellcheck disable=SC2154

# say WORD...: a line of the keeper's log.
say() {
    echo "$(date +%FT%T) $*"
}

# attempt WORD...: a command that may fail; what it said is in $errors.
attempt() {
    local code=0
    ("$@") 2>"$errors" || code=$?
    cat "$errors" >&2
    return "$code"
}

errors_say() {
    grep -qiE "$1" "$errors"
}

# state_of KIND FIELD: its state, GONE where there is none, UNCLEAR where
# nobody answers.
state_of() {
    local state
    if state="$(attempt tpus "$1" describe "$name" --format="value($2)" \
        2>/dev/null)"; then
        echo "${state:-UNCLEAR}"
    elif errors_say 'NOT_FOUND|was not found'; then
        echo GONE
    else
        echo UNCLEAR
    fi
}

# One word for what has to be done about the slice, and the cloud's own.
slice() {
    local state
    if [[ -n "$queued" ]]; then
        state="$(state_of queued-resources state.state)"
        case "$state" in
            GONE) echo "gone $state" && return ;;
            FAILED | SUSPENDED) echo "lost $state" && return ;;
            ACTIVE) ;;
            *) echo "wait $state" && return ;;
        esac
    fi
    state="$(state_of tpu-vm state)"
    case "$state" in
        READY) echo "ready $state" ;;
        GONE) if [[ -n "$queued" ]]; then
            echo "lost $state"
        else
            echo "gone $state"
        fi ;;
        PREEMPTED | TERMINATED) echo "lost $state" ;;
        STOPPED) echo "stopped $state" ;;
        *) echo "wait $state" ;;
    esac
}

# What the workers say of their training, each a line.
training() {
    local said
    said="$(attempt on_worker all "wanted=$(quote "$(train_command)")
$look_here")" || return
    sed -n 's/^topd-state: //p' <<<"$said"
}

# Counts a failure; gives up after too many.
failed() {
    failures=$((failures + 1))
    if ((failures > restarts)); then
        say "gave up: $*; that was failure $failures, and --restarts is" \
            "$restarts"
        exit 1
    fi
    say "failure $failures of at most $restarts: $*"
    sleep "$every"
}

make_slice() {
    say "creating $name"
    if attempt create; then
        return
    fi
    if errors_say 'ALREADY_EXISTS'; then
        sleep "$every"
    elif errors_say 'quota'; then
        failed "the quota is used up: delete slices, or ask for more"
    elif errors_say 'capacity|RESOURCE_EXHAUSTED|UNAVAILABLE'; then
        say "no capacity; asking again in $every s"
        sleep "$every"
    elif errors_say 'PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED'; then
        say "gave up: asking again would not help"
        exit 1
    else
        failed "create"
    fi
}

drop_slice() {
    say "the slice is $1: deleting it, to begin again from the checkpoint"
    attempt delete_slice || sleep "$every"
}

# What the training's state asks for: the lines of all workers.
act() {
    local states="$1"
    if grep -q '^other' <<<"$states"; then
        say "gave up: another training runs there; tpu.sh stop ends it"
        exit 1
    elif grep -q '^absent' <<<"$states"; then
        say "installing"
        attempt install || failed "install"
    elif ! grep -qv '^running' <<<"$states"; then
        sleep "$every"
    elif ! grep -qv '^ended 0$' <<<"$states"; then
        finish
    elif grep -q '^ended 2$' <<<"$states"; then
        attempt logs >&2 || true
        say "gave up: topd says that what it was told is wrong (exit code 2)"
        exit 1
    elif [[ "$states" != "$last_seen" ]] && grep -q '^running' <<<"$states"
    then
        sleep "$every" # the others have noticed, and end
    else
        restart "$states"
    fi
}

restart() {
    if grep -qE '^ended' <<<"$1"; then
        if grep -E '^ended' <<<"$1" | grep -qvE '^ended (0|143)$'; then
            attempt logs >&2 || true
            failed "the training ended"
        fi
        attempt stop_training || {
            sleep "$every"
            return 0
        }
    fi
    say "starting the training"
    attempt run || failed "run"
}

finish() {
    say "the training is done"
    if [[ -n "$delete_when_done" ]]; then
        attempt delete_slice || {
            say "gave up: $name could not be deleted, and costs money"
            exit 1
        }
    fi
    exit 0
}

# The keeper itself, until it leaves.
keep_on() {
    failures=0 last_seen="" follow=""
    local verdict states last=""
    trap 'rm -f "$errors"' EXIT
    while true; do
        verdict="$(slice)"
        if [[ "$verdict" != "$last" ]]; then
            say "the slice: ${verdict#* }"
            last="$verdict"
        fi
        case "${verdict% *}" in
            gone) make_slice ;;
            lost) drop_slice "${verdict#* }" ;;
            wait) sleep "$every" ;;
            stopped)
                say "gave up: $name is stopped; start it (gcloud compute tpus" \
                    "tpu-vm start), or tpu.sh delete"
                exit 1
                ;;
            ready)
                if ! states="$(training)"; then
                    say "the workers do not answer"
                    sleep "$every"
                    continue
                fi
                if [[ "$states" != "$last_seen" ]]; then
                    say "the training: $(paste -sd, - <<<"$states")"
                fi
                act "$states"
                last_seen="$states"
                ;;
        esac
    done
}

# Its process, or nothing. (ps: a number may be another program's by now; -ww:
# its whole command, however narrow the terminal.)
keeper() {
    local pid
    pid="$(cat "$record.pid" 2>/dev/null)" || return 0
    if ps -ww -o args= -p "$pid" 2>/dev/null | grep -q "tpu.sh keep"; then
        echo "$pid"
    fi
}

end_keeper() {
    local pid
    pid="$(keeper)"
    if [[ -n "$pid" && -z "$dry_run" ]]; then
        kill -TERM -- "-$pid"
        echo "tpu.sh: the keeper (process $pid) is ended"
    fi
}

keep() {
    if [[ -n "$dry_run" ]]; then
        follow=""
        create
        tpus tpu-vm describe "$name" --format="value(state)"
        install
        run
        on_worker all "wanted=$(quote "$(train_command)")
$look_here"
        delete
        return
    fi
    check_commit
    mkdir -p "$top/runs/launch"
    if [[ -n "$foreground" ]]; then
        keep_on
    fi
    local pid begin code
    pid="$(keeper)"
    touch "$record.log"
    begin="$(wc -l <"$record.log")"
    if [[ -z "$pid" ]]; then
        rm -f "$record.exit"
        set -m # a process group of its own: the terminal's end is not its
        # shellcheck disable=SC2016
        nohup bash -c '"$@"; echo $? >"$0.exit"' "$record" \
            bash "$top/launch/tpu.sh" keep "${given[@]}" --foreground \
            >>"$record.log" 2>&1 </dev/null &
        pid=$!
        set +m
        echo "$pid" >"$record.pid"
    fi
    echo "tpu.sh: process $pid keeps $name; its log is $record.log;" \
        "closing the terminal ends nothing, tpu.sh stop does"
    if [[ -z "$follow" ]]; then
        return
    fi
    tail -n "+$((begin + 1))" -f "$record.log" &
    while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
    sleep 0.2
    kill $!
    code="$(cat "$record.exit" 2>/dev/null)" || die "the keeper was ended"
    exit "$code"
}
