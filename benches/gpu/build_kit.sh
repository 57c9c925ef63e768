#!/usr/bin/env bash
# Builds the archive that benches/gpu/check.py unpacks on a machine with a GPU, Python 3.12, torch, transformers and
# accelerate but no network: OUT/kit.tar.xz, for x86-64. Run by `make gpu-kit`, after `make setup`.
#
#   benches/gpu/build_kit.sh OUT [WORLD_CACHE]
#
# It holds site/ (the project's wheel and the packages that such a machine lacks, at the versions of
# requirements/dev.txt, installed), project/ (the tree, so that the archive is enough), and world/ where WORLD_CACHE
# (a folder for DICE_CACHE) has worlds that were made with the versions of the other machine.
set -euo pipefail
repo=$(cd "$(dirname "$0")/../.." && pwd)
out=$(realpath -m "$1")
python=${GPU_KIT_PYTHON:-$repo/.venv/bin/python}
maturin=${GPU_KIT_MATURIN:-$repo/.venv/bin/maturin}
packages="polars polars-runtime-32 trl datasets peft pydantic pydantic-core annotated-types typing-inspection multiprocess dill"
limit=$((60 * 1024 * 1024))

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$repo"
pinned() { grep -E "^$1==" requirements/dev.txt | head -1 | sed -E 's/[ ;\\].*//'; }

# shellcheck disable=SC2046  # one word for each package
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --dest "$work/wheels" $(for name in $packages; do pinned "$name"; done)
"$maturin" build --release --strip --quiet --manifest-path rust/dice-native/Cargo.toml --out "$work/wheels"
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
    --root-user-action=ignore --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
    --platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --only-binary=:all: --target "$work/site" "$work"/wheels/*.whl
# The symbols of Polars are 40 MB. Tests of packages and commands are not needed.
strip --strip-unneeded "$work"/site/_polars_runtime_32/*.so
rm -rf "$work"/site/bin "$work"/site/multiprocess/tests "$work"/site/dill/tests
mkdir "$work/project"
git ls-files -z --cached --others --exclude-standard -- dice_py cli benches tests configs pyproject.toml README.md \
    ":!benches/results" | tar --create --null --files-from=- | tar --extract --directory "$work/project"
parts=(site project)
if [ -n "${2:-}" ]; then
    cp -r "$2/world" "$work/world"
    parts+=(world)
fi
find "$work/site" "$work/project" -name __pycache__ -prune -exec rm -rf {} +
mkdir -p "$out"
tar --directory "$work" --sort=name --owner=0 --group=0 --mtime=@0 --create "${parts[@]}" | xz -6 --threads=0 >"$out/kit.tar.xz"
size=$(stat --format=%s "$out/kit.tar.xz")
echo "$out/kit.tar.xz: $((size / 1024 / 1024)) MiB"
if [ "$size" -gt "$limit" ]; then
    echo "that is more than 60 MiB" >&2
    exit 1
fi
