"""Results of the other API processes of a server, each asked over its socket. In each API process.

Processes of one server are those that know workers of the same addresses: the name of a process's socket begins with a
digest of these. Sockets take calls of processes of the same user alone.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Final

import msgspec

from vllm_tap.errors import TapError
from vllm_tap.serve.results import Results
from vllm_tap.transport.calls import Caller, CallServer

POLL_S: Final = 0.02
MOST_BYTES: Final = 32 << 20
"""Bytes of frames of one reply, unless a frame alone is larger."""

FROM_THE_END: Final = 1 << 60
"""Number behind all frames: the answer has the last one, if the result has ended."""

SOCKETS: Final = Path("/proc/net/unix")


class Question(msgspec.Struct):
    """Question for frames of a result from a number on, or that it be deleted."""

    key: str
    name: str
    begin: int = 0
    delete: bool = False


class Answer(msgspec.Struct):
    """Frames that there are; `has_ended` if no more come behind them, and then the bytes of all of the result."""

    is_here: bool
    frames: list[bytes]
    has_ended: bool
    total_bytes: int | None = None


class Peers:
    """The other API processes.

    Args:
        results: Of this one.
        addresses: Of the workers.
        loop: The event loop that has the results.
    """

    def __init__(self, results: Results, addresses: Iterable[str], loop: asyncio.AbstractEventLoop) -> None:
        self._results, self._loop = results, loop
        self._name = f"rows-{hashlib.sha256(' '.join(sorted(addresses)).encode()).hexdigest()[:16]}"
        self._server = CallServer(self._answer, self._name)
        self._callers: dict[str, Caller] = {}

    async def find(self, key: str, name: str) -> RemoteResult | None:
        """Return a result that another process has."""
        for caller in await asyncio.to_thread(self._others):
            answer = await _ask(caller, Question(key, name, FROM_THE_END))
            if answer.is_here:
                return RemoteResult(caller, key, name, answer.total_bytes)
        return None

    async def delete(self, key: str, name: str) -> bool:
        """Let go of a result that another process has; return whether there was one."""
        answers = [
            await _ask(caller, Question(key, name, delete=True)) for caller in await asyncio.to_thread(self._others)
        ]
        return any(answer.is_here for answer in answers)

    def _others(self) -> list[Caller]:
        start = f"@vllm-tap-{self._name}-"
        listed = {line.rsplit(" ", 1)[-1] for line in SOCKETS.read_text().splitlines() if start in line}
        found = {name[1:] for name in listed} - {self._server.address}
        for gone in set(self._callers) - found:
            self._callers.pop(gone).close()
        for address in found - set(self._callers):
            try:
                self._callers[address] = Caller(address)
            except TapError:  # it has ended, or is of another user
                continue
        return list(self._callers.values())

    def _answer(self, data: bytes) -> bytes:
        """Answer another process, in a thread of the socket."""
        question = msgspec.msgpack.decode(data, type=Question)
        result = self._results.peek(question.key, question.name)
        if result is None:
            return msgspec.msgpack.encode(Answer(False, [], True))
        if question.delete:
            self._loop.call_soon_threadsafe(self._results.delete, question.key, question.name)
            return msgspec.msgpack.encode(Answer(True, [], True))
        has_ended = result.has_ended  # before the frames are looked at
        frames = result.frames[min(question.begin, len(result.frames) - has_ended) :]
        num = _fitting(frames)
        return msgspec.msgpack.encode(
            Answer(True, frames[:num], has_ended and num == len(frames), result.total_bytes if has_ended else None)
        )


class RemoteResult:
    """A result that another process has.

    Attributes:
        total_bytes: Of all frames, if it has ended.
    """

    def __init__(self, caller: Caller, key: str, name: str, total_bytes: int | None) -> None:
        self._caller, self._key, self._name, self.total_bytes = caller, key, name, total_bytes

    async def read(self) -> AsyncIterator[bytes]:
        """Yield all frames, as they come, to the end; cut off where the result goes."""
        begin = 0
        while True:
            answer = await _ask(self._caller, Question(self._key, self._name, begin))
            for frame in answer.frames:
                yield frame
            begin += len(answer.frames)
            if answer.has_ended:
                return
            if not answer.frames:
                await asyncio.sleep(POLL_S)


async def _ask(caller: Caller, question: Question) -> Answer:
    def ask() -> bytes:
        return caller.receive(caller.send(msgspec.msgpack.encode(question)))

    try:
        return msgspec.msgpack.decode(await asyncio.to_thread(ask), type=Answer)
    except TapError:  # that process has ended
        return Answer(False, [], True)


def _fitting(frames: list[bytes]) -> int:
    """Return how many of these frames go into a reply."""
    num_bytes = 0
    for number, frame in enumerate(frames):
        num_bytes += len(frame)
        if number and num_bytes > MOST_BYTES:
            return number
    return len(frames)
