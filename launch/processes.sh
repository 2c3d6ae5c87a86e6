#!/usr/bin/env bash
# Several CPU processes on this machine, one program: what a pod does, without a pod.
#
#   launch/processes.sh N [options] -- VERB [--config FILE ...]
#
#   --devices K        CPU devices of each process (default 1)
#   --max-restarts R   restarts after failures (default 3); a preemption (exit code 143) does not count
#   --heartbeat S      seconds after which a silent peer counts as dead (default 10)
#   --grace S          seconds that processes have to save after SIGTERM (default 60)
#   --logs DIR         output of processes 1 to N-1; process 0 keeps the terminal (default runs/logs)
#   --dry-run          print what would be run, do nothing
#
# When one process dies all are ended and started again; each continues from the last checkpoint. SIGTERM or
# Ctrl-C to this script lets them save, then ends for good with 143 or 130. A refusal (2) is not retried.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

count='' devices=1 max_restarts=3 heartbeat=10 grace=60 logs=runs/logs
# After a failure the others can do nothing useful: a moment for their last words, and no longer.
readonly LAST_WORDS=3

while (($#)); do
  case $1 in
    --devices) need_value "$1" $#; need_number "$1" "$2" 1; devices=$2; shift 2 ;;
    --max-restarts) need_value "$1" $#; need_number "$1" "$2" 0; max_restarts=$2; shift 2 ;;
    --heartbeat) need_value "$1" $#; need_number "$1" "$2" 1; heartbeat=$2; shift 2 ;;
    --grace) need_value "$1" $#; need_number "$1" "$2" 1; grace=$2; shift 2 ;;
    --logs) need_value "$1" $#; logs=$2; shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) refuse "unknown option $1; see $me --help" ;;
    *)
      [[ -z $count ]] || break
      count=$1
      shift
      ;;
  esac
done
[[ -n $count ]] || refuse "how many processes? $me N -- VERB ..."
need_number N "$count" 1
need_verb $#
find_instructax

free_port() { # of this machine, below the range that the kernel hands out itself
  local port
  while :; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

start() { # INDEX PORT COMMAND...: in the background, its id in pids
  local index=$1 port=$2
  shift 2
  local settings=(
    JAX_PLATFORMS=cpu
    "JAX_NUM_CPU_DEVICES=$devices"
    "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
    "JAX_NUM_PROCESSES=$count"
    "JAX_PROCESS_ID=$index"
    "INSTRUCTAX_HEARTBEAT_SECONDS=$heartbeat"
  )
  if "$dry_run"; then
    run env "${settings[@]}" "$root/launch/local.sh" --flags cpu -- "$@"
  elif ((index == 0)); then
    env "${settings[@]}" "$root/launch/local.sh" --flags cpu -- "$@" &
  else
    env "${settings[@]}" "$root/launch/local.sh" --flags cpu -- "$@" >>"$logs/process-$index.log" 2>&1 &
  fi
  "$dry_run" || pids[index]=$!
}

signal_all() {
  local index
  for index in "${!pids[@]}"; do
    kill "-$1" "${pids[index]}" 2>/dev/null || true
  done
}

watch() { # until every process has ended; `outcome` is 0, or the code of the first that failed
  local index code told=false deadline=0
  outcome=0
  while ((${#pids[@]})); do
    if ((stopped)) && ! "$told"; then
      signal_all TERM
      told=true
      deadline=$((SECONDS + grace))
    fi
    for index in "${!pids[@]}"; do
      kill -0 "${pids[index]}" 2>/dev/null && continue
      code=0
      wait "${pids[index]}" || code=$?
      unset "pids[index]"
      ((code)) || continue
      # A refusal is the reason even where a peer fell over it first.
      if ((outcome == 0 || code == REFUSED)); then
        outcome=$code
        ((stopped)) || say "process $index ended with $code"
        ((stopped || index == 0)) || tail -n 5 "$logs/process-$index.log" >&2
      fi
      ((deadline)) || deadline=$((SECONDS + (code == SAVED ? grace : LAST_WORDS)))
    done
    if ((deadline && SECONDS >= deadline)); then
      signal_all KILL
    fi
    sleep 0.1
  done
}

if "$dry_run"; then
  for ((i = 0; i < count; i++)); do
    start "$i" PORT "$@"
  done
  exit 0
fi

mkdir -p "$logs" || refuse "cannot write to $logs; give --logs another folder"
declare -a pids=()
stopped=0 failures=0
trap 'stopped=143' TERM
trap 'stopped=130' INT
while :; do
  port=$(free_port)
  for ((i = 0; i < count; i++)); do
    start "$i" "$port" "$@"
  done
  watch
  ((outcome)) || exit 0
  ((stopped == 0)) || exit "$stopped"
  if ((outcome == REFUSED)); then
    exit "$REFUSED"
  elif ((outcome == SAVED)); then
    say "preempted with all saved; starting again"
  elif ((++failures > max_restarts)); then
    say "gave up after $max_restarts restarts; the last checkpoint is kept, logs are in $logs"
    exit "$outcome"
  else
    say "restart $failures of $max_restarts"
  fi
  sleep 1
  ((stopped == 0)) || exit "$stopped"
done
