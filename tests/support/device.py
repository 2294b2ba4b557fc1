"""Where engines and Hugging Face's models run, and in which modes; runs in the test process.

On a CPU unless `VLLM_TAP_TEST_DEVICE=cuda`, which `tests/on_gpu.py` sets. There more can be chosen:
`VLLM_TAP_TEST_GRAPHS=1` compiles engines that a test starts eagerly, and `VLLM_TAP_TEST_PREFIX_CACHE=0` or `1` is for
engines of which a test does not say whether they have a prefix cache.
"""

from __future__ import annotations

import os
from typing import Any

import torch

NAME = os.environ.get("VLLM_TAP_TEST_DEVICE", "cpu")
ON_CUDA = NAME == "cuda"
GRAPHS = ON_CUDA and os.environ.get("VLLM_TAP_TEST_GRAPHS") == "1"

# Both sides compute in float32 (eps 1.2e-7) and add up a few hundred products per element in different orders, layer
# after layer; 1e-6 of the stream's scale was the most seen over all families on CPUs. Ten times that is allowed; on a
# GPU, whose kernels take exponentials and roots to 2 ** -22, fifty times. A row of another token, layer or convention
# is off by the scale itself.
TOLERANCE = 5e-5 if ON_CUDA else 1e-5

KV_BYTES = 256 << 20


def num_ranks() -> int:
    """Return over how many ranks a model is spread where a test wants two."""
    return min(2, torch.cuda.device_count()) if ON_CUDA else 2


def engine_arguments(**arguments: Any) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`, with those that this device and the chosen modes ask for."""
    if not ON_CUDA:
        return arguments
    if GRAPHS:
        arguments.pop("enforce_eager", None)
    cache = os.environ.get("VLLM_TAP_TEST_PREFIX_CACHE")
    # The size of the cache is given: engines of several test processes start on one device, and none may measure how
    # much memory the others leave.
    ours = {"gpu_memory_utilization": 0.01, "kv_cache_memory_bytes": KV_BYTES}
    if cache is not None and "runner" not in arguments:
        ours["enable_prefix_caching"] = cache == "1"
    return ours | arguments
