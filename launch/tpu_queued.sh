#!/usr/bin/env bash
# A TPU slice through queued resources: create, wait, install, run on all workers, start again when preempted, delete.
#
#   launch/tpu_queued.sh --job NAME --zone ZONE --type TYPE [options] -- VERB --run-dir DIR [--config FILE ...]
#
#   --job NAME              the queued resource and its node; with the same name the same job is taken up again
#   --zone ZONE             for example us-east5-a
#   --type TYPE             accelerator type: v5p-128, v6e-32, v5litepod-16, v4-32 ...
#   --project ID            (default: gcloud's)
#   --runtime-version NAME  (default: by the type)
#   --spot                  cheaper, may be preempted
#   --create FLAG           a further flag of `queued-resources create`, repeatable, such as --create=--reserved
#   --install COMMAND       run once on every new worker in ~/instructax (default: a .venv made with uv)
#   --setup COMMAND         run after it on every worker, for example to mount the disk that holds DIR
#   --env NAME=VALUE        environment of the run, repeatable
#   --max-restarts R        restarts after failures (default 3); preemptions do not count
#   --poll S                seconds between two looks (default 60)
#   --logs DIR              the workers' output is fetched here at the end (default runs/logs)
#   --keep                  do not delete the slice at the end
#   --dry-run               print what would be run, do nothing
#
# DIR must outlive the slice: a mounted Filestore, Lustre or bucket. The files of this checkout are sent as they are.
# Ctrl-C ends this script, not the run: the same command watches it again.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

job='' zone='' type='' project='' runtime='' setup='' max_restarts=3 poll=60 logs=runs/logs keep=false
# TPU images carry Python 3.10, and instructax needs 3.11: uv brings its own.
# shellcheck disable=SC2016
install='python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --clear --python 3.12 .venv && ~/.local/bin/uv pip install --quiet --python .venv/bin/python -e ".[tpu]"'
create_flags=() settings=()
# So many silent looks in a row mean that the workers are gone, whatever the service says.
readonly PATIENCE=10

while (($#)); do
  case $1 in
    --job) need_value "$1" $#; job=$2; shift 2 ;;
    --zone) need_value "$1" $#; zone=$2; shift 2 ;;
    --type) need_value "$1" $#; type=$2; shift 2 ;;
    --project) need_value "$1" $#; project=$2; shift 2 ;;
    --runtime-version) need_value "$1" $#; runtime=$2; shift 2 ;;
    --spot) create_flags+=(--spot); shift ;;
    --create=*) create_flags+=("${1#--create=}"); shift ;;
    --install) need_value "$1" $#; install=$2; shift 2 ;;
    --setup) need_value "$1" $#; setup=$2; shift 2 ;;
    --env) need_value "$1" $#; need_setting "$1" "$2"; settings+=(--env "$2"); shift 2 ;;
    --max-restarts) need_value "$1" $#; need_number "$1" "$2" 0; max_restarts=$2; shift 2 ;;
    --poll) need_value "$1" $#; need_number "$1" "$2" 0; poll=$2; shift 2 ;;
    --logs) need_value "$1" $#; logs=$2; shift 2 ;;
    --keep) keep=true; shift ;;
    --dry-run) dry_run=true; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) refuse "unknown option $1; see $me --help" ;;
    *) break ;;
  esac
done
need_verb $#
need_name --job "$job"
[[ -n $zone ]] || refuse "--zone is missing, for example --zone us-east5-a"
[[ -n $type ]] || refuse "--type is missing, for example --type v5p-128"
if [[ -z $runtime ]]; then
  case $type in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v4-*) runtime=tpu-ubuntu2204-base ;;
    *) refuse "no runtime version is known for --type $type; give --runtime-version" ;;
  esac
fi
command=" $* "
[[ $command == *" --run-dir"* ]] ||
  refuse "the command has no --run-dir; name a folder on a disk that outlives the TPU"
[[ $command != *" --run-dir gs://"* && $command != *" --run-dir=gs://"* ]] ||
  refuse "--run-dir must be a folder, not a gs:// address; mount the bucket with --setup"
need_program gcloud "see cloud.google.com/sdk"

where=("--zone=$zone" --quiet)
[[ -z $project ]] || where+=("--project=$project")

create() {
  run gcloud compute tpus queued-resources create "$job" "--node-id=$job" "${where[@]}" \
    "--accelerator-type=$type" "--runtime-version=$runtime" ${create_flags[@]+"${create_flags[@]}"}
}

delete() {
  run gcloud compute tpus queued-resources delete "$job" --force "${where[@]}"
}

on_workers() { # all|0 COMMAND
  run gcloud compute tpus tpu-vm ssh "$job" "${where[@]}" "--worker=$1" "--command=$2"
}

state() { # of the queued resource; NONE where there is none, UNKNOWN where the service does not answer
  local found
  if "$dry_run"; then
    run gcloud compute tpus queued-resources describe "$job" "${where[@]}" '--format=value(state.state)'
  elif found=$(gcloud compute tpus queued-resources describe "$job" "${where[@]}" \
    '--format=value(state.state)' 2>&1); then
    tail -n 1 <<<"$found"
  elif grep -qiE 'not[ _]?found|does not exist' <<<"$found"; then
    echo NONE
  else
    say "no answer about $job: $(tail -n 1 <<<"$found")"
    echo UNKNOWN
  fi
}

status() { # of the run, on worker 0: a code, running, none, lost, or unreachable
  local found
  if "$dry_run"; then
    on_workers 0 'bash instructax/launch/worker.sh status'
  elif found=$(on_workers 0 'bash instructax/launch/worker.sh status 2>/dev/null || echo none' 2>/dev/null); then
    tail -n 1 <<<"$found" | grep -xE '[0-9]+|running|none|lost' || echo unreachable
  else
    echo unreachable
  fi
}

pack() { # ARCHIVE: tracked files and new ones, as they are now; what git ignores stays here
  git -C "$root" ls-files --cached --others --exclude-standard -z |
    tar -C "$root" --null --files-from=- --ignore-failed-read -czf "$1" 2>/dev/null
}

install_all() {
  local folder=/tmp archive code=0
  "$dry_run" || folder=$(mktemp -d)
  archive=$folder/instructax.tar.gz
  "$dry_run" || pack "$archive" || refuse "the files of $root could not be packed; it must be a git checkout"
  if ! run gcloud compute tpus tpu-vm scp "$archive" "$job:instructax.tar.gz" "${where[@]}" --worker=all; then
    code=1
  elif ! on_workers all "mkdir -p instructax && tar -C instructax -xzf instructax.tar.gz && cd instructax && $install"; then
    code=1
  fi
  "$dry_run" || rm -rf "$folder"
  return "$code"
}

start_all() {
  # After a failure the others may still wait for the dead one: all are ended before any starts.
  on_workers all 'bash instructax/launch/worker.sh stop' &&
    { [[ -z $setup ]] || on_workers all "$setup"; } &&
    on_workers all "bash instructax/launch/worker.sh start $(words ${settings[@]+"${settings[@]}"} -- "$@")"
}

fetch_logs() { # one file a worker
  run mkdir -p "$logs/$job"
  run gcloud compute tpus tpu-vm ssh "$job" "${where[@]}" --worker=all "--output-directory=$logs/$job" \
    '--command=bash instructax/launch/worker.sh log'
}

finish() { # CODE
  fetch_logs >/dev/null || say "the logs could not be fetched"
  "$keep" || delete ||
    say "$job could not be deleted; do it: gcloud compute tpus queued-resources delete $job --force ${where[*]}"
  say "$job ended with $1; logs in $logs/$job"
  exit "$1"
}

if "$dry_run"; then
  create
  echo "until ACTIVE, every $poll s:"
  state
  install_all
  start_all "$@"
  echo "until it has ended, every $poll s; where it is preempted, after a delete from the first line again:"
  status
  fetch_logs
  "$keep" || delete
  exit 0
fi

failures=0 silent=0 started=false last=''
failed() { # WHAT CODE: one more failure, or the end
  ((++failures <= max_restarts)) || {
    say "gave up after $max_restarts restarts: $1"
    finish "$2"
  }
  say "$1; restart $failures of $max_restarts"
}

trap 'say "$job goes on without this script; the same command watches it again"; exit 130' INT
trap 'say "$job goes on without this script; the same command watches it again"; exit 143' TERM
while :; do
  now=$(state)
  [[ $now == "$last" ]] || say "$job is $now"
  last=$now
  case $now in
    ACTIVE) ;;
    NONE)
      create || failed "$job could not be created" 1
      started=false
      ;;
    FAILED)
      delete || true
      failed "the request for $job failed" 1
      ;;
    SUSPENDED)
      # Preempted: what was created is gone, and the request never comes to life again.
      delete || true
      ;;
    *) ;; # waiting, provisioning, suspending, deleting, or no answer: look again
  esac
  if [[ $now != ACTIVE ]]; then
    sleep "$poll"
    continue
  fi
  now=$(status)
  [[ $now == unreachable ]] || silent=0
  if [[ $now == running ]]; then
    started=true
  elif [[ $now == unreachable ]] && "$started"; then
    if ((++silent >= PATIENCE)); then
      say "no word from $job for $silent looks; it is made anew"
      delete || true
      silent=0
    fi
  elif ! "$started"; then
    if install_all && start_all "$@"; then
      started=true
    else
      failed "$job could not be prepared" 1
    fi
  elif [[ $now == 0 || $now == "$REFUSED" ]]; then
    finish "$now"
  else
    case $now in
      "$SAVED") say "stopped with all saved; starting again" ;;
      lost | none) say "the run vanished from $job; starting again" ;;
      *) failed "the run ended with $now" "$now" ;;
    esac
    start_all "$@" || failed "the run could not be started" 1
  fi
  sleep "$poll"
done
