"""A system that refuses shared memory, at the pool of a worker. Runs in the test process; starts no engine.

`test_lifetimes` has the same refusal in a running engine.
"""

from __future__ import annotations

import errno
import os
import threading

import pytest

from vllm_tap.errors import TransportError
from vllm_tap.transport.segment.pool import SegmentPool

MIB = 1 << 20


def refuse(*_: object) -> int:
    """Stand in for a kernel without memfd_create, or a sandbox that forbids it."""
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_a_refused_memfd_names_the_way_out(monkeypatch):
    """Reserving says that shared memory was refused, why, and what works instead; nothing is counted as taken."""
    monkeypatch.setattr(os, "memfd_create", refuse)
    pool = SegmentPool(8 * MIB)
    with pytest.raises(TransportError, match=r'Operation not permitted.*transport="inline"') as caught:
        pool.reserve(MIB)
    assert caught.value.needed_bytes == 8 * MIB
    assert pool.stats().capacity_bytes == pool.stats().used_bytes == 0


def test_memory_that_is_grown_ahead_fails_where_it_is_needed(monkeypatch):
    """Where memory is refused ahead and still when it is needed, reserving says so; then the pool works again."""
    monkeypatch.setattr(os, "memfd_create", refuse)
    pool = SegmentPool(8 * MIB)
    pool.grow_ahead(4 * MIB)
    for thread in [t for t in threading.enumerate() if t.name == "vllm-tap-grow"]:
        thread.join()
    with pytest.raises(TransportError, match="inline"):
        pool.reserve(MIB)
    monkeypatch.undo()
    assert pool.reserve(MIB).nbytes == MIB
    pool.close()


def test_private_memory_needs_no_memfd(monkeypatch):
    """The pool of the inline transport works where shared memory is refused."""
    monkeypatch.setattr(os, "memfd_create", refuse)
    pool = SegmentPool(8 * MIB, shared=False)
    assert pool.reserve(MIB).nbytes == MIB
    pool.close()
