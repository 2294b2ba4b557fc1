"""Captures over a network, on loopback, from an engine that was told to listen; another engine listens nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from engine.engines import Engine, greedy, prompts
from vllm_tap import Recording, Spec
from vllm_tap.client.connection import Connection, connect
from vllm_tap.errors import TransportError

pytestmark = pytest.mark.engine

SPEC = Spec(hidden_states="all", final_hidden_states=True)


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """Llama, eager, with a worker that listens on loopback."""
    engine = Engine(tiny_model("llama"), enforce_eager=True, listens=True)
    yield engine
    engine.close()


def test_a_capture_over_tcp_has_the_rows_of_one_in_segments(engine):
    """Bit for bit, and the worker's memory is free while the result lives."""
    given = prompts()
    segment = engine.capture(given, SPEC, transport="segment")
    network = engine.capture(given, SPEC, transport="tcp")
    for one, other in zip(segment, network, strict=True):
        assert one.positions.tolist() == other.positions.tolist()
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert torch.equal(one.final_hidden_states, other.final_hidden_states)
        for layer in segment.layers["hidden_states"]:
            assert torch.equal(one.hidden_states[layer], other.hidden_states[layer])


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
    given = prompts([5, 40], seed=3)
    mine = engine.llm.generate(given, local.mark_all([greedy()] * 2), use_tqdm=False)
    theirs = engine.llm.generate(given, remote.mark_all([greedy()] * 2), use_tqdm=False)
    for one, other in zip(local.finish(mine), remote.finish(theirs), strict=True):
        for layer in one.hidden_states:
            assert torch.equal(one.hidden_states[layer], other.hidden_states[layer])
    assert [state["captures"] for state in engine.status()] == [[]]


def test_a_capturing_engine_listens_on_loopback_alone(engine):
    """What vLLM itself listens on is not ours; the worker's own address is of loopback."""
    (address,) = connect(engine.llm).network_addresses
    listening = {
        (at.laddr.ip, at.laddr.port)
        for process in engine.processes
        for at in psutil.Process(process.pid).net_connections("tcp")
        if at.status == psutil.CONN_LISTEN
    }
    assert ("127.0.0.1", int(address.rpartition(":")[2])) in listening
    assert {host for host, _ in listening} <= {"127.0.0.1", "::1"}
