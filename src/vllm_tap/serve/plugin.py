"""Entry point of vLLM's API server, loaded where VLLM_PLUGINS names it. In each API process."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from vllm_tap.errors import TapError

logger = logging.getLogger("vllm_tap")


class TapEndpoints:
    """An endpoint plugin of vLLM: routes of rows, and captures around the engine's `generate`.

    Attributes:
        service: What the routes serve; None before the server is up, and where captures cannot work, see `why_not`.
    """

    name = "vllm_tap"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.service: Any = None
        self.why_not = "it is starting."

    def attach_router(self, app: Any) -> None:
        """Register the routes."""
        from vllm_tap.serve.routes import Caller, new_router

        app.include_router(new_router(self))
        app.add_middleware(Caller, holder=self)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Connect to the workers. A server that cannot capture serves all the same."""
        from vllm_tap.client.async_connection import connect_engines
        from vllm_tap.client.engines import Engines
        from vllm_tap.serve import settings
        from vllm_tap.serve.captures import Captures
        from vllm_tap.serve.metrics import Metrics
        from vllm_tap.serve.peers import Peers
        from vllm_tap.serve.results import Results
        from vllm_tap.serve.routes import Service
        from vllm_tap.vllm.log import log_as_vllm

        log_as_vllm()
        given = settings.read(engine_client.vllm_config.additional_config)  # a wrong one ends the server's start
        try:
            connections, sockets = await connect_engines(engine_client)
        except TapError as error:
            self.why_not = str(error)
            logger.warning("vllm-tap captures nothing in this server: %s", error)
            return
        metrics, results = Metrics(), Results(given)
        engines = Engines(
            engine_client,
            connections,
            linger_s=settings.LINGER_S,
            most=max(1, given.max_specs // (getattr(args, "api_server_count", None) or 1)),
            budget_bytes=given.budget_bytes,
            on_full="wait",
        )
        Captures(engine_client, engines, results, given, metrics)
        keys = [key for key in (getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]) if key]
        peers = Peers(results, sockets, asyncio.get_running_loop())
        self.service = Service(results, peers, metrics, bool(keys))
