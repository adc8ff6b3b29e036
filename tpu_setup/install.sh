#!/usr/bin/env bash
# Put this checkout (what git has committed) on every worker of every slice, and set it up there.
#   tpu_setup/install.sh --name NAME --zone ZONE [--slices N] [--project PROJECT] [--dry-run]
# May be run again: what is done already is quick.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TRIES="${TRIES:-3}"

flags "$@"
needs NAME ZONE
where

archive="${TMPDIR:-/tmp}/aquila_jax-$NAME.tar.gz"
run git -C "$HERE/.." archive --format=tar.gz -o "$archive" HEAD
setup="mkdir -p $REMOTE_DIR && tar xzf aquila_jax.tar.gz -C $REMOTE_DIR && cd $REMOTE_DIR && make .venv/installed"
tpu=(gcloud compute tpus tpu-vm)

attempt() {
  on_all "${tpu[@]}" scp "$archive" NODE:aquila_jax.tar.gz "${WHERE[@]}" --worker=all &&
    on_all "${tpu[@]}" ssh NODE "${WHERE[@]}" --worker=all "--command=$setup"
}

for ((try = 1; try <= TRIES; try++)); do
  if attempt; then
    [[ $DRY_RUN == 1 ]] || say "installed on every worker of $NAME"
    exit 0
  fi
  say "try $try of $TRIES failed"
done
die "could not install on every worker of $NAME: run this again, or recreate it by resume.sh"
