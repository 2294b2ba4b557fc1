#!/usr/bin/env bash
# Set up a bare GPU machine without network for bench/*.py: stock vLLM from .gpu/vllm-bundle.tar.xz, this package, models.
#   VLLM_TAP_COMMIT=$(git describe --always --dirty) bash bench/gpu.sh COMMAND...
# The variable names the commit for the results where the tree came without its history.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
site=${SITE:-/tmp/vllm-tap-site}
if [ ! -d "$site" ]; then
  mkdir -p "$site" && tar -C "$site" -xJf "$root/.gpu/vllm-bundle.tar.xz"
  python3 "$root/bench/gpu_models.py" "$site/models"
fi
python3 -m zipfile -e "$root"/.gpu/vllm_tap-*.whl "$site"
cp -r "$root/src/." "$site/"
export PYTHONPATH="$site" VLLM_USE_FLASHINFER_SAMPLER=0 HF_HUB_OFFLINE=1 VLLM_USE_DEEP_GEMM=0 MODELS="$site/models"
export VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1
# Several GPUs: without NVLink multicast, which virtual machines often lack.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 VLLM_ALLREDUCE_USE_SYMM_MEM=0
cd "$root" && "$@"
