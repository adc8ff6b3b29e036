#!/usr/bin/env bash
# Start a command on every worker of every slice, and keep it going (supervise.sh).
#   tpu_setup/run.sh --name NAME --zone ZONE [--slices N] [--project PROJECT] [--dry-run] \
#     -- aquila train --gin_file=gin_configs/runs/pretrain.gin --gin.MODEL_DIR="'/mnt/run'"
# Where it runs already, nothing happens.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flags "$@"
needs NAME ZONE
((${#COMMAND[@]})) || die "no command: write it behind --"
where

words="$(quoted "${COMMAND[@]}")"
# On TPU hosts JAX must find the chips: no platform is set.
start="cd $REMOTE_DIR && PATH=\$PWD/.venv/bin:\$PATH nohup tpu_setup/supervise.sh $words >>\$HOME/aquila.log 2>&1 </dev/null & sleep 1"
on_all gcloud compute tpus tpu-vm ssh NODE "${WHERE[@]}" --worker=all "--command=$start" ||
  die "not started everywhere: run this again, which leaves alone what runs"
[[ $DRY_RUN == 1 ]] || say "started; tpu_setup/logs.sh --name $NAME --zone $ZONE shows what it says"
