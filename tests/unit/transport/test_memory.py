"""One segment, against what the kernel reports of it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

import numpy as np
import pytest

from vllm_tap.errors import TransportError
from vllm_tap.transport.segment import memory
from vllm_tap.transport.segment.memory import Segment

MIB = 1 << 20


def resident_bytes(address: int) -> int:
    """Return what the kernel says is present of the mapping at an address."""
    inside = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if "-" in line.split()[0] and ":" not in line.split()[0]:
                first, end = (int(x, 16) for x in line.split()[0].split("-"))
                inside = first <= address < end
            elif inside and line.startswith("Rss:"):
                return int(line.split()[1]) * 1024
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.mark.parametrize("shared", [True, False])
def test_all_pages_are_present_and_zero(shared):
    """A new segment has every page, so that no later write can fail, and holds zeros."""
    segment = Segment.create(7, 5 * MIB + 1, shared=shared)
    assert (segment.segment_id, segment.nbytes) == (7, 5 * MIB + mmap.PAGESIZE)
    assert resident_bytes(segment.address) >= segment.nbytes
    assert not np.frombuffer(segment.view, np.uint8).any()
    segment.close()


def test_population_by_threads_covers_every_chunk(monkeypatch):
    """Several chunks, the last one short, are all populated."""
    monkeypatch.setattr(memory, "_POPULATE_CHUNK_BYTES", MIB)
    segment = Segment.create(1, 4 * MIB + 4096, shared=True, num_threads=3)
    assert os.fstat(segment.fd).st_blocks * 512 == segment.nbytes
    assert resident_bytes(segment.address) == segment.nbytes
    segment.close()


@pytest.mark.parametrize("shared", [True, False])
def test_kernels_without_populate_get_their_pages_touched(monkeypatch, shared):
    """EINVAL from madvise falls back to allocating the file and touching the pages."""

    def refuse(*_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(memory, "populate", refuse)
    segment = Segment.create(1, 2 * MIB, shared=shared)
    assert resident_bytes(segment.address) >= 2 * MIB
    segment.close()


def test_seals_forbid_resizing_and_mapping_for_writing():
    """Nobody who receives the descriptor can resize the memory or write into it; reading works."""
    segment = Segment.create(1, MIB, shared=True)
    for nbytes in (0, 2 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, nbytes)
    with pytest.raises(PermissionError):
        mmap.mmap(segment.fd, MIB)
    with pytest.raises(PermissionError):
        os.pwrite(segment.fd, b"x", 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    segment.view[:3] = b"abc"
    with mmap.mmap(segment.fd, MIB, prot=mmap.PROT_READ) as other:
        assert other[:3] == b"abc"
    segment.close()


def test_descriptors_do_not_reach_programs_that_are_started():
    """The memfd is closed on exec, so that no child keeps the memory alive."""
    segment = Segment.create(1, MIB, shared=True)
    assert not os.get_inheritable(segment.fd)
    segment.close()


def test_private_memory_has_no_descriptor():
    """A segment that is not shared cannot be handed to anybody."""
    segment = Segment.create(1, MIB, shared=False)
    assert segment.fd is None
    segment.close()


def test_close_gives_everything_back():
    """Close unmaps the memory and closes the descriptor, also the second time."""
    before = len(os.listdir("/proc/self/fd"))
    segment = Segment.create(1, 3 * MIB, shared=True)
    address = segment.address
    segment.close()
    segment.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps") as maps:
        assert f"{address:x}-" not in {line.split("-")[0] + "-" for line in maps if "memfd:vllm-tap" in line}


def test_views_outlive_close():
    """An array over a segment that was closed is still readable: no reader of it crashes."""
    segment = Segment.create(1, MIB, shared=True)
    array = np.frombuffer(segment.view[4096:8192], np.uint8)
    segment.view[4096:8192] = b"z" * 4096
    segment.close()
    assert (array == ord("z")).all()


@pytest.mark.parametrize(
    ("code", "says"),
    [(errno.ENOMEM, "not enough free memory"), (errno.EFAULT, "not enough free memory"), (errno.EMFILE, "ulimit -n")],
)
def test_a_refusal_says_what_is_missing_and_leaks_nothing(monkeypatch, code, says):
    """A kernel that says no becomes a TransportError with a way out, and no descriptor stays open."""

    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(memory, "populate", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransportError, match=says) as caught:
        Segment.create(1, MIB, shared=True)
    assert "inline" in str(caught.value)
    del caught
    assert len(os.listdir("/proc/self/fd")) == before


def test_systems_without_memfd_are_told_to_go_inline(monkeypatch):
    """Where shared memory is not allowed, the message names the transport that works there."""

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(TransportError, match=r'memfd_create .* transport="inline"'):
        Segment.create(1, MIB, shared=True)


def test_memory_that_no_machine_has_is_refused():
    """The kernel's own refusal arrives as a TransportError."""
    with pytest.raises(TransportError, match="refused"):
        Segment.create(1, 1 << 60, shared=False)
