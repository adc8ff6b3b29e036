#!/usr/bin/env bash
# The same on GKE, by XPK (pip install xpk): a workload on a cluster that xpk has made.
#   tpu_setup/gke.sh create --cluster CLUSTER --image IMAGE <--name, --zone, --type, --slices,
#     --project as for create.sh> [--dry-run] -- COMMAND...
#   tpu_setup/gke.sh logs|delete --cluster CLUSTER --name NAME --zone ZONE [--yes] [--dry-run]
# IMAGE holds this checkout, installed. GKE starts the command again after a preemption.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action="${1:-}" cluster="" image="" rest=()
(($# == 0)) || shift
while (($#)); do
  case "$1" in
    --cluster | --image)
      [[ $# -ge 2 ]] || die "$1 needs a value; see tpu_setup/README.md"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --) rest+=("$@") && break ;;
    *) rest+=("$1") && shift ;;
  esac
done
flags ${rest[@]+"${rest[@]}"}
needs NAME ZONE
[[ -n $cluster ]] || die "--cluster is missing; see tpu_setup/README.md"
where
place=("--cluster=$cluster" "${WHERE[@]}")

case "$action" in
  create)
    needs TYPE
    [[ -n $image ]] || die "--image is missing; see tpu_setup/README.md"
    ((${#COMMAND[@]})) || die "no command: write it behind --"
    # 75: another host was lost; XPK starts again from 127 up by itself.
    run xpk workload create "--workload=$NAME" "${place[@]}" "--tpu-type=$TYPE" \
      "--num-slices=$SLICES" "--docker-image=$image" --max-restarts=1000 \
      --restart-on-exit-codes=75 "--command=$(quoted "${COMMAND[@]}")" ||
      die "xpk refused (see above)"
    ;;
  logs)
    run kubectl logs --follow --tail=100 --selector="jobset.sigs.k8s.io/jobset-name=$NAME" \
      --prefix
    ;;
  delete)
    confirm "delete the workload $NAME of $cluster?"
    run xpk workload delete "--workload=$NAME" "${place[@]}" || die "could not delete $NAME"
    ;;
  *) die "say create, logs or delete, not '$action'" ;;
esac
