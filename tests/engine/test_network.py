"""Captures over a network, on loopback, from an engine that was told to listen; one that was not listens nowhere."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from engine.engines import HAS_NIXL, Engine, greedy, prompts, surroundings, wait_until
from vllm_tap import Recording, Spec, record
from vllm_tap.cli import verify
from vllm_tap.client.connection import Connection, connect
from vllm_tap.errors import DatasetError, EngineDiedError, TransportError
from vllm_tap.transport.tcp.access import SILENCE_SECONDS
from vllm_tap.transport.tcp.reader import NetworkReader

pytestmark = pytest.mark.engine

SPEC = Spec(hidden_states="all", final_hidden_states=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder below which the worker writes datasets."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path], shared: Path) -> Iterator[Engine]:
    """Llama, eager, with a worker that listens on loopback."""
    with surroundings({"VLLM_TAP_WRITE_ROOT": str(shared)}):
        engine = Engine(tiny_model("llama"), enforce_eager=True, listens=True)
    yield engine
    engine.close()


def test_a_capture_over_tcp_has_the_rows_of_one_in_segments(engine):
    """Bit for bit, of a prompt at a time: which of several meet in a step depends on when each of them arrives."""
    given = prompts([150])
    segment = engine.capture(given, SPEC, transport="segment")
    network = engine.capture(given, SPEC, transport="tcp")
    for one, other in zip(segment, network, strict=True):
        assert one.positions.tolist() == other.positions.tolist()
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert torch.equal(one.final_hidden_states, other.final_hidden_states)
        for layer in segment.layers["hidden_states"]:
            assert torch.equal(one.hidden_states[layer], other.hidden_states[layer])


def test_rows_that_are_recorded_over_tcp_stay_with_the_worker(engine, shared, tmp_path, monkeypatch):
    """It writes them where it may, unasked; elsewhere the client does, and if workers are asked for, nobody."""
    given, options = prompts([5, 70]), {"batch": 1, "max_tokens": 4, "temperature": 0}
    fetches, plain = [], NetworkReader.fetch
    monkeypatch.setattr(NetworkReader, "fetch", lambda *args: (fetches.append(args), plain(*args)))
    files, num_fetches = [], []
    for way, folder in [("segment", tmp_path / "local"), ("tcp", shared / "run"), ("tcp", tmp_path / "fetched")]:
        record(engine.llm, given, SPEC, folder, transport=way, **options)
        files.append({one.relative_to(folder): one.read_bytes() for one in folder.glob("*/*.safetensors")})
        num_fetches.append(len(fetches))
    assert files[0] == files[1] == files[2]
    assert num_fetches == [0, 0, 2]
    with pytest.raises(DatasetError, match="is not below"):
        record(engine.llm, given, SPEC, tmp_path / "run", transport="tcp", writers="workers", **options)


@pytest.mark.skipif(not HAS_NIXL, reason="NIXL is not installed: make test-nixl")
def test_a_capture_over_nixl_has_the_rows_of_one_in_segments(engine):
    """Bit for bit; and again, over the connection that is there."""
    given = prompts([150])
    segment = engine.capture(given, SPEC, transport="segment")
    held = engine.used_bytes()
    for _ in range(2):
        read = engine.capture(given, SPEC, transport="nixl")
        for one, other in zip(segment, read, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert torch.equal(one.final_hidden_states, other.final_hidden_states)
            for layer in segment.layers["hidden_states"]:
                assert torch.equal(one.hidden_states[layer], other.hidden_states[layer])
        wait_until(lambda: engine.used_bytes() == held, "the end of the blocks that were read")


def test_a_client_elsewhere_captures_with_the_secret_alone(engine):
    """An address and the secret are all that it needs; without the secret it gets nothing."""
    own = connect(engine.llm)
    (hello,) = own.hellos
    secret = hello.secret
    with pytest.raises(TransportError, match="secret"):
        Connection.at(own.network_addresses, secret="another secret, as long")
    elsewhere = Connection.at(own.network_addresses, secret=secret)
    assert not elsewhere.hellos[0].secret
    local, remote = Recording(engine.llm, SPEC), Recording(elsewhere, SPEC)
    given = prompts([70], seed=3)
    mine = engine.llm.generate(given, local.mark_all([greedy()]), use_tqdm=False)
    theirs = engine.llm.generate(given, remote.mark_all([greedy()]), use_tqdm=False)
    for one, other in zip(local.finish(mine), remote.finish(theirs), strict=True):
        for layer in one.hidden_states:
            assert torch.equal(one.hidden_states[layer], other.hidden_states[layer])
    assert [state["captures"] for state in engine.status()] == [[]]


def test_a_connection_that_was_lost_is_made_anew(engine):
    """A capture under way ends with an error that says to capture again; the next one is as if nothing had been."""
    given, own = prompts([70]), connect(engine.llm)
    expected = engine.capture(given, SPEC, transport="tcp")
    recording = Recording(engine.llm, SPEC, transport="tcp")
    for _ in range(2):  # the second time without a capture under way
        for stream in own.ways.readers("tcp").values():
            stream._session.shutdown()
        if recording is not None:
            with pytest.raises(EngineDiedError, match="Capture again"):
                recording.finish([])
        recording = None
        found = engine.capture(given, SPEC, transport="tcp")
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.final_hidden_states, other.final_hidden_states)
    wait_until(lambda: not engine.status()[0]["captures"], "the end of captures")


def test_a_worker_that_stands_still_is_an_error_in_bounded_time(engine):
    """SIGSTOP: rows that wait in it, a client that connects, and a capture that begins each raise; none hangs."""
    own = connect(engine.llm)
    (hello,) = own.hellos
    elsewhere = Connection.at(own.network_addresses, secret=hello.secret)
    given, remote = prompts([5, 40]), Recording(elsewhere, SPEC)
    outputs = engine.llm.generate(given, remote.mark_all([greedy()] * 2), use_tqdm=False)
    attempts = [
        lambda: remote.finish(outputs),
        lambda: Connection.at(own.network_addresses, secret=hello.secret),
        lambda: engine.capture(given, SPEC, transport="tcp"),
    ]
    own.ways.readers("tcp")  # connected before, as it is from then on
    (worker,) = {state["pid"] for state in engine.status()}
    begin = time.monotonic()
    os.kill(worker, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor() as threads:
            raised = [future.exception() for future in [threads.submit(attempt) for attempt in attempts]]
        took = time.monotonic() - begin
    finally:
        os.kill(worker, signal.SIGCONT)
    assert [type(error) for error in raised] == [EngineDiedError, TransportError, EngineDiedError]
    assert all("sends nothing" in str(error) for error in raised), raised
    assert took < 2 * SILENCE_SECONDS  # once for each, not once more to clean up
    elsewhere.ways.readers("tcp")[0].close()  # which ends its capture


def test_a_capturing_engine_listens_on_loopback_alone(engine):
    """What vLLM itself listens on is not ours; the worker's own address is of loopback."""
    (address,) = connect(engine.llm).network_addresses
    listening = listeners(engine)
    assert ("127.0.0.1", int(address.rpartition(":")[2])) in listening
    assert {host for host, _ in listening} <= {"127.0.0.1", "::1"}


def test_verify_checks_every_transport(engine):
    """What `vllm-tap verify` finds of this engine holds, and rows over TCP are among it."""
    options = SimpleNamespace(max_tokens=2, reference=False, model="llama")
    checks = list(verify._checks(engine.llm, verify.make_prompts(engine.llm, 2, seed=0), options))
    assert [check for check in checks if not check.holds] == []
    names = {check.name: check.text for check in checks}
    assert {names[f"transport {name}"] for name in ("inline", "segment", "tcp")} == {"equal bytes"}


def test_an_engine_that_was_not_told_to_listens_nowhere(tiny_model: Callable[..., Path]):
    """A capture opens no socket of a network: those that listen are vLLM's, and of loopback."""
    engine = Engine(tiny_model("llama"), enforce_eager=True)
    before = listeners(engine)
    with Recording(engine.llm, SPEC) as recording:
        engine.llm.generate(prompts([5]), recording.mark_all([greedy()]), use_tqdm=False)
        assert engine.used_bytes()
        assert listeners(engine) == before
    assert {host for host, _ in before} <= {"127.0.0.1", "::1"}
    assert not connect(engine.llm).network_addresses
    engine.close()


def listeners(engine: Engine) -> set[tuple[str, int]]:
    """Return addresses on which processes of an engine, and this one, listen."""
    return {
        (at.laddr.ip, at.laddr.port)
        for pid in [os.getpid(), *(process.pid for process in engine.processes)]
        for at in psutil.Process(pid).net_connections("inet")
        if at.status == psutil.CONN_LISTEN
    }
