#!/usr/bin/env bash
# Downloads the packages that a bare GPU machine lacks into benchmarks/gpu/wheels, which
# git ignores: Linux, x86-64, Python 3.12, in the versions of constraints.txt. Run it
# where there is a network; benchmarks/gpu/run.sh installs them where there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

packages=(
  array-record dm-tree docstring-parser googleapis-common-protos grain immutabledict
  importlib-resources ml-collections simple-parsing tensorboardx tensorflow-datasets
  tensorflow-metadata toml tqdm
)
folder=benchmarks/gpu/wheels
python=${PYTHON:-python3}

pinned=()
for package in "${packages[@]}"; do
  pinned+=("$(grep -x "$package==.*" constraints.txt)") || {
    echo "constraints.txt has no version of $package" >&2
    exit 2
  }
done
rm -rf "$folder"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  --dest "$folder" "${pinned[@]}"
du -ch "$folder"/*.whl
