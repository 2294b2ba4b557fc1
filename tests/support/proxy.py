"""A proxy between clients and a worker, for tests: it resets connections, stalls, and keeps to a rate."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable

from vllm_tap.transport.tcp.address import Address, parse

NEVER = 1 << 60
PIECE_BYTES = 1 << 16
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with which closing a socket sends RST, and throws away what was under way."""


class Proxy:
    """Passes connections on, in a thread of its own.

    Args:
        target: Address of the worker.
        break_after: Returns after how many bytes of the worker a connection breaks, given its number from 0.
        resets: Whether a connection breaks by RST, rather than by its end.
        bytes_per_second: Rate of all that the worker sends.

    Attributes:
        address: Where clients connect.
        num_broken: Connections that were broken.
        num_bytes: Bytes that the worker has sent.
    """

    def __init__(
        self,
        target: str,
        break_after: Callable[[int], int] = lambda _: NEVER,
        *,
        resets: bool = True,
        bytes_per_second: float = float("inf"),
    ) -> None:
        self._target, self._break_after, self._resets = parse(target), break_after, resets
        self._seconds_per_byte, self._free_at = 1 / bytes_per_second, 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self.num_broken = self.num_bytes = self._num_connections = 0
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = str(Address(*self._listener.getsockname()))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stall(self, seconds: float = NEVER) -> None:
        """Pass nothing on for a while, in either direction."""
        self._call(self._open.clear)
        if seconds < NEVER:
            self._call(lambda: self._loop.call_later(seconds, self._open.set))

    def reset(self) -> None:
        """Break all connections."""
        self._call(lambda: [self._break(writer) for writer in list(self._writers)])

    def close(self) -> None:
        """End everything."""
        self.reset()
        self._call(self._end)
        self._thread.join(10)
        self._loop.close()

    def _end(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_soon(self._loop.stop)

    def _call(self, function: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_server(self._pass_on, sock=self._listener))
        self._loop.run_forever()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        most = self._break_after(self._num_connections)
        self._num_connections += 1
        from_worker, to_worker = await asyncio.open_connection(*self._target)
        self._writers |= {writer, to_worker}
        both = self._copy(reader, to_worker, NEVER), self._copy(from_worker, writer, most, paced=True)
        tasks = [asyncio.create_task(one) for one in both]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for end in (writer, to_worker):
                self._writers.discard(end)
                end.transport.abort()

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int, paced: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            while most and (data := await reader.read(min(PIECE_BYTES, most))):
                await self._open.wait()
                if paced:
                    self.num_bytes += len(data)
                    await self._take_turn(len(data))
                writer.write(data)
                await writer.drain()
                most -= len(data)
        if not most:
            self.num_broken += 1
            self._break(writer)

    async def _take_turn(self, nbytes: int) -> None:
        now = self._loop.time()
        self._free_at = max(self._free_at, now - 0.001) + nbytes * self._seconds_per_byte
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)

    def _break(self, writer: asyncio.StreamWriter) -> None:
        if self._resets:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
