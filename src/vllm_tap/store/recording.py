"""Records prompts into a dataset, piece by piece: one is captured while the one before is written. Client process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from vllm_tap.errors import BudgetError, DatasetError, SpecError, counted_from
from vllm_tap.spec import Spec
from vllm_tap.store import index
from vllm_tap.store.dataset import Dataset, open_dataset
from vllm_tap.store.facts import Facts, facts_of, require_same
from vllm_tap.store.manifest import Manifest
from vllm_tap.store.part import sealed_parts
from vllm_tap.store.pieces import Metadata, Piece, Share, pieces
from vllm_tap.store.place import Place
from vllm_tap.store.places import place_of
from vllm_tap.store.source import RowSource
from vllm_tap.store.writer import write_part


class Run(NamedTuple):
    """Facts that are the same whenever a dataset is gone on with: the request, the model, and how tokens are chosen."""

    spec: Spec
    model: Mapping[str, str]
    sampling: str
    versions: Mapping[str, str]


def record_with(
    capture: Callable[[list[Any]], RowSource],
    prompts: Iterable[Any],
    path: Any,
    run: Run,
    *,
    resume: bool = False,
    batch: int = 256,
    metadata: Iterable[Metadata] | None = None,
    share: tuple[int, int] = (0, 1),
    on_part: Callable[[Manifest], None] | None = None,
) -> Dataset:
    """Record prompts by a function that captures a list of them; see `vllm_tap.record`.

    Args:
        capture: Returns the rows of prompts, one sample for each.
        prompts: Any iterable; `batch` of them are read at a time.
        path: A folder or a URL.
        run: What was asked for, of which model.
        resume: Whether to go on with a dataset that is there.
        batch: Prompts of a part.
        metadata: The user's, one for each prompt.
        share: (index, count), if several processes record into one folder.
        on_part: Called when a part has been sealed, in another thread.

    Raises:
        DatasetError: The folder holds another run, or cannot be written to. What is sealed stays readable.
        SpecError: There are no prompts, or arguments that cannot be.
    """
    if batch < 1:
        raise SpecError(f"batch is a number of prompts from 1 on, got {batch}.")
    mine = Share(*share).checked()
    index.require_pyarrow()
    place = place_of(path)
    sealed = sealed_parts(place)
    if sealed and not resume:
        raise DatasetError(
            f"{place.path} holds a dataset already: pass resume=True to go on with it, or another folder.",
            path=place.path,
        )
    place.clean()
    facts = sealed[0].facts() if sealed else None
    if facts is not None:
        _require_same_run(run, facts, place.path)
    with _Writer(place, on_part) as writer:
        for piece in pieces(prompts, metadata, [part.manifest for part in sealed], batch, mine):
            source = _captured(capture, piece, writer)
            found = facts_of(source, run.model, run.sampling, run.versions)
            if facts is None:
                facts = found
            require_same(found, facts, place.path)
            writer.put(source, found, piece)
            del source  # its rows are let go of as soon as they are written
    if facts is None:
        raise SpecError("there are no prompts to record.")
    return open_dataset(path)


def _require_same_run(run: Run, facts: Facts, path: str) -> None:
    """Refuse what would be refused after the first capture, before it."""
    asked = {"model": dict(run.model), "spec": run.spec.to_json(), "sampling": run.sampling}
    values = {name: getattr(facts, name) for name in Facts.__struct_fields__}
    require_same(Facts(**{**values, **asked}), facts, path)


def _captured(capture: Callable[[list[Any]], RowSource], piece: Piece, writer: _Writer) -> RowSource:
    with counted_from(piece.first):
        try:
            return capture(piece.prompts)
        except BudgetError:
            # The rows of the piece before may have taken the room: they go when they are written.
            if not writer.wait():
                raise
            return capture(piece.prompts)


class _Writer:
    """A thread that writes parts, one behind the other; at most one is written while the next one is captured."""

    def __init__(self, place: Place, on_part: Callable[[Manifest], None] | None) -> None:
        self._place, self._on_part = place, on_part
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vllm-tap-writer")
        self._pending: Future[None] | None = None
        self._stop = threading.Event()

    def put(self, source: RowSource, facts: Facts, piece: Piece) -> None:
        """Have a part written; wait until the one before has been.

        Raises:
            DatasetError: The part before could not be written.
        """
        self.wait()
        self._pending = self._pool.submit(self._write, source, facts, piece)

    def wait(self) -> bool:
        """Wait until nothing is being written; return whether there was something."""
        pending, self._pending = self._pending, None
        if pending is None:
            return False
        pending.result()
        return True

    def _write(self, source: RowSource, facts: Facts, piece: Piece) -> None:
        part = write_part(
            self._place,
            source,
            facts,
            first_sample=piece.first,
            metadata=piece.metadata,
            prompts=piece.digest,
            is_stopped=self._stop.is_set,
        )
        if self._on_part is not None:
            self._on_part(part)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """End the thread. After an error, what was captured is written still; after Ctrl-C, it is not."""
        if kind is not None and not issubclass(kind, Exception):
            self._stop.set()
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"(and what was captured before could not be written: {failure})")
        finally:
            self._pool.shutdown()
