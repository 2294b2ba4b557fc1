"""Connections to the workers of an `AsyncLLM`, one for each of its engines. Client process, in its event loop."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from vllm_tap.client.connection import PROBE_TOKENS, Connection
from vllm_tap.client.replies import expect, explain, not_loaded
from vllm_tap.errors import PluginNotLoadedError, TapError
from vllm_tap.frame import messages
from vllm_tap.vllm import asynchronous


async def connect_engines(llm: Any) -> list[Connection]:
    """Return connections to the workers of all engines of an `AsyncLLM`: several where they are data parallel.

    Raises:
        TapError: As of `connect_async`.
    """
    asynchronous.require_async(llm)
    return list(await asyncio.gather(*(connect_async(llm, engine) for engine in range(asynchronous.num_engines(llm)))))


async def connect_async(llm: Any, engine: int) -> Connection:
    """Return a connection to the workers of one of the engines of an `AsyncLLM`.

    Raises:
        PluginNotLoadedError: The workers do not know this package.
        EngineUnsupportedError: They know it and cannot capture.
        EngineDiedError: The engine ended.
    """
    asynchronous.require_async(llm)
    addresses = await _addresses(llm, engine)
    connection = await asyncio.to_thread(Connection.at, addresses)
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


async def _addresses(llm: Any, engine: int) -> list[str]:
    try:
        replies = await asynchronous.call(llm, "vllm_tap_open", engine)
        hellos = expect(messages.Hello, [messages.decode_reply(data) for data in replies], "vllm_tap_open")
    except PluginNotLoadedError as error:
        raise not_loaded(str(error)) from error
    except TapError:
        raise
    except Exception as error:
        told = explain(error)
        raise not_loaded(str(told)) if isinstance(told, PluginNotLoadedError) else told from error
    return [hello.calls for hello in hellos]
