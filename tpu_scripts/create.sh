#!/usr/bin/env bash
# Makes the bucket and asks for the chips; returns when they are there.
#
#   tpu_scripts/create.sh [--dry_run]
#
# What is there already is left alone; a request that failed, or whose chips
# were taken away, is replaced. Run again, it goes on waiting.
set -euo pipefail
# shellcheck source=cloud.sh
source "$(dirname "$0")/cloud.sh"

only_dry_run "$@"
deadline=$((SECONDS + 60 * CREATE_TIMEOUT_MINUTES))
patient=${PATIENT:-false}  # launch.sh sets it, once it has seen that all is well

# Checkpoints rename folders: only a bucket with a hierarchical namespace does
# this in one step, and gcsfuse refuses to do it in others.
make_bucket() {
  ask storage buckets describe "gs://$BUCKET" --raw \
    --format='value(hierarchicalNamespace.enabled)'
  if [[ $ERROR == absent ]] || $DRY_RUN; then
    cloud storage buckets create "gs://$BUCKET" --location="${ZONE%-*}" \
      --uniform-bucket-level-access --enable-hierarchical-namespace
  elif [[ -n $ERROR ]]; then
    die "cannot read gs://$BUCKET: $ERROR"
  elif [[ $ANSWER != [Tt]rue ]]; then
    die "gs://$BUCKET has no hierarchical namespace, which checkpoints need:" \
      "name a BUCKET that does not exist yet, and it is made"
  fi
}

request() {
  local options=(--accelerator-type="$ACCELERATOR_TYPE")
  if [[ $RESOURCE == vm ]]; then
    options+=(--version="$RUNTIME_VERSION")
  else
    options+=(--runtime-version="$RUNTIME_VERSION")
    if ((NUM_SLICES == 1)); then
      options+=(--node-id="$TPU_NAME")
    else
      options+=(--node-count="$NUM_SLICES" --node-prefix="$TPU_NAME")
    fi
  fi
  if $SPOT; then options+=(--spot); fi
  if [[ -n $SERVICE_ACCOUNT ]]; then
    options+=(--service-account="$SERVICE_ACCOUNT")
  fi
  if [[ -n $NETWORK ]]; then options+=(--network="$NETWORK"); fi
  if [[ $RESOURCE == vm ]]; then
    tpus tpu-vm create "$TPU_NAME" "${options[@]}"
  else
    tpus queued-resources create "$TPU_NAME" "${options[@]}" --async
  fi
}

# Asks once; a VM for which there is no capacity is asked for again later.
request_or_explain() {
  local errors said
  if $DRY_RUN; then
    request
    return
  fi
  say "asking for $ACCELERATOR_TYPE as $TPU_NAME in $ZONE"
  errors=$(mktemp)
  if request 2>"$errors"; then
    rm -f "$errors"
    return
  fi
  said=$(<"$errors")
  rm -f "$errors"
  echo "$said" >&2
  if grep -qiE 'ALREADY_EXISTS|already exists' <<<"$said"; then
    return
  elif grep -qi 'quota' <<<"$said"; then
    die "the project's quota in $ZONE does not allow $ACCELERATOR_TYPE" \
      "(spot: $SPOT): ask for quota, or change ZONE, ACCELERATOR_TYPE or SPOT"
  elif grep -qiE 'no more capacity|RESOURCE_EXHAUSTED|stockout' <<<"$said"; then
    say "no capacity for $ACCELERATOR_TYPE in $ZONE; asking again in" \
      "$POLL_SECONDS s"
  else
    die "$TPU_NAME could not be made; what gcloud said is above"
  fi
}

why_failed() {
  if [[ $RESOURCE == queued ]]; then
    tpus queued-resources describe "$TPU_NAME" --format='json(state)' >&2 ||
      true
  fi
}

make_bucket
told="" fresh=false looks=0
while :; do
  read_state absent
  if [[ $STATE == ready ]]; then break; fi
  if [[ $STATE == unknown ]]; then
    endure_unknown "$patient"
  else
    patient=true num_unknown=0
    if [[ $RAW_STATE != "$told" ]]; then say "$TPU_NAME: $RAW_STATE"; fi
    told=$RAW_STATE
  fi
  looks=$((looks + 1))
  if ((looks > 1 && SECONDS >= deadline)); then
    die "after $CREATE_TIMEOUT_MINUTES minutes $TPU_NAME is still $RAW_STATE." \
      "Run this again to go on waiting, change ZONE, or give up with" \
      "tpu_scripts/delete.sh"
  fi
  case $STATE in
    absent)
      request_or_explain
      fresh=true
      ;;
    failed)
      why_failed
      # A failure from before is cleared away; one of our own is told.
      if $fresh; then
        die "the request for $ACCELERATOR_TYPE in $ZONE failed, see above:" \
          "change ZONE, ACCELERATOR_TYPE or SPOT; tpu_scripts/delete.sh" \
          "removes the request"
      fi
      "$here/delete.sh" || true
      ;;
    preempted) "$here/delete.sh" || true ;;
  esac
  if $DRY_RUN; then
    echo "# until it is ready, every $POLL_SECONDS s, for at most" \
      "$CREATE_TIMEOUT_MINUTES minutes:"
    read_state ready
    break
  fi
  sleep "$POLL_SECONDS"
done
$DRY_RUN || say "$TPU_NAME is ready"
