"""The log of a process of vLLM's server, and ours in it. Imports nothing of vLLM."""

from __future__ import annotations

import logging


def log_as_vllm() -> None:
    """Have our messages go where vLLM's go, from its level on.

    A package that vLLM's server imports (model_hosting_container_standards) raises the level of the root logger, which
    drops warnings of all loggers that have none of their own.
    """
    ours, theirs = logging.getLogger("vllm_tap"), logging.getLogger("vllm")
    if ours.handlers or not theirs.handlers:  # somebody has said where ours go, or that vLLM is to configure nothing
        return
    for handler in theirs.handlers:
        ours.addHandler(handler)
    ours.propagate = theirs.propagate
    if ours.level == logging.NOTSET:
        ours.setLevel(theirs.level)
