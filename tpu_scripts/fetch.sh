#!/usr/bin/env bash
# Brings a run's workdir here, or what has changed in it since.
#
#   tpu_scripts/fetch.sh [--dry_run] [--all] [FOLDER]
#
# To FOLDER, by default runs/RUN_NAME. Checkpoints and other folders of arrays
# stay in the bucket unless --all asks for them. No chips need be there.
set -euo pipefail
# shellcheck source=cloud.sh
source "$(dirname "$0")/cloud.sh"

all=false folder=""
while (($#)); do
  case $1 in
    --dry_run) DRY_RUN=true ;;
    --all) all=true ;;
    -*) die "unknown argument '$1'; known are --dry_run and --all" ;;
    *)
      [[ -z $folder ]] || die "one folder, please: '$folder' or '$1'"
      folder=$1
      ;;
  esac
  shift
done
check_env
: "${folder:=runs/$RUN_NAME}"

options=(--recursive)
if ! $all; then
  options+=(--exclude='(^|.*/)(checkpoints|arrays)/.*')
fi
ask storage ls "gs://$BUCKET/runs/$RUN_NAME/"
if [[ $ERROR == absent ]]; then
  die "gs://$BUCKET/runs/$RUN_NAME holds nothing yet: is RUN_NAME right, and" \
    "does the run go (watch.sh)?"
elif [[ -n $ERROR ]]; then
  die "cannot read gs://$BUCKET/runs/$RUN_NAME: $ERROR"
fi
run mkdir -p "$folder"
cloud storage rsync "gs://$BUCKET/runs/$RUN_NAME" "$folder" "${options[@]}" ||
  die "not all of it could be fetched; run this again to get the rest"
$DRY_RUN || say "gs://$BUCKET/runs/$RUN_NAME is in $folder"
