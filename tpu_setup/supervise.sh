#!/usr/bin/env bash
# Run a command again whenever its exit code says that it will go on: on one host, once.
#   tpu_setup/supervise.sh COMMAND...
# 0: done. 2: a person must mend something. 1: a defect, tried once more. All others (75: another
# host was lost; 128 + n: stopped by a signal) mean: start again.
set -uo pipefail
LOCK="${SUPERVISE_LOCK:-/tmp/aquila-supervise.lock}"
WAIT_SECONDS="${WAIT_SECONDS:-10}"

exec 9>"$LOCK"
flock --nonblock 9 || {
  echo "supervise: a command runs here already" >&2
  exit 0
}

child=0
stopping=0
# shellcheck disable=SC2329 # called by the trap
stop() {
  stopping=1
  ((child == 0)) || kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT

defects=0
while true; do
  "$@" 9>&- &
  child=$!
  code=0
  wait "$child" || code=$?
  # A signal ends wait before the command has saved.
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  child=0
  case "$code" in
    0 | 2) break ;;
    1)
      defects=$((defects + 1))
      ((defects < 2)) || break
      ;;
    *) defects=0 ;;
  esac
  ((stopping == 0)) || break
  echo "supervise: exit code $code, starting again in $WAIT_SECONDS s" >&2
  sleep "$WAIT_SECONDS"
  ((stopping == 0)) || break
done
echo "supervise: ended with exit code $code" >&2
exit "$code"
