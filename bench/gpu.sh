#!/usr/bin/env bash
# Set up a bare GPU machine without network for bench/*.py and the tests: stock vLLM from a bundle, this package, models.
#   bash bench/gpu.sh COMMAND...
# BUNDLE: a folder with vllm-bundle.tar.xz (bench/gpu_bundle.py) or with setup.sh and its archives; by default .gpu.
# OWN_TORCH=1: the bundle brings its own torch, and setup.sh puts that in, too.
# VLLM_TAP_COMMIT=$(git describe --always --dirty): the commit for the results, where a tree comes without its history.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bundle=$(realpath "${BUNDLE:-$root/.gpu}")
site=${SITE:-/tmp/vllm-tap-site}
if [ -e "$bundle/setup.sh" ]; then
  eval "$(bash "$bundle/setup.sh" "$bundle" "$site" ${OWN_TORCH:+torch})"
elif [ ! -d "$site/vllm" ]; then
  mkdir -p "$site" && tar -C "$site" -xJf "$bundle/vllm-bundle.tar.xz"
fi
[ -d "$site/models" ] || python3 "$root/bench/gpu_models.py" "$site/models"
python3 "$root/bench/gpu_tree.py" "$root" "$site"
export PYTHONPATH="$site" VLLM_USE_FLASHINFER_SAMPLER=0 HF_HUB_OFFLINE=1 VLLM_USE_DEEP_GEMM=0 MODELS="$site/models"
export VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1
# Several GPUs: without NVLink multicast, which virtual machines often lack.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 VLLM_ALLREDUCE_USE_SYMM_MEM=0
cd "$root" && "$@"
