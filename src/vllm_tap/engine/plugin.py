"""The entry point that vLLM calls in each of its processes. Cheap, and harmless to call twice.

`VLLM_TAP=0` is looked at where an engine is configured, not here: vLLM calls this once per process, which may have
engines with taps and without.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm_tap")


def register() -> None:
    """Prepare this vLLM process for captures. Never raises: vLLM does not catch what a plugin raises."""
    try:
        from vllm_tap.vllm import hooks

        hooks.install()
    except Exception as error:
        logger.warning("vllm-tap is off in this process, plain generation goes on: %s", error)
