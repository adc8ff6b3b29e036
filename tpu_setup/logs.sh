#!/usr/bin/env bash
# Follow what a worker says; the first one of the first slice speaks for all.
#   tpu_setup/logs.sh --name NAME --zone ZONE [--slices N] [--worker N|all] [--project PROJECT]
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flags "$@"
needs NAME ZONE
where

first="$(nodes | head -n 1)"
# The home is the worker's.
# shellcheck disable=SC2016
run gcloud compute tpus tpu-vm ssh "$first" "${WHERE[@]}" "--worker=$WORKER" \
  '--command=tail -n 100 -F $HOME/aquila.log'
