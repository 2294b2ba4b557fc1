"""Shards of a part that the workers write, each rank those of its own layers. Client process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from vllm_tap.client.connection import Connection
from vllm_tap.client.left import LeftMemory
from vllm_tap.client.owned import Place
from vllm_tap.client.rank_rows import RankRows
from vllm_tap.client.replies import expect
from vllm_tap.client.result import Capture
from vllm_tap.errors import CaptureError, DatasetError, TapError
from vllm_tap.frame import messages
from vllm_tap.store import shard
from vllm_tap.store.facts import StreamFacts
from vllm_tap.store.files import StoppedError
from vllm_tap.store.manifest import FileFacts

FIRST_PAUSE_SECONDS: Final = 0.001
LONGEST_PAUSE_SECONDS: Final = 0.05
"""Seconds between two questions to the workers of how far they are, of which none waits in a worker."""

GROWTH: Final = 1.5


class RankShards:
    """Has the workers write the rows of a capture that were left there; see `store.source.ShardWriter`."""

    def __init__(self, connection: Connection, way: str, capture: Capture) -> None:
        self._connection, self._way = connection, way
        # Not the capture, which holds this object.
        self._ranks = {rank: places for rank, places in capture.places_of_ranks().items() if isinstance(rank, RankRows)}

    def write(
        self, folder: str, streams: Sequence[StreamFacts], num_rows: int, is_stopped: Callable[[], bool]
    ) -> list[FileFacts]:
        """Have all shards written into a draft; return what is known of the files, which the disk has.

        Raises:
            DatasetError: A worker cannot write there, or has not written what it was asked for.
            StoppedError: `is_stopped` said so.
            EngineDiedError: A worker is gone.

        Cost:
            4 bytes for each row go to each worker; the rows go from its memory to the disk.
        """
        facts = {stream.name: stream for stream in streams}
        calls = dict(self._call(rank, places, folder, facts) for rank, places in self._ranks.items())
        files = written(self._connection, self._way, calls, is_stopped)
        heads = {(one, layer): len(shard.shard_header(one, layer, num_rows)) for one in streams for layer in one.layers}
        sizes = {
            shard.shard_name(one.name, layer): head + num_rows * one.row_bytes for (one, layer), head in heads.items()
        }
        if {file.name: file.nbytes for file in files} != sizes or len(files) != len(sizes):
            raise DatasetError(f"the workers wrote {sorted(files)} into {folder}, expected were {sizes}.", path=folder)
        return files

    def _call(
        self, rank: RankRows, places: Sequence[Place], folder: str, facts: Mapping[str, StreamFacts]
    ) -> tuple[int, messages.Write]:
        """Return the number of a rank, and the call that has it write its layers."""
        assert isinstance(rank.memory, LeftMemory)
        for name, layer in places:
            there, here = rank.stream_of((name, layer)), facts[name]
            if (there.dtype, there.width) != (here.dtype, here.width):
                raise DatasetError(
                    f"{name} of layer {layer} has {there.dtype} rows of {there.width} elements, and the dataset "
                    f"{here.dtype} rows of {here.width}: record such layers apart."
                )
        return rank.memory.rank, rank.memory.write(folder, [rank.places[place] for place in places], rank.chosen)


def written(
    connection: Connection,
    way: str,
    calls: Mapping[int, messages.Write],
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[FileFacts]:
    """Have workers write; return what they say of the files when the disks have all of them.

    Args:
        connection: To the workers.
        way: As `choose_transport` returned it.
        calls: What each rank is to write, of one capture.
        is_stopped: Asked from time to time.

    Raises:
        TapError: A worker cannot write. Nobody writes any more then.
        StoppedError: `is_stopped` said so; nobody writes any more.
    """
    reports = {rank: messages.Report(capture_id=call.capture_id) for rank, call in calls.items()}
    pause = FIRST_PAUSE_SECONDS
    try:
        expect(messages.Written, connection.ask_each(calls, way), "Write")
        while True:
            replies = _reported(connection, way, reports)
            files = [reply.files for reply in replies if reply.files is not None]
            if len(files) == len(calls):
                return [FileFacts(name=one.name, nbytes=one.nbytes, crc32=one.crc32) for each in files for one in each]
            if is_stopped():
                raise StoppedError
            time.sleep(pause)
            pause = min(GROWTH * pause, LONGEST_PAUSE_SECONDS)
    except BaseException:
        for rank, report in reports.items():
            _stop(connection, way, rank, report)
        raise


def _reported(connection: Connection, way: str, reports: Mapping[int, messages.Report]) -> list[messages.Written]:
    """Return how far the workers are."""
    try:
        return expect(messages.Written, connection.ask_each(reports, way), "Report")
    except CaptureError:
        connection.ask_each({}, way)  # raises where a connection has ended meanwhile: the worker knows of nothing then
        raise


def _stop(connection: Connection, way: str, rank: int, report: messages.Report) -> None:
    """Have a worker write no more, and wait until it does not; one that is gone does not either."""
    with contextlib.suppress(TapError):
        connection.ask_each({rank: messages.Stop(capture_id=report.capture_id)}, way)
        while connection.ask_each({rank: report}, way) == [messages.Written(rank=rank)]:
            time.sleep(FIRST_PAUSE_SECONDS)
