# Shared by the launchers: read with `source`, never run.
# shellcheck shell=bash

# How `instructax` ends: 2 is a refusal that no restart cures, 143 a SIGTERM after which all is saved.
# shellcheck disable=SC2034
readonly REFUSED=2 SAVED=143

me=$(basename "$0")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=false

usage() { # print the comment at the head of the script
  sed -n '2,/^$/{s/^# \{0,1\}//;p}' "$0"
}

refuse() {
  printf '%s: %s\n' "$me" "$1" >&2
  exit "$REFUSED"
}

say() {
  printf '%s: %s\n' "$me" "$1" >&2
}

need_value() { # OPTION COUNT: an option that takes a value must have one behind it
  (($2 >= 2)) || refuse "$1 needs a value; see $me --help"
}

need_number() { # OPTION VALUE LEAST
  if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
    refuse "$1 must be an integer of at least $3, got '$2'"
  fi
}

need_name() { # OPTION VALUE: what TPU, Kubernetes and SLURM all accept as a name
  [[ $2 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    refuse "$1 must be lower-case letters, digits and dashes, from a letter on, 40 at most, got '$2'"
}

need_setting() { # OPTION VALUE
  [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || refuse "$1 must be NAME=VALUE, got '$2'"
}

need_verb() { # COUNT
  (($1 > 0)) || refuse "no command; write the instructax verb and its flags behind --, see $me --help"
}

need_program() {
  "$dry_run" || command -v "$1" >/dev/null || refuse "$1 is not installed here; $2"
}

words() { # the arguments as one line that a shell reads back
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

run() { # do it, or with --dry-run only say so
  if "$dry_run"; then
    printf 'would run: %s\n' "$(words "$@")"
  else
    "$@"
  fi
}

platform() { # which flag file fits this machine
  if compgen -G '/dev/accel*' >/dev/null || [[ -e /dev/vfio/0 ]]; then
    echo tpu
  elif [[ -e /dev/nvidia0 || -e /dev/nvidiactl ]]; then
    echo gpu
  else
    echo cpu
  fi
}

load_flags() { # PLATFORM: export flags/PLATFORM.env; what the user has set already comes last and wins
  local line name value
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ ^([A-Z][A-Z0-9_]*)(\+?)=(.*)$ ]] || continue
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[3]}
    if [[ -n ${BASH_REMATCH[2]} ]]; then
      export "$name=$value${!name:+ ${!name}}"
    elif [[ -z ${!name+set} ]]; then
      export "$name=$value"
    fi
  done <"$root/launch/flags/$1.env"
}

find_instructax() { # the array `instructax`: from INSTRUCTAX, this checkout's .venv, or PATH
  if [[ -n ${INSTRUCTAX:-} ]]; then
    read -ra instructax <<<"$INSTRUCTAX"
  elif [[ -x $root/.venv/bin/instructax ]]; then
    instructax=("$root/.venv/bin/instructax")
  else
    instructax=(instructax)
  fi
  "$dry_run" || command -v "${instructax[0]}" >/dev/null ||
    refuse "${instructax[0]} not found; install with pip install -e . or set INSTRUCTAX to the command"
}
