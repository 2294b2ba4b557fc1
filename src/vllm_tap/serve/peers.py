"""Results of the other API processes of a server, each asked over its socket. In each API process.

Processes of one server are those that know workers of the same addresses: the name of a process's socket begins with a
digest of these. Sockets take calls of processes of the same user alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from vllm_tap.errors import TapError
from vllm_tap.serve.results import Frame, Results
from vllm_tap.transport.calls import Caller, CallServer

POLL_S: Final = 0.02
MOST_BYTES: Final = 32 << 20
"""Bytes of frames of one reply, unless a frame alone is larger."""

DELETE_S: Final = 10.0
"""Seconds that a process has to let go of a result."""

FRESH_S: Final = 0.1
"""Seconds for which the list of processes holds."""

SOCKETS: Final = Path("/proc/net/unix")

T = TypeVar("T")

Name = tuple[str, str]
"""Key of a client, and a name that it has for a result."""


class Search(msgspec.Struct, tag=True):
    """Question which of some results there are."""

    names: list[Name]


class Found(msgspec.Struct):
    """Numbers of those that there are, and the bytes of all frames of each that has ended."""

    numbers: list[tuple[int, int | None]]


class Question(msgspec.Struct, tag=True):
    """Question for frames of a result from a number on, or that it be deleted."""

    key: str
    name: str
    begin: int = 0
    delete: bool = False


class Answer(msgspec.Struct):
    """Frames that there are; `has_ended` if no more come behind them."""

    is_here: bool
    frames: list[bytes]
    has_ended: bool


NOT_HERE: Final = Answer(False, [], True)


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
        self._listed = float("-inf")
        self._lock = threading.Lock()

    async def find(self, names: Sequence[Name]) -> dict[Name, RemoteResult]:
        """Return results that other processes have."""
        found: dict[Name, RemoteResult] = {}
        question = Search(list(names))
        for caller in await asyncio.to_thread(self._others):
            for number, total in (await _ask(caller, question, Found([]))).numbers:
                found[names[number]] = RemoteResult(caller, *names[number], total)
        return found

    async def delete(self, key: str, name: str) -> bool:
        """Let go of a result that another process has; return whether there was one."""
        question = Question(key, name, delete=True)
        answers = [await _ask(caller, question, NOT_HERE) for caller in await asyncio.to_thread(self._others)]
        return any(answer.is_here for answer in answers)

    def _others(self) -> list[Caller]:
        """Return the processes that there are. Threads take turns."""
        with self._lock:
            if time.monotonic() > self._listed + FRESH_S:
                self._list()
                self._listed = time.monotonic()
            return list(self._callers.values())

    def _list(self) -> None:
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

    def _answer(self, data: bytes) -> bytes:
        """Answer another process, in a thread of the socket."""
        question = msgspec.msgpack.decode(data, type=Search | Question)
        answer = self._search(question.names) if isinstance(question, Search) else self._frames(question)
        return msgspec.msgpack.encode(answer)

    def _search(self, names: list[Name]) -> Found:
        results = ((number, self._results.peek(*name)) for number, name in enumerate(names))
        return Found([(number, result.total_bytes) for number, result in results if result is not None])

    def _frames(self, question: Question) -> Answer:
        result = self._results.peek(question.key, question.name)
        if result is None:
            return NOT_HERE
        if question.delete:
            deleting = asyncio.run_coroutine_threadsafe(self._delete(question), self._loop)
            return Answer(deleting.result(DELETE_S), [], True)
        result.asked = time.monotonic()
        has_ended = result.has_ended  # before the frames are looked at
        frames = result.frames[min(question.begin, len(result.frames) - has_ended) :]
        num = _fitting(frames)
        return Answer(True, [bytes(frame) for frame in frames[:num]], has_ended and num == len(frames))

    async def _delete(self, question: Question) -> bool:
        return self._results.delete(question.key, question.name)


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
            answer = await _ask(self._caller, Question(self._key, self._name, begin), NOT_HERE)
            for frame in answer.frames:
                yield frame
            begin += len(answer.frames)
            if answer.has_ended:
                return
            if not answer.frames:
                await asyncio.sleep(POLL_S)


async def _ask(caller: Caller, question: Search | Question, otherwise: T) -> T:
    """Return the answer of a process, or another one if it has ended."""

    def ask() -> bytes:
        return caller.receive(caller.send(msgspec.msgpack.encode(question)))

    try:
        return msgspec.msgpack.decode(await asyncio.to_thread(ask), type=type(otherwise))
    except TapError:
        return otherwise


def _fitting(frames: Sequence[Frame]) -> int:
    """Return how many of these frames go into a reply."""
    num_bytes = 0
    for number, frame in enumerate(frames):
        num_bytes += len(frame)
        if number and num_bytes > MOST_BYTES:
            return number
    return len(frames)
