"""Connections to the workers of an `AsyncLLM`, one for each of its engines. Client process, in its event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any

from vllm_tap.client.connection import PROBE_TOKENS, Connection, require_able
from vllm_tap.client.replies import expect, explain, not_loaded
from vllm_tap.errors import PluginNotLoadedError, TapError, TransportError
from vllm_tap.frame import messages
from vllm_tap.transport.tcp.address import host_id
from vllm_tap.vllm import asynchronous

logger = logging.getLogger("vllm_tap")


async def connect_engines(llm: Any) -> dict[int, Connection]:
    """Return connections to the workers of the engines of an `AsyncLLM`: several where they are data parallel.

    Engines of other hosts whose workers serve no network are left out, with a warning, unless there are no others.

    Raises:
        TapError: As of `connect_async`.
    """
    asynchronous.require_async(llm)
    numbers = range(asynchronous.num_engines(llm))
    found = await asyncio.gather(*(connect_async(llm, number) for number in numbers), return_exceptions=True)
    connections = {number: one for number, one in zip(numbers, found, strict=True) if isinstance(one, Connection)}
    for number, one in zip(numbers, found, strict=True):
        if isinstance(one, BaseException):
            if not connections or not isinstance(one, TransportError):
                raise one
            logger.warning("vllm-tap: data parallel rank %d captures nothing, others do: %s", number, one)
    return connections


async def connect_async(llm: Any, engine: int) -> Connection:
    """Return a connection to the workers of one of the engines of an `AsyncLLM`.

    Raises:
        PluginNotLoadedError: The workers do not know this package.
        EngineUnsupportedError: They know it and cannot capture.
        EngineDiedError: The engine ended.
        TransportError: They cannot be reached from here.
    """
    asynchronous.require_async(llm)
    hellos = await _hellos(llm, engine)
    require_able(hellos)
    addresses = [_address(hello) for hello in hellos]
    secret = next((hello.secret for hello in hellos if hello.secret), None)
    connection = await asyncio.to_thread(Connection.at, addresses, secret=secret)
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
            f"worker {hello.rank.rank} runs on another host, and {hello.no_network or 'it serves no network'}: "
            "set VLLM_TAP_LISTEN there, and VLLM_TAP_SECRET on both hosts."
        )
    return hello.network
