#!/usr/bin/env bash
# Sourced by tpu.sh: train until it is done, whatever happens to the slice.
#
# The keeper remembers only how often the training failed and which commit it
# installs. It decides from what the cloud and the workers report, so that one
# that is started again, on this machine or another, continues where the last
# one ended.
# shellcheck disable=SC2154

# say WORD...: a line of the keeper's log.
say() {
    echo "$(date +%FT%T) $*"
}

give_up() {
    say "gave up: $*"
    exit 1
}

# attempt WORD...: a command that may fail; its stderr is kept in $errors.
attempt() {
    local code=0
    ("$@") 2>"$errors" || code=$?
    cat "$errors" >&2
    return "$code"
}

errors_say() {
    grep -qiE "$1" "$errors"
}

# state_of KIND FIELD: the cloud's word; GONE where there is no such thing,
# UNCLEAR where the cloud does not answer.
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

# Prints the state of the slice, as one of the words that keep_on knows, and in
# the cloud's word.
slice() {
    local state gone=gone
    if [[ -n "$queued" ]]; then
        state="$(state_of queued-resources state.state)"
        case "$state" in
            GONE) echo "gone $state" && return ;;
            FAILED | SUSPENDED) echo "lost $state" && return ;;
            ACTIVE) gone=lost ;; # a request without its slice
            *) echo "wait $state" && return ;;
        esac
    fi
    state="$(state_of tpu-vm state)"
    case "$state" in
        READY) echo "ready $state" ;;
        GONE) echo "$gone $state" ;;
        PREEMPTED | TERMINATED) echo "lost $state" ;;
        STOPPED) echo "stopped $state" ;;
        *) echo "wait $state" ;;
    esac
}

# failed WORD...: counts a failure; gives up after too many.
failed() {
    failures=$((failures + 1))
    if ((failures > restarts)); then
        give_up "$*; this was failure $failures, and --restarts is $restarts"
    fi
    say "failure $failures of at most $restarts: $*"
    sleep "$every"
}

create_slice() {
    say "creating $name"
    if attempt create; then
        return
    elif errors_say 'ALREADY_EXISTS'; then
        sleep "$every"
    elif errors_say 'quota'; then
        failed "the quota is used up: delete slices, or request more"
    elif errors_say 'capacity|RESOURCE_EXHAUSTED|UNAVAILABLE'; then
        say "no capacity; retrying in $every s"
        sleep "$every"
    elif errors_say 'PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED'; then
        give_up "the cloud refuses the request, and would refuse it again"
    else
        failed "create"
    fi
}

# act STATES: what the workers' states, one a line, call for.
act() {
    if grep -q '^other' <<<"$1"; then
        give_up "another training runs on the slice; tpu.sh stop ends it"
    elif grep -q '^absent' <<<"$1"; then
        say "installing"
        attempt install || failed "install"
    elif ! grep -qv '^running' <<<"$1"; then
        sleep "$every"
    elif ! grep -qv '^ended 0$' <<<"$1"; then
        finish
    elif [[ -n "$started" ]] && ! grep -qv '^ended 2$' <<<"$1"; then
        attempt logs >&2 || true
        give_up "topd refused its arguments or its config (exit code 2)"
    elif [[ "$1" != "$last_states" ]] && grep -q '^running' <<<"$1"; then
        sleep "$every" # the others notice, and end by themselves
    else
        restart "$1"
    fi
}

restart() {
    if grep -q '^ended' <<<"$1"; then
        # Neither done nor stopped by SIGTERM, as at a preemption.
        if grep '^ended' <<<"$1" | grep -qvE ' (0|143)$'; then
            attempt logs >&2 || true
            failed "the training ended"
        fi
        if ! attempt stop_training; then
            sleep "$every"
            return
        fi
    fi
    say "starting the training"
    started=yes
    attempt run || failed "run"
}

finish() {
    say "the training is done"
    if [[ -n "$delete_when_done" ]] && ! attempt delete_slice; then
        give_up "$name could not be deleted, and costs money"
    fi
    exit 0
}

# The keeper itself, until it exits; the code is left to those who follow.
keep_on() {
    # started: what an earlier keeper was refused may be mended by now.
    failures=0 last_states="" follow="" started=""
    local verdict states last=""
    trap 'echo $? >"$record.exit"; rm -f "$errors"' EXIT
    trap 'exit 143' TERM
    # The same after a preemption, whatever is committed meanwhile.
    branch="$(git -C "$TOPD_TOP" rev-parse "$branch^{commit}")"
    while true; do
        verdict="$(slice)"
        if [[ "$verdict" != "$last" ]]; then
            say "the slice: ${verdict#* }"
            last="$verdict"
        fi
        case "${verdict% *}" in
            gone) create_slice ;;
            lost)
                say "deleting the slice, to resume on another one"
                attempt delete_slice || sleep "$every"
                ;;
            wait) sleep "$every" ;;
            stopped)
                give_up "$name is stopped; start it (gcloud compute tpus" \
                    "tpu-vm start), or tpu.sh delete"
                ;;
            ready)
                if ! states="$(attempt report)"; then
                    say "the workers do not answer"
                    sleep "$every"
                    continue
                fi
                states="$(sed -n 's/^topd-state: //p' <<<"$states")"
                if [[ "$states" != "$last_states" ]]; then
                    say "the training: $(paste -sd, - <<<"$states")"
                fi
                act "$states"
                last_states="$states"
                ;;
        esac
    done
}

# Prints all that a keeper goes by, of this command.
kept() {
    quote "$zone" "$project" "$type" "$version" "$queued" "$branch" "$prepare" \
        "$every" "$restarts" "$delete_when_done" ${capacity[@]+"${capacity[@]}"}
    printf ' %s' "$(worker_command)"
}

# Prints the process of the keeper, or nothing. ps, because the number may be
# another program's by now; -ww, because a narrow terminal cuts commands off.
keeper() {
    local pid
    pid="$(cat "$record.pid" 2>/dev/null)" || return 0
    if ps -ww -o args= -p "$pid" 2>/dev/null |
        grep -qE "tpu\.sh (keep|paper)"; then
        echo "$pid"
    fi
}

end_keeper() {
    local pid
    pid="$(keeper)"
    if [[ -n "$pid" && -z "$dry_run" ]]; then
        # One in the foreground of a script leads no group.
        kill -TERM -- "-$pid" 2>/dev/null || kill -TERM "$pid"
        while [[ -n "$(keeper)" ]]; do sleep 0.1; done
        echo "tpu.sh: stopped the keeper (process $pid)"
    fi
}

keep() {
    if [[ -n "$dry_run" ]]; then
        create
        install
        run
        report
        return
    fi
    check_commit
    mkdir -p "$TOPD_TOP/runs/launch"
    local pid begin
    pid="$(keeper)"
    if [[ -n "$foreground" ]]; then
        [[ -z "$pid" || "$pid" == "$$" ]] ||
            die "process $pid keeps $name already: tpu.sh stop ends it"
        echo "$$" >"$record.pid" # for stop and delete
        kept >"$record.kept"
        keep_on
    fi
    touch "$record.log"
    begin="$(wc -l <"$record.log")"
    if [[ -z "$pid" ]]; then
        rm -f "$record.exit"
        set -m # a process group of its own, which outlives the terminal
        nohup bash "$launch/tpu.sh" keep --foreground "${given[@]}" \
            >>"$record.log" 2>&1 </dev/null &
        pid=$!
        set +m
        echo "$pid" >"$record.pid"
    elif [[ "$(kept)" != "$(cat "$record.kept" 2>/dev/null || kept)" ]]; then
        die "process $pid keeps $name with other flags or arguments: tpu.sh" \
            "stop ends it and the training, and this command then resumes it"
    fi
    echo "tpu.sh: process $pid keeps $name; its log is $record.log;" \
        "it outlives this terminal, tpu.sh stop ends it"
    if [[ -z "$follow" ]]; then
        return
    fi
    tail -n "+$((begin + 1))" -f "$record.log" &
    while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
    sleep 0.2 # for the last lines
    kill $!
    exit "$(cat "$record.exit" || echo 1)"
}
