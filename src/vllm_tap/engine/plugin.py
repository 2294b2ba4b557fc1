"""The entry point that vLLM calls in each of its processes. Cheap, harmless to call twice, off with `VLLM_TAP=0`."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("vllm_tap")


def register() -> None:
    """Prepare this vLLM process for captures. Never raises: vLLM does not catch what a plugin raises."""
    if os.environ.get("VLLM_TAP", "1") == "0":
        return
    try:
        from vllm_tap.engine import host

        host.install()
    except Exception as error:
        logger.warning("vllm-tap is off in this process, plain generation goes on: %s", error)
