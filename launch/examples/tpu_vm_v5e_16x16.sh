#!/usr/bin/env bash
NAME=kuairand-27k
PROJECT=my-project
ZONE=us-west4-a
ACCELERATOR_TYPE=v5litepod-256
RUNTIME_VERSION=v2-alpha-tpuv5-lite
NODES=(--node-id kuairand-27k)
BUCKET=my-bucket
IMAGE=europe-docker.pkg.dev/my-project/tokenrec/train:0.1.0
DATA=kuairand_27k
MOUNT=/gcs
USER_ID=1000
GCSFUSE_VERSION=3.4.4
GCSFUSE_SHA256=installed
CONFIG_OBJECT=''
CONFIG_TEXT=''
ENVIRONMENT=(--env=JAX_PLATFORMS=tpu --env=JAX_COMPILATION_CACHE_DIR=gs://my-bucket/runs/jax_cache --env=TOKENREC_DATA=/gcs/data)
COMMAND=(tokenrec train --distributed --config=kuairand_27k --config.mesh.data=-1 --config.data.batch_size=256 --config.data.eval_batch_size=256 --data=/gcs/data/kuairand_27k --workdir=gs://my-bucket/runs/kuairand-27k --quiet)
FINAL_EXITS='2 3 4'
STOPPED_EXITS='75 143'
MAX_RESTARTS=10
GRACE_SECONDS=300
# Runs one training job on TPU VMs. `tokenrec launch` sets the variables above.
set -euo pipefail

usage() {
  cat <<END
usage: bash $0 VERB
  data DIR     copy a prepared data set to gs://$BUCKET/data/$DATA
  create       request the slices as a queued resource, and wait until they are ready
  setup        on every host: mount the data sets and pull the image
  start        on every host: train in the background, with restarts
  up           create, setup and start
  status       show the state of the slices, and of the first host's training
  log          follow the log of the first host
  gather DIR   copy the log of every host to DIR
  stop         on every host: stop the training
  delete       give the slices back
END
}

tpus() {
  local group=$1 verb=$2
  shift 2
  gcloud compute tpus "$group" "$verb" "$@" --project="$PROJECT" --zone="$ZONE"
}

on_every_host() { tpus queued-resources ssh "$NAME" --node=all --worker=all --command="$1" "${@:2}"; }

on_first_host() { tpus queued-resources ssh "$NAME" --node=0 --worker=0 --command="$1"; }

state() { tpus queued-resources describe "$NAME" --format='value(state.state)'; }

create() {
  tpus queued-resources create "$NAME" --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" \
    "${NODES[@]}"
  local now
  while true; do
    now=$(state)
    echo "$NAME: $now" >&2
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED) exit 1 ;;
    esac
    sleep 30
  done
}

setup() {
  if [[ -n $CONFIG_OBJECT ]]; then
    printf '%s' "$CONFIG_TEXT" | gcloud storage cp - "$CONFIG_OBJECT"
  fi
  tpus queued-resources scp "$0" "$NAME:$NAME.sh" --node=all --worker=all
  on_every_host "bash $NAME.sh host-setup"
}

start() {
  on_every_host "sudo systemd-run --collect --unit=$NAME --property=TimeoutStopSec=$GRACE_SECONDS bash \$PWD/$NAME.sh host-train"
}

# The functions below run on the hosts.

host-setup() {
  if ! command -v gcsfuse >/dev/null; then
    install-gcsfuse
  fi
  mount-data
  sudo gcloud auth configure-docker "${IMAGE%%/*}" --quiet
  sudo docker pull "$IMAGE"
}

# Root installs the package: only the one whose digest `tokenrec launch` was given, from a
# folder that no other user can write.
install-gcsfuse() {
  if [[ $GCSFUSE_SHA256 == installed ]]; then
    echo "$NAME: this host has no gcsfuse; give --gcsfuse-sha256=DIGEST to tokenrec launch, or use an image that has it" >&2
    exit 2
  fi
  local package=gcsfuse_${GCSFUSE_VERSION}_amd64.deb folder
  folder=$(mktemp --directory)
  curl -fsSLo "$folder/$package" \
    "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$GCSFUSE_VERSION/$package"
  if ! echo "$GCSFUSE_SHA256  $folder/$package" | sha256sum --check --quiet >&2; then
    rm -r "$folder"
    echo "$NAME: $package is not the file of --gcsfuse-sha256=$GCSFUSE_SHA256; nothing is installed" >&2
    exit 2
  fi
  sudo apt-get install -y "$folder/$package"
  rm -r "$folder"
}

mount-data() {
  local folder=$MOUNT/data
  if mountpoint --quiet "$folder"; then
    return
  fi
  sudo mkdir -p "$folder"
  # Data sets do not change, so what is known of them may be cached.
  sudo gcsfuse --only-dir=data --implicit-dirs --uid="$USER_ID" --gid="$USER_ID" -o allow_other -o ro \
    --metadata-cache-ttl-secs=-1 "$BUCKET" "$folder"
}

# Adds the TPU chips of this host to `devices`: /dev/accelN, or groups of VFIO, by the
# generation. The container gets these and no other rights; VFIO locks the memory that the
# chips read. Docker passes device nodes on one by one, and no folder of them
# (github.com/marin-community/marin/pull/3858). A container without chips fails, as
# JAX_PLATFORMS is tpu.
find-devices() {
  local device
  for device in "${DEVICES:-/dev}"/accel* "${DEVICES:-/dev}"/vfio/*; do
    if [[ -c $device ]]; then
      devices+=("--device=$device")
    fi
  done
}

# Trains, with restarts by exit code. Every host runs this loop: when one host fails, the
# others lose their connection to it, fail too, and all meet again after the restart.
host-train() {
  local restarts=0 stopping='' code devices=()
  trap 'stopping=1' TERM
  while true; do
    code=0
    # Again at each start: a driver may need some time after a reboot.
    devices=()
    find-devices
    # Remove the container of a run that was killed.
    docker rm --force "$NAME" >/dev/null 2>&1 || true
    docker run --rm --name="$NAME" --network=host --stop-timeout="$GRACE_SECONDS" \
      "${devices[@]}" --ulimit=memlock=-1 --volume="$MOUNT:$MOUNT" "${ENVIRONMENT[@]}" "$IMAGE" "${COMMAND[@]}" || code=$?
    echo "$NAME: exit code $code, $restarts of $MAX_RESTARTS restarts" >&2
    if [[ $code == 0 || -n $stopping ]]; then
      exit 0
    elif [[ " $FINAL_EXITS " == *" $code "* ]]; then
      # A restart would fail in the same way.
      exit "$code"
    elif [[ " $STOPPED_EXITS " != *" $code "* ]] && ((restarts++ >= MAX_RESTARTS)); then
      exit "$code"
    fi
    sleep "${PAUSE_SECONDS:-10}"
  done
}

case ${1:-} in
  data) gcloud storage rsync --recursive "$2" "gs://$BUCKET/data/$DATA" ;;
  create | setup | start | host-setup | host-train) "$1" ;;
  up)
    create
    setup
    start
    ;;
  status)
    state
    on_first_host "systemctl status $NAME --no-pager"
    ;;
  log) on_first_host "sudo journalctl --unit=$NAME --follow" ;;
  gather)
    mkdir -p "$2"
    on_every_host "sudo journalctl --unit=$NAME --no-pager" --output-directory="$2"
    ;;
  stop) on_every_host "sudo systemctl stop $NAME" ;;
  delete) tpus queued-resources delete "$NAME" --force --quiet ;;
  *)
    usage >&2
    exit 2
    ;;
esac
