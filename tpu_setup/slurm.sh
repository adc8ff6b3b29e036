#!/usr/bin/env bash
# The same on GPUs under SLURM: one process for each GPU, started again when hosts are lost.
#   tpu_setup/slurm.sh submit --name NAME --nodes N --gpus GPUS_A_NODE [--partition P] [--time T]
#     [--dry-run] -- COMMAND...
#   tpu_setup/slurm.sh logs|delete --name NAME [--yes] [--dry-run]
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action="${1:-}" nodes=1 gpus=8 partition="" time="" rest=()
(($# == 0)) || shift
while (($#)); do
  case "$1" in
    --nodes | --gpus | --partition | --time)
      [[ $# -ge 2 ]] || die "$1 needs a value; see tpu_setup/README.md"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --) rest+=("$@") && break ;;
    *) rest+=("$1") && shift ;;
  esac
done
flags ${rest[@]+"${rest[@]}"}
[[ $nodes =~ ^[1-9][0-9]*$ && $gpus =~ ^[1-9][0-9]*$ ]] || die "--nodes and --gpus are numbers"

case "$action" in
  submit)
    ((${#COMMAND[@]})) || die "no command: write it behind --"
    # SIGTERM five minutes before the time is over, so that everything is saved; then requeued.
    asked=(sbatch "--job-name=$NAME" "--nodes=$nodes" "--ntasks-per-node=$gpus"
      "--gpus-per-node=$gpus" --requeue --open-mode=append --signal=B:TERM@300
      "--output=$NAME.log")
    [[ -z $partition ]] || asked+=("--partition=$partition")
    [[ -z $time ]] || asked+=("--time=$time")
    run "${asked[@]}" "$HERE/slurm_job.sh" "${COMMAND[@]}" || die "sbatch refused (see above)"
    ;;
  logs) run tail -n 100 -F "$NAME.log" ;;
  delete)
    confirm "cancel the job $NAME?"
    run scancel "--name=$NAME" || die "could not cancel $NAME"
    ;;
  *) die "say submit, logs or delete, not '$action'" ;;
esac
