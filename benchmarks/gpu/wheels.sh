#!/usr/bin/env bash
# Downloads the packages that a bare GPU machine lacks into benchmarks/gpu/wheels, which
# git ignores: Linux, x86-64, Python 3.12, in the versions of constraints.txt. Run it
# where there is a network; benchmarks/gpu/run.sh unpacks them where there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Those of grain, TensorFlow Datasets and tensorboardX that JAX, Flax, Orbax and PyTorch
# do not bring along. What the machine has after all goes first there.
packages=(
  array-record attrs cloudpickle dm-tree docstring-parser googleapis-common-protos grain
  immutabledict importlib-resources ml-collections portpicker simple-parsing six
  tensorboardx tensorflow-datasets tensorflow-metadata termcolor toml tqdm wrapt
)
# Published as source alone; pure Python.
sources=(promise)
folder=benchmarks/gpu/wheels
python=${PYTHON:-python3}
pip=("$python" -m pip --quiet --disable-pip-version-check)

pin() {
  grep -x "$1==.*" constraints.txt || {
    echo "constraints.txt has no version of $1" >&2
    return 2
  }
}

pinned=()
for package in "${packages[@]}"; do
  pinned+=("$(pin "$package")")
done
rm -rf "$folder"
"${pip[@]}" download --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  --dest "$folder" "${pinned[@]}"
for package in "${sources[@]}"; do
  "${pip[@]}" wheel --no-deps --wheel-dir "$folder" "$(pin "$package")"
done
du -ch "$folder"/*.whl
