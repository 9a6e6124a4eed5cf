#!/usr/bin/env bash
# Runs one binary with one config on TPUs of a Kubernetes cluster.
#
#   tpu_scripts/gke.sh [--dry_run] experiments.ppo --config=configs/ppo.py ...
#
# Copies the tree to the bucket, as launch.sh does, fills in gke.yaml and applies
# it: given again, nothing changes. The cluster is the one that kubectl speaks
# to. It needs JobSet, the Cloud Storage FUSE driver and a node pool of the chips
# that env.sh names; README.md says how. --dry_run prints what would be applied.
set -euo pipefail
# shellcheck source=cloud.sh
source "$(dirname "$0")/cloud.sh"
# shellcheck source=tree.sh
source "$here/tree.sh"

case ${1-} in
  --dry_run)
    DRY_RUN=true
    shift
    ;;
  -*) die "unknown argument '$1' before the binary; known is --dry_run" ;;
esac
check_env
read_binary "$@"
identify python /rlhf_jax

names=(RUN_NAME MAX_RESTARTS NUM_SLICES GKE_HOSTS GKE_SERVICE_ACCOUNT
  GKE_ACCELERATOR GKE_TOPOLOGY SPOT GKE_IMAGE MOUNT FOLDER LAUNCH
  GKE_CHIPS_PER_HOST BUCKET)
manifest=$(<"$here/gke.yaml")
for name in "${names[@]}"; do
  manifest=${manifest//"{$name}"/"${!name}"}
done
if ! $SPOT; then
  # Nodes that are not spot have no such label at all.
  manifest=$(grep -v 'gke-spot' <<<"$manifest")
fi

upload || die "the tree is not in the bucket, so nothing was started"
if $DRY_RUN; then
  echo "kubectl apply -f - <<'END'"
  echo "$manifest"
  echo END
  exit 0
fi
kubectl apply -f - <<<"$manifest" || die "kubectl did not take it. A JobSet" \
  "cannot be changed: for another tree or command under the same RUN_NAME," \
  "kubectl delete jobset $RUN_NAME first"
say "kubectl get jobset $RUN_NAME; fetch.sh brings the workdir here"
