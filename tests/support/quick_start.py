"""Starts engines of tests in a few seconds: their processes are forked from one that has imported vLLM already.

vLLM's CPU platform has each process of an engine import all of vLLM anew, which takes a core twelve seconds. Here the
engine core is forked from a server of Python's own (`multiprocessing`'s "forkserver"), and a worker from the core,
as vLLM does on GPUs by default. Engines of other programs (servers, commands, scripts) start as users' engines do.

Runs in the test process, and, preloaded, in that server.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import device
from runners import python_path

PRELOADED = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker")
"""Modules that processes of an engine import; none of them starts a thread or loads plugins."""

IS_SERVER = "VLLM_TAP_TESTS_PRELOAD"
"""Set in the surroundings of the server, which preloads this module."""


class Process(multiprocessing.context.ForkServerProcess):
    """A process that has the environment of the one that asks for it, and not that of the server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environment = dict(os.environ)

    def run(self) -> None:
        """Take over the environment; then run, no longer than the process that has asked for it."""
        os.environ.clear()
        os.environ.update(self._environment)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()


def _end_with_parent() -> None:
    # The parent in the kernel's sense is the server, which outlives tests that are killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


class Context(multiprocessing.context.ForkServerContext):
    """Python's context of its server, with processes as above."""

    Process = Process


@contextmanager
def quick_start() -> Iterator[None]:
    """Let engines that start in this context be forked; on a GPU, let them start as they do."""
    import vllm.utils.system_utils

    if device.ON_CUDA:
        yield
        return
    _ensure_server()
    with mock.patch.object(vllm.utils.system_utils, "multiprocessing", SimpleNamespace(get_context=_server)):
        yield


def _ensure_server() -> None:
    multiprocessing.set_forkserver_preload([__name__])
    # A server of Python 3.11 does not have the path of the process that starts it.
    with mock.patch.dict(os.environ, {IS_SERVER: "1", "PYTHONPATH": python_path()}):
        multiprocessing.forkserver.ensure_running()


def _server(_method: str) -> Context:
    return Context()


def _fork(_method: str) -> multiprocessing.context.BaseContext:
    return multiprocessing.get_context("fork")


if os.environ.get(IS_SERVER):
    for module in PRELOADED:
        importlib.import_module(module)
    utilities = importlib.import_module("vllm.utils.system_utils")
    mock.patch.object(utilities, "multiprocessing", SimpleNamespace(get_context=_fork)).start()
