# shellcheck shell=bash
# The tree and the command as files in the bucket. Sourced, after cloud.sh, by
# the scripts that start runs there.
#
# The command's words are quoted once, here, into a file: no shell on the way to
# a worker ever sees them.

tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The tree's files: what git tracks, and what it would add.
list_files() {
  local file
  git -C "$tree" ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      # A tracked file may have been deleted.
      if [[ -f $tree/$file ]]; then printf '%s\0' "$file"; fi
    done
}

# Checks `BINARY ARGUMENTS` and sets BINARY and ARGUMENTS.
read_binary() {
  local argument
  (($#)) || die "say what to run: [--dry_run] experiments.ppo" \
    "--config=configs/ppo.py ..."
  BINARY=$1 ARGUMENTS=("${@:2}")
  [[ -f $tree/${BINARY//.//}.py ]] ||
    die "there is no binary '$BINARY' in $tree: name it as experiments.ppo"
  for argument in "${@:2}"; do
    case $argument in
      --workdir | --workdir=*)
        die "leave out $argument: the workdir is $MOUNT/runs/$RUN_NAME; set" \
          "RUN_NAME to name another"
        ;;
      --distributed | --distributed=*)
        die "leave out $argument: it is added, since all workers are one run"
        ;;
    esac
  done
}

# write_command PYTHON FOLDER: what all workers run, to stdout.
write_command() {
  echo "# Written by tpu_scripts: one run, the same on all workers."
  echo "cd $2"
  echo "export RLHF_JAX_DATA=$MOUNT/data"
  echo "exec $1 -m $BINARY \\"
  echo "  --workdir=$MOUNT/runs/$RUN_NAME --distributed \\"
  echo "  $(quoted ${ARGUMENTS[@]+"${ARGUMENTS[@]}"})"
}

# Sets TREE_ID and LAUNCH_ID, which name contents, and LAUNCH, a folder in the
# bucket: what is there under this name need not be copied again.
# identify PYTHON FOLDER, as for write_command; '@TREE_ID@' in FOLDER stands for
# the tree's.
identify() {
  git -C "$tree" rev-parse --git-dir >/dev/null 2>&1 ||
    die "$tree is not a git checkout, which says what is to be copied"
  TREE_ID=$({ list_files && cd "$tree" && list_files | tr '\0' '\n' |
    git hash-object --stdin-paths; } | git hash-object --stdin | cut -c1-12)
  FOLDER=${2//@TREE_ID@/$TREE_ID}
  COMMAND=$(write_command "$1" "$FOLDER")
  LAUNCH_ID=$(echo "$TREE_ID $COMMAND" | git hash-object --stdin | cut -c1-12)
  LAUNCH=launch/$RUN_NAME-$LAUNCH_ID
}

# Fails where the bucket cannot be read or written to.
upload() {
  local folder file
  ask storage ls "gs://$BUCKET/$LAUNCH/command.sh"
  if [[ -z $ERROR ]] && ! $DRY_RUN; then return; fi
  if [[ -n $ERROR && $ERROR != absent ]]; then
    say "cannot read gs://$BUCKET: $ERROR"
    return 1
  fi
  if $DRY_RUN; then
    folder=/tmp/$LAUNCH
    echo "mkdir -p $folder"
    echo "(cd $tree && git ls-files -z --cached --others" \
      "--exclude-standard |"
    echo "  tar -czf $folder/tree.tar.gz --null -T -)"
    echo "cat >$folder/command.sh <<'END'"
    echo "$COMMAND"
    echo END
  else
    say "copying the tree to gs://$BUCKET/$LAUNCH"
    folder=$(mktemp -d)
    list_files | tar -C "$tree" -czf "$folder/tree.tar.gz" --null -T - ||
      die "could not pack the files of $tree"
    echo "$COMMAND" >"$folder/command.sh"
  fi
  # The command goes last: where it is, the tree is.
  for file in tree.tar.gz command.sh; do
    if ! cloud storage cp "$folder/$file" "gs://$BUCKET/$LAUNCH/$file"; then
      say "could not copy the tree to gs://$BUCKET: you need" \
        "roles/storage.objectAdmin on it"
      return 1
    fi
  done
  $DRY_RUN || rm -r "$folder"
}
