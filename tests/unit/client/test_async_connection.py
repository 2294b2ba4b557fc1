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
from vllm_tap.errors import EngineUnsupportedError, SpecError, TapError, TransportError
from vllm_tap.frame import messages
from vllm_tap.transport.tcp.address import host_id

HERE = host_id().hex()
WORKER = messages.Hello(
    rank=messages.Rank(0, 0, 1, 0, 1), pid=1, engine="0", runner="V1", device="cpu", num_layers=4, streams=(),
    residual="", reasons={}, routing={}, wants_rows=0, address="rows", calls="calls", host=HERE, refusal="",
)  # fmt: skip
ELSEWHERE = structs.replace(WORKER, host="00", no_network="it was started without VLLM_TAP_LISTEN=host:port")
SERVED = structs.replace(ELSEWHERE, network="tcp://10.0.0.7:7300", secret="made there")
GUARDED = structs.replace(SERVED, network="tcp://guarded:7300", secret="")
REFUSING = structs.replace(WORKER, refusal="it has no layers", address="", calls="")

SAYS = {
    ("", ""): "worker 0 runs on another host, and serves no network: it was started without VLLM_TAP_LISTEN=host:port.",
    (GUARDED.network, ""): "workers run on another host: set VLLM_TAP_SECRET here as it is there",
    ("", REFUSING.refusal): "rank 0 cannot capture: it has no layers",
}


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses and secrets of workers that were connected to."""
    found: list[Any] = []

    def at(cls: type[Connection], addresses: Sequence[str], *, secret: str | None) -> Connection:
        if addresses == ["tcp://guarded:7300"]:
            raise SpecError("a worker on a network wants a secret")
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

    model = SimpleNamespace(model="tiny", dtype="torch.float32")
    return SimpleNamespace(
        generate=None,
        collective_rpc=collective_rpc,
        vllm_config=SimpleNamespace(model_config=model),
        model_config=model,
        engine_core=Core(),
    )


@pytest.mark.parametrize(
    ("workers", "numbers", "wanted"),
    [
        ([WORKER], [0], [(["calls"], None)]),
        ([SERVED], [0], [(["tcp://10.0.0.7:7300"], "made there")]),
        ([WORKER, SERVED], [0, 1], [(["calls"], None), (["tcp://10.0.0.7:7300"], "made there")]),
        ([ELSEWHERE, WORKER], [1], [(["calls"], None)]),
        ([GUARDED, WORKER], [1], [(["calls"], None)]),
        ([REFUSING, WORKER], [1], [(["calls"], None)]),
    ],
)
def test_engines_are_reached_where_they_run(
    reached: list[Any],
    caplog: pytest.LogCaptureFixture,
    workers: list[messages.Hello],
    numbers: list[int],
    wanted: list[Any],
) -> None:
    """By a network those of other hosts; one that captures nothing is left out with a warning, and known."""
    with caplog.at_level(logging.WARNING, "vllm_tap"):
        found = asyncio.run(connect_engines(engines(*workers)))
    assert (list(found.connections), reached) == (numbers, wanted)
    assert found.sockets == [worker.calls for worker in workers]
    assert [one.model for one in found.connections.values()] == [{"name": "tiny", "dtype": "float32"}] * len(numbers)
    if len(numbers) < len(workers):
        assert "data parallel rank 0 captures nothing, others do: " in caplog.text
        assert SAYS[workers[0].network, workers[0].refusal] in caplog.text
    else:
        assert not caplog.text


@pytest.mark.parametrize(
    ("workers", "kind", "says"),
    [
        ([REFUSING], EngineUnsupportedError, "rank 0 cannot capture: it has no layers"),
        ([REFUSING, ELSEWHERE], EngineUnsupportedError, "it has no layers"),
        ([ELSEWHERE], TransportError, "worker 0 runs on another host, and serves no network: it was started without"),
        ([ELSEWHERE, GUARDED], TransportError, "runs on another host"),
        ([GUARDED], TransportError, "set VLLM_TAP_SECRET here as it is there"),
    ],
)
def test_what_keeps_engines_from_capturing_is_told(
    reached: list[Any], workers: list[messages.Hello], kind: type[TapError], says: str
) -> None:
    """Where one refuses, or none can be reached."""
    with pytest.raises(kind, match=says):
        asyncio.run(connect_engines(engines(*workers)))
