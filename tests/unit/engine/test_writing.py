"""Datasets that workers write out of their segments: against those of the client, and what ends one early.

Workers of a host engine and their clients in this process, over all their sockets.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from host_worker import ServedEngine, prompts_of
from proxy import Proxy
from vllm_tap import Recording, Spec, Spill
from vllm_tap.client.rank_shards import RankShards, written
from vllm_tap.client.writers import Writers
from vllm_tap.engine.capture import session
from vllm_tap.errors import CaptureError, DatasetError, DescriptorError, EngineDiedError, SpecError
from vllm_tap.frame import messages
from vllm_tap.store import files, guest, local
from vllm_tap.store.dataset import open_dataset
from vllm_tap.store.facts import facts_of
from vllm_tap.store.files import StoppedError
from vllm_tap.store.manifest import Manifest
from vllm_tap.store.places import place_of
from vllm_tap.store.verify import verify
from vllm_tap.store.writer import write_part
from vllm_tap.transport.segment import spill
from vllm_tap.transport.tcp import settings

SPEC = Spec(hidden_states="all", embeddings=True, routed_experts="all")
DEADLINE_S = 10.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S} s"
        os.sched_yield()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServedEngine]]:
    """A function that starts an engine, which may write below `tmp_path / "shared"` for clients of its network."""
    started: list[ServedEngine] = []
    (tmp_path / "shared").mkdir()

    def start(way: str = "segment", num_ranks: int = 1, **options: Any) -> ServedEngine:
        options = {"listens": way == "tcp", "write_root": str(tmp_path / "shared"), **options}
        started.append(ServedEngine(random.Random(7), num_ranks, **options))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


def left_capture(engine: ServedEngine, connection: Any, spec: Spec = SPEC, count: int = 6, **options: Any) -> Any:
    """Return a capture whose rows stay in the workers, and that of another client which has all rows of the same."""
    left, whole = Recording(connection, spec, **options), Recording(engine.connect(), spec)
    left.leave_rows()
    prompts = prompts_of(random.Random(count), count)
    engine.run([left, whole], prompts)
    outputs = [prompt.output() for prompt in prompts]
    result = left.finish(outputs)
    result.shard_writer = RankShards(connection, connection.choose_transport("auto"), result)
    return result, whole.finish(outputs)


def write(source: Any, folder: Path, **options: Any) -> Manifest:
    """Write a capture as the only part of a dataset."""
    return write_part(place_of(folder), source, facts_of(source, {}, "", {}), **options)


def num_held(engine: ServedEngine) -> int:
    """Return how many blocks clients hold."""
    return sum(state.num_blocks for worker in engine.workers for state in worker._pools.stats())


def writer_threads() -> list[str]:
    """Return the threads that write."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vllm-tap-writer")]


@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("way", ["segment", "tcp"])
def test_workers_write_what_the_client_would(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, num_ranks: int, drafts: bool
) -> None:
    """Byte for byte, in pieces of some rows that lie in many blocks; then no block is held, and no thread left."""
    monkeypatch.setattr(files, "CHUNK_BYTES", 64)
    engine = serve(way, num_ranks, drafts=drafts)
    for positions in ("all", "generated"):
        spec = Spec(hidden_states="all", embeddings=True, routed_experts="all", positions=positions)
        left, whole = left_capture(engine, engine.connect(way), spec)
        mine, theirs = tmp_path / "shared" / positions, tmp_path / f"client-{positions}"
        assert write(left, mine).files == write(whole, theirs).files
        for one in theirs.glob("part-*/*.safetensors"):
            assert (mine / one.relative_to(theirs)).read_bytes() == one.read_bytes()
        assert verify(mine).problems == []
        assert open_dataset(mine).num_rows == whole.num_rows > 0
        assert sorted(path.name for path in mine.iterdir()) == [".lock", "part-000000000000"]
        with pytest.raises(DatasetError, match="lie in the workers"):
            left[0].hidden_states[1]
        del left, whole
        wait_until(lambda: num_held(engine) == 0, "the end of the leases")
    wait_until(lambda: not writer_threads(), "the end of the threads")


def test_rows_in_files_and_many_segments_are_written_too(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget of a few steps: the rest was spilled, and a piece of a shard lies in several segments."""
    monkeypatch.setattr(session, "STEPS_PER_CHUNK", 1)
    monkeypatch.setattr(spill, "FILE_BYTES", 4096)
    engine = serve()
    left, whole = left_capture(engine, engine.connect(), budget_bytes=1 << 15, on_full=Spill(tmp_path))
    segments = {chunk.segment_id for rank in left.places_of_ranks() for chunk in rank.memory._descriptor.chunks}
    assert len(segments) > 1
    assert write(left, tmp_path / "run").files == write(whole, tmp_path / "client").files


def test_labels_alone_cross_a_network(serve: Any, tmp_path: Path) -> None:
    """Counted by a proxy: of rows of 300 bytes, 12 of labels and what every capture costs."""
    engine = serve("tcp")
    crossed = {}
    for leaves in (False, True):
        proxy = Proxy(engine.workers[0].addresses.network)
        connection = engine.connect_at([proxy.address])
        recording = Recording(connection, SPEC)
        if leaves:
            recording.leave_rows()
        prompts = prompts_of(random.Random(1), 60)
        engine.run([recording], prompts)
        before = proxy.num_bytes
        result = recording.finish([prompt.output() for prompt in prompts])
        if leaves:
            result.shard_writer = RankShards(connection, "auto", result)
        sealed = write(result, tmp_path / "shared" / str(leaves))
        crossed[leaves] = proxy.num_bytes - before
        rows = sum(file.nbytes for file in sealed.files if not file.name.startswith(("labels", "index", "facts")))
        connection.ways.readers()[0].close()
        proxy.close()
    assert crossed[False] > rows / 2
    # A capture's requests and blocks are named in its descriptor, in either case.
    assert crossed[True] < crossed[False] / 2
    assert 12 * sealed.num_rows < crossed[True] < 12 * sealed.num_rows + 100 * 60 + 24 * 800, crossed


class Held:
    """Writes that wait until they are let go of, in the middle of a file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()
        monkeypatch.setattr(files, "CHUNK_BYTES", 16)
        plain, num_written = local.LocalSink.write, 0

        def held(sink: Any, data: Any) -> None:
            nonlocal num_written
            if threading.current_thread().name == "vllm-tap-writer":
                num_written += 1
                if num_written == 5:
                    self.begun.set()
                    assert self.goes_on.wait(DEADLINE_S)
            plain(sink, data)

        monkeypatch.setattr(local.LocalSink, "write", held)


@pytest.mark.parametrize("way", ["segment", "tcp"])
def test_a_client_that_is_gone_stops_its_writing(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Its connection ends in the middle of a file: no further one is begun, its memory is free, threads have ended."""
    held, engine = Held(monkeypatch), serve(way)
    connection, folder = engine.connect(way), tmp_path / "shared" / "run"
    left, _ = left_capture(engine, connection)
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(write, left, folder)
        assert held.begun.wait(DEADLINE_S)
        for reader in connection.ways.readers().values():
            reader.close()
        wait_until(lambda: not engine.workers[0]._writers._jobs, "the end of the job")
        held.goes_on.set()
        assert isinstance(writing.exception(), EngineDiedError)
    wait_until(lambda: not writer_threads(), "the end of the threads")
    wait_until(lambda: len(engine.workers[0]._pools.stats()) == 1, "the end of the client's memory")
    assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize(("is_lost", "error"), [(True, EngineDiedError), (False, CaptureError)])
def test_a_worker_that_knows_of_nothing_may_have_lost_its_client(is_lost: bool, error: type[Exception]) -> None:
    """The connection ended while a report was under way: that is told, not what came of it."""

    class Lost:
        def ask_each(self, calls: Any, way: str) -> list[Any]:
            if not calls and is_lost:
                raise EngineDiedError("the engine is gone")
            if isinstance(calls.get(0), SimpleNamespace):
                return [messages.Written(rank=0)]
            return [messages.Failure(rank=0, error="CaptureError", message="no rows are written here", identity={})]

    with pytest.raises(error):
        written(Lost(), "segment", {0: SimpleNamespace(capture_id="x")})  # type: ignore[arg-type, dict-item]


def test_a_writer_that_is_stopped_has_stopped_in_the_workers(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C: when the call returns nobody writes any more, no draft is left; the rows can be written anew."""
    held, engine = Held(monkeypatch), serve(num_ranks=2)
    left, whole = left_capture(engine, engine.connect())

    def is_stopped() -> bool:
        if not held.begun.is_set():
            return False
        held.goes_on.set()
        return True

    with pytest.raises(StoppedError):
        write(left, tmp_path / "run", is_stopped=is_stopped)
    assert not writer_threads() or all(job.has_ended for one in engine.workers for job in one._writers._jobs.values())
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert write(left, tmp_path / "run").files == write(whole, tmp_path / "client").files


@pytest.mark.parametrize("fault", ["full", "gone", "taken"])
def test_what_the_disk_refuses(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A full disk, a draft that was moved away, a file that is there: one clear error of the dataset, no draft left."""
    engine = serve(num_ranks=2)
    left, whole = left_capture(engine, engine.connect())
    run = tmp_path / "run"
    number = 0

    def refuse(fd: int, start: int, nbytes: int) -> None:
        nonlocal number
        if threading.current_thread().name != "vllm-tap-writer":
            return
        number += 1
        draft = next(run.glob(".draft-*"), run)
        if fault == "full" and number > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fault == "gone" and draft != run:
            shutil.rmtree(draft)
        if fault == "taken":
            for layer in range(3):
                (draft / f"hidden_states.{layer:04d}.safetensors").touch()

    expected = {
        "full": r"No space left.*resume=True",
        "gone": "The folder is gone|is not there where the worker runs",
        "taken": "File exists",
    }
    with monkeypatch.context() as patched:
        patched.setattr(local.os, "posix_fallocate", refuse)
        with pytest.raises(DatasetError, match=expected[fault]):
            write(left, run)
    assert [path.name for path in run.iterdir()] == [".lock"]
    assert write(left, run).files == write(whole, tmp_path / "client").files


def draft_in(folder: Path) -> str:
    """Return a new draft."""
    draft = folder / ".draft-here-1"
    draft.mkdir(parents=True)
    return str(draft)


def test_folders_in_which_a_worker_does_not_write(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For clients of its network all outside of what its operator named, or behind a link; for any what is no draft."""
    elsewhere, shared = tmp_path / "elsewhere", tmp_path / "shared"
    inside, outside = draft_in(shared), draft_in(elsewhere)
    (shared / "link").symlink_to(elsewhere)
    (shared / ".draft-link").symlink_to(elsewhere / ".draft-here-1")
    (shared / "plain").mkdir()
    here, there = str(shared), None

    def refused(path: str, below: str | None) -> str:
        try:
            guest.GuestDraft(path, below).close()
        except DatasetError as error:
            return str(error)
        return ""

    assert refused(inside, here) == refused(inside, there) == refused(outside, there) == ""
    assert "is not below" in refused(outside, here)
    assert "is not below" in refused(f"{here}-too/.draft-1", here)
    assert "not the path" in refused(f"{here}/../elsewhere/.draft-here-1", here)
    assert "not the path" in refused("shared/.draft-here-1", here)
    assert "symbolic link" in refused(f"{here}/link/.draft-here-1", here)
    assert "symbolic link" in refused(f"{here}/.draft-link", here)
    assert "no draft" in refused(f"{here}/plain", there)
    assert "is not there where the worker runs" in refused(f"{here}/.draft-missing", there)
    assert "is not there where the worker runs" in refused(f"{here}/.draft-missing", here)
    assert refused(f"{here}/.draft-link", there)
    monkeypatch.setattr(guest.os, "access", lambda *_, **__: False)
    assert "may not write" in refused(inside, here)


def test_a_draft_whose_path_leads_elsewhere_meanwhile(tmp_path: Path) -> None:
    """It was opened once: files go where it was."""
    path = draft_in(tmp_path / "run")
    draft = guest.GuestDraft(path, None)
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").symlink_to("/proc")
    sink = draft.create("a", 1)
    sink.write(b"x")
    sink.close()
    draft.close()
    assert (tmp_path / "moved" / ".draft-here-1" / "a").read_bytes() == b"x"


def test_what_a_client_may_not_have_written(serve: Any, tmp_path: Path) -> None:
    """Rows of another client, rows that are none, shards that are none: refused before a file is made."""
    engine = serve()
    connection = engine.connect()
    left, _ = left_capture(engine, connection)
    (rank,) = left.places_of_ranks()
    draft = draft_in(tmp_path / "run")
    right = rank.memory.write(draft, [(0, 0)], rank.chosen)
    other = Recording(engine.connect(), SPEC)
    theirs = other._connection.ways.readers("segment")[0]
    changes: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"client": theirs.client}, CaptureError, "another name"),
        ({"client": 999}, CaptureError, "not connected"),
        ({"client": theirs.client, "pool": theirs.pool_id}, Exception, "no block|is not"),
        ({"rows": rank.chosen.astype("<i4").tobytes()[:-1]}, DescriptorError, "no numbers of rows"),
        ({"rows": b"\xff\xff\xff\xff"}, DescriptorError, "rows -1"),
        ({"rows": b"\xff\xff\xff\x7f"}, DescriptorError, "to be written, of"),
        ({"shards": ((0, 0), (0, 0))}, DescriptorError, "twice"),
        ({"shards": ((0, 3),)}, DescriptorError, "does not have"),
        ({"shards": ((-1, 0),)}, DescriptorError, "does not have"),
        ({"folder": "/etc"}, DatasetError, "no draft"),
    ]
    named = [("../hidden_states", (0, 1, 2)), ("/etc/x", (0, 1, 2)), ("hidden_states", (-1, 0, 1)), ("", (0, 1, 2))]
    for name, layers in named:
        first, *others = right.descriptor.streams
        streams = (msgspec.structs.replace(first, name=name, layers=layers), *others)
        described = msgspec.structs.replace(right.descriptor, streams=streams)
        changes.append(({"descriptor": described}, DescriptorError, "that cannot be"))
    for change, kind, words in changes:
        (reply,) = connection.ask_each({0: msgspec.structs.replace(right, **change)}, "segment")
        assert isinstance(reply.exception(), kind), reply
        assert any(word in reply.message for word in words.split("|")), reply
    chunks = tuple(chunk.__replace__(offset=chunk.offset + 4096) for chunk in right.descriptor.chunks)
    moved = msgspec.structs.replace(right.descriptor, chunks=chunks)
    (reply,) = connection.ask_each({0: msgspec.structs.replace(right, descriptor=moved)}, "segment")
    assert isinstance(reply.exception(), DescriptorError)
    assert os.listdir(draft) == []
    other.stop()


def test_who_writes(serve: Any, tmp_path: Path) -> None:
    """The client on one host; workers where rows would cross a network and they may; what was asked for, or why not."""
    network, alone = serve("tcp"), serve("tcp", write_root="")
    shared, elsewhere = tmp_path / "shared" / "run", tmp_path / "run"
    reduced = Spec(hidden_states="all", reduce="mean")

    def found(engine: ServedEngine, folder: Any, way: str = "tcp", spec: Spec = SPEC, writers: str = "auto") -> bool:
        return Writers(engine.connect(way), folder, spec, "auto", writers).are_workers

    assert found(network, shared)
    assert not found(network, elsewhere)
    assert not found(alone, shared)
    assert not found(network, shared, "segment")
    assert not found(network, shared, writers="client")
    assert not found(network, shared, spec=reduced)
    assert not found(network, "memory://run")
    assert found(network, elsewhere, "segment", writers="workers")
    with pytest.raises(DatasetError, match="VLLM_TAP_WRITE_ROOT"):
        found(alone, shared, writers="workers")
    with pytest.raises(DatasetError, match="is not below"):
        found(network, elsewhere, writers="workers")
    with pytest.raises(SpecError, match="reduce='mean' of the Spec"):
        found(network, shared, spec=reduced, writers="workers")
    with pytest.raises(SpecError, match="no folder of this host"):
        found(network, "memory://run", writers="workers")
    with pytest.raises(SpecError, match="writers='worker' is not known"):
        found(network, shared, writers="worker")
    assert not list(tmp_path.rglob(".draft-*"))


def test_a_root_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """The worker then serves no network, and says so."""
    for given in ("relative", str(tmp_path / "missing")):
        with pytest.raises(SpecError, match="VLLM_TAP_WRITE_ROOT"):
            settings.read({"VLLM_TAP_LISTEN": "127.0.0.1:0", "VLLM_TAP_WRITE_ROOT": given}, 0)
