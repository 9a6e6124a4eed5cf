#!/usr/bin/env bash
# Gives the chips back, whatever state they are in, so that they cost no more.
#
#   tpu_scripts/delete.sh [--dry_run]
#
# The bucket stays, with all that runs have left there.
set -euo pipefail
# shellcheck source=cloud.sh
source "$(dirname "$0")/cloud.sh"

only_dry_run "$@"

delete() {
  if [[ $RESOURCE == queued ]]; then
    # --force takes the VMs with the request.
    tpus queued-resources delete "$TPU_NAME" --force
  else
    tpus tpu-vm delete "$TPU_NAME"
  fi
}

read_state ready
case $STATE in
  absent) say "there is no $TPU_NAME in $ZONE of $PROJECT to delete" ;;
  unknown) die "cannot see what state $TPU_NAME is in, and chips may go on" \
    "costing: $RAW_STATE" ;;
  *)
    say "deleting $TPU_NAME ($RAW_STATE)"
    delete || die "$TPU_NAME was not deleted, and its chips may go on" \
      "costing: run this again, or look at" \
      "https://console.cloud.google.com/compute/tpus?project=$PROJECT"
    ;;
esac
