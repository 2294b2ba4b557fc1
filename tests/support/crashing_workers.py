"""An engine and a client in processes of their own, of which either is killed while workers write a dataset.

Used by `crash.py`. The engine is a `host_engine` whose rows follow from their tokens, so that datasets can be compared.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import host_engine
from host_engine import INFOS, TAPS, Prompt
from host_worker import PARAMS, SECRET, ServedEngine
from synthetic_rows import MODEL, tokens_of
from vllm_tap import Recording, Spec
from vllm_tap.client import connection as client_connection
from vllm_tap.client.writers import Writers
from vllm_tap.engine.model.tap import tap
from vllm_tap.errors import EngineDiedError
from vllm_tap.store import files
from vllm_tap.store.recording import Run, record_with

SPEC = Spec(hidden_states="all", embeddings=True, routed_experts="all")
RUN = Run(SPEC, MODEL, "greedy", {"vllm_tap": "0"})
LOST = 8
"""Exit code of a client whose engine has gone."""

PATIENCE_S = 20.0

_client_pids = [0]  # 0 until it asks for the first rows


def client_pid() -> int:
    """Return the process of the client that the engine works for."""
    return _client_pids[0]


class FixedEngine(host_engine.HostEngine):
    """Rows follow from the tokens up to their position."""

    def _forward(self, names: Any, positions: Any) -> None:
        infos = {info.name: info for info in INFOS}
        texts = [
            f"{self.requests[str(name)].token_ids[: position + 1]}"
            for name, position in zip(names, positions.tolist(), strict=True)
        ]
        for (stream, layer), place in TAPS.items():
            info = infos[stream]
            drawn = [hashlib.shake_128(f"{stream} {layer} {text}".encode()).digest(info.width) for text in texts]
            rows = torch.from_numpy(np.frombuffer(b"".join(drawn), np.uint8).reshape(-1, info.width).copy())
            made = rows if stream == "expert_ids" else ((rows.float() - 99) / 7).to(getattr(torch, info.dtype))
            tap(made, None, place.control)


def prompt_of(text: str) -> Prompt:
    """Return a prompt, and what is generated behind it."""
    drawn = hashlib.shake_128(text.encode()).digest(5)
    return Prompt(text, tokens_of(text), [list(drawn[: 1 + drawn[4] % 4])])


def serve(path: Path, num_ranks: int, hook: Callable[[], None] = lambda: None) -> None:
    """Be the engine: generate what clients ask for, one after the other, until this process is killed."""
    files.CHUNK_BYTES = 64
    engine = ServedEngine(random.Random(0), num_ranks, engine=FixedEngine)
    hook()
    with Listener(str(path)) as listener:
        while True:
            with listener.accept() as control:
                control.send([worker.addresses.calls for worker in engine.workers])
                try:
                    _generate_all(engine, control)
                except (EOFError, OSError):
                    continue


def _generate_all(engine: ServedEngine, control: Connection) -> None:
    while True:
        texts, marks, pid = control.recv()
        if texts:
            _client_pids[0] = pid
        else:  # asked for what is left of clients that are gone
            control.send((_held(engine), _writing()))
            continue
        prompts = [prompt_of(text) for text in texts]
        engine.send(prompts, [SimpleNamespace(extra_args=mark) for mark in marks])
        control.send([prompt.output() for prompt in prompts])


def _held(engine: ServedEngine) -> int:
    return sum(len(worker._pools._pools) for worker in engine.workers if worker._pools is not None)


def _writing() -> int:
    return sum(thread.name.startswith("vllm-tap-writer") for thread in threading.enumerate())


def reached(path: Path) -> tuple[Connection, list[str]]:
    """Connect to an engine that begins."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            control = Client(str(path))
            return control, control.recv()
        except (FileNotFoundError, ConnectionError, EOFError):
            assert time.monotonic() < deadline, "the engine does not begin"
            time.sleep(0.01)


def record(path: Path, folder: Path, texts: list[str], batch: int, writers: str) -> None:
    """Be the client: record what is left; end with `LOST` where the engine has gone."""
    try:
        control, addresses = reached(path)
        connection = client_connection.Connection.at(addresses, secret=SECRET)
        who = Writers(connection, folder, SPEC, "auto", writers)

        def capture(some: list[str]) -> Any:
            recording = Recording(connection, SPEC)
            if who.are_workers:
                recording.leave_rows()
            marks = [recording.mark(SimpleNamespace(**PARAMS, n=1), n).extra_args for n in range(len(some))]
            control.send((some, marks, os.getpid()))
            result = recording.finish(control.recv())
            if who.are_workers:
                who.leave(result)
            return result

        record_with(capture, texts, folder, RUN, resume=True, batch=batch)
    except (EngineDiedError, EOFError, ConnectionError):
        os._exit(LOST)


def require_nothing_left(path: Path) -> None:
    """Fail where an engine keeps memory of a client that is gone, or goes on writing for it."""
    control, _ = reached(path)
    deadline = time.monotonic() + PATIENCE_S
    with control:
        while True:
            control.send(([], [], 0))
            left = control.recv()
            if left == (0, 0):
                return
            assert time.monotonic() < deadline, f"pools and threads are left of a client that was killed: {left}"
            time.sleep(0.01)
