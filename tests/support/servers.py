"""Starts vLLM's server with our routes, as a process of its own, for tests and for what measures it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.engines import ARGUMENTS
from vllm_tap.vllm import launch

httpx = pytest.importorskip("httpx")

KEY = "a-key"
COMMAND = "import sys; from vllm_tap.cli import command; sys.exit(command())"
START_S = 540.0
IDLE_S = 3600
"""Seconds for which a server keeps idle connections. By default vLLM closes them after 5: a request that goes out at
that moment is lost (`ReadError` of httpx)."""

PLAIN = {"VLLM_TAP": "0", "VLLM_PLUGINS": ""}
"""Variables of a server without this package."""

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


class Server:
    """A server of `vllm-tap serve`.

    Args:
        folder: Of the model.
        log: File for what it says.
        settings: Of ours.
        is_plain: Whether it is `vllm serve` without this package.
        **options: Arguments of `vllm serve`, over those that are here: True for a flag, None to leave one out.
    """

    def __init__(
        self, folder: Path, log: Path, settings: dict[str, Any] | None = None, *, is_plain: bool = False, **options: Any
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        template = log.with_name("template.jinja")
        template.write_text(TEMPLATE)
        given = {
            **ARGUMENTS, "enforce_eager": True, "api_server_count": 2, "port": port, "host": "127.0.0.1",
            "api_key": KEY, "served_model_name": "tiny", "chat_template": template, "generation_config": "vllm",
            "additional_config": None if is_plain else json.dumps({"vllm_tap_serve": settings or {}}), **options,
        }  # fmt: skip
        arguments: list[str] = []
        for name, value in given.items():
            if value is not None:
                arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        program = ["-m", launch.COMMAND] if is_plain else ["-c", COMMAND]
        command = [sys.executable, *program, "serve", str(folder), *arguments]
        variables = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(IDLE_S), **os.environ, **(PLAIN if is_plain else {})}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=variables, start_new_session=True)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        with httpx.Client(timeout=1) as client:  # each would read all certificates
            while time.monotonic() < deadline and self.process.poll() is None:
                try:
                    if client.get(self.url.replace("/v1", "/health")).status_code == 200:
                        return
                except httpx.HTTPError:
                    time.sleep(0.2)
        self.close()
        raise AssertionError(self.log.read_text()[-4000:])

    def get(self, path: str, key: str = KEY, **options: Any) -> Any:
        """Return a reply of the server."""
        return httpx.get(f"{self.url}{path}", headers={"Authorization": f"Bearer {key}"}, **options)

    def post(self, path: str, given: dict[str, Any]) -> Any:
        """Return the reply to a request of JSON."""
        return httpx.post(
            self.url.replace("/v1", path), headers={"Authorization": f"Bearer {KEY}"}, json=given, timeout=300
        )

    def metrics(self) -> dict[str, float]:
        """Return what our counters say, without their prefix."""
        lines = httpx.get(self.url.replace("/v1", "/metrics")).text.splitlines()
        found = (line.split() for line in lines if line.startswith("vllm_tap_") and "_total" in line)
        return {name.removeprefix("vllm_tap_").partition("_total")[0]: float(value) for name, value in found}

    def cpu_seconds(self) -> float:
        """Return the processor time of all its processes so far."""
        process = psutil.Process(self.process.pid)
        return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))

    def close(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
