#!/usr/bin/env bash
# A TPU slice on GKE as a JobSet: fill in the template, apply, wait, fetch the log.
#
#   launch/gke.sh --job NAME --image IMAGE --tpu KIND --topology AxBxC --claim NAME [options] -- VERB [--config FILE ...]
#
#   --job NAME           the JobSet; with the same name a running one is watched, a finished one made anew
#   --image IMAGE        built from launch/images/tpu.Dockerfile
#   --tpu KIND           v4, v5e, v5p or v6e
#   --topology AxBxC     chips of the slice, for example 4x4x4 (v5e and v6e: AxB)
#   --chips-per-node C   (default 4, or fewer where the slice has fewer; 8 for v6e 2x4 on one node)
#   --claim NAME         PersistentVolumeClaim (Filestore, Lustre or a bucket) that is mounted at /runs
#   --namespace NAME     (default: kubectl's)
#   --spot               nodes that may be preempted
#   --env NAME=VALUE     environment of the run, repeatable
#   --max-restarts R     restarts after failures (default 3); preemptions do not count
#   --poll S             seconds between two looks (default 30)
#   --logs DIR           worker 0's output is fetched here at the end (default runs/logs)
#   --no-wait            apply and leave
#   --dry-run            print the manifest and what would be run, do nothing
#
# Runs are kept under /runs: --run-dir /runs is added where the command has none. Ctrl-C ends this script, not the run.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

job='' image='' tpu='' topology='' chips_per_node='' claim='' spot=false max_restarts=3 poll=30 logs=runs/logs wait=true
where=() settings=()
while (($#)); do
  case $1 in
    --job) need_value "$1" $#; job=$2; shift 2 ;;
    --image) need_value "$1" $#; image=$2; shift 2 ;;
    --tpu) need_value "$1" $#; tpu=$2; shift 2 ;;
    --topology) need_value "$1" $#; topology=$2; shift 2 ;;
    --chips-per-node) need_value "$1" $#; need_number "$1" "$2" 1; chips_per_node=$2; shift 2 ;;
    --claim) need_value "$1" $#; claim=$2; shift 2 ;;
    --namespace) need_value "$1" $#; where=("--namespace=$2"); shift 2 ;;
    --spot) spot=true; shift ;;
    --env) need_value "$1" $#; need_setting "$1" "$2"; settings+=("$2"); shift 2 ;;
    --max-restarts) need_value "$1" $#; need_number "$1" "$2" 0; max_restarts=$2; shift 2 ;;
    --poll) need_value "$1" $#; need_number "$1" "$2" 0; poll=$2; shift 2 ;;
    --logs) need_value "$1" $#; logs=$2; shift 2 ;;
    --no-wait) wait=false; shift ;;
    --dry-run) dry_run=true; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) refuse "unknown option $1; see $me --help" ;;
    *) break ;;
  esac
done
need_verb $#
need_name --job "$job"
[[ -n $image ]] || refuse "--image is missing; build one from launch/images/tpu.Dockerfile"
[[ $claim =~ ^[a-z0-9][a-z0-9.-]*$ ]] || refuse "--claim must name a PersistentVolumeClaim, got '$claim'"
case $tpu in
  v4) accelerator=tpu-v4-podslice axes=3 ;;
  v5e) accelerator=tpu-v5-lite-podslice axes=2 ;;
  v5p) accelerator=tpu-v5p-slice axes=3 ;;
  v6e) accelerator=tpu-v6e-slice axes=2 ;;
  *) refuse "--tpu must be v4, v5e, v5p or v6e, got '$tpu'" ;;
esac
[[ $topology =~ ^[1-9][0-9]?(x[1-9][0-9]?){$((axes - 1))}$ ]] ||
  refuse "--topology of $tpu has $axes sides, such as $( ((axes == 3)) && echo 4x4x4 || echo 4x4), got '$topology'"
chips=$((${topology//x/*}))
per_node=${chips_per_node:-$((chips < 4 ? chips : 4))}
((chips % per_node == 0)) || refuse "$topology has $chips chips, which --chips-per-node $per_node does not divide"
[[ " $* " == *" --run-dir"* ]] || set -- "$@" --run-dir /runs
need_program kubectl "see kubernetes.io/docs/tasks/tools"

quoted() { # as a string of YAML
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "${text//$'\n'/\\n}"
}

joined() { # by commas
  local IFS=,
  printf '%s' "$*"
}

manifest() { # COMMAND...
  local args=() env=() text setting
  for text in --flags tpu -- "$@"; do
    args+=("$(quoted "$text")")
  done
  for setting in ${settings[@]+"${settings[@]}"}; do
    env+=("{name: ${setting%%=*}, value: $(quoted "${setting#*=}")}")
  done
  # Without it bash 5.2 reads & in a value as what it replaces.
  shopt -u patsub_replacement 2>/dev/null || true
  text=$(<"$root/launch/gke_jobset.yaml")
  text=${text//@NAME@/$job}
  text=${text//@MAX_RESTARTS@/$max_restarts}
  text=${text//@HOSTS@/$((chips / per_node))}
  text=${text//@ACCELERATOR@/$accelerator}
  text=${text//@TOPOLOGY@/$topology}
  text=${text//@CHIPS@/$per_node}
  text=${text//@CLAIM@/$claim}
  if "$spot"; then
    text=${text//@SPOT@/cloud.google.com/gke-spot: \"true\"}
  else
    text=${text//@SPOT@/}
  fi
  text=${text//@IMAGE@/$(quoted "$image")}
  text=${text//@ENV@/[$(joined ${env[@]+"${env[@]}"})]}
  text=${text//@ARGS@/[$(joined "${args[@]}")]}
  printf '%s\n' "$text"
}

kube() {
  run kubectl ${where[@]+"${where[@]}"} "$@"
}

state() { # Completed, Failed, Active, NONE, or UNKNOWN where the cluster does not answer
  local found
  if ! found=$(kube get jobset "$job" --ignore-not-found \
    '--output=jsonpath={.kind}{range .status.conditions[?(@.status=="True")]} {.type}{end}' 2>&1); then
    say "no answer about $job: $(tail -n 1 <<<"$found")"
    echo UNKNOWN
    return
  fi
  case " $found " in
    *" Completed "*) echo Completed ;;
    *" Failed "*) echo Failed ;;
    *JobSet*) echo Active ;;
    *) echo NONE ;;
  esac
}

fetch_log() { # of worker 0, its last start
  kube logs "--selector=jobset.sigs.k8s.io/jobset-name=$job,batch.kubernetes.io/job-completion-index=0" --tail=-1
}

if "$dry_run"; then
  manifest "$@"
  kube apply --filename=-
  if "$wait"; then
    echo "until Completed or Failed, every $poll s:"
    kube get jobset "$job"
    fetch_log
  fi
  exit 0
fi

now=$(state)
case $now in
  Completed | Failed)
    # What a JobSet runs cannot be changed: a finished one is made anew.
    kube delete jobset "$job" --wait=true
    ;;
  UNKNOWN) refuse "the cluster does not answer; see kubectl get jobset $job" ;;
esac
if [[ $now == Active ]]; then
  say "$job is already running; watching it"
else
  manifest "$@" | kube apply --filename=-
fi
"$wait" || exit 0

trap 'say "$job goes on without this script; the same command watches it again"; exit 130' INT
trap 'say "$job goes on without this script; the same command watches it again"; exit 143' TERM
restarts=''
while :; do
  sleep "$poll"
  now=$(state)
  case $now in
    Completed | Failed | NONE) break ;;
  esac
  count=$(kube get jobset "$job" --ignore-not-found '--output=jsonpath={.status.restarts}' 2>/dev/null || true)
  [[ $count == "$restarts" ]] || say "$job is $now, restarts: ${count:-0}"
  restarts=$count
done
[[ $now != NONE ]] || {
  say "$job was deleted by someone else"
  exit 1
}
mkdir -p "$logs"
fetch_log >"$logs/$job.log" || say "the log could not be fetched"
say "$job is $now; log in $logs/$job.log"
[[ $now == Completed ]]
