#!/usr/bin/env bash
# Go on after a preemption: recreate what is gone, install, and start the command again.
#   tpu_setup/resume.sh <the flags of create.sh> [--yes] [--watch SECONDS] -- COMMAND...
# With --watch it looks again every so many seconds, until it is stopped.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flags "$@"
needs NAME ZONE TYPE VERSION
((${#COMMAND[@]})) || die "no command: write it behind --"
where

place=(--name "$NAME" --zone "$ZONE" --slices "$SLICES")
[[ -z $PROJECT ]] || place+=(--project "$PROJECT")
created=("${place[@]}" --type "$TYPE" --version "$VERSION")
[[ -z $TIER ]] || created+=("$TIER")
[[ -z $NETWORK ]] || created+=(--network "$NETWORK")

# A slice may be preempted while its queued resource still says ACTIVE.
are_ready() {
  local node
  while read -r node; do
    [[ $(gcloud compute tpus tpu-vm describe "$node" "${WHERE[@]}" \
      --format="value(state)" 2>/dev/null </dev/null) == READY ]] || return 1
  done < <(nodes)
}

look() {
  local now
  now="$(state)"
  case "$now" in
    ACTIVE)
      if are_ready; then
        "$HERE/run.sh" "${place[@]}" -- "${COMMAND[@]}"
        return
      fi
      say "a slice of $NAME was preempted"
      ;;
    WAITING_FOR_RESOURCES | PROVISIONING | CREATING | ACCEPTED)
      say "$NAME is $now: it is waited for"
      return
      ;;
    *) say "$NAME is $now" ;;
  esac
  if [[ $now != ABSENT ]]; then
    local deletion=("${place[@]}")
    [[ $YES == 0 ]] || deletion+=(--yes)
    "$HERE/delete.sh" "${deletion[@]}"
  fi
  "$HERE/create.sh" "${created[@]}"
  "$HERE/install.sh" "${place[@]}"
  "$HERE/run.sh" "${place[@]}" -- "${COMMAND[@]}"
}

if [[ $DRY_RUN == 1 ]]; then
  "$HERE/delete.sh" "${place[@]}" --dry-run
  "$HERE/create.sh" "${created[@]}" --dry-run
  "$HERE/install.sh" "${place[@]}" --dry-run
  "$HERE/run.sh" "${place[@]}" --dry-run -- "${COMMAND[@]}"
  exit 0
fi
look
while ((WATCH > 0)); do
  sleep "$WATCH"
  # One failure, of the network or of quota, does not end the watch.
  (look) || say "will look again in $WATCH s"
done
