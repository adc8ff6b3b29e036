#!/usr/bin/env bash
# What SLURM runs on the first node: the command on all of them, queued again where it will go on.
# A signal of SLURM's (time is nearly over) stops it with everything saved, and queues it again; one
# that scancel sends is followed by no requeue that SLURM would carry out.
set -uo pipefail

child=0
trap '((child == 0)) || kill -TERM "$child"' TERM
srun --kill-on-bad-exit=0 "$@" &
child=$!
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do
  code=0
  wait "$child" || code=$?
done
case "$code" in
  0 | 1 | 2) exit "$code" ;;
  *) exec scontrol requeue "$SLURM_JOB_ID" ;;
esac
