"""An agent of NIXL over UCX: memory of this process that others may read, and reads of theirs. Used by both processes.

It has no thread of NIXL's, which would take a core for itself: who waits calls `progress` or `read`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import TransportError

DEVICES_VARIABLE: Final = "UCX_NET_DEVICES"
"""UCX's own variable: the interfaces that it uses, and listens on."""

_MEMORY: Final = "DRAM"
_BACKEND: Final = "UCX"
_PAUSE_SECONDS: Final = 20e-6

_creating = threading.Lock()

Ranges = Sequence[tuple[int, int]]
"""(address, length) of pieces of memory."""


def require_nixl() -> Any:
    """Return NIXL's module.

    Raises:
        TransportError: It is not installed, or does not load.
    """
    try:
        from nixl import _api
    except (ImportError, OSError) as error:
        raise TransportError(
            f'transport="nixl" needs NIXL here ({error}): pip install vllm-tap[nixl], or use "tcp".'
        ) from error
    if "NIXL_LOG_LEVEL" not in os.environ:
        _api.logger.setLevel(logging.WARNING)  # it tells standard output of each agent
    return _api


class Agent:
    """An agent, for one connection. Used by one thread at a time.

    Args:
        is_local: Whether the other end is on the loopback interface: then UCX listens there alone, unless
            UCX_NET_DEVICES says otherwise.

    Raises:
        TransportError: There is no NIXL, or it cannot begin.
    """

    def __init__(self, is_local: bool) -> None:
        api = require_nixl()
        try:
            with _creating, _devices("lo" if is_local else ""):
                config = api.nixl_agent_config(enable_prog_thread=False, backends=[_BACKEND])
                self._agent = api.nixl_agent(f"vllm-tap-{secrets.token_hex(8)}", config)
            if _BACKEND not in self._agent.backends:
                raise TransportError(f"NIXL came without {_BACKEND}.")
        except TransportError:
            raise
        except Exception as error:
            raise TransportError(f"NIXL cannot begin ({_told(error)}).") from error
        self._peer = ""
        self._is_stopped = False

    def register(self, ranges: Ranges) -> Any:
        """Let the other end, or its own reads, reach memory; return what `deregister` and `metadata` take.

        Raises:
            TransportError: NIXL refuses.
        """
        with _failures("memory is not registered"):
            return self._agent.register_memory([(address, nbytes, 0, "") for address, nbytes in ranges], _MEMORY)

    def deregister(self, registered: Any) -> None:
        """Let nobody reach memory any more."""
        with contextlib.suppress(Exception):  # which goes with the agent
            self._agent.deregister_memory(registered)

    def metadata(self, registered: Any) -> bytes:
        """Return what the other end has to know to read registered memory.

        Raises:
            TransportError: NIXL refuses.
        """
        with _failures("there is no metadata"):
            return bytes(self._agent.get_partial_agent_metadata(registered, True, [_BACKEND]))

    def meet(self, metadata: bytes) -> None:
        """Take in what the other end says of its memory.

        Raises:
            TransportError: NIXL refuses.
        """
        with _failures("the worker's metadata are refused"):
            name = self._agent.add_remote_agent(metadata)
        self._peer = name.decode() if isinstance(name, bytes) else name

    def read(self, theirs: Ranges, mine: Ranges, timeout_s: float) -> None:
        """Copy memory of the other end, which has been met, to registered memory here.

        Raises:
            TimeoutError: Nothing has come for so long. The agent is of no use any more.
            TransportError: Or NIXL failed.
        """
        with _failures("a read failed"):
            wanted = [self._agent.get_xfer_descs(_table(ranges), _MEMORY) for ranges in (mine, theirs)]
            handle = self._agent.initialize_xfer("READ", *wanted, self._peer)
            try:
                self._wait(handle, self._agent.transfer(handle), timeout_s)
            finally:
                with contextlib.suppress(Exception):  # of one that has failed: it ends with the agent
                    self._agent.release_xfer_handle(handle)

    def _wait(self, handle: Any, state: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while state == "PROC":
            if self._is_stopped:
                raise TransportError("this reader is closed: connect again.")
            if time.monotonic() > deadline:
                raise TimeoutError("the other end sends nothing")
            time.sleep(_PAUSE_SECONDS)
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise TransportError(f"NIXL's read ended as {state}.")

    def progress(self) -> None:
        """Have UCX answer what the other end asks for, where no hardware does."""
        with contextlib.suppress(Exception):  # it is the other end that finds out
            self._agent.get_new_notifs()

    def stop(self) -> None:
        """Have a read that is under way end, in any thread."""
        self._is_stopped = True

    def close(self) -> None:
        """End the connection: nothing is read or written from here on."""
        self._agent = None


def _table(ranges: Ranges) -> npt.NDArray[np.uint64]:
    """Return ranges as NIXL takes them: address, length, device."""
    return np.array([(address, nbytes, 0) for address, nbytes in ranges], np.uint64)


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """Turn errors of NIXL, which have no class in common, into one of ours."""
    try:
        yield
    except (TransportError, TimeoutError):
        raise
    except Exception as error:
        raise TransportError(f"{what} by NIXL ({_told(error)}).") from error


@contextlib.contextmanager
def _devices(name: str) -> Iterator[None]:
    """Have UCX, which reads its environment once for each agent, use an interface; as it is told, for none."""
    if not name or DEVICES_VARIABLE in os.environ:
        yield
        return
    os.environ[DEVICES_VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[DEVICES_VARIABLE]
