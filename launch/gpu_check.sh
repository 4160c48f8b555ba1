#!/usr/bin/env bash
# Check and measure all that needs a GPU, on one, within nine minutes and without network; writes
# runs/gpu_check/gpu_check.json and gpu_check.md. Arguments are tests.benchmarks.gpu_check's.
# Takes the Python that PYTHON names (default: python3), which must have PyTorch 2.11 or newer.
# All other packages come from the folder WHEELS (default: wheels), which was filled elsewhere, with
# the same version of Python, by
#   DS_IGNORE_CUDA_DETECTION=1 pip wheel --wheel-dir wheels ".[pretrain]" pytest hypothesis timm
#   rm -f wheels/{alto_ds,torch,triton,nvidia,cuda}*
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=("${WHEELS:-wheels}"/*.whl)
if [ -e "${wheels[0]}" ]; then
    packages=$PWD/build/gpu_check_packages
    "$python" -m pip --disable-pip-version-check install --quiet --no-index \
        --no-deps --upgrade --target "$packages" "${wheels[@]}"
    export PATH="$packages/bin:$PATH" PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
fi
# The cache is keyed by the version of Python alone, so environments must not share it.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/build/gpu_check_extensions}"
exec "$python" -m tests.benchmarks.gpu_check "$@"
