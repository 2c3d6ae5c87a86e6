#!/usr/bin/env bash
# One process on this machine; also what each worker of a larger job runs.
#
#   launch/local.sh [options] -- VERB [--config FILE ...]
#
#   --flags NAME   flag file: cpu, gpu, tpu or none (default: by the devices found)
#   --dry-run      print environment and command, do nothing
#
# INSTRUCTAX is the command to run where it is neither in .venv nor on PATH. Compiled programs are kept in
# JAX_COMPILATION_CACHE_DIR (default ~/.cache/instructax/jax).

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flags=''
while (($#)); do
  case $1 in
    --flags) need_value "$1" $#; flags=$2; shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) refuse "unknown option $1; see $me --help" ;;
    *) break ;;
  esac
done
need_verb $#
flags=${flags:-$(platform)}
case $flags in
  cpu | gpu | tpu) load_flags "$flags" ;;
  none) ;;
  *) refuse "--flags must be cpu, gpu, tpu or none, got '$flags'" ;;
esac
find_instructax
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/instructax/jax}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.5}

if "$dry_run"; then
  for name in JAX_PLATFORMS XLA_FLAGS LIBTPU_INIT_ARGS GLIBC_TUNABLES XLA_PYTHON_CLIENT_MEM_FRACTION \
    JAX_COMPILATION_CACHE_DIR JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID; do
    [[ -z ${!name+set} ]] || printf '%s=%s\n' "$name" "${!name}"
  done
  run "${instructax[@]}" "$@"
  exit 0
fi
exec "${instructax[@]}" "$@"
