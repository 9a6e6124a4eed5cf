#!/usr/bin/env bash
#SBATCH --job-name=rlhf_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#
# Runs one binary with one config on GPUs under SLURM, until the run is done.
#
#   sbatch tpu_scripts/slurm.sh experiments.ppo --workdir=/shared/runs/first \
#       --config=configs/ppo.py --config.mesh.fsdp=-1
#   tpu_scripts/slurm.sh --dry_run experiments.ppo ...   # prints the commands
#
# Give it from the tree's root, on a file system that all nodes see, as the
# workdir must be. Sizes above are changed there or by options of sbatch. PYTHON
# names an interpreter that all nodes see (`pip install -e '.[cuda]'`).
#
# One process a GPU, which is how jax reads SLURM's variables: so no
# --gpus-per-task, under which each process would see one GPU and look for the
# wrong one. A job that is preempted, or whose time runs out, saves, is queued
# again and goes on; once the workdir holds finished.json it ends at once.
set -euo pipefail

PYTHON=${PYTHON:-python}

die() {
  echo "slurm.sh: $*" >&2
  exit 1
}

dry_run=false
if [[ ${1-} == --dry_run ]]; then
  dry_run=true
  shift
fi
(($#)) || die "say what to run: experiments.ppo --workdir=... --config=..."
[[ -f ${1//.//}.py ]] ||
  die "there is no binary '$1' here: give it from the tree's root, and name it" \
    "as experiments.ppo"
workdir=""
for argument in "$@"; do
  case $argument in
    --workdir=*) workdir=${argument#--workdir=} ;;
    --distributed* | --coordinator_address* | --num_processes* | --process_id*)
      die "leave out $argument: it follows from SLURM's variables"
      ;;
  esac
done
[[ $workdir == /* ]] ||
  die "give --workdir=/... , a place that all nodes see, not '$workdir'"

if $dry_run; then
  # As in a job of the size that stands above.
  : "${SLURM_JOB_ID:=1}" "${SLURM_JOB_NODELIST:=node[1-2]}"
  : "${SLURM_JOB_NUM_NODES:=2}" "${SLURM_NTASKS:=16}"
  nodes=node1
else
  [[ -n ${SLURM_JOB_ID-} ]] ||
    die "this is no SLURM job: sbatch tpu_scripts/slurm.sh ..., or --dry_run"
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
fi
# A port of this job's own: nodes may be shared.
address=${nodes%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))

# Each task's number is known in the task alone.
# shellcheck disable=SC2016
command=(
  srun --kill-on-bad-exit=1 bash -c 'exec "$@" --process_id="$SLURM_PROCID"' run
  "$PYTHON" -m "$@" --distributed "--coordinator_address=$address"
  "--num_processes=$SLURM_NTASKS"
)
if $dry_run; then
  # bash's own quoting: as one could paste it.
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi

if [[ -e $workdir/finished.json ]]; then
  echo "slurm.sh: $workdir is done already" >&2
  exit 0
fi
# Five minutes before its time is up, the run saves and ends, as on SIGTERM.
again=false
# shellcheck disable=SC2317,SC2329  # The trap calls it.
stop() {
  echo "slurm.sh: time is almost up: saving" >&2
  again=true heard=true
  # It may have none left to signal: the run decides.
  scancel --signal=TERM "$SLURM_JOB_ID" || true
}
trap stop USR1
# In the background, since bash hears signals between commands alone.
"${command[@]}" &
pid=$!
while :; do
  heard=false code=0
  wait "$pid" || code=$?
  # The signal ends a wait with a code of its own, even where the run has ended
  # meanwhile; bash still knows the run's then.
  if ! $heard || ((code <= 128)); then break; fi
done
if [[ ! -e $workdir/finished.json ]]; then
  echo "slurm.sh: there is no $workdir/finished.json yet" >&2
  if $again; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$code"
