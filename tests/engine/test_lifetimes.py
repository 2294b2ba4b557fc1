"""How long rows, memory and sessions last: dropped results, small budgets, interrupted calls, killed processes.

Runs in the test process, beside one eager Llama engine; a test that kills it leaves the next one to start another. By
default the engine's core is killed between captures and its worker during one; VLLM_TAP_TEST_MATRIX=full kills either
in both.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import device
from engine.engines import (
    FULL_MATRIX,
    MAX_MODEL_LEN,
    TRANSPORTS,
    Engine,
    References,
    Shelf,
    compare,
    forget_failures,
    greedy,
    prompts,
    surroundings,
    wait_until,
)
from vllm_tap import Spec
from vllm_tap.client import recording
from vllm_tap.client.connection import Connection
from vllm_tap.client.interruption import Interruption
from vllm_tap.errors import BudgetError, EngineDiedError, SpecError, TransportError
from vllm_tap.labels import KEY
from vllm_tap.transport.calls import Caller

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

HIDDEN = Spec(hidden_states="all")
RELEASE_S = 1.0
DEATH_S = 5.0
TOO_SMALL_BYTES = 64 << 10
VICTIMS = ["core", "worker"] if FULL_MATRIX else []


@pytest.fixture(scope="module", autouse=True)
def others() -> set[threading.Thread]:
    """Threads of this process before any engine of these tests, which other files of tests may have left."""
    return set(threading.enumerate())


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the engine takes for temporary files."""
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def shelf(tiny_model: Callable[..., Path], temporary: Path) -> Iterator[Shelf]:
    """The engine of this module."""

    def start() -> Engine:
        with surroundings({"TMPDIR": str(temporary)}):
            return Engine(tiny_model("llama"), enforce_eager=True, listens=True)

    shelf = Shelf(start)
    yield shelf
    shelf.close()


@pytest.fixture
def engine(shelf: Shelf) -> Engine:
    """A running engine that holds no rows."""
    forget_failures()
    return shelf.get()


@pytest.fixture
def known(references: Callable[[str], References]) -> References:
    """Hugging Face's forward passes of the engine's model."""
    return references("llama")


def test_rows_are_free_as_soon_as_the_last_tensor_is_gone(engine):
    """One row of a view keeps what it lies in; when it goes, nothing is in use, without another call."""
    result = engine.capture(prompts([9, 20, 6]), HIDDEN, max_tokens=1)  # one step: views, not gathered copies
    whole = engine.used_bytes()
    tensor = result[1].hidden_states[2][7:8]
    expected = tensor.clone()
    del result
    assert 0 < engine.used_bytes() <= whole
    assert tensor.equal(expected)
    del tensor
    wait_until(lambda: engine.used_bytes() == 0, "the release of all rows", RELEASE_S)


@pytest.mark.parametrize("transport", ["inline", "tcp"])
def test_rows_that_were_fetched_hold_nothing_in_the_worker(engine, transport):
    """They are free when the call returns, or as soon as the worker has heard of it over a network."""
    result = engine.capture(prompts(), HIDDEN, transport=transport)
    wait_until(lambda: engine.used_bytes() == 0, "the release of all rows", RELEASE_S)
    assert len(result) == 8


def test_memory_is_used_again(engine):
    """Captures that are dropped do not make the worker grow; those that are kept stay as they were."""
    kept = engine.capture(prompts(), HIDDEN)
    copies = [sample.hidden_states[1].clone() for sample in kept]
    engine.capture(prompts(seed=1), HIDDEN)
    wait_until(lambda: engine.status()[0]["num_blocks"] >= 1, "a held block")
    capacity = engine.status()[0]["capacity_bytes"]
    for seed in range(2, 8):
        engine.capture(prompts(seed=seed), HIDDEN)
    assert engine.status()[0]["capacity_bytes"] == capacity
    assert all(sample.hidden_states[1].equal(copy) for sample, copy in zip(kept, copies, strict=True))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_budget_too_small_ends_the_capture_alone(engine, known, transport):
    """Rows that do not fit raise BudgetError with the numbers; the engine goes on, and captures with more memory."""
    before = engine.generate(prompts())
    with pytest.raises(BudgetError, match="budget_bytes") as caught:
        engine.capture(prompts(), HIDDEN, budget_bytes=TOO_SMALL_BYTES, transport=transport)
    assert caught.value.budget_bytes == TOO_SMALL_BYTES < caught.value.needed_bytes + caught.value.used_bytes
    assert engine.status()[0]["captures"] == []
    assert engine.used_bytes() == 0
    assert engine.generate(prompts()) == before
    compare(engine.capture(prompts(), HIDDEN, transport=transport), known)


def test_rows_that_are_held_count_against_the_budget(engine, known):
    """Captures under one budget fit until the rows that are kept fill it, and again once these are dropped."""
    budget_bytes, held = 4 << 20, []

    def fill() -> None:
        for _ in range(64):  # each takes at least 0.6 MiB
            held.append(engine.capture(prompts(), HIDDEN, budget_bytes=budget_bytes))

    with pytest.raises(BudgetError, match="let go of the tensors of earlier captures"):
        fill()
    compare(held[0], known)
    held.clear()
    wait_until(lambda: engine.used_bytes() == 0, "the release of all rows", RELEASE_S)
    compare(engine.capture(prompts(), HIDDEN, budget_bytes=budget_bytes), known)


def test_a_prompt_that_the_engine_refuses_leaves_no_session(engine, known):
    """It is named; the capture is over in the workers, and the next one has its own rows only."""
    with pytest.raises(SpecError, match=f"prompt 1, .*{MAX_MODEL_LEN} tokens") as caught:
        engine.capture(prompts([5, MAX_MODEL_LEN + 20]), HIDDEN)
    assert type(caught.value.__cause__).__module__ == "vllm.exceptions"
    assert engine.status()[0]["captures"] == []
    assert engine.used_bytes() == 0
    compare(engine.capture(prompts(), HIDDEN), known)


def test_an_interrupted_capture_leaves_no_session_and_no_requests(monkeypatch, engine, known):
    """After Ctrl-C in the middle of a capture the next one has its own prompts and rows, and nothing stays in use."""
    step, num_steps = engine.llm.llm_engine.step, 0

    def interrupted() -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 4:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine.llm.llm_engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.capture(prompts(seed=1), HIDDEN)
    assert engine.status()[0]["captures"] == []
    wait_until(lambda: engine.used_bytes() == 0, "the release of all rows", RELEASE_S)
    try:
        result = engine.capture(prompts(), HIDDEN)
        assert len(result) == len(prompts())
        compare(result, known)
    finally:
        engine.llm.wait_for_completion(use_tqdm=False)


@pytest.mark.parametrize("moment", ["queueing", "outputs"])
def test_a_key_loses_nothing_that_was_finished(monkeypatch, engine, known, moment):
    """Ctrl-C while prompts are queued, of which some have ended unread; and where all have ended."""
    add_request, read = engine.llm.llm_engine.add_request, recording.Sequences
    given, arrived = prompts([3, 17, 5, 9, 30]), engine.llm.llm_engine.engine_core.outputs_queue

    def num_ended() -> int:
        return sum(output.finished for outputs in list(arrived.queue) for output in outputs.outputs)

    def interrupted(request_id: str, prompt: Any, *args: Any, **options: Any) -> Any:
        if prompt["prompt_token_ids"] == given[3]["prompt_token_ids"]:
            wait_until(lambda: num_ended() == 3, "the end of three requests", DEATH_S)
            os.kill(os.getpid(), signal.SIGINT)
        return add_request(request_id, prompt, *args, **options)

    def interrupted_reading(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return read(*args)

    with monkeypatch.context() as patch, Interruption():
        if moment == "queueing":
            patch.setattr(engine.llm.llm_engine, "add_request", interrupted)
        else:
            patch.setattr(recording, "Sequences", interrupted_reading)
        result = engine.capture(given, HIDDEN)
    num_finished = 3 if moment == "queueing" else len(given)
    assert [output is not None for output in result.outputs] == [index < num_finished for index in range(len(given))]
    result.outputs = result.outputs[:num_finished]
    compare(result, known)
    assert engine.status()[0]["captures"] == []
    compare(engine.capture(prompts([4]), HIDDEN), known)


@pytest.mark.parametrize("moment", ["start", "finish", "outputs"])
def test_an_interrupted_call_leaves_nothing(monkeypatch, engine, known, moment):
    """After Ctrl-C while the worker begins a capture or hands rows over, or outputs are read, nobody holds anything."""
    receive, num_replies = Caller.receive, 0

    def interrupted(self: Caller, number: int) -> bytes:
        nonlocal num_replies
        num_replies += 1
        if num_replies == {"start": 1, "finish": 2}[moment]:
            raise KeyboardInterrupt
        return receive(self, number)

    def unreadable(*_: Any) -> None:
        raise KeyboardInterrupt

    engine.capture(prompts([3]), HIDDEN)  # connects
    with monkeypatch.context() as patch:
        if moment == "outputs":
            patch.setattr(recording, "Sequences", unreadable)
        else:
            patch.setattr(Caller, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.capture(prompts(seed=1), HIDDEN)
    assert engine.status()[0]["captures"] == []
    wait_until(lambda: engine.used_bytes() == 0, "the release of all rows", RELEASE_S)
    compare(engine.capture(prompts(), HIDDEN), known)


def test_an_interrupted_start_through_the_engine_leaves_nothing(monkeypatch, engine, known):
    """The same where a call waits for the worker before the client has anything to wait with."""
    rpc, names = Connection._rpc, []

    def interrupted(self: Connection, name: str, *args: Any) -> list[Any]:
        names.append(name)
        replies = rpc(self, name, *args)
        if names.count("call") == 1:
            raise KeyboardInterrupt
        return replies

    engine.capture(prompts([3]), HIDDEN)  # connects
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "_rpc", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.capture(prompts(seed=1), HIDDEN, transport="inline")
    assert engine.status()[0]["captures"] == []
    compare(engine.capture(prompts(), HIDDEN), known)


def test_requests_with_something_else_under_our_key_run_as_any_other(engine):
    """Whoever may send a request to a server must not be able to end it."""
    before = engine.generate(prompts())
    for value in ("mark", 7, ["x"], {"a": [1]}):
        assert engine.generate(prompts(), extra_args={KEY: value}) == before


def test_nothing_with_a_name_is_left_behind(engine, temporary):
    """Captures by any transport make no file, no shared memory with a name, and leave no file open."""
    engine.capture(prompts(), HIDDEN)  # connects, and makes what stays as long as the engine
    left = [left_by_captures(engine, temporary) for _ in range(3)]
    # Other programs make names in /dev/shm as well; one that captures leave behind is there every time.
    assert set() in left


def left_by_captures(engine: Engine, temporary: Path) -> set[str]:
    """Capture by every transport; return the names that were not there before."""
    before = named(engine, temporary)
    for transport in TRANSPORTS:
        engine.capture(prompts(), HIDDEN, transport=transport)
    return named(engine, temporary) - before


def named(engine: Engine, temporary: Path) -> set[str]:
    """Return all files in the folders that processes share, and the files that worker and client hold open."""
    shared = {str(path) for folder in (temporary, Path("/dev/shm")) for path in folder.rglob("*")}
    return shared | open_files(os.getpid()) | open_files(engine.status()[0]["pid"])


def open_files(pid: int) -> set[str]:
    """Return the names of open files of a process; sockets, pipes and memory without a name are left out."""
    names = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.add(os.readlink(fd))
        except OSError:
            continue  # closed since the listing, as the listing's own descriptor is
    return {name for name in names if name.startswith("/") and not name.startswith(("/memfd:", "/proc/"))}


@pytest.mark.skipif(device.ON_CUDA, reason="the driver needs files of its own, and an engine without it ends")
def test_memory_that_the_system_refuses_is_an_error_with_a_way_out(engine, known):
    """A worker that may open no more files says what to do; inline works at once, shared memory when it may again."""
    engine.capture(prompts([1]), Spec(hidden_states=[0]), budget_bytes=TOO_SMALL_BYTES)  # closes what is larger
    wait_until(lambda: engine.used_bytes() == 0, "the release of all rows", RELEASE_S)
    pid, limits = engine.status()[0]["pid"], resource.RLIMIT_NOFILE
    soft, hard = resource.prlimit(pid, limits)
    resource.prlimit(pid, limits, (8, hard))  # no more than it has; it still may wait for that many
    try:
        with pytest.raises(TransportError, match=r'ulimit -n.*transport="inline"'):
            engine.capture(prompts(), HIDDEN, transport="segment")
        compare(engine.capture(prompts(), HIDDEN, transport="inline"), known)
    finally:
        resource.prlimit(pid, limits, (soft, hard))
    compare(engine.capture(prompts(), HIDDEN, transport="segment"), known)


def mapped_segments() -> int:
    """Return how many segments this process maps, of this engine and of any that a module before has not let go of."""
    return Path("/proc/self/maps").read_text().count("/memfd:vllm-tap")


def core_and_worker(engine: Engine) -> dict[str, int]:
    """Return the processes of an engine by their part in it; on a single GPU one process is both."""
    worker = engine.status()[0]["pid"]
    core = psutil.Process(worker).ppid()
    return {"worker": worker, "core": worker if core == os.getpid() else core}


@pytest.mark.timeout(120, func_only=True)
@pytest.mark.parametrize("victim", VICTIMS or ["core"])
def test_rows_outlive_a_killed_engine_and_the_next_capture_says_so(others, engine, known, victim):
    """Tensors can be read after a kill -9, and the next capture raises at once, by every transport.

    Nothing stays in this process for it: no memory once the tensors are gone, and no thread that waits.
    """
    result = engine.capture(prompts(), Spec(hidden_states="all", embeddings=True))
    pid = core_and_worker(engine)[victim]
    os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    for transport in TRANSPORTS:
        with pytest.raises(EngineDiedError, match="new LLM"):
            engine.capture(prompts(), HIDDEN, transport=transport)
    assert time.monotonic() - begin < DEATH_S
    compare(result, known)
    engine.close()
    compare(result, known)
    del result
    gc.collect()
    assert mapped_segments() == 0
    threads = [
        thread for thread in threading.enumerate() if thread.name.startswith("vllm-tap") and thread not in others
    ]
    for thread in threads:  # one that ends may still be there
        thread.join(1)
    assert not [thread for thread in threads if thread.is_alive()]


@pytest.mark.timeout(120, func_only=True)
@pytest.mark.parametrize("victim", VICTIMS or ["worker"])
def test_an_engine_that_dies_during_a_capture_is_an_error(monkeypatch, engine, victim):
    """A process killed between two steps of a capture ends the call with EngineDiedError in bounded time."""
    pid = core_and_worker(engine)[victim]
    step, num_steps, killed_at = engine.llm.llm_engine.step, 0, 0.0

    def deadly() -> Any:
        nonlocal num_steps, killed_at
        num_steps += 1
        if num_steps == 4:
            killed_at = time.monotonic()
            os.kill(pid, signal.SIGKILL)
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine.llm.llm_engine, "step", deadly)
        with pytest.raises(EngineDiedError, match="new LLM"):
            engine.capture(prompts(), HIDDEN, sampling_params=greedy(max_tokens=100))
    assert time.monotonic() - killed_at < 2 * DEATH_S
    assert engine.llm.llm_engine.output_processor.request_states  # those that it died with hide nothing
    with pytest.raises(EngineDiedError, match="new LLM"):
        engine.capture(prompts(), HIDDEN)
    engine.close()
