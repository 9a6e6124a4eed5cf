#!/usr/bin/env bash
# Readies every worker: tools, the bucket as a folder, an empty Python.
#
#   tpu_scripts/setup.sh [--dry_run]
#
# What is there already is left alone.
set -euo pipefail
# shellcheck source=cloud.sh
source "$(dirname "$0")/cloud.sh"

only_dry_run "$@"

# A fresh VM updates itself for minutes and holds apt's lock meanwhile. The
# worker expands what is in this text.
# shellcheck disable=SC2016
tools='set -eu
if ! command -v gcsfuse >/dev/null || ! command -v tmux >/dev/null; then
  keyring=/usr/share/keyrings/cloud.google.asc
  packages=https://packages.cloud.google.com/apt
  curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$keyring" >/dev/null
  echo "deb [signed-by=$keyring] $packages gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq -o DPkg::Lock::Timeout=900 update
  sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
    -o DPkg::Lock::Timeout=900 install gcsfuse tmux
fi'

# Nothing about files is cached: what one worker wrote, all see at once.
mounting="set -eu
if ! mountpoint -q $MOUNT; then
  sudo mkdir -p $MOUNT
  sudo chown \"\$(id -u):\$(id -g)\" $MOUNT
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 \\
    --metadata-cache-negative-ttl-secs=0 --kernel-list-cache-ttl-secs=0 \\
    $BUCKET $MOUNT
fi
mkdir -p $MOUNT/runs $MOUNT/launch"

# The image's own Python is too old for jax.
python="set -eu
if ! test -x ~/.rlhf_jax/venv/bin/python; then
  mkdir -p ~/.rlhf_jax
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --python $PYTHON_VERSION ~/.rlhf_jax/venv
fi"

# One step at a time, so that a message names what failed.
step() {
  $DRY_RUN || say "$TPU_NAME: $1"
  on_workers all "$2" || die "$1 failed on a worker of $TPU_NAME: its message" \
    "is above. $3"
}

step "installing gcsfuse and tmux" "$tools" \
  "Run this again; if a worker does not answer, delete.sh and create.sh."
step "mounting gs://$BUCKET at $MOUNT" "$mounting" \
  "The workers' service account needs roles/storage.objectAdmin on the bucket."
step "making Python $PYTHON_VERSION" "$python" \
  "Workers need a way to the internet, and PYTHON_VERSION 3.11 or later."
