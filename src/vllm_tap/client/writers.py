"""Who writes the rows of a dataset: this process, or the workers out of their own memory. Client process."""

from __future__ import annotations

from typing import Any, Final

from vllm_tap.client.connection import Connection, connect, new_capture_id
from vllm_tap.client.left import nothing_left
from vllm_tap.client.rank_shards import RankShards, written
from vllm_tap.client.result import Capture
from vllm_tap.errors import EngineDiedError, SpecError, TapError
from vllm_tap.spec import Spec, nearest
from vllm_tap.store.places import place_of
from vllm_tap.store.source import AUTO, CLIENT, WORKERS, WRITERS

TRIAL: Final = "trial"
"""Name of a part that is never sealed."""


class Writers:
    """Choice of who writes, made before the first capture.

    Args:
        llm: The engine.
        path: Of the dataset.
        spec: What is captured.
        transport: As for `capture`.
        writers: "client", "workers", or "auto".

    Raises:
        SpecError: No such writers, or workers cannot write this dataset.
    """

    def __init__(self, llm: Any, path: Any, spec: Spec, transport: str, writers: str) -> None:
        if writers not in WRITERS:
            raise SpecError(f"writers={writers!r} is not known.{nearest(str(writers), WRITERS)}")
        self._llm, self._path, self._transport, self._writers = llm, path, transport, writers
        self._place = place_of(path)
        self._way: tuple[Connection, str] | None = None
        self._are_workers: bool | None = False if writers == CLIENT else None
        made = [f"{name}={value!r}" for name in ("reduce", "dtype") if (value := getattr(spec, name)) is not None]
        if made:
            self._refuse(f"{' and '.join(made)} of the Spec is made of the rows in this process")
        elif not self._place.is_folder:
            self._refuse(f"{path} is no folder of this host")

    def _refuse(self, reason: str) -> None:
        """Take note that workers cannot write."""
        if self._writers == WORKERS:
            raise SpecError(f'writers="workers": {reason}. Leave writers out.')
        self._are_workers = False

    @property
    def are_workers(self) -> bool:
        """True if the workers are to write: found out when it is first asked for.

        Raises:
            TapError: They were asked for, and cannot write there.
        """
        if self._are_workers is None:
            self._are_workers = self._found_out()
        return self._are_workers

    def _found_out(self) -> bool:
        connection = connect(self._llm)
        way = connection.choose_transport(self._transport)
        self._way = connection, way
        if not way:
            self._refuse("no socket reaches the workers from here")
            return False
        if self._writers == AUTO and not connection.ways.goes_over_network(way):
            return False
        try:
            self._try(connection, way)
        except EngineDiedError:
            raise
        except TapError:
            if self._writers == WORKERS:
                raise
            return False
        return True

    def _try(self, connection: Connection, way: str) -> None:
        """Have all workers write nothing into a draft."""
        draft = self._place.draft(TRIAL)
        try:
            name, folder = new_capture_id(), str(draft.folder)
            readers = connection.ways.readers(way)
            calls = {rank: nothing_left(name, rank, reader).write(folder) for rank, reader in readers.items()}
            written(connection, way, calls)
        finally:
            draft.discard()

    def leave(self, capture: Capture) -> None:
        """Have a capture whose rows were left in the workers written by these."""
        assert self._way is not None
        capture.shard_writer = RankShards(*self._way, capture)
