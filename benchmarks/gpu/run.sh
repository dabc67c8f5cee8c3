#!/usr/bin/env bash
# Measures this library on one GPU, in at most nine minutes:
#
#   benchmarks/gpu/run.sh OUT [--rehearse] [--stages limits,correctness]
#
# OUT        folder of the results: a record per stage, gpu_CARD.json and gpu_CARD.md
# --rehearse tiny sizes on the CPU, without a limit of time
# --stages   only these, in the order below
#
# Each stage is a process with a time of its own; what it leaves over goes to the next
# ones. A stage that fails or runs out of time does not stop the rest, and its rows so
# far are on the page. Nothing is fetched from a network: packages that are missing are
# installed from benchmarks/gpu/wheels (benchmarks/gpu/wheels.sh) into a temporary
# folder. PYTHON names the interpreter. The exit status is 0 if every stage passed.
set -u

# Stages with their seconds; with the page they add up to TOTAL.
STAGES=(limits correctness attention steps tables train)
declare -A BUDGETS=([limits]=35 [correctness]=100 [attention]=110 [steps]=180 [tables]=40 [train]=65)
TOTAL=540 LAST_PAGE=10
# Seconds before its end at which a stage leaves out what it has not begun.
MARGIN=10
NO_GPU=3

usage() {
  echo "usage: benchmarks/gpu/run.sh OUT [--rehearse] [--stages NAME,NAME]" >&2
  exit 2
}

[[ $# -ge 1 && $1 != -* ]] || usage
out=$1
shift
flags=() chosen=("${STAGES[@]}")
while [[ $# -gt 0 ]]; do
  case $1 in
    --rehearse) flags=(--rehearse) ;;
    --stages)
      [[ $# -ge 2 ]] || usage
      IFS=, read -r -a chosen <<<"$2"
      shift
      ;;
    *) usage ;;
  esac
  shift
done
for stage in "${chosen[@]}"; do
  [[ -n ${BUDGETS[$stage]:-} ]] || { echo "--stages $stage is not one of: ${STAGES[*]}" >&2; exit 2; }
done

mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
python=${PYTHON:-python3}
work=$(mktemp -d)
logs=$work/logs
mkdir "$logs"
child=
trap 'rm -rf "$work"' EXIT

if [[ ${#flags[@]} -gt 0 ]]; then
  export JAX_PLATFORMS=cpu
  TOTAL=86400
else
  # JAX must not fall back to the CPU in silence, and comparisons need the CPU as well.
  export JAX_PLATFORMS=cuda,cpu
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Processes of JAX and PyTorch share the card.
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}
# Stages and their processes compile some programs alike.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$work/compiled}

# These wheels need no more than to be unpacked, so that pip may be missing as well.
if ! "$python" -c "import grain" 2>/dev/null; then
  for wheel in benchmarks/gpu/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$work/site" || exit 2
  done
  export PYTHONPATH=$PYTHONPATH:$work/site
  if ! "$python" -c "import grain"; then
    echo "grain is not installed, and benchmarks/gpu/wheels does not help; run benchmarks/gpu/wheels.sh beforehand" >&2
    exit 2
  fi
fi

page() {
  "$python" -m benchmarks.gpu.page --out "$out" --logs "$logs" --stages "$(IFS=,; echo "${chosen[*]}")"
}

stop() {
  [[ -z $child ]] || kill "$child"
  page
  exit 143
}
trap stop TERM INT

# Seconds that stages after the given one need, and the page.
reserved() {
  local sum=$LAST_PAGE after=
  for stage in "${chosen[@]}"; do
    [[ -z $after ]] || sum=$((sum + BUDGETS[$stage]))
    [[ $stage != "$1" ]] || after=yes
  done
  echo "$sum"
}

for name in "${chosen[@]}"; do
  seconds=$((TOTAL - SECONDS - $(reserved "$name")))
  if ((seconds <= MARGIN)); then
    echo "== $name: no time is left"
    continue
  fi
  echo "== $name: at most $seconds s"
  # In the background: a signal to this script is handled at once.
  timeout --kill-after=5 "$seconds" \
    "$python" -m "benchmarks.gpu.$name" --out "$out" --seconds $((seconds - MARGIN)) "${flags[@]}" \
    >"$logs/$name.log" 2>&1 &
  child=$!
  wait "$child"
  code=$?
  child=
  echo "== $name: exit status $code after $SECONDS s in all"
  [[ $code -eq 0 ]] || tail -n 8 "$logs/$name.log"
  [[ $code -ne $NO_GPU ]] || break
  # After the last stage it follows below.
  [[ $name == "${chosen[-1]}" ]] || page >/dev/null
done
page
