"""Connections to the workers of an `AsyncLLM`, one for each of its engines. Client process, in its event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any, NamedTuple

from vllm_tap.client.connection import PROBE_TOKENS, Connection, require_able
from vllm_tap.client.identity import model_facts
from vllm_tap.client.replies import expect, explain, not_loaded
from vllm_tap.errors import PluginNotLoadedError, SpecError, TapError, TransportError
from vllm_tap.frame import messages
from vllm_tap.transport.tcp.address import host_id
from vllm_tap.vllm import asynchronous

logger = logging.getLogger("vllm_tap")


class Found(NamedTuple):
    """The engines of an `AsyncLLM`.

    Attributes:
        connections: To the workers of those that can be captured from, by the engines' numbers.
        sockets: Names of all workers' sockets, also of those that cannot be reached: the same in each process.
    """

    connections: dict[int, Connection]
    sockets: list[str]


async def connect_engines(llm: Any) -> Found:
    """Connect to the workers of the engines of an `AsyncLLM`: several where they are data parallel.

    Engines that cannot be captured from, as those of other hosts whose workers serve no network, are left out with a
    warning, unless there are no others.

    Raises:
        PluginNotLoadedError: The workers do not know this package.
        EngineUnsupportedError: They know it and cannot capture.
        EngineDiedError: The engine ended.
        TransportError: They cannot be reached from here.
    """
    asynchronous.require_async(llm)
    tried = await asyncio.gather(*(_tried(llm, number) for number in range(asynchronous.num_engines(llm))))
    connections = {number: one for number, (_, one) in enumerate(tried) if isinstance(one, Connection)}
    for number, (_, failed) in enumerate(tried):
        if isinstance(failed, TapError):
            if not connections:
                raise failed
            logger.warning("vllm-tap: data parallel rank %d captures nothing, others do: %s", number, failed)
    return Found(connections, [hello.calls for hellos, _ in tried for hello in hellos])


async def _tried(llm: Any, engine: int) -> tuple[list[messages.Hello], Connection | TapError]:
    """Return what the workers of an engine say, and a connection or what keeps it from being made."""
    hellos: list[messages.Hello] = []
    try:
        hellos = await _hellos(llm, engine)
        return hellos, await _connect(llm, engine, hellos)
    except TapError as error:
        return hellos, error


async def _connect(llm: Any, engine: int, hellos: list[messages.Hello]) -> Connection:
    require_able(hellos)
    addresses = [_address(hello) for hello in hellos]
    secret = next((hello.secret for hello in hellos if hello.secret), None)
    try:
        connection = await asyncio.to_thread(Connection.at, addresses, secret=secret)
    except SpecError as error:
        raise TransportError("workers run on another host: set VLLM_TAP_SECRET here as it is there.") from error
    connection.model = model_facts(llm)
    if connection.wants_rows:
        longest = llm.vllm_config.model_config.max_model_len - 1
        ids = list(itertools.islice(itertools.cycle(PROBE_TOKENS), min(connection.wants_rows, longest)))
        params = asynchronous.new_params(llm, None, {"max_tokens": 1, "temperature": 0.0}, "FINAL_ONLY")
        params.skip_reading_prefix_cache = True
        prompt, name = {"prompt_token_ids": ids}, f"vllm-tap-probe-{id(params)}"
        async for _ in asynchronous.generate(llm, prompt, params, name, engine):
            pass
        await asyncio.to_thread(connection.greet)
    return connection


async def _hellos(llm: Any, engine: int) -> list[messages.Hello]:
    """Ask the workers of an engine what can be captured."""
    try:
        replies = await asynchronous.call(llm, "vllm_tap_open", engine)
        return expect(messages.Hello, [messages.decode_reply(data) for data in replies], "vllm_tap_open")
    except PluginNotLoadedError as error:
        raise not_loaded(str(error)) from error
    except TapError:
        raise
    except Exception as error:
        told = explain(error)
        raise not_loaded(str(told)) if isinstance(told, PluginNotLoadedError) else told from error


def _address(hello: messages.Hello) -> str:
    """Return where a worker is reached: by a network if it runs on another host."""
    if hello.host in ("", host_id().hex()):
        return hello.calls
    if not hello.network:
        raise TransportError(
            f"worker {hello.rank.rank} runs on another host, and serves no network: {hello.no_network}."
        )
    return hello.network
