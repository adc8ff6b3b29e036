#!/usr/bin/env bash
# Delete the slices and their queued resource. Asks first; --yes does not.
#   tpu_setup/delete.sh --name NAME --zone ZONE [--slices N] [--project PROJECT] [--yes] [--dry-run]
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flags "$@"
needs NAME ZONE
where

confirm "delete $NAME in $ZONE, with everything on its disks?"
run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet ||
  die "could not delete $NAME (see above)"
