#!/usr/bin/env bash
# Follows worker 0's log and tells of errors on all workers, until the run ends.
#
#   tpu_scripts/watch.sh [--dry_run] [--once]
#
# It only looks: stopping it stops nothing.
set -euo pipefail
# shellcheck source=cloud.sh
source "$(dirname "$0")/cloud.sh"

once=false
while (($#)); do
  case $1 in
    --dry_run) DRY_RUN=true ;;
    --once) once=true ;;
    *) die "unknown argument '$1'; known are --dry_run and --once" ;;
  esac
  shift
done
check_env

worker="bash ~/.rlhf_jax/$RUN_NAME/worker.sh"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

next=0 stamp="" told=""
# New lines of worker 0's log.
show_log() {
  local head
  on_workers 0 "$worker log $RUN_NAME $next" >"$scratch/log" \
    2>"$scratch/messages" || return 1
  head=$(head -n 1 "$scratch/log")
  head=${head#\#}
  if [[ -n $stamp && ${head% *} != "$stamp" ]]; then
    say "the run was started again"
    stamp=${head% *} next=1
    show_log
    return
  fi
  stamp=${head% *} next=$((${head#* } + 1))
  tail -n +2 "$scratch/log"
}

# Errors and states that were not told before.
show_errors() {
  local errors
  on_workers all "$worker errors $RUN_NAME; $worker status $RUN_NAME" \
    >"$scratch/errors" 2>"$scratch/messages" || return 1
  errors=$(grep -v ' running$' "$scratch/errors" | sort || true)
  if [[ $errors != "$told" && -n $errors ]]; then echo "$errors" >&2; fi
  told=$errors
}

if $DRY_RUN; then
  echo "# every $POLL_SECONDS s, until the last finds the done-mark:"
  on_workers 0 "$worker log $RUN_NAME 0"
  on_workers all "$worker errors $RUN_NAME; $worker status $RUN_NAME"
  is_done || exit 0
fi
while :; do
  if ! show_log || ! show_errors; then
    read_state ready
    if is_done; then
      say "$RUN_NAME is done"
      exit 0
    fi
    cat "$scratch/messages" >&2
    say "$TPU_NAME (${RAW_STATE:-$STATE}): not all workers answer for" \
      "$RUN_NAME. launch.sh starts it, and relaunches what is lost"
  elif is_done; then
    show_log || true
    say "$RUN_NAME is done"
    exit 0
  fi
  if $once; then exit 0; fi
  sleep "$POLL_SECONDS"
done
