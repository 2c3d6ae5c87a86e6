#!/usr/bin/env bash
# A job on a SLURM cluster, one process a GPU; it requeues itself on preemption and at its time limit.
#
#   launch/slurm.sh --job NAME [options] -- VERB [--config FILE ...]
#
#   --job NAME            of two jobs of the same name the second waits for the first
#   --nodes N             (default 1)
#   --gpus-per-node G     processes and GPUs of each node (default 8); 0 is one CPU process a node
#   --cpus-per-task C     processor cores of each process
#   --time LIMIT          (default: the partition's) two minutes before it the run saves and is queued again
#   --partition NAME      (default: the cluster's)
#   --account NAME        (default: yours)
#   --sbatch=FLAG         a further flag of sbatch, repeatable, such as --sbatch=--qos=high
#   --max-restarts R      restarts after failures within an allocation (default 3)
#   --logs DIR            output, on a disk that all nodes see (default runs/logs)
#   --dry-run             print what would be run, do nothing
#
# The checkout, its .venv and the run's folder must lie on a disk that all nodes see.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

job='' nodes=1 gpus=8 max_restarts=3 logs=runs/logs more=()
while (($#)); do
  case $1 in
    --job) need_value "$1" $#; job=$2; shift 2 ;;
    --nodes) need_value "$1" $#; need_number "$1" "$2" 1; nodes=$2; shift 2 ;;
    --gpus-per-node) need_value "$1" $#; need_number "$1" "$2" 0; gpus=$2; shift 2 ;;
    --cpus-per-task) need_value "$1" $#; need_number "$1" "$2" 1; more+=("--cpus-per-task=$2"); shift 2 ;;
    --time | --partition | --account) need_value "$1" $#; more+=("$1=$2"); shift 2 ;;
    --sbatch=*) more+=("${1#--sbatch=}"); shift ;;
    --max-restarts) need_value "$1" $#; need_number "$1" "$2" 0; max_restarts=$2; shift 2 ;;
    --logs) need_value "$1" $#; logs=$2; shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) refuse "unknown option $1; see $me --help" ;;
    *) break ;;
  esac
done
need_verb $#
need_name --job "$job"
need_program sbatch "run this on a login node of the cluster"

# JAX expects one process a GPU that sees all GPUs of its node, so no --gpus-per-task.
flags=gpu
if ((gpus)); then
  more=("--gpus-per-node=$gpus" "--ntasks-per-node=$gpus" ${more[@]+"${more[@]}"})
else
  flags=cpu
  more=(--ntasks-per-node=1 ${more[@]+"${more[@]}"})
fi
# A job starts in the checkout, wherever this was called.
[[ $logs == /* ]] || logs=$root/$logs
run mkdir -p "$logs"
run env "LAUNCH_FLAGS=$flags" "LAUNCH_MAX_RESTARTS=$max_restarts" "LAUNCH_LOGS=$logs" \
  sbatch --export=ALL "--job-name=$job" "--nodes=$nodes" "${more[@]}" "--output=$logs/$job-%j.log" "--chdir=$root" \
  "$root/launch/slurm.sbatch" "$@"
