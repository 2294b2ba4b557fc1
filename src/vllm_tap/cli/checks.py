"""Needs of a capture, looked at without an engine: one finding per need. Runs in the user's process."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from vllm_tap import __version__
from vllm_tap.cli.table import size_text
from vllm_tap.errors import TapError

OK: Final = "ok"
WARN: Final = "warn"
NO: Final = "no"

PLUGIN: Final = "vllm_tap"


class Finding(NamedTuple):
    """One line of the report. `NO` means that captures cannot work; `text` then says what to do."""

    level: str
    subject: str
    text: str


def all_findings() -> Iterator[Finding]:
    """Look at everything, in the order in which a failure would explain the ones after it."""
    for look in CHECKS:
        yield look()


def python() -> Finding:
    """Python and this package."""
    system = f"{platform.system()} {platform.release()}"
    text = f"{platform.python_version()}, vllm-tap {__version__}, {system}"
    return Finding(OK, "Python", text) if sys.platform == "linux" else Finding(NO, "Python", f"{text}: Linux is needed")


def torch() -> Finding:
    """torch, which comes with vLLM."""
    from vllm_tap.vllm import launch

    version = launch.describe_torch()
    return Finding(OK, "torch", version) if version else Finding(NO, "torch", "not installed: it comes with vLLM")


def vllm() -> Finding:
    """vLLM, its distribution and its version."""
    from vllm_tap.vllm import launch

    installed = launch.find_vllm()
    if installed is None:
        return Finding(NO, "vLLM", f"not installed: {launch.INSTALL}")
    if not launch.describe_torch():
        return Finding(NO, "vLLM", f"{installed.version} ({installed.distribution}) is installed without torch")
    return _compared(installed.distribution or "of no known distribution", installed.version)


def _compared(distribution: str, version: str) -> Finding:
    from vllm_tap.vllm import facts

    oldest, newest = (".".join(map(str, bound)) for bound in (facts.OLDEST, facts.NEWEST))
    text = f"{version or 'of no known version'} ({distribution}); made for {oldest} to {newest}"
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if len(release) < 2:
        return Finding(WARN, "vLLM", f"{text}: the version cannot be compared")
    if release < facts.OLDEST:
        return Finding(NO, "vLLM", f"{text}: upgrade vLLM to {oldest} or later")
    if release > facts.NEWEST:
        return Finding(WARN, "vLLM", f"{text}: newer than any that was tried; what does not fit is refused by name")
    return Finding(OK, "vLLM", text)


def plugin() -> Finding:
    """The entry point by which vLLM's processes load this package."""
    from vllm_tap.vllm import launch

    found = launch.find_plugins()
    if found:
        return Finding(OK, "plugin", f"{found[0]} in {launch.ENTRY_POINTS}")
    return Finding(
        NO, "plugin", f"no entry point in {launch.ENTRY_POINTS}: install vllm-tap with pip, a source path is not enough"
    )


def plugin_list() -> Finding:
    """VLLM_PLUGINS, the list of plugins that vLLM may load."""
    value = os.environ.get("VLLM_PLUGINS")
    if value is None:
        text = "not set: vLLM loads every plugin, but no routes of a server, for which vllm-tap serve sets it"
        return Finding(OK, "VLLM_PLUGINS", text)
    if PLUGIN in value.split(","):
        text = f"{value!r} names {PLUGIN}, for taps and routes of a server; plugins that it does not name are off"
        return Finding(OK, "VLLM_PLUGINS", text)
    return Finding(NO, "VLLM_PLUGINS", f"{value!r} leaves {PLUGIN} out: add it to the list, or unset the variable")


def switch() -> Finding:
    """VLLM_TAP, the switch of this package."""
    value = os.environ.get("VLLM_TAP")
    if value == "0":
        return Finding(NO, "VLLM_TAP", "'0' switches taps off in engines that start now: unset it, or set it to 1")
    return Finding(OK, "VLLM_TAP", "not set: engines get taps" if value is None else f"{value!r}: engines get taps")


def shared_memory() -> Finding:
    """The way of the rows: a sealed memfd, handed over an abstract Unix socket, read back."""
    subject = "shared memory"
    try:
        _trip()
    except TapError as error:
        return Finding(WARN, subject, f"rows would go through calls, which is slower: {error}")
    return Finding(OK, subject, "a sealed memfd went over an abstract Unix socket and was read back")


def _trip() -> None:
    """Hand a page from a pool to a reader, in this process."""
    from vllm_tap.errors import TransportError
    from vllm_tap.transport.segment.pool import SEGMENT_GRANULE_BYTES, SegmentPool
    from vllm_tap.transport.segment.reader import SegmentReader
    from vllm_tap.transport.segment.server import SegmentServer

    pool = SegmentPool(SEGMENT_GRANULE_BYTES, segment_bytes=SEGMENT_GRANULE_BYTES)
    try:
        block = pool.reserve(4096)
        pool.view(block)[:] = bytes(range(256)) * 16
        server = SegmentServer(lambda _: pool)
        try:
            reader = SegmentReader(server.address, timeout_s=5)
            server.publish(reader.client, [block.block_id])
            if reader.lease(block).array.tobytes() != bytes(range(256)) * 16:
                raise TransportError("the bytes that were read are not those that were written")
            reader.close()
        finally:
            server.close()
    finally:
        pool.close()


def memory() -> Finding:
    """RAM, and what a capture takes of it by default."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    total, free = (1024 * kib[name] for name in ("MemTotal", "MemAvailable"))
    budget = default_budget_bytes()
    text = f"{size_text(total)}, {size_text(free)} free"
    if budget:  # known where the client can be loaded
        text += f"; a capture may take {size_text(budget)} unless told otherwise"
    if free < budget:
        return Finding(WARN, "RAM", f"{text}: set budget_bytes if that is too much")
    return Finding(OK, "RAM", text)


def default_budget_bytes() -> int:
    """Return the budget of a capture that names none; 0 where the client cannot be loaded."""
    from vllm_tap.vllm import launch

    if not launch.describe_torch():
        return 0
    from vllm_tap.client import bounds

    return bounds.default_budget_bytes()


def cuda() -> Finding:
    """CUDA devices."""
    from vllm_tap.vllm import launch

    devices = launch.describe_devices()
    return Finding(OK, "CUDA", "; ".join(devices) if devices else "no device: engines run on the processor")


CHECKS: Final[tuple[Callable[[], Finding], ...]] = (
    python,
    torch,
    vllm,
    plugin,
    plugin_list,
    switch,
    shared_memory,
    memory,
    cuda,
)
