# What the scripts share: flags, and commands that are shown or run. Sourced, not run.
# shellcheck shell=bash
# The scripts that source this use what it sets.
# shellcheck disable=SC2034

set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
NAME="" ZONE="" PROJECT="" TYPE="" VERSION="" TIER="" NETWORK="" SLICES=1 WORKER=0
DRY_RUN=0 YES=0 WATCH=0
REMOTE_DIR="aquila_jax"
COMMAND=()

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# The words of a command as a shell would read them.
quoted() {
  local shown
  printf -v shown ' %q' "$@"
  printf '%s' "${shown# }"
}

# Show a command; run it unless this is a dry run.
run() {
  if [[ $DRY_RUN == 1 ]]; then
    quoted "$@"
    printf '\n'
    return 0
  fi
  "$@"
}

# flags "$@": reads all flags into the variables above, and the words behind -- into COMMAND.
flags() {
  while (($#)); do
    case "$1" in
      --name | --zone | --project | --type | --version | --network | --slices | --worker | --watch)
        [[ $# -ge 2 && $2 != --* ]] || die "$1 needs a value; see tpu_setup/README.md"
        local variable="${1#--}"
        printf -v "${variable^^}" '%s' "$2"
        shift 2
        ;;
      --spot | --reserved)
        [[ -z $TIER ]] || die "--spot and --reserved exclude each other"
        TIER="$1"
        shift
        ;;
      --dry-run) DRY_RUN=1 && shift ;;
      --yes) YES=1 && shift ;;
      --) shift && COMMAND=("$@") && break ;;
      *) die "unknown flag $1; see tpu_setup/README.md" ;;
    esac
  done
  [[ $NAME =~ ^[a-z][a-z0-9-]{0,60}$ ]] || die "--name must be lower-case letters, digits and -"
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || die "--slices must be a whole number, not '$SLICES'"
  [[ $WATCH =~ ^[0-9]+$ ]] || die "--watch must be whole seconds, not '$WATCH'"
  [[ $WORKER =~ ^([0-9]+|all)$ ]] || die "--worker must be a number or all, not '$WORKER'"
}

needs() {
  local variable
  for variable in "$@"; do
    [[ -n ${!variable} ]] || die "--${variable,,} is missing; see tpu_setup/README.md"
  done
}

# Where everything is; credentials are gcloud's own and never pass through here.
where() {
  WHERE=("--zone=$ZONE")
  [[ -z $PROJECT ]] || WHERE+=("--project=$PROJECT")
}

# The names of the slices, one a line.
nodes() {
  local i
  if ((SLICES == 1)); then
    printf '%s\n' "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do printf '%s-%d\n' "$NAME" "$i"; done
  fi
}

# state: of the queued resource, as Google Cloud calls it; ABSENT where there is none.
state() {
  gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
    --format="value(state.state)" 2>/dev/null || printf 'ABSENT\n'
}

# on_all WORDS...: a gcloud command for each slice, all at once; WORDS hold NODE for its name.
on_all() {
  local node pids=() names=() failed=() i
  while read -r node; do
    if [[ $DRY_RUN == 1 ]]; then
      run "${@//NODE/$node}"
    else
      "${@//NODE/$node}" &
      pids+=($!) names+=("$node")
    fi
  done < <(nodes)
  for i in "${!pids[@]}"; do
    wait "${pids[$i]}" || failed+=("${names[$i]}")
  done
  [[ ${#failed[@]} == 0 ]] || {
    say "not all workers of ${failed[*]} could be reached, or the command failed there"
    return 1
  }
}

confirm() {
  [[ $YES == 1 || $DRY_RUN == 1 ]] && return 0
  local answer=""
  printf '%s [y/N] ' "$1" >&2
  read -r answer || true
  [[ $answer == [yY] ]] || die "nothing was deleted"
}
