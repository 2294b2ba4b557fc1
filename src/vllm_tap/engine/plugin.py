"""The entry point that vLLM calls in each of its processes. Cheap, and harmless to call twice.

`VLLM_TAP=0` is looked at where an engine is configured, not here: vLLM calls this once per process, which may have
engines with taps and without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from vllm_tap.errors import PluginNotLoadedError
from vllm_tap.labels import NO_TAPS

logger = logging.getLogger("vllm_tap")

RPC_METHODS: Final = ("open", "call", "fetch", "release", "status", "profile")
"""Methods of `TapWorker` that clients reach through `collective_rpc("vllm_tap_<name>")`."""

REPLYING: Final = ("open", "call", "release")
"""Those of them whose replies are messages."""

LEGACY_METHODS: Final = (
    "enable_hidden_states_capture",
    "disable_hidden_states_capture",
    "get_captured_hidden_states",
    "clear_hidden_states",
    "get_hidden_states_debug_info",
    "enable_moe_router_logits_capture",
    "disable_moe_router_logits_capture",
    "get_moe_router_logits",
    "clear_moe_router_logits",
    "get_moe_debug_info",
)
"""Methods of `LegacyCalls`, reached by their own names."""


def register() -> None:
    """Prepare this vLLM process for captures. Never raises: vLLM does not catch what a plugin raises."""
    try:
        from vllm_tap.vllm import hooks

        own = {f"vllm_tap_{name}": _rpc(name, "vllm_tap") for name in RPC_METHODS}
        legacy = {name: _rpc(name, "vllm_tap_legacy") for name in LEGACY_METHODS}
        hooks.install(_on_loaded, hooks.Calls(own | legacy, optional=LEGACY_METHODS))
    except Exception as error:
        logger.warning("vllm-tap is off in this process, plain generation goes on: %s", error)


def _on_loaded(worker: Any) -> None:
    from vllm_tap.engine.legacy.calls import LegacyCalls
    from vllm_tap.engine.worker import TapWorker

    worker.vllm_tap = TapWorker.install(worker)
    worker.vllm_tap_legacy = LegacyCalls(worker.vllm_tap)


def _rpc(name: str, owner: str) -> Callable[..., Any]:
    """Return a method of vLLM's worker that calls one of what its attribute `owner` holds."""

    def method(self: Any, *args: Any) -> Any:
        if not hasattr(self, "vllm_tap"):
            return _without_taps(name, self.rank)
        with self.vllm_tap.lock:
            return getattr(getattr(self, owner), name)(*args)

    return method


def _without_taps(name: str, rank: int) -> Any:
    """Return the reply of a worker without taps.

    It does not raise: vLLM stops at the failure of the first of several ranks, and takes the replies of the others for
    those to its next call.
    """
    text = f"{NO_TAPS}: it was made with VLLM_TAP=0 or with an additional_config that is no dict"
    if name in REPLYING:
        from vllm_tap.frame import messages

        return messages.encode(messages.Failure(rank=rank, error=PluginNotLoadedError.__name__, message=text))
    return {"error": f"{PluginNotLoadedError.__name__}: {text}"}
