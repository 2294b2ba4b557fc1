"""Hooks into vLLM's classes, in all of its processes, and what every look inside vLLM goes through.

With `host_model`, `host_runner` and `experts` this is all that knows vLLM's inside. `assumptions` lists each name that
is used, with the reason and the versions it was read from; `require` refuses by that name where it is not there.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from vllm_tap import __version__
from vllm_tap.errors import EngineUnsupportedError, PluginNotLoadedError
from vllm_tap.labels import KEY, NO_TAPS
from vllm_tap.vllm.assumptions import Assumption, why

if TYPE_CHECKING:
    from vllm_tap.engine.worker import TapWorker

logger = logging.getLogger("vllm_tap")

OLDEST: Final = (0, 26)
NEWEST: Final = (0, 33)

GRAPH_VERSION: Final = 2
"""Part of vLLM's compile cache key: rises whenever the taps in the graph change."""

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
"""Methods of `LegacyTapWorker`, reached by their own names."""


def require(owner: Any, name: str) -> Any:
    """Return an attribute of a vLLM object that `assumptions` lists, or refuse with its name.

    Raises:
        EngineUnsupportedError: This vLLM does not have it.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        kind = owner if inspect.isclass(owner) or inspect.ismodule(owner) else type(owner)
        raise EngineUnsupportedError(
            f"vLLM {vllm_version()} has no {kind.__module__}.{kind.__qualname__}.{name}, which is needed {why(name)}. "
            f"This package was made for vLLM {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}."
        ) from None


def require_fields(entries: Iterable[Assumption]) -> None:
    """Refuse where a class lacks fields that only its instances have: no step of the engine may fail for one.

    Raises:
        EngineUnsupportedError: The first that is missing.
    """
    for entry in entries:
        module, _, name = entry.owner.rpartition(".")
        kind: Any = getattr(import_module(module), name)
        declared = {field for base in kind.__mro__ for field in vars(base).get("__annotations__", ())}
        for field in entry.names:
            if field not in declared:
                require(kind, field)


def enabled() -> bool:
    """Tell whether the engine that is being configured gets taps."""
    return os.environ.get("VLLM_TAP", "1") != "0"


def vllm_version() -> str:
    """Return vLLM's version as it states it."""
    import vllm

    return str(vllm.__version__)


def check_version() -> None:
    """Refuse versions of vLLM from before the hook points that this module uses.

    Raises:
        EngineUnsupportedError: Too old.
    """
    release = tuple(int(part) for part in vllm_version().split("+")[0].split(".")[:2] if part.isdigit())
    if release and release < OLDEST:
        raise EngineUnsupportedError(f"vLLM {vllm_version()} is older than {OLDEST[0]}.{OLDEST[1]}: upgrade vLLM.")


# ---------------------------------------------------------------------------------------------------- every process


def install() -> None:
    """Hook into vLLM's classes, once per process.

    Raises:
        EngineUnsupportedError: vLLM does not look as expected; nothing has been changed.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    if hasattr(WorkerBase, "vllm_tap_open"):
        return
    check_version()
    create_config = require(EngineArgs, "create_engine_config")
    init_device = require(WorkerWrapperBase, "init_device")
    EngineArgs.create_engine_config = _keyed(create_config)
    WorkerWrapperBase.init_device = _watched(init_device)
    for name in RPC_METHODS:
        setattr(WorkerBase, f"vllm_tap_{name}", _rpc(name))
    for name in LEGACY_METHODS:
        if not hasattr(WorkerBase, name):
            setattr(WorkerBase, name, _rpc(name))


def _keyed(create_config: Callable[..., Any]) -> Callable[..., Any]:
    """Put a key into `additional_config`: it tells the workers to install taps.

    vLLM hashes it, so that a cached graph without taps is never served to an engine with them.
    """

    @functools.wraps(create_config)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        extra = self.additional_config
        if isinstance(extra, dict) and enabled():
            self.additional_config = {**extra, KEY: {"graph": GRAPH_VERSION, "version": __version__}}
        return create_config(self, *args, **kwargs)

    return create_engine_config


def _watched(init_device: Callable[..., Any]) -> Callable[..., Any]:
    """Install the taps after the weights are loaded and before anything is profiled, compiled or captured."""

    @functools.wraps(init_device)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = init_device(self, *args, **kwargs)
        worker, load_model = self.worker, self.worker.load_model

        @functools.wraps(load_model)
        def load_and_tap(*args: Any, **kwargs: Any) -> Any:
            loaded = load_model(*args, **kwargs)
            extra = worker.vllm_config.additional_config
            if isinstance(extra, dict) and KEY in extra:
                from vllm_tap.engine.legacy.calls import LegacyTapWorker

                worker.vllm_tap = LegacyTapWorker.install(worker)
            return loaded

        worker.load_model = load_and_tap
        return result

    return wrapper


def _without_taps(name: str, rank: int) -> Any:
    """Return what a worker without taps replies.

    It does not raise: vLLM stops at the failure of the first of several ranks, and takes the replies of the others for
    those to its next call.
    """
    text = f"{NO_TAPS}: it was made with VLLM_TAP=0 or with an additional_config that is no dict"
    if name in REPLYING:
        from vllm_tap.frame import messages

        return messages.encode(messages.Failure(rank=rank, error=PluginNotLoadedError.__name__, message=text))
    return {"error": f"{PluginNotLoadedError.__name__}: {text}"}


def _rpc(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        tap_worker: TapWorker | None = getattr(self, "vllm_tap", None)
        if tap_worker is None:
            return _without_taps(name, self.rank)
        with tap_worker.lock:
            return getattr(tap_worker, name)(*args)

    return method
