"""Worker and client as two real processes: what arrives, how long it lasts, and what every kind of death leaves.

Every test runs over every transport, unless it says that it is of shared memory alone: there a client holds blocks of
the worker as long as it looks at them, while over a network it has bytes of its own. Run as a program, this file is the
other process: `test_handover.py worker TRANSPORT` or `test_handover.py client ADDRESS`. It takes one JSON object a line
and answers with one.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import transports
import vllm_tap
from transports import Reader, connect, keeps, serve
from vllm_tap.errors import BudgetError, DescriptorError, TransportError
from vllm_tap.transport.segment.pool import Block, SegmentPool

MIB = 1 << 20
BUDGET = 8 * MIB
DEADLINE_S = 10.0


def content(seed: int, nbytes: int) -> np.ndarray:
    """Return the bytes that both processes make for themselves."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Return as soon as a condition holds; fail where it does not within the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        os.sched_yield()


class Peer:
    """Another process and its pipe."""

    def __init__(self, *role: str) -> None:
        package_dir = str(Path(next(iter(vllm_tap.__path__))).parent)
        tests = Path(__file__).parents[1]
        folders = [package_dir, str(tests), str(tests / "support"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.hello = json.loads(self.process.stdout.readline())

    def ask(self, op: str, **arguments: object) -> dict:
        """Have the other process do something; return its answer."""
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        """Kill the process as an out-of-memory killer would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """End the process if it still runs."""
        if self.process.poll() is None:
            self.kill()
        self.process.stdin.close()
        self.process.stdout.close()


class Worker(Peer):
    """A worker process with a pool of 8 MiB."""

    def __init__(self, transport: str) -> None:
        super().__init__("worker", transport)
        self.transport = transport
        self.address: str = self.hello["address"]

    def put(self, client: int, nbytes: int, seed: int) -> Block:
        """Have a block written and published."""
        answer = self.ask("put", client=client, nbytes=nbytes, seed=seed)
        if "error" in answer:
            raise {"BudgetError": BudgetError, "TransportError": TransportError}[answer["error"]](answer["message"])
        return Block(*answer["block"])

    def num_blocks(self) -> int:
        """Return how many blocks are taken."""
        return self.ask("stats")["num_blocks"]


@pytest.fixture(params=transports.NAMES)
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    """A fresh worker process."""
    worker = Worker(request.param)
    yield worker
    worker.close()


of_shared_memory = pytest.mark.parametrize("worker", ["segment"], indirect=True)


def assert_taken(worker: Worker, reader: Reader, num_leased: int, num_others: int = 0) -> None:
    """Check how many blocks are taken: those that are leased if these are the worker's, and the others."""
    expected = num_others + num_leased * keeps(reader)
    wait_until(lambda: worker.num_blocks() <= expected, "the end of the other leases")
    assert worker.num_blocks() == expected


@pytest.fixture
def reader(worker: Worker) -> Iterator[Reader]:
    """This process, connected to the worker."""
    reader = connect(worker.address)
    yield reader
    reader.close()


def test_bytes_arrive_unchanged(worker, reader):
    """Blocks of many sizes hold in the client what the worker wrote."""
    for seed, nbytes in enumerate([1, 4095, 4096, 4097, 100_000, 3 * MIB]):
        block = worker.put(reader.client, nbytes, seed)
        np.testing.assert_array_equal(reader.lease(block).array, content(seed, nbytes))


@of_shared_memory
def test_two_readers_of_a_mapping_see_the_same_pages(worker, reader):
    """The whole segment, as a gather sees it, shows every block at its offset."""
    blocks = [worker.put(reader.client, 5000, seed) for seed in range(4)]
    leases = [reader.lease(block) for block in blocks]
    whole = reader.segment_array(blocks[0].segment_id)
    for seed, lease in enumerate(leases):
        block = lease.block
        np.testing.assert_array_equal(whole[block.offset : block.offset + block.nbytes], content(seed, 5000))
        assert lease.array.ctypes.data == whole.ctypes.data + block.offset


def test_the_lease_ends_with_the_last_array(worker, reader):
    """The block is taken while anything over it lives, and free as soon as nothing does; a fetched one is free."""
    block = worker.put(reader.client, 64 * 1024, 1)
    lease = reader.lease(block)
    array = lease.array.view(np.uint16).reshape(-1, 64)
    del lease
    one_row = array[3:4]
    del array
    gc.collect()
    assert_taken(worker, reader, 1)
    np.testing.assert_array_equal(one_row.view(np.uint8).ravel(), content(1, 64 * 1024)[3 * 128 : 4 * 128])
    del one_row
    wait_until(lambda: worker.num_blocks() == 0, "the end of the lease")


def test_a_slice_of_one_row_of_a_tensor_keeps_the_lease(worker, reader):
    """Torch tensors keep the lease through views of another dtype, and end it without a cycle collection."""
    torch = pytest.importorskip("torch")
    block = worker.put(reader.client, 64 * 1024, 2)
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of arrays that are marked read-only
            tensor = torch.from_numpy(reader.lease(block).array).view(torch.bfloat16).view(-1, 64)
        one_row = tensor[5:6]
        del tensor
        assert_taken(worker, reader, 1)
        expected = torch.from_numpy(content(2, 64 * 1024)[5 * 128 : 6 * 128]).view(torch.int16)
        assert torch.equal(one_row.view(torch.int16).ravel(), expected)
        del one_row
        wait_until(lambda: worker.num_blocks() == 0, "the end of the lease")
    finally:
        gc.enable()


@of_shared_memory
def test_leasing_a_block_twice_needs_both_to_end(worker, reader):
    """A block that is leased twice at once stays until both are gone."""
    block = worker.put(reader.client, 1000, 1)
    first, second = reader.lease(block), reader.lease(block)
    del first
    assert worker.num_blocks() == 1
    del second
    wait_until(lambda: worker.num_blocks() == 0, "the end of both leases")


@of_shared_memory
def test_many_leases_that_end_at_once_are_all_heard(worker, reader):
    """A burst of releases while the worker does not run, more than a socket holds, is heard when it runs again."""
    leases = [reader.lease(worker.put(reader.client, 10, seed)) for seed in range(1500)]
    assert worker.num_blocks() == 1500
    worker.process.send_signal(signal.SIGSTOP)
    leases.clear()
    worker.process.send_signal(signal.SIGCONT)
    wait_until(lambda: worker.num_blocks() == 0, "the end of all leases")


def test_tensors_stay_readable_when_the_worker_is_killed(worker, reader):
    """Killing the worker ends no mapping; `alive` turns False, and a new lease reads what is mapped, or says so."""
    lease = reader.lease(worker.put(reader.client, MIB, 3))
    later = worker.put(reader.client, MIB, 4)
    assert reader.alive
    worker.kill()
    wait_until(lambda: not reader.alive, "the end of the connection")
    np.testing.assert_array_equal(lease.array, content(3, MIB))
    if keeps(reader):
        np.testing.assert_array_equal(reader.lease(later).array, content(4, MIB))
        return
    with pytest.raises(TransportError, match="has gone"):
        reader.lease(later)


def test_a_block_that_is_not_here_is_lost_with_the_worker(worker, reader):
    """A lease that needs the dead worker says so instead of waiting."""
    block = worker.put(reader.client, MIB, 3)
    worker.kill()
    with pytest.raises(TransportError, match="has gone"):
        reader.lease(block)


def test_blocks_of_a_killed_client_are_back_at_once(worker):
    """Killing a client frees what it held within a second, and its number is refused from then on."""
    client = Peer("client", worker.address)
    number = client.hello["client"]
    for seed in range(3):
        block = worker.put(number, MIB, seed)
        assert client.ask("hold", block=block)["sum"] == int(content(seed, MIB).sum())
        worker.put(number, MIB, seed)  # at which nobody looks
    assert worker.num_blocks() >= 3
    client.kill()
    wait_until(lambda: worker.num_blocks() == 0, "the return of the blocks", timeout_s=1.0)
    assert worker.ask("connected", client=number) == {"connected": False}
    assert worker.ask("gone") == {"gone": [number]}
    with pytest.raises(TransportError, match="not connected"):
        worker.put(number, 10, 1)
    assert worker.num_blocks() == 0
    client.close()


def test_clients_do_not_free_each_others_blocks(worker, reader):
    """Two clients read from one segment; the death of one leaves the other's rows alone."""
    client = Peer("client", worker.address)
    mine = worker.put(reader.client, MIB // 4, 1)
    theirs = worker.put(client.hello["client"], MIB // 4, 2)
    assert mine.segment_id == theirs.segment_id
    lease = reader.lease(mine)
    with contextlib.nullcontext() if keeps(reader) else pytest.raises(DescriptorError):
        reader.lease(theirs)  # readable, if it is in the same segment, but not this client's to free
    # Releases arrive in order: once this lease has ended, the server has dealt with the one before it.
    np.testing.assert_array_equal(reader.lease(worker.put(reader.client, 10, 9)).array, content(9, 10))
    assert_taken(worker, reader, 1, num_others=1)
    client.ask("hold", block=theirs)
    client.kill()
    assert_taken(worker, reader, 1)
    worker.put(reader.client, MIB // 4, 5)
    np.testing.assert_array_equal(lease.array, content(1, MIB // 4))
    client.close()


def test_a_reader_that_keeps_its_tensors_fills_the_budget(worker, reader):
    """A slow reader meets BudgetError in the worker, not overwritten rows; letting go makes room again."""
    blocks = [worker.put(reader.client, 2 * MIB, seed) for seed in range(4)]
    leases = [reader.lease(block) for block in blocks] if keeps(reader) else []
    with pytest.raises(BudgetError, match="budget_bytes"):
        worker.put(reader.client, 2 * MIB, 9)
    leases = leases or [reader.lease(block) for block in blocks]
    for seed, lease in enumerate(leases):
        np.testing.assert_array_equal(lease.array, content(seed, 2 * MIB))
    leases.pop(1)
    del lease
    assert_taken(worker, reader, 3)
    leases.append(reader.lease(worker.put(reader.client, 2 * MIB, 9)))
    for seed, lease in zip((0, 2, 3, 9), leases, strict=True):
        np.testing.assert_array_equal(lease.array, content(seed, 2 * MIB))


def test_memory_that_is_used_again_shows_the_new_bytes(worker, reader):
    """Many times the budget passes through the same pages, and each block shows its own bytes."""
    places, held = set(), []
    for seed in range(30):
        block = worker.put(reader.client, MIB, seed)
        places.add((block.segment_id, block.offset))
        held.append(reader.lease(block))
        np.testing.assert_array_equal(held[-1].array, content(seed, MIB))
        if len(held) > 2:
            np.testing.assert_array_equal(held.pop(0).array, content(seed - 2, MIB))
            assert_taken(worker, reader, 2)
    assert len(places) < 10


def test_a_closed_reader_keeps_its_lease_until_the_tensor_is_gone(worker):
    """Closing the reader does not let the worker write under tensors that live; the last of them ends it."""
    reader = connect(worker.address)
    lease = reader.lease(worker.put(reader.client, MIB, 1))
    reader.close()
    assert not reader.alive
    with pytest.raises(TransportError, match="closed"):
        reader.lease(Block(1, 0, 10, 5))
    assert_taken(worker, reader, 1)
    np.testing.assert_array_equal(lease.array, content(1, MIB))
    assert worker.ask("connected", client=reader.client) == {"connected": True} or not keeps(reader)
    del lease
    wait_until(lambda: worker.num_blocks() == 0, "the end of the lease")
    wait_until(lambda: worker.ask("gone") == {"gone": [reader.client]}, "the end of the connection")


def test_a_forked_child_does_not_end_its_parents_leases(worker, reader):
    """A child that is forked off with a tensor and drops it leaves the block to the parent."""
    lease = reader.lease(worker.put(reader.client, MIB, 1))
    child = os.fork()
    if child == 0:
        del lease
        os._exit(0)
    os.waitpid(child, 0)
    np.testing.assert_array_equal(reader.lease(worker.put(reader.client, 10, 2)).array, content(2, 10))
    assert_taken(worker, reader, 1)
    np.testing.assert_array_equal(lease.array, content(1, MIB))


def test_a_forked_child_does_not_end_what_its_parent_holds(worker, reader):
    """A child drops blocks that nobody looked at, one that the parent looked at and one that it looks at itself."""
    blocks = [worker.put(reader.client, 1000, seed) for seed in range(4)]
    held = reader.hold(blocks)
    held.lease(0)
    child = os.fork()
    if child == 0:
        same = False
        try:
            same = held.lease(1).array.tobytes() == content(1, 1000).tobytes()
            del held
        finally:
            os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(reader.lease(worker.put(reader.client, 10, 9)).array, content(9, 10))
    assert_taken(worker, reader, 4)
    for seed in range(4):
        np.testing.assert_array_equal(held.lease(seed).array, content(seed, 1000))
    del held
    wait_until(lambda: worker.num_blocks() == 0, "the end of all blocks")


@of_shared_memory
def test_the_end_of_many_held_blocks_waits_for_no_worker(worker, reader):
    """Held blocks end while the worker does not run and its socket is full; it hears of them when it runs again."""
    held = [reader.hold([worker.put(reader.client, 10, seed)]) for seed in range(1000)]
    held.append(reader.hold([worker.put(reader.client, 10, seed) for seed in range(500)]))
    assert worker.num_blocks() == 1500
    worker.process.send_signal(signal.SIGSTOP)
    held.clear()
    worker.process.send_signal(signal.SIGCONT)
    wait_until(lambda: worker.num_blocks() == 0, "the end of all blocks")


@of_shared_memory
@pytest.mark.parametrize("looks", [True, False], ids=["a client that looks", "a client that does nothing"])
def test_clients_let_go_of_segments_that_the_worker_closed(worker, looks, monkeypatch):
    """Trimming frees the memory in the client too: as soon as it looks at the connection, and if it does not, soon."""
    monkeypatch.setattr("vllm_tap.transport.segment.reader._NOTICE_SECONDS", 1000 if looks else 0.05)
    reader = connect(worker.address)
    # Engines of other tests in this process may still be mapped, here and below.
    before = mapped_segments("self")
    reader.lease(worker.put(reader.client, MIB, 1))
    wait_until(lambda: worker.num_blocks() == 0, "the end of the lease")
    assert mapped_segments("self") == before + 1
    worker.ask("trim")
    wait_until(lambda: (not looks or reader.alive) and mapped_segments("self") == before, "the end of the mapping")
    np.testing.assert_array_equal(reader.lease(worker.put(reader.client, MIB, 2)).array, content(2, MIB))
    reader.close()


def test_nothing_has_a_name_and_no_descriptor_is_left(worker):
    """Neither process maps a file of /dev/shm for it, and connecting again and again costs no descriptor."""
    # Other libraries in the test process may map semaphores of their own there, which are none of ours.
    named_before = {process: named_shared_memory(process) for process in ("self", worker.process.pid)}
    mapped_before = mapped_segments("self")

    def turn() -> None:
        reader = connect(worker.address)
        lease = reader.lease(worker.put(reader.client, MIB, 1))
        assert mapped_segments(worker.process.pid) == 1
        assert mapped_segments("self") == mapped_before + keeps(reader)
        assert {process: named_shared_memory(process) for process in named_before} == named_before
        del lease
        reader.close()
        wait_until(lambda: reader.client in worker.ask("gone")["gone"], "the end of the connection")

    turn()
    before = {process: num_fds(process) for process in named_before}
    for _ in range(10):
        turn()
    # Threads of connections close these some time after the client has gone.
    # Some of the first turn may have been there still.
    wait_until(lambda: all(num_fds(process) <= most for process, most in before.items()), "the end of all descriptors")
    assert mapped_segments("self") == mapped_before


@pytest.mark.parametrize("transport", transports.NAMES)
def test_a_server_closes_without_freeing_what_clients_read(transport):
    """After close the client sees the end of the connection, and its rows stay as they are."""
    pool = SegmentPool(BUDGET, segment_bytes=2 * MIB)
    descriptors_before = num_fds("self")
    server = serve(transport, pool)
    reader = connect(server.address)
    block = pool.reserve(1000)
    pool.view(block)[:] = content(1, 1000).tobytes()
    server.publish(reader.client, [block.block_id])
    lease = reader.lease(block)
    server.close()
    server.close()
    wait_for_end(reader)
    kept = keeps(reader)
    wait_until(lambda: pool.stats().num_blocks == kept, "the release of what the client does not read")
    pool.close()
    np.testing.assert_array_equal(lease.array, content(1, 1000))
    del lease
    reader.close()
    with pytest.raises(TransportError, match="inline" if kept else "no worker answers"):
        connect(server.address)
    del reader
    wait_until(lambda: num_fds("self") <= descriptors_before, "the end of all descriptors")


def wait_for_end(reader: Reader) -> None:
    """Wait until a reader has noticed that its server is gone."""
    wait_until(lambda: not reader.alive, "the end of the connection")


def num_fds(process: int | str) -> int:
    """Return how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{process}/fd"))


def mapped_segments(process: int | str) -> int:
    """Return how many segments a process maps."""
    return Path(f"/proc/{process}/maps").read_text().count("/memfd:vllm-tap")


def named_shared_memory(process: int | str) -> list[str]:
    """Return what a process maps of the file system for shared memory, but for what UCX has there of its own."""
    lines = [line for line in Path(f"/proc/{process}/maps").read_text().splitlines() if "/dev/shm" in line]
    return [line.split(maxsplit=5)[5] for line in lines if "/ucx_shm_" not in line]


def run_worker(transport: str) -> None:
    """Be the worker."""
    pool = SegmentPool(BUDGET, segment_bytes=2 * MIB)
    server = serve(transport, pool)
    gone: list[int] = []
    server.on_disconnect = gone.append

    def put(client: int, nbytes: int, seed: int) -> dict:
        block = pool.reserve(nbytes)
        np.frombuffer(pool.view(block), np.uint8)[:] = content(seed, nbytes)
        try:
            server.publish(client, [block.block_id])
        except TransportError:
            pool.release(block.block_id)
            raise
        return {"block": block}

    answer_requests(
        {"address": server.address},
        {
            "put": put,
            "stats": lambda: pool.stats()._asdict(),
            "connected": lambda client: {"connected": server.is_connected(client)},
            "gone": lambda: {"gone": gone},
            "trim": lambda: pool.trim() or {},
        },
    )


def run_client(address: str) -> None:
    """Be a client that lets go of nothing."""
    reader = connect(address)
    leases = []

    def hold(block: list[int]) -> dict:
        leases.append(reader.lease(Block(*block)))
        return {"sum": int(leases[-1].array.sum())}

    answer_requests({"client": reader.client}, {"hold": hold})


def answer_requests(hello: dict, operations: dict[str, Callable[..., dict]]) -> None:
    """Say hello, then answer line by line."""
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = operations[request.pop("op")](**request)
        except (BudgetError, TransportError) as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    {"worker": run_worker, "client": run_client}[sys.argv[1]](*sys.argv[2:])
