"""Workers of a `host_engine`, with their sockets, and captures through these: all of a capture but a model and vLLM.

Runs in one process; clients reach the workers by addresses, as those of another process or host do.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

from host_engine import INFOS, NUM_LAYERS, ROWS, TAPS, HostEngine, Prompt, Request
from vllm_tap import Recording
from vllm_tap.client.connection import Connection
from vllm_tap.engine.capture.cpu import CpuBackend
from vllm_tap.engine.capture.memory import Pools
from vllm_tap.engine.servers import Servers
from vllm_tap.engine.worker import TapWorker
from vllm_tap.frame import messages
from vllm_tap.frame.layout import Stream
from vllm_tap.labels import read_mark
from vllm_tap.transport.tcp.address import host_id
from vllm_tap.vllm.runner import Batch

SECRET = "a secret of the tests"
PARAMS = {"max_tokens": 9, "extra_args": None, "skip_reading_prefix_cache": False}

_names = itertools.count()


class HostWorker(TapWorker):
    """One of the tensor-parallel ranks of a host engine."""

    def __init__(self, drafts: bool, rank: int, num_ranks: int, listens: bool, write_root: str) -> None:
        runner = SimpleNamespace(max_num_tokens=64)
        speculative = SimpleNamespace(num_speculative_tokens=2 * drafts)
        config = SimpleNamespace(speculative_config=speculative)
        super().__init__(SimpleNamespace(rank=rank, model_runner=runner, vllm_config=config))
        self._num_ranks = num_ranks
        self._backend = backend = CpuBackend()
        backend.rows = ROWS
        self._pools = Pools(backend)
        self._closing += [self._pools, self._writers]
        routers = SimpleNamespace(biases=lambda: None, check=lambda biases, rows_of: (0, {}))
        self._taps: Any = SimpleNamespace(rows=ROWS, by_place=TAPS, end_pass=lambda: None, routers=routers)
        self._servers = Servers(rank, self._pools, self.call, self._client_gone, self._closing)
        variables = {"VLLM_TAP_SECRET": SECRET, "VLLM_TAP_WRITE_ROOT": write_root}
        if listens:
            variables["VLLM_TAP_LISTEN"] = "127.0.0.1:0"
        with mock.patch.dict(os.environ, variables):
            self._servers.listen(0)
        self.addresses = self._servers.addresses()

    def _hello(self) -> messages.Hello:
        return messages.Hello(
            rank=messages.Rank(self.rank, self.rank, self._num_ranks, 0, 1),
            pid=os.getpid(),
            engine="",
            runner="",
            device="cpu",
            num_layers=NUM_LAYERS,
            streams=INFOS,
            residual="",
            reasons={},
            routing={},
            wants_rows=0,
            host=host_id().hex(),
            refusal="",
            **self.addresses._asdict(),
        )

    def _share(self, start: messages.Start) -> tuple[Stream, ...]:
        mine = {
            info: tuple(n for n in start.streams.get(info.name, ()) if n % self._num_ranks == self.rank)
            for info in INFOS
        }
        return tuple(Stream(info.name, info.dtype, info.width, layers) for info, layers in mine.items() if layers)

    def before_forward(self, batch: Batch) -> None:
        self.lock.acquire()  # for the whole step, as in an engine
        super().before_forward(batch)

    def after_sampling(self) -> None:
        super().after_sampling()
        self.lock.release()

    def close(self) -> None:
        """End all that it has opened."""
        for one in reversed(self._closing):
            one.close()


class Served:
    """A worker as a `HostEngine` sees it."""

    def __init__(self, worker: HostWorker) -> None:
        self.session = worker

    def meet(self, request: Request, params: Any) -> None:
        """A request is scheduled."""
        mark = read_mark(params.extra_args)
        assert mark is not None
        self.session.expect([mark])
        with self.session.lock:
            self.session.meet(request.name, mark, request.prompt_len, True)


class ServedEngine:
    """A host engine whose workers clients reach through sockets.

    Args:
        draw: Draws all that is random.
        num_ranks: Of its workers.
        drafts: Whether it drafts.
        listens: Whether workers listen on loopback.
        write_root: Folder below which they write for clients that come from there.
        engine: Its kind.
    """

    def __init__(
        self,
        draw: Any,
        num_ranks: int = 1,
        drafts: bool = False,
        listens: bool = False,
        write_root: str = "",
        engine: type[HostEngine] = HostEngine,
    ) -> None:
        self._engine = engine(draw, drafts)
        self.workers = [HostWorker(drafts, rank, num_ranks, listens, write_root) for rank in range(num_ranks)]
        self._served: list[Any] = [Served(worker) for worker in self.workers]
        self._engine.clients.extend(self._served)

    def connect(self, way: str = "segment") -> Connection:
        """Return a new connection to the workers."""
        addresses = [worker.addresses for worker in self.workers]
        where = [one.network if way == "tcp" else one.calls for one in addresses]
        return self.connect_at(where)

    def connect_at(self, addresses: Sequence[str]) -> Connection:
        """Return a new connection to the workers at addresses."""
        return Connection.at(addresses, secret=SECRET)

    def run(self, recordings: Sequence[Recording], prompts: Sequence[Prompt]) -> None:
        """Generate from prompts, all of which each of the recordings captures."""
        for recording in recordings:
            for sample, prompt in enumerate(prompts):
                params = recording.mark(SimpleNamespace(**PARAMS, n=len(prompt.requests)), sample)
                self._add(prompt, params)
        self._run(prompts)

    def send(self, prompts: Sequence[Prompt], params: Sequence[Any]) -> None:
        """Generate from prompts with marked parameters."""
        for prompt, given in zip(prompts, params, strict=True):
            self._add(prompt, given)
        self._run(prompts)

    def _add(self, prompt: Prompt, params: Any) -> None:
        for request in prompt.requests:
            request.params.extend((served, params) for served in self._served)

    def _run(self, prompts: Sequence[Prompt]) -> None:
        requests = [request for prompt in prompts for request in prompt.requests]
        self._engine.requests = {request.name: request for request in requests}
        for _ in self._engine.run(requests):
            pass

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.close()


def prompts_of(draw: Any, count: int, longest: int = 12) -> list[Prompt]:
    """Return so many prompts, some with several completions."""

    def tokens(most: int) -> list[int]:
        return [draw.randrange(6) for _ in range(draw.randint(1, most))]

    return [
        Prompt(f"{next(_names)}", tokens(longest), [tokens(9) for _ in range(draw.choice((1, 1, 1, 3)))])
        for _ in range(count)
    ]
