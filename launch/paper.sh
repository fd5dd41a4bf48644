#!/usr/bin/env bash
# Run the recipe of arXiv:2606.00305 (App. B), one command of topd after the
# other; on several hosts, every one of them runs this script.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/paper.sh --config FILE --workdir DIR [ARGUMENT ...]

  generate   the teacher writes solutions         in DIR/solutions
  train      stage 1, on these solutions          in DIR/stage1
  train      stage 2 of FILE, after stage 1       in DIR/stage2
  eval       stage 2 on config.eval.benchmarks    in DIR/stage2
  report     a page of stage 2                    in DIR/stage2

Rerun the command to resume: each part continues where it was stopped, and one
that is done only loads its models.

  --config FILE   config of stage 2 and of the evaluation
  --stage1 FILE   config of the first two parts (configs/paper_stage1.py)
  --workdir DIR   a directory that all hosts share
  --help          print this text
  ARGUMENT        passed to every command but report, for instance --distributed
                  or --config.data.path=questions.jsonl

Exit codes: 2 for wrong usage, else that of the part that failed.
TEXT
}

config="" workdir="" stage1=configs/paper_stage1.py arguments=()
while (($#)); do
    case "$1" in
        --help | -h) usage && exit 0 ;;
        --config=* | --workdir=* | --stage1=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            continue
            ;;
        --config | --workdir | --stage1)
            printf -v "${1#--}" '%s' "${2:-}"
            shift
            ;;
        *) arguments+=("$1") ;;
    esac
    (($# == 0)) || shift
done
if [[ -z "$config" || -z "$workdir" ]]; then
    echo "paper.sh: needs --config and --workdir: see --help" >&2
    exit 2
fi

# part WORD ...: runs topd, which gets each signal once, through this script: in
# a process group of its own.
set -m
part() {
    local code=0
    echo "paper.sh: topd $1 ${3##*/}"
    topd "$@" &
    trap 'kill -TERM $!' TERM INT
    wait $! || code=$?
    while kill -0 $! 2>/dev/null; do # a signal ended the wait, not yet topd
        code=0
        wait $! || code=$?
    done
    trap - TERM INT
    ((code == 0)) || exit "$code"
}

# model NAME PART: a part that runs a model. The words after the second follow.
model() {
    part "$1" --workdir "$workdir/$2" --config "${@:3}" \
        ${arguments[@]+"${arguments[@]}"}
}

model generate solutions "$stage1"
model train stage1 "$stage1" --config.offline.path="$workdir/solutions"
model train stage2 "$config" --config.student.source="$workdir/stage1"
model eval stage2 "$config" --config.student.source="$workdir/stage1"
part report --workdir "$workdir/stage2"
