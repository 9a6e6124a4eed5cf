#!/usr/bin/env bash
# Runs one binary with one config on all workers, until the run is done.
#
#   tpu_scripts/launch.sh [--dry_run] [--detach] [--restart] [--delete] \
#       experiments.ppo --config=configs/ppo.py --config.mesh.fsdp=-1
#
# Gets the chips and readies them if need be (create.sh, setup.sh), copies the
# tree, installs it, and starts the binary under tmux. Then it watches: chips
# that are taken away are asked for anew, a run that fails is started again, up
# to MAX_RESTARTS times, and goes on from its last checkpoint. It ends when the
# workdir holds finished.json. Stopped and given again, it takes up where it is.
#
#   --detach   starts the run and leaves; nobody relaunches it then
#   --restart  stops what runs under this RUN_NAME first: for a changed tree
#   --delete   gives the chips back when the run is done
set -euo pipefail
# shellcheck source=cloud.sh
source "$(dirname "$0")/cloud.sh"
# shellcheck source=tree.sh
source "$here/tree.sh"

detach=false restart=false delete=false
passed=()
while (($#)); do
  case $1 in
    --dry_run) DRY_RUN=true passed=(--dry_run) ;;
    --detach) detach=true ;;
    --restart) restart=true ;;
    --delete) delete=true ;;
    -*) die "unknown argument '$1' before the binary; known are --dry_run," \
      "--detach, --restart and --delete" ;;
    *) break ;;
  esac
  shift
done
check_env
read_binary "$@"
# What the worker expands is left as it is.
# shellcheck disable=SC2088
identify '~/.rlhf_jax/venv/bin/python' '~/.rlhf_jax/trees/@TREE_ID@'
worker="bash $FOLDER/tpu_scripts/worker.sh"

sub() { "$here/$1" ${passed[@]+"${passed[@]}"}; }

# Fails where a worker does; the caller looks at why.
start() {
  local unpack="set -eu
if ! test -e $FOLDER/.unpacked; then
  mkdir -p $FOLDER
  tar -xzf $MOUNT/$LAUNCH/tree.tar.gz -C $FOLDER
  touch $FOLDER/.unpacked
fi
$worker install $RUN_NAME $MOUNT/$LAUNCH"
  on_workers all "$unpack" || return 1
  if $restart; then
    on_workers all "$worker stop $RUN_NAME" || return 1
    restart=false
  fi
  on_workers all "$worker start $RUN_NAME $MOUNT/$LAUNCH"
}

failures=0
# One more failure of a kind that a new start may mend.
count_failure() {
  failures=$((failures + 1))
  started=false
  if ((failures > MAX_RESTARTS)); then
    die "$1. That was failure $failures, and MAX_RESTARTS=$MAX_RESTARTS: look" \
      "at it with watch.sh, mend it, and give the same command again. The" \
      "chips are still there, and cost: tpu_scripts/delete.sh"
  fi
  say "$1; starting again ($failures of $MAX_RESTARTS)"
}

# Looks at all workers once. Sets started=false where something must be done.
check_workers() {
  local status failed
  if ! status=$(on_workers all "$worker status $RUN_NAME" 2>"$messages"); then
    misses=$((misses + 1))
    say "a worker does not answer ($misses of 3)"
    if ((misses < 3)); then return; fi
    misses=0
    read_state ready
    if [[ $STATE != ready ]]; then return; fi
    cat "$messages" >&2
    count_failure "a worker of $TPU_NAME is down"
    sub delete.sh || true
    return
  fi
  misses=0
  if ! grep -qE ' exited | absent' <<<"$status"; then return; fi
  # A moment for the mark of a worker that ended just now, and for chips that
  # are being taken away to be told so: neither is a failure.
  sleep "$POLL_SECONDS"
  if is_done; then return; fi
  read_state ready
  if [[ $STATE != ready ]]; then return; fi
  if grep -qE ' exited [1-9]| absent' <<<"$status"; then
    on_workers all "$worker errors $RUN_NAME" >&2 2>/dev/null || true
    failed=$(grep -E ' exited [1-9]| absent' <<<"$status" | paste -sd, -)
    count_failure "the run failed on $failed"
    on_workers all "$worker stop $RUN_NAME" 2>"$messages" || true
  elif ! grep -q ' running' <<<"$status"; then
    # As a run does that was told to stop (SIGTERM), after saving.
    count_failure "the run ended on all workers, and left no $(done_mark)"
  fi
}

if is_done; then
  say "$RUN_NAME is done already: tpu_scripts/fetch.sh brings it here"
  if $delete; then sub delete.sh; fi
  exit 0
fi
messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
started=false misses=0 patient=false

if $DRY_RUN; then
  sub create.sh
  sub setup.sh
  upload
  start
  if $detach; then exit 0; fi
  echo "# until the first of these finds the done-mark, every $POLL_SECONDS s;" \
    "what is not ready is deleted and made again:"
  is_done || read_state ready
  on_workers all "$worker status $RUN_NAME"
  if $delete; then sub delete.sh; fi
  exit 0
fi

until is_done; do
  read_state ready
  case $STATE in
    ready | unknown) ;;
    *)
      if $started; then say "$TPU_NAME is gone ($RAW_STATE)"; fi
      started=false
      PATIENT=$patient sub create.sh
      ;;
  esac
  if [[ $STATE == unknown ]]; then
    endure_unknown "$patient"
  else
    patient=true num_unknown=0
  fi
  if [[ $STATE != unknown ]] && ! $started; then
    if sub setup.sh && upload && start; then
      started=true
      say "$RUN_NAME runs on $TPU_NAME; tpu_scripts/watch.sh follows it"
      if $detach; then exit 0; fi
    else
      read_state ready
      if [[ $STATE == ready ]]; then
        count_failure "$TPU_NAME could not be readied"
      fi
    fi
  elif $started; then
    check_workers
  fi
  sleep "$POLL_SECONDS"
done
say "$RUN_NAME is done: tpu_scripts/fetch.sh brings it here"
if $delete; then
  # The mark comes a moment before the workers' logs are in the bucket.
  sleep "$POLL_SECONDS"
  sub delete.sh
else
  say "the chips are still there, and cost: tpu_scripts/delete.sh"
fi
