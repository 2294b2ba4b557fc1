"""Hooks into vLLM's classes, in all of its processes. They call what they are given: this room knows no taps.

With `model`, `runner` and `experts` (worker side) and `frontend` (user side) this is all that knows vLLM's inside.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from vllm_tap import __version__
from vllm_tap.labels import KEY
from vllm_tap.vllm import caching
from vllm_tap.vllm.facts import check_version, require

GRAPH_VERSION: Final = 3
"""Part of vLLM's compile cache key: rises whenever the taps in the graph change."""


class Calls(NamedTuple):
    """Methods that vLLM's workers get.

    Attributes:
        methods: {name in vLLM's worker: function of that worker and the call's arguments}.
        optional: Names among them that give way to a method that a worker has already.
    """

    methods: Mapping[str, Callable[..., Any]]
    optional: Sequence[str] = ()


def enabled() -> bool:
    """Tell whether the engine that is being configured gets taps."""
    return os.environ.get("VLLM_TAP", "1") != "0"


def install(on_loaded: Callable[[Any], None], calls: Calls) -> None:
    """Hook into vLLM's classes, once per process.

    Args:
        on_loaded: Called with a worker whose model has been loaded, if its engine is to have taps; before anything is
            profiled, compiled or captured.
        calls: Methods that clients reach through `collective_rpc`.

    Raises:
        EngineUnsupportedError: vLLM does not look as expected; nothing has been changed.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    if hasattr(EngineArgs.create_engine_config, "vllm_tap"):
        return
    check_version()
    create_config = require(EngineArgs, "create_engine_config")
    init_device = require(WorkerWrapperBase, "init_device")
    EngineArgs.create_engine_config = _keyed(create_config)
    EngineArgs.create_engine_config.vllm_tap = True
    WorkerWrapperBase.init_device = _watched(init_device, on_loaded)
    caching.install()
    for name, method in calls.methods.items():
        if name not in calls.optional or not hasattr(WorkerBase, name):
            setattr(WorkerBase, name, method)


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


def _watched(init_device: Callable[..., Any], on_loaded: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(init_device)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = init_device(self, *args, **kwargs)
        worker, load_model = self.worker, self.worker.load_model

        @functools.wraps(load_model)
        def load_and_tap(*args: Any, **kwargs: Any) -> Any:
            loaded = load_model(*args, **kwargs)
            extra = worker.vllm_config.additional_config
            if isinstance(extra, dict) and KEY in extra:
                on_loaded(worker)
            return loaded

        worker.load_model = load_and_tap
        return result

    return wrapper
