#!/usr/bin/env bash
# Trains under Slurm, with restarts by exit code: `sbatch FILE`. `tokenrec launch` sets the
# options and variables above. `scancel JOB` stops the run.
set -euo pipefail

# Where the job was submitted, which all nodes see: the config, and how the processes ended.
state=$SLURM_SUBMIT_DIR/$NAME.slurm
crashes=$state/crashes.$SLURM_JOB_ID
ending=''

# Slurm signals this shell only when it ends the whole job: `scancel`, the time limit, or a
# preemption without warning. Then it decides itself whether the job runs again.
trap 'ending=1' TERM

prepare() {
  mkdir -p "$state"
  rm -f "$state"/exit.*
  if [[ -n $CONFIG_TEXT ]]; then
    printf '%s' "$CONFIG_TEXT" >"$state/config.py"
  fi
  if [[ -n $VENV ]]; then
    export PATH=$VENV/bin:$PATH
  fi
  local nodes
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # A port below those that the kernel hands out, which two jobs of a node seldom share.
  export JAX_COORDINATOR_ADDRESS=${nodes%%$'\n'*}:$((12000 + SLURM_JOB_ID % 16384))
  export JAX_NUM_PROCESSES=$SLURM_JOB_NUM_NODES
  export "${ENVIRONMENT[@]}"
}

# What runs on every node, in the container if there is one. It notes how the process ended:
# `srun` returns the highest exit code of all, also of those that it killed.
# shellcheck disable=SC2329  # `srun` runs it
run-process() {
  # The signal to stop is for the process; the shell waits for its end.
  trap : TERM
  export JAX_PROCESS_ID=$SLURM_PROCID
  local state=$1 stopped=$2 code=0
  shift 2
  "$@" || code=$?
  echo "$code" >"$state/exit.$SLURM_PROCID"
  # Slurm would kill the other processes, which may still be closing what they saved.
  if [[ " $stopped " == *" $code "* ]]; then
    code=0
  fi
  exit "$code"
}

train() {
  local flags=(--ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none --label --chdir="$state")
  if [[ -n $IMAGE ]]; then
    local folder mounts=$state:$state
    for folder in "${MOUNTS[@]}"; do
      mkdir -p "$folder"
      mounts+=,$folder:$folder
    done
    flags+=(--container-image="$IMAGE" --container-mounts="$mounts" --container-workdir="$state"
      --no-container-mount-home)
  fi
  srun "${flags[@]}" bash -c "$(declare -f run-process); run-process \"\$@\"" bash \
    "$state" "$STOPPED_EXITS" "${COMMAND[@]}" &
  local pid=$! code=0
  # A signal ends `wait`, and not what it waits for.
  while true; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || return "$code"
  done
}

# Ends as the process with this exit code, for good.
finish() {
  echo "$NAME: exit code $1${2:+: $2}" >&2
  exit "$1"
}

requeue() {
  echo "$NAME: $1; the job is requeued" >&2
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}

# Decides from the exit codes of the processes; $1 is that of `srun`.
decide() {
  local file code stopped='' crashed='' count=0
  for file in "$state"/exit.*; do
    # Without any, the pattern stands for itself: `srun` could not start.
    if [[ -e $file ]]; then
      code=$(<"$file")
    else
      code=$1
    fi
    if [[ " $FINAL_EXITS " == *" $code "* ]]; then
      finish "$code" "a restart would fail in the same way"
    elif [[ " $STOPPED_EXITS " == *" $code "* ]]; then
      stopped=$code
    elif [[ $code != 0 ]]; then
      crashed=$code
    fi
  done
  if [[ -n $ending ]]; then
    finish "${crashed:-${stopped:-$1}}" "Slurm ends the job"
  elif [[ -z $crashed && -n $stopped ]]; then
    requeue "stopped by a signal"
  elif [[ -z $crashed && $1 == 0 ]]; then
    finish 0
  fi
  if [[ -e $crashes ]]; then
    count=$(<"$crashes")
  fi
  if ((count >= MAX_RESTARTS)); then
    finish "${crashed:-$1}" "$count of $MAX_RESTARTS restarts"
  fi
  echo $((count + 1)) >"$crashes"
  requeue "exit code ${crashed:-$1}, restart $((count + 1)) of $MAX_RESTARTS"
}

prepare
code=0
train || code=$?
decide "$code"
