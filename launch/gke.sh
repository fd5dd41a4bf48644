#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster, from this machine, through kubectl.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/gke.sh COMMAND --name NAME [FLAG ...] [-- ARG ...]

  run      create the JobSet NAME (launch/jobset.yaml), which starts topd train
           on every host of the slice (needs --topology, --image, --claim,
           --config)
  status   show the JobSet and its pods
  logs     follow the log of one host
  stop     delete the JobSet; what the run wrote stays. run goes on from it
  xpk      print the command that starts the same through xpk instead (needs
           --cluster, --topology, --image, --config, and a storage that
           xpk storage attach mounts at /runs)

  --name NAME          the job, and its directory below /runs
  --topology KIND:SHAPE  v4, v5e, v5p, v6e or tpu7x and the slice's shape, as in
                       topd plan: v5e:4x4, v5p:2x2x2
  --chips N            chips of a host, where a shape comes on several machine
                       types: 8 for v5e:2x4 on one host (default: 4, or 1 of 1)
  --image IMAGE        with topd_jax in it; launch/Dockerfile builds it
  --claim CLAIM        a ReadWriteMany volume claim (Filestore), mounted at
                       /runs on every host
  --config FILE        the config: a path in the image, or a shipped name
  --workdir DIR        default /runs/NAME; below /runs
  --restarts N         after failures (default 10); those after a preemption
                       do not count
  --spot               on spot nodes
  --account ACCOUNT    Kubernetes service account of the pods
  --secret SECRET      a secret whose keys become variables (HF_TOKEN)
  --namespace NAME     default: kubectl's own
  --cluster NAME       for xpk
  --host N             whose log (default 0)
  --no-follow          print the end of the log and return
  --dry-run            of run: print the manifest; else every command; run none
  -- ARG ...           handed to topd train, for instance --config.train.steps=9

The cluster needs the JobSet controller and a TPU node pool of that topology
(Autopilot makes one). SIGTERM, of a preemption or of stop, lets the run save
after its step; a restart goes on from there.
Exit codes: 2 for wrong usage, else that of the command that failed.
Example:
  bash launch/gke.sh run --name t1 --topology v5e:4x4 --claim runs \
      --image us-docker.pkg.dev/my-project/my-repo/topd:1 --config tiny --spot
TEXT
}

top="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/common.sh
source "$top/launch/common.sh"
name="" topology="" chips="" image="" claim="" config="" workdir="" restarts=10
spot="" account="" secret="" namespace="" cluster="" host=0
follow=yes dry_run="" arguments=()
hosts="" shape="" accelerator="" tpu_type="" # by the topology

parse() {
    while (($#)); do
        if [[ "$1" == --?*=* ]]; then
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
        fi
        case "$1" in
            --spot) spot=yes && shift && continue ;;
            --dry-run) dry_run=yes && shift && continue ;;
            --no-follow) follow="" && shift && continue ;;
            --help | -h) usage && exit 0 ;;
            --) arguments=("${@:2}") && break ;;
            --name | --topology | --chips | --image | --claim | --config | \
                --workdir | --restarts | --account | --secret | --namespace | \
                --cluster | --host) ;;
            *) die "unknown argument $1: see --help; what is meant for topd" \
                "goes after --" ;;
        esac
        if (($# < 2)) || [[ "$2" == --* || -z "$2" ]]; then
            die "$1 needs a value, for instance $1=..."
        fi
        printf -v "${1#--}" '%s' "$2"
        shift 2
    done
}

# Kubernetes' own rules, so that it is this script that explains them.
check_names() {
    local flag label='^[a-z0-9]([-a-z0-9]*[a-z0-9])?$'
    # The pods are called NAME-slice-0-HOST-xxxxx, 63 letters at the most.
    if [[ ! "$name" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || ((${#name} > 40))
    then
        die "--name=$name must be 1 to 40 of a-z, 0-9 and -, a letter first," \
            "for instance my-run"
    fi
    for flag in claim account secret namespace; do
        if [[ -n "${!flag}" && ! "${!flag}" =~ $label ]]; then
            die "--$flag=${!flag} must be a name in the cluster: a-z, 0-9, -"
        fi
    done
    if [[ "$image" == *[!A-Za-z0-9._/:@-]* ]]; then
        die "--image=$image must be an image's name, HOST/PATH:TAG"
    fi
}

check() {
    case "$command" in
        run | xpk | status | logs | stop) ;;
        *) die "unknown command $command: one of run, status, logs, stop, xpk" \
            "(see --help)" ;;
    esac
    required --name my-run
    if [[ "$command" == run || "$command" == xpk ]]; then
        required --topology v5e:4x4
        required --image us-docker.pkg.dev/my-project/my-repo/topd:1
        required --config tiny
        choose_slice
    elif ((${#arguments[@]})); then
        die "$command takes no arguments after --; run and xpk do"
    fi
    if [[ "$command" == run ]]; then
        required --claim runs
    elif [[ "$command" == xpk ]]; then
        required --cluster my-cluster
    fi
    check_names
    : "${workdir:=/runs/$name}"
    if [[ "$workdir" != /runs/?* || "$workdir" == */..* ]]; then
        die "--workdir=$workdir must be below /runs, where the claim is" \
            "mounted: nothing else outlives the pods or is seen by all"
    fi
    if [[ ! "$restarts" =~ ^[0-9]{1,6}$ ]]; then
        die "--restarts=$restarts must be a number, 0 or more"
    fi
    if [[ ! "$host" =~ ^[0-9]{1,4}$ ]]; then
        die "--host=$host must be a host's number, 0 or more"
    fi
    if [[ -z "$dry_run" && "$command" != xpk ]] &&
        ! command -v kubectl >/dev/null; then
        die "kubectl is not on PATH: gcloud components install kubectl, then" \
            "gcloud container clusters get-credentials, or look with --dry-run"
    fi
}

# GKE's name of the kind, xpk's name of the slice, and how many hosts it has.
# Chips of a host: GKE's page "Plan TPUs", by machine type.
choose_slice() {
    local kind="${topology%%:*}" dimensions=3 total=1 side
    shape="${topology#*:}"
    case "$kind" in
        v4) accelerator=tpu-v4-podslice ;;
        v5e) accelerator=tpu-v5-lite-podslice dimensions=2 ;;
        v5p) accelerator=tpu-v5p-slice ;;
        v6e) accelerator=tpu-v6e-slice dimensions=2 ;;
        tpu7x) accelerator=tpu7x ;;
        *) die "--topology=$topology must start with v4:, v5e:, v5p:, v6e: or" \
            "tpu7x:, for instance v5e:4x4" ;;
    esac
    local number='[1-9][0-9]{0,2}'
    if [[ ! "$shape" =~ ^$number(x$number){$((dimensions - 1))}$ ]]; then
        die "--topology=$topology must have $dimensions sides, as" \
            "$([[ $dimensions == 2 ]] && echo v5e:4x4 || echo v5p:2x2x2)"
    fi
    for side in ${shape//x/ }; do
        total=$((total * side))
    done
    : "${chips:=$((total < 4 ? total : 4))}"
    if [[ ! "$chips" =~ ^[148]$ ]] || ((total % chips)) ||
        { ((chips == 8)) && [[ "$shape" != 2x4 ]]; } ||
        { ((chips == 1)) && [[ "$shape" != 1x1 ]]; }; then
        die "no host has $chips of the $total chips of $topology: a host has" \
            "4, or all 8 of 2x4, or the one of 1x1 (--chips)"
    fi
    hosts=$((total / chips))
    case "$kind" in
        v5e) tpu_type="v5litepod-$total" ;;
        v6e) tpu_type="v6e-$total" ;;
        *) tpu_type="$kind-$((2 * total))" ;; # of TensorCores
    esac
}

# topd train's arguments, as the array words. One host is one process, told so
# rather than found: it then saves on SIGTERM as several do.
train_words() {
    words=(--config "$config" --workdir "$workdir" --distributed)
    if ((hosts == 1)); then
        words=(--config "$config" --workdir "$workdir"
            --coordinator localhost:8482 --processes 1 --process 0)
    fi
    words+=(${arguments[@]+"${arguments[@]}"})
}

# json_list WORD ...: a JSON list, which is YAML. Kubernetes expands $(NAME) in
# arguments, and reads $$ as $.
json_list() {
    local word separator=""
    for word in "$@"; do
        if [[ "$word" == *[[:cntrl:]]* ]]; then
            die "an argument after -- has a line break or another control" \
                "character, which the manifest does not carry: $(quote "$word")"
        fi
        word="${word//\\/\\\\}"
        word="${word//\"/\\\"}"
        printf '%s"%s"' "$separator" "${word//\$/\$\$}"
        separator=", "
    done
}

# Prints launch/jobset.yaml with everything filled in.
# shellcheck disable=SC2016
manifest() {
    local line tag words list
    local tags=" ${spot:+spot} ${account:+account} ${secret:+secret} "
    if ((hosts > 1)); then
        tags+="hosts "
    fi
    train_words
    list="$(json_list "${words[@]}")" || exit
    while IFS= read -r line; do
        if [[ "$line" =~ ^(.*[^ ])\ +#\?\ ([a-z]+)$ ]]; then
            line="${BASH_REMATCH[1]}" tag="${BASH_REMATCH[2]}"
            [[ "$tags" == *" $tag "* ]] || continue
        fi
        line="${line//'${NAME}'/$name}"
        line="${line//'${RESTARTS}'/$restarts}"
        line="${line//'${HOSTS}'/$hosts}"
        line="${line//'${CHIPS}'/$chips}"
        line="${line//'${ACCELERATOR}'/$accelerator}"
        line="${line//'${TOPOLOGY}'/$shape}"
        line="${line//'${IMAGE}'/$image}"
        line="${line//'${CLAIM}'/$claim}"
        line="${line//'${ACCOUNT}'/$account}"
        line="${line//'${SECRET}'/$secret}"
        # The last: it may hold anything. Quoted, so that & is itself.
        printf '%s\n' "${line//'${ARGUMENTS}'/"[$list]"}"
    done < <(sed '/^#/d' "$top/launch/jobset.yaml")
}

kube() {
    execute kubectl ${namespace:+"--namespace=$namespace"} "$@"
}

run() {
    local text
    text="$(manifest)" || exit
    if [[ -n "$dry_run" ]]; then
        printf '%s\n' "$text"
        return
    fi
    # create, not apply: a running JobSet cannot be changed into another.
    kube create --filename=- <<<"$text"
}

status() {
    kube get jobset "$name"
    kube get pods --selector="jobset.sigs.k8s.io/jobset-name=$name"
}

logs() {
    local pods="jobset.sigs.k8s.io/jobset-name=$name"
    pods+=",batch.kubernetes.io/job-completion-index=$host"
    kube logs --selector="$pods" --tail=50 ${follow:+--follow}
}

stop() {
    kube delete jobset "$name"
}

xpk() {
    local words
    train_words
    dry_run=yes execute xpk workload create --workload="$name" \
        --cluster="$cluster" --tpu-type="$tpu_type" --docker-image="$image" \
        --max-restarts="$restarts" --restart-on-user-code-failure \
        --termination-grace-period-seconds=120 ${spot:+--spot} \
        --command="cd /topd_jax && $(quote topd train "${words[@]}")"
}

command="${1:-}"
if [[ -z "$command" ]]; then
    usage >&2
    exit 2
fi
if [[ "$command" == --help || "$command" == -h ]]; then
    usage
    exit 0
fi
shift
parse "$@"
check
"$command"
