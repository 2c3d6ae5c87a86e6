#!/usr/bin/env bash
# One worker's part of a job that outlives the connection which started it; used by tpu_queued.sh.
#
#   launch/worker.sh start [--env NAME=VALUE ...] -- VERB [--config FILE ...]
#   launch/worker.sh status    prints running, none, lost (ended without a code, as by a reboot) or an exit code
#   launch/worker.sh stop      SIGTERM, and SIGKILL after 60 seconds
#   launch/worker.sh log       prints the output so far
#
#   --dry-run                  print what would be done, do nothing
#
# The state lies in INSTRUCTAX_JOB (default ~/instructax-job): pid, exit, log. `start` ends what still runs.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

job=${INSTRUCTAX_JOB:-$HOME/instructax-job}
action='' settings=()
while (($#)); do
  case $1 in
    --env) need_value "$1" $#; need_setting "$1" "$2"; settings+=("$2"); shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) refuse "unknown option $1; see $me --help" ;;
    *)
      [[ -z $action ]] || break
      action=$1
      shift
      ;;
  esac
done

boot=$(</proc/sys/kernel/random/boot_id)

leader() { # the process that writes the exit code, where it has not ended; ids of before a reboot mean nothing
  local id of state
  read -r id of 2>/dev/null <"$job/pid" && [[ $of == "$boot" ]] || return
  state=$(cat "/proc/$id/stat" 2>/dev/null) && [[ $state != *") Z "* ]] && echo "$id"
}

status() {
  if [[ -s $job/exit ]]; then
    cat "$job/exit"
  elif leader >/dev/null; then
    echo running
  elif [[ -e $job/pid ]]; then
    echo lost
  else
    echo none
  fi
}

stop() {
  local id of deadline=$((SECONDS + 60))
  [[ ! -s $job/exit ]] && read -r id of 2>/dev/null <"$job/pid" && [[ $of == "$boot" ]] || return 0
  if leader >/dev/null; then
    kill -TERM -- "-$id" 2>/dev/null || true
    while leader >/dev/null && ((SECONDS < deadline)); do sleep 0.2; done
  fi
  # Whoever is left: the leader after its time, or what has lost its leader and still holds the chips.
  kill -KILL -- "-$id" 2>/dev/null || true
}

start() {
  stop
  mkdir -p "$job"
  rm -f "$job/exit" "$job/pid"
  # A session of its own survives the end of the connection. The trap keeps the shell that writes the code.
  # shellcheck disable=SC2016
  setsid bash -c '
    echo "$$ $(</proc/sys/kernel/random/boot_id)" >"$0/pid"
    trap : TERM
    code=0
    "$@" || code=$?
    echo "$code" >"$0/exit.part"
    mv "$0/exit.part" "$0/exit"
  ' "$job" env ${settings[@]+"${settings[@]}"} "$root/launch/local.sh" -- "$@" \
    </dev/null >>"$job/log" 2>&1 &
  until [[ -s $job/pid ]]; do sleep 0.05; done
}

case $action in
  start) need_verb $#; run start "$@" ;;
  status) status ;;
  stop) run stop ;;
  log) [[ ! -e $job/log ]] || cat "$job/log" ;;
  '') refuse "what? start, status, stop or log" ;;
  *) refuse "no action '$action'; start, status, stop or log" ;;
esac
