"""Connections to the engines of an `AsyncLLM`: where workers are reached, and what is said of those that cannot be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs

from vllm_tap.client.async_connection import connect_engines
from vllm_tap.client.connection import Connection
from vllm_tap.errors import EngineUnsupportedError, TapError, TransportError
from vllm_tap.frame import messages
from vllm_tap.transport.tcp.address import host_id

HERE = host_id().hex()
WORKER = messages.Hello(
    rank=messages.Rank(0, 0, 1, 0, 1), pid=1, engine="0", runner="V1", device="cpu", num_layers=4, streams=(),
    residual="", reasons={}, routing={}, wants_rows=0, address="rows", calls="calls", host=HERE, refusal="",
)  # fmt: skip
ELSEWHERE = structs.replace(WORKER, host="00", no_network="it was started without VLLM_TAP_LISTEN=host:port")
SERVED = structs.replace(ELSEWHERE, network="tcp://10.0.0.7:7300", secret="made there")
REFUSING = structs.replace(WORKER, refusal="it has no layers", address="", calls="")


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses and secrets of workers that were connected to."""
    found: list[Any] = []

    def at(cls: type[Connection], addresses: Sequence[str], *, secret: str | None) -> Connection:
        found.append((addresses, secret))
        connection = object.__new__(Connection)
        connection.hellos = [WORKER]
        return connection

    monkeypatch.setattr(Connection, "at", classmethod(at))
    return found


def engines(*workers: messages.Hello) -> Any:
    """Return an `AsyncLLM` of an engine for each worker."""

    class Core:
        core_engines = tuple(range(len(workers)))

        async def _call_utility_async(self, *arguments: Any, engine: int) -> list[bytes]:
            return [messages.encode(workers[engine])]

    async def collective_rpc(method: str) -> list[bytes]:
        return [messages.encode(workers[0])]

    config = SimpleNamespace(model_config=SimpleNamespace())
    return SimpleNamespace(generate=None, collective_rpc=collective_rpc, vllm_config=config, engine_core=Core())


@pytest.mark.parametrize(
    ("workers", "numbers", "wanted"),
    [
        ([WORKER], [0], [(["calls"], None)]),
        ([SERVED], [0], [(["tcp://10.0.0.7:7300"], "made there")]),
        ([WORKER, SERVED], [0, 1], [(["calls"], None), (["tcp://10.0.0.7:7300"], "made there")]),
        ([ELSEWHERE, WORKER], [1], [(["calls"], None)]),
    ],
)
def test_engines_are_reached_where_they_run(
    reached: list[Any],
    caplog: pytest.LogCaptureFixture,
    workers: list[messages.Hello],
    numbers: list[int],
    wanted: list[Any],
) -> None:
    """By a network those of other hosts; one that nobody can reach is left out, with a warning."""
    with caplog.at_level(logging.WARNING, "vllm_tap"):
        connections = asyncio.run(connect_engines(engines(*workers)))
    assert (list(connections), reached) == (numbers, wanted)
    says = (
        "rank 0 captures nothing, others do: worker 0 runs on another host, and it was started without VLLM_TAP_LISTEN"
    )
    assert (says in caplog.text) == (len(numbers) < len(workers))


@pytest.mark.parametrize(
    ("workers", "kind", "says"),
    [
        ([REFUSING], EngineUnsupportedError, "rank 0 cannot capture: it has no layers"),
        ([WORKER, REFUSING], EngineUnsupportedError, "it has no layers"),
        ([ELSEWHERE], TransportError, "set VLLM_TAP_LISTEN there, and VLLM_TAP_SECRET on both hosts"),
        ([ELSEWHERE, ELSEWHERE], TransportError, "runs on another host"),
    ],
)
def test_what_keeps_engines_from_capturing_is_told(
    reached: list[Any], workers: list[messages.Hello], kind: type[TapError], says: str
) -> None:
    """Where one refuses, or none can be reached."""
    with pytest.raises(kind, match=says):
        asyncio.run(connect_engines(engines(*workers)))
