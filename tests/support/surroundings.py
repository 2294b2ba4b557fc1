"""What vLLM reads when it is imported, in every test and every process that one starts: import this module first.

An engine takes 1 GiB for its cache, whatever else runs here: without that vLLM wants nearly all memory to itself.
"""

from __future__ import annotations

import os

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(_name, _value)
