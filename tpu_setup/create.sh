#!/usr/bin/env bash
# Ask for TPU slices by a queued resource, and wait until they are there.
#   tpu_setup/create.sh --name NAME --zone ZONE --type v5p-256 --version v2-alpha-tpuv5
#     [--slices N] [--spot | --reserved] [--project PROJECT] [--network NETWORK] [--dry-run]
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
POLL_SECONDS="${POLL_SECONDS:-30}"

flags "$@"
needs NAME ZONE TYPE VERSION
where

asked=(gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}"
  "--accelerator-type=$TYPE" "--runtime-version=$VERSION")
if ((SLICES == 1)); then
  asked+=("--node-id=$NAME")
else
  asked+=("--node-count=$SLICES" "--node-prefix=$NAME")
fi
[[ -z $TIER ]] || asked+=("$TIER")
[[ -z $NETWORK ]] || asked+=("--network=$NETWORK")

if ! run "${asked[@]}"; then
  die "Google Cloud refused (see above). Quota: ask for more, or try another --zone or --spot"
fi
[[ $DRY_RUN == 0 ]] || exit 0

previous=""
while true; do
  now="$(state)"
  [[ $now == "$previous" ]] || say "$NAME is $now"
  case "$now" in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED | SUSPENDING | ABSENT)
      die "$NAME is $now: tpu_setup/delete.sh removes it, then try again" ;;
  esac
  previous="$now"
  sleep "$POLL_SECONDS"
done
