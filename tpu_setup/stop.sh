#!/usr/bin/env bash
# Stop the command on every worker: the step under way is finished and saved.
#   tpu_setup/stop.sh --name NAME --zone ZONE [--slices N] [--project PROJECT] [--dry-run]
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flags "$@"
needs NAME ZONE
where

on_all gcloud compute tpus tpu-vm ssh NODE "${WHERE[@]}" --worker=all \
  "--command=pkill -TERM -f '[s]upervise.sh' || true" ||
  die "not every worker was told: run this again"
