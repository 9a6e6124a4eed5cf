#!/usr/bin/env bash
# The part of launch.sh and watch.sh that runs on a worker.
#
#   worker.sh install RUN LAUNCH    the tree's packages
#   worker.sh start RUN LAUNCH      under tmux; nothing if it is running
#   worker.sh status RUN            'HOST running', 'HOST exited N', 'HOST absent'
#   worker.sh log RUN LINE          '#STAMP TOTAL', then lines from LINE on, or
#                                   the last 20 if that is 0
#   worker.sh errors RUN            'HOST: LINE' for each line that tells of one
#   worker.sh stop RUN
#
# LAUNCH is the folder that launch.sh has put the tree and the command in. What
# is known of a run is in ~/.rlhf_jax/RUN: log, launch (its folder), pid, exit.
set -euo pipefail

host=$(hostname)
venv=$HOME/.rlhf_jax/venv
action=$1 name=$2
folder=$HOME/.rlhf_jax/$name

die() {
  echo "$host: $*" >&2
  exit 1
}

is_running() { tmux has-session -t "=$name" 2>/dev/null; }

install() {
  local launch=$1 tree
  tree=$(cd "$(dirname "$0")/.." && pwd)
  if [[ -e $tree/.installed ]]; then return; fi
  python3 -m uv pip install --quiet --python "$venv/bin/python" \
    --editable "${tree}[tpu]" || die "packages of $launch are not installed"
  touch "$tree/.installed"
}

start() {
  local launch=$1 mount self
  mount=${launch%/launch/*}
  mountpoint -q "$mount" ||
    die "$mount is not mounted, and checkpoints would be lost: run setup.sh"
  mkdir -p "$folder"
  if is_running; then
    [[ $(<"$folder/launch") == "$launch" ]] ||
      die "$name runs another tree or command: follow it with watch.sh, or" \
        "replace it with launch.sh --restart"
    return
  fi
  self=$(cd "$(dirname "$0")" && pwd)/worker.sh
  # Where watch.sh finds it, which does not know the tree.
  ln -sfn "$self" "$folder/worker.sh"
  rm -f "$folder/exit"
  echo "$launch" >"$folder/launch"
  tmux new-session -d -s "$name" "bash '$self' run '$name' '$launch'"
}

# What tmux starts. The log goes to the bucket when the run has ended, so that
# it outlives the chips.
run() {
  local launch=$1 code=0 stamp
  stamp=$(date +%Y%m%d-%H%M%S)
  cd "$(dirname "$0")/.."
  echo "$stamp" >"$folder/stamp"
  bash "$launch/command.sh" >"$folder/log" 2>&1 &
  echo $! >"$folder/pid"
  wait $! || code=$?
  mkdir -p "$launch/logs" || true
  cp "$folder/log" "$launch/logs/$host.$stamp.log" || true
  echo "$code" >"$folder/exit"
}

status() {
  if [[ -e $folder/exit ]]; then
    echo "$host exited $(<"$folder/exit")"
  elif is_running; then
    echo "$host running"
  elif [[ -e $folder/launch ]]; then
    # Killed with its tmux, or the machine was started anew.
    echo "$host exited 137"
  else
    echo "$host absent"
  fi
}

log() {
  local from=$1 total=0 stamp=0
  if [[ -e $folder/log && -e $folder/stamp ]]; then
    total=$(wc -l <"$folder/log") stamp=$(<"$folder/stamp")
  fi
  total=$((total))
  if ((from == 0)); then from=$((total > 20 ? total - 19 : 1)); fi
  echo "#$stamp $total"
  if ((total >= from)); then sed -n "${from},${total}p" "$folder/log"; fi
}

errors() {
  local code=""
  if [[ -e $folder/exit ]]; then code=$(<"$folder/exit"); fi
  if [[ -n $code && $code != 0 ]]; then echo "$host: exited with $code"; fi
  if [[ ! -e $folder/log ]]; then return; fi
  # What the binaries say, exceptions, absl's errors, and what a signal leaves.
  { grep -aE -e '^error: ' -e '^[A-Za-z_.]+(Error|Exception|Mismatch)\b' \
    -e '^[EF][0-9]{4} ' -e '^(Fatal|Killed|Aborted|Segmentation)' \
    "$folder/log" || true; } | tail -n 5 | sed "s/^/$host: /"
}

stop() {
  local pid i
  if [[ -e $folder/pid && ! -e $folder/exit ]]; then
    pid=$(<"$folder/pid")
    kill "$pid" 2>/dev/null || true
    # It saves; and the next run cannot have the chips before it has ended.
    for ((i = 0; i < 300; i++)); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 1
    done
    kill -9 "$pid" 2>/dev/null || true
  fi
  tmux kill-session -t "=$name" 2>/dev/null || true
}

case $action in
  install | start | run | status | log | errors | stop) "$action" "${@:3}" ;;
  *) die "worker.sh knows no '$action'" ;;
esac
