"""Rows that clients hold, written into shards of datasets: out of segments, in threads of their own. Worker process.

No step waits for this, and nothing here takes a step's lock. What is written belongs to the client that asks, which
holds it until it has been told of the files; a client that is gone stops its writing.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from typing import Final

from vllm_tap.engine.writing.rows import HeldRows
from vllm_tap.errors import CaptureError, TapError
from vllm_tap.frame import messages
from vllm_tap.store.files import Files, StoppedError
from vllm_tap.store.guest import GuestDraft
from vllm_tap.transport import threads
from vllm_tap.transport.segment.pool import SegmentPool
from vllm_tap.transport.serial import Serial

logger = logging.getLogger("vllm_tap")

MOST_WAITING: Final = 16
"""Parts of datasets that wait to be written; each holds the memory of its rows."""


class Job:
    """The shards of one part that this worker writes.

    Attributes:
        files: What was written, once the disk has it.
        has_ended: Whether it was written, stopped, or failed.
    """

    def __init__(self, write: messages.Write, rows: HeldRows, draft: GuestDraft) -> None:
        self.capture_id, self.client = write.capture_id, write.client
        self.files: tuple[messages.WrittenFile, ...] | None = None
        self.has_ended = False
        self._shards = write.shards
        self._rows: HeldRows | None = rows
        self._draft = draft
        self._stopped = threading.Event()
        # Not the exception itself, whose frames would keep the memory of the rows.
        self._failure: tuple[type[TapError], str, dict[str, object]] | None = None

    def stop(self) -> None:
        """Have it end at the next piece."""
        self._stopped.set()

    def require_right(self) -> None:
        """Raise what ended it early, if anything did."""
        if self._failure is not None:
            kind, message, identity = self._failure
            raise kind(message, **identity)

    def run(self) -> None:
        """Write."""
        try:
            self.files = self._written()
        except StoppedError:
            self._fail(CaptureError(f"the rows of capture {self.capture_id} are not written any more: it was stopped"))
        except TapError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("vllm-tap: rows could not be written")
            self._fail(CaptureError(f"rows could not be written: unexpected {type(error).__name__}: {error}"))
        finally:
            self._rows = None
            self._draft.close()
            self.has_ended = True

    def _fail(self, error: TapError) -> None:
        self._failure = type(error), str(error), error.identity

    def _written(self) -> tuple[messages.WrittenFile, ...]:
        if self._stopped.is_set():
            raise StoppedError
        rows = self._rows
        assert rows is not None
        with Serial("vllm-tap-writer-sums") as adder, Serial("vllm-tap-writer-syncs") as closer:
            files = Files(self._draft, adder, closer, self._stopped.is_set)
            for number, plane in self._shards:
                stream = rows.streams[number]
                part = functools.partial(rows.rows, number, plane)
                files.write_shard(stream, stream.layers[plane], len(rows), part)
            done = files.done()
        self._draft.sync()
        return tuple(messages.WrittenFile(file.name, file.nbytes, file.crc32) for file in done)


class Writers:
    """Jobs of a worker, one behind the other, in a thread that is there while there are any.

    Args:
        rank: Of the worker.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}  # by capture, also some that have ended
        self._waiting: deque[Job] = deque()
        self._is_running = self._is_closed = False

    def begin(self, write: messages.Write, pool: SegmentPool, below: str | None) -> messages.Written:
        """Begin to write rows of a client.

        Args:
            write: What, and into which draft.
            pool: The client's memory.
            below: Folder in which the draft must lie; None where any will do.

        Raises:
            DescriptorError: Numbers that cannot be, or rows that the client does not hold.
            DatasetError: It may not write there, or cannot.
            CaptureError: Too much waits already.
        """
        rows = HeldRows(write, pool)
        draft = GuestDraft(write.folder, below)
        try:
            self._add(Job(write, rows, draft))
        except BaseException:
            draft.close()
            raise
        return messages.Written(rank=self._rank)

    def _add(self, job: Job) -> None:
        with self._lock:
            if self._is_closed:
                raise CaptureError("the worker ends, and writes nothing more.")
            if job.capture_id in self._jobs and not self._jobs[job.capture_id].has_ended:
                raise CaptureError(f"the rows of capture {job.capture_id} are written already.")
            if len(self._waiting) >= MOST_WAITING:
                raise CaptureError(f"{MOST_WAITING} parts of datasets wait to be written here: record again later.")
            # A client asks for one part after the other: it has been told of those before.
            self._jobs = {
                name: one for name, one in self._jobs.items() if one.client != job.client or not one.has_ended
            }
            self._jobs[job.capture_id] = job
            self._waiting.append(job)
            if not self._is_running:
                self._start()

    def _start(self) -> None:
        try:
            threads.start("vllm-tap-writer", self._run, stop=self.close)
            self._is_running = True
        except RuntimeError as error:
            job = self._waiting.pop()
            del self._jobs[job.capture_id]
            raise CaptureError(f"the worker cannot write: {error}") from error

    def _run(self) -> None:
        while (job := self._next()) is not None:
            job.run()
            del job  # with it goes the memory of its rows

    def _next(self) -> Job | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._is_running = False
            return None

    def report(self, capture_id: str) -> messages.Written:
        """Say what has been written.

        Raises:
            CaptureError: Nothing of this capture is written here, or it was stopped.
            DatasetError: It cannot be written.
        """
        with self._lock:
            job = self._jobs.get(capture_id)
        if job is None:
            raise CaptureError(f"no rows of capture {capture_id} are written here.")
        job.require_right()
        return messages.Written(rank=self._rank, files=job.files)

    def stop(self, capture_id: str) -> None:
        """Have the writing of a capture's rows end soon, if there is any."""
        with self._lock:
            jobs = [self._jobs[capture_id]] if capture_id in self._jobs else []
        self._stop(jobs)

    def stop_client(self, client: int) -> None:
        """Have all writing for a client end soon, and forget it."""
        with self._lock:
            jobs = [job for job in self._jobs.values() if job.client == client]
            for job in jobs:
                del self._jobs[job.capture_id]
        self._stop(jobs)

    def close(self) -> None:
        """Have all writing end soon; no more begins."""
        with self._lock:
            self._is_closed = True
            jobs = list(self._jobs.values())
        self._stop(jobs)

    def _stop(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.stop()
        with self._lock:
            waiting = [job for job in jobs if job in self._waiting]
            for job in waiting:
                self._waiting.remove(job)
        for job in waiting:
            job.run()  # which ends at once, and lets go of the memory
