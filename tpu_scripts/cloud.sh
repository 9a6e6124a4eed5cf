# shellcheck shell=bash
# What the scripts here share: env.sh, and how they speak to Google Cloud.
#
# Under --dry_run nothing is asked and nothing is done: commands are printed to
# stdout, as one could paste them, and the answers are taken for those of the
# plainest course. What the scripts say for themselves goes to stderr.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=env.sh
source "$here/env.sh"

DRY_RUN=false
# Not for passwords or host keys either: nothing here may wait for an answer.
SSH_FLAGS=(--ssh-flag=-oConnectTimeout=20 --strict-host-key-checking=no)

say() { echo "$(basename "$0"): $*" >&2; }

die() {
  say "$*"
  exit 1
}

# The words, quoted for a shell only where they need it.
quoted() {
  local word sep=""
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    printf '%s%s' "$sep" "$word"
    sep=" "
  done
}

run() {
  if $DRY_RUN; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# A gcloud command on this project, which asks no questions.
cloud() { run gcloud "$@" --project="$PROJECT" --quiet; }

tpus() { cloud compute tpus "$@" --zone="$ZONE"; }

# The arguments of a script that takes no others, and what env.sh says.
only_dry_run() {
  case ${1-} in
    "") ;;
    --dry_run) DRY_RUN=true ;;
    *) die "unknown argument '$1'; the only one is --dry_run" ;;
  esac
  check_env
}

check_env() {
  local name value
  for name in PROJECT ZONE TPU_NAME ACCELERATOR_TYPE BUCKET RUN_NAME MOUNT; do
    value=${!name}
    [[ -n $value ]] || die "$name is empty: set it in tpu_scripts/env.sh"
    [[ $value =~ ^[A-Za-z0-9_./:-]+$ ]] ||
      die "$name='$value': only letters, digits and _./:- can be in it"
  done
  for name in TPU_NAME RUN_NAME; do
    [[ ${!name} =~ ^[a-z]([a-z0-9-]{0,37}[a-z0-9])?$ ]] ||
      die "$name='${!name}': take a-z, 0-9 and '-', begin with a letter"
  done
  for name in NUM_SLICES POLL_SECONDS CREATE_TIMEOUT_MINUTES MAX_RESTARTS; do
    [[ ${!name} =~ ^[0-9]+$ ]] || die "$name='${!name}' must be a number"
  done
  [[ $SPOT == true || $SPOT == false ]] ||
    die "SPOT='$SPOT' must be true or false"
  [[ $BUCKET != gs:* ]] || die "BUCKET='$BUCKET': leave out gs://"
  case $RESOURCE in
    queued) ;;
    vm) ((NUM_SLICES == 1)) ||
      die "NUM_SLICES=$NUM_SLICES needs RESOURCE=queued, not vm" ;;
    *) die "RESOURCE='$RESOURCE' must be queued or vm" ;;
  esac
  ((NUM_SLICES >= 1)) || die "NUM_SLICES=$NUM_SLICES must be at least 1"
  check_gcloud
  set_names
}

check_gcloud() {
  $DRY_RUN || command -v gcloud >/dev/null ||
    die "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
}

# RUNTIME_VERSION and NODES, which follow from the settings.
set_names() {
  local i
  if [[ -z $RUNTIME_VERSION ]]; then
    case $ACCELERATOR_TYPE in
      v5litepod-*) RUNTIME_VERSION=v2-alpha-tpuv5-lite ;;
      v5p-*) RUNTIME_VERSION=v2-alpha-tpuv5 ;;
      v6e-*) RUNTIME_VERSION=v2-alpha-tpuv6e ;;
      v2-* | v3-* | v4-*) RUNTIME_VERSION=tpu-ubuntu2204-base ;;
      *) die "ACCELERATOR_TYPE='$ACCELERATOR_TYPE' is of no generation known" \
        "here: set RUNTIME_VERSION" ;;
    esac
  fi
  NODES=("$TPU_NAME")
  if ((NUM_SLICES > 1)); then
    NODES=()
    for ((i = 0; i < NUM_SLICES; i++)); do NODES+=("$TPU_NAME-$i"); done
  fi
}

# Asks for something that may not be there: sets ANSWER, and ERROR to '',
# 'absent' or what gcloud said.
ask() {
  local errors
  ANSWER="" ERROR=""
  if $DRY_RUN; then
    cloud "$@"
    return
  fi
  errors=$(mktemp)
  if ! ANSWER=$(cloud "$@" 2>"$errors"); then
    ERROR=$(<"$errors")
    if grep -qiE 'NOT_FOUND|not found|matched no objects|HTTPError 404' \
      "$errors"; then
      ERROR=absent
    fi
  fi
  rm -f "$errors"
}

# Sets STATE to absent, waiting, ready, preempted, failed, deleting or unknown,
# and RAW_STATE to what it was called, or to the error. In a dry run STATE is $1.
read_state() {
  local kind=tpu-vm fields='state,acceleratorType' type node count
  if [[ $RESOURCE == queued ]]; then
    kind=queued-resources
    fields='state.state,tpu.nodeSpec[0].node.acceleratorType.basename()'
    fields+=',tpu.nodeSpec[0].nodeId,tpu.nodeSpec.len()'
  fi
  # As csv, in which a field that is not there has its place.
  ask compute tpus "$kind" describe "$TPU_NAME" --zone="$ZONE" \
    --format="csv[no-heading]($fields)"
  if $DRY_RUN; then
    STATE=$1 RAW_STATE=$1
    return
  fi
  STATE=unknown RAW_STATE=$ERROR
  if [[ -n $ERROR ]]; then
    if [[ $ERROR == absent ]]; then STATE=absent RAW_STATE=absent; fi
    return
  fi
  IFS=, read -r RAW_STATE type node count <<<"$ANSWER"
  check_is_ours "${type##*/}" "$node" "$count"
  classify_state
}

# check_is_ours TYPE FIRST_NODE NUM_NODES, each '' if it is not known: chips of
# another shape under our name are not ours to use, replace or delete.
check_is_ours() {
  local is=""
  if [[ -n $1 && $1 != "$ACCELERATOR_TYPE" ]]; then
    is="is a $1, and env.sh asks for $ACCELERATOR_TYPE"
  elif [[ -n $2 && $2 != "${NODES[0]}" ]]; then
    is="has the node $2, and NUM_SLICES=$NUM_SLICES would have ${NODES[0]}"
  elif [[ -n $2 && -n $3 && $3 != "$NUM_SLICES" ]]; then
    is="has $3 slices, and env.sh asks for $NUM_SLICES"
  fi
  [[ -z $is ]] || die "$TPU_NAME $is: set what it is, or take another TPU_NAME"
}

classify_state() {
  case $RAW_STATE in
    ACTIVE | READY) STATE=ready ;;
    ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | CREATING) STATE=waiting ;;
    STARTING | RESTARTING | REIMAGING | REPAIRING) STATE=waiting ;;
    FAILED) STATE=failed ;;
    DELETING) STATE=deleting ;;
    # SUSPENDING and SUSPENDED of a queue, PREEMPTED, STOPPED and TERMINATED of
    # a VM; a VM that is taken away has been seen in other states too.
    *) STATE=preempted ;;
  esac
  if [[ $STATE == ready && $RESOURCE == queued ]]; then read_nodes; fi
}

# A queue may say ACTIVE for a while after a slice was taken away.
read_nodes() {
  local node
  for node in "${NODES[@]}"; do
    ask compute tpus tpu-vm describe "$node" --zone="$ZONE" \
      --format='value(state)'
    case $ERROR/$ANSWER in
      /READY) continue ;;
      absent/) STATE=preempted RAW_STATE="$node is gone" ;;
      /CREATING | /STARTING | /RESTARTING | /REPAIRING | /REIMAGING)
        STATE=waiting RAW_STATE="$node is $ANSWER"
        ;;
      /*) STATE=preempted RAW_STATE="$node is $ANSWER" ;;
      *) STATE=unknown RAW_STATE=$ERROR ;;
    esac
    return
  done
}

# endure_unknown PATIENT: at the first look an unknown STATE is an error; later,
# in hours of watching, a network may fail for a while.
num_unknown=0
endure_unknown() {
  num_unknown=$((num_unknown + 1))
  if ! $1 || ((num_unknown > 10)); then
    die "cannot see what state $TPU_NAME is in: $RAW_STATE. Mend that and give" \
      "the same command again; what runs goes on meanwhile"
  fi
  say "cannot see what state $TPU_NAME is in ($num_unknown of 10): $RAW_STATE"
}

# on_workers all|0 COMMAND: on all workers of all slices at once, or on the very
# first. Fails, and names the slices, unless all of them answered with success.
on_workers() {
  local worker=$1 command=$2 i pids=() failed=()
  local targets=("${NODES[@]}")
  if [[ $worker != all ]]; then targets=("${NODES[0]}"); fi
  for i in "${!targets[@]}"; do
    if $DRY_RUN; then
      ssh_to "${targets[$i]}" "$worker" "$command"
    else
      ssh_to "${targets[$i]}" "$worker" "$command" </dev/null &
      pids+=($!)
    fi
  done
  if $DRY_RUN; then return; fi
  for i in "${!targets[@]}"; do
    wait "${pids[$i]}" || failed+=("${targets[$i]}")
  done
  if ((${#failed[@]})); then
    say "not all workers of ${failed[*]} answered with success"
    return 1
  fi
}

ssh_to() {
  tpus tpu-vm ssh "$1" --worker="$2" "${SSH_FLAGS[@]}" --command="$3"
}

done_mark() { echo "gs://$BUCKET/runs/$RUN_NAME/finished.json"; }

# Whether the run is done; asks the bucket, so that no chips need be there.
is_done() {
  ask storage ls "$(done_mark)"
  if $DRY_RUN; then return 1; fi
  [[ -z $ERROR ]] && return 0
  [[ $ERROR == absent ]] || say "could not look for $(done_mark): $ERROR"
  return 1
}
