# shellcheck shell=bash
# Names, zone and sizes: every script here reads this file, and nothing else.
#
# Edit it, or set variables for one command, which go before what is here:
#
#   PROJECT=mine ZONE=us-east5-a RUN_NAME=second tpu_scripts/launch.sh ...

PROJECT=${PROJECT:-}  # Google Cloud project that pays
ZONE=${ZONE:-us-west4-a}  # where the chips are; the bucket goes to its region

# What is asked for. A type's number counts chips in v5litepod and v6e, and
# cores, two a chip, in v4 and v5p.
TPU_NAME=${TPU_NAME:-rlhf}
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-16}
RUNTIME_VERSION=${RUNTIME_VERSION:-}  # '' for what the type needs
RESOURCE=${RESOURCE:-queued}  # queued: wait in a queue for chips; vm: directly
SPOT=${SPOT:-true}  # cheaper chips that can be taken away at any moment
NUM_SLICES=${NUM_SLICES:-1}  # more than 1 (queued alone) join over the network
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-}  # of the workers; '' for the default one
NETWORK=${NETWORK:-}  # '' for the default one

# Where everything that outlives the chips is kept, and where workers see it.
BUCKET=${BUCKET:-}  # without gs://
MOUNT=${MOUNT:-/mnt/rlhf_jax}
RUN_NAME=${RUN_NAME:-first}  # the workdir is $MOUNT/runs/$RUN_NAME

PYTHON_VERSION=${PYTHON_VERSION:-3.11}

# How long and how often.
POLL_SECONDS=${POLL_SECONDS:-60}
CREATE_TIMEOUT_MINUTES=${CREATE_TIMEOUT_MINUTES:-720}
MAX_RESTARTS=${MAX_RESTARTS:-3}  # after errors; preemptions are not counted

# For gke.sh alone: how Kubernetes calls the chips, and hosts a slice.
GKE_ACCELERATOR=${GKE_ACCELERATOR:-tpu-v5-lite-podslice}
GKE_TOPOLOGY=${GKE_TOPOLOGY:-4x4}
GKE_HOSTS=${GKE_HOSTS:-4}
GKE_CHIPS_PER_HOST=${GKE_CHIPS_PER_HOST:-4}
GKE_SERVICE_ACCOUNT=${GKE_SERVICE_ACCOUNT:-rlhf-jax}
GKE_IMAGE=${GKE_IMAGE:-python:3.11-slim}
