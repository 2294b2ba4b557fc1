"""Captures around the `generate` of an engine client: which requests, what their replies get, what is counted.

No engine runs: outputs and rows are made here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_tap.client.engines import Engines
from vllm_tap.client.owned import OwnedRows
from vllm_tap.client.result import Capture
from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import EngineUnsupportedError, TransportError
from vllm_tap.spec import Spec

fastapi = pytest.importorskip("fastapi")
prometheus = pytest.importorskip("prometheus_client")

from vllm_tap.serve import captures  # noqa: E402
from vllm_tap.serve.metrics import Metrics  # noqa: E402
from vllm_tap.serve.results import Results  # noqa: E402
from vllm_tap.serve.settings import Settings  # noqa: E402

PROMPT = {"prompt_token_ids": [1, 2, 3]}
ASKED = '{"hidden_states": [1]}'
BEAM = f"cmpl-1-{'a' * 32}-beam-0"


class Lives:
    """Captures of no engine: each layer of a request has the row's position."""

    def __init__(
        self, error: Exception | None = None, start_error: Exception | None = None, *, engine: int = 0, length: int = 0
    ) -> None:
        self.connection, self._error, self._start_error = SimpleNamespace(), error, start_error
        self.engine, self._length, self.num_requests = engine, length, 0
        self.failed = float("-inf")
        self.specs: list[Spec] = []
        self.num_asked = 0
        self.is_crowded = False
        self.blocked: asyncio.Event | None = None
        self.room: list[int] = []
        self.stall = asyncio.Event()
        self.stall.set()

    def __len__(self) -> int:
        return self._length

    def __contains__(self, spec: object) -> bool:
        return False

    @contextlib.asynccontextmanager
    async def request(self, spec: Spec, params: Any) -> AsyncIterator[Any]:
        if self._start_error:
            raise self._start_error
        self.specs.append(spec)
        request = SimpleNamespace(params=params, result=None, has_all=False)
        request.has_more = lambda tokens: True
        request.is_crowded = lambda tokens: self.is_crowded
        wanted = asyncio.Event()

        async def rest() -> None:
            await wanted.wait()
            wanted.clear()

        request.rest, request.hurry = rest, wanted.set
        request.rows = lambda tokens: self._rows(spec, tokens)
        request.has_room = lambda num_rows: self.stall.is_set()
        request.begin, request.left = self._enter, self._leave
        yield request

    async def _enter(self, num_rows: int) -> None:
        self.room.append(num_rows)
        await self.stall.wait()

    def _leave(self) -> None:
        self.room.append(0)

    async def _rows(self, spec: Spec, tokens: Any) -> Capture | None:
        self.num_asked += 1
        if self.blocked is not None:
            await self.blocked.wait()
        if self._error:
            raise self._error
        if not tokens.finished:
            return None
        sequences = Sequences([tokens], spec.positions)
        rows = torch.arange(len(sequences.wanted))[:, None].repeat(1, 2) * 1.0
        states = OwnedRows({("hidden_states", 1): rows})
        return Capture(spec, [tokens], sequences, [states], {"hidden_states": "x"}, {}, ["hidden_states"], 4, True)


class Server:
    """An engine client around which captures are taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *lives: Lives, **settings: Any) -> None:
        monkeypatch.setattr(captures, "resolve", lambda connection, spec: {"hidden_states": (1,)})
        monkeypatch.setattr(captures.missing, "check_params", lambda spec, params, number: None)
        all_lives, given = list(lives) or [Lives()], Settings(**settings)
        core = SimpleNamespace(core_engines=[one.engine for one in all_lives])
        self.llm = SimpleNamespace(generate=self._outputs, engine_core=core)
        connections: Any = {one.engine: one.connection for one in all_lives}
        self.lives, engines = all_lives[0], Engines(self.llm, connections)
        engines._lives = all_lives  # type: ignore[assignment]
        self.results, self.metrics = Results(given), Metrics(prometheus.CollectorRegistry())
        captures.Captures(self.llm, engines, self.results, given, self.metrics)

    async def _outputs(self, prompt: Any, params: Any, name: str, **options: Any) -> AsyncIterator[Any]:
        self.options = options
        for finished in (False, True):
            one = SimpleNamespace(index=0, token_ids=[7, 8] if finished else [7])
            fields = {"request_id": name, "prompt_token_ids": prompt["prompt_token_ids"], "outputs": [one]}
            yield SimpleNamespace(**fields, finished=finished, kv_transfer_params=None)

    async def run(self, asked: str | None, name: str = "cmpl-1-0", kind: str = "CUMULATIVE", key: str = "") -> Any:
        """Return what the reply to a request has in `kv_transfer_params`."""
        params = SimpleNamespace(
            extra_args=None if asked is None else {"vllm_tap": asked}, n=1, output_kind=SimpleNamespace(name=kind),
            max_tokens=5,
        )  # fmt: skip
        captures.current.set(captures.Call("", key))
        return [output async for output in self.llm.generate(PROMPT, params, name)][-1].kv_transfer_params

    def counted(self) -> dict[str, float]:
        """Return the counters that are not 0."""
        counters = {name: counter._value.get() for name, counter in vars(self.metrics).items()}
        return {name: value for name, value in counters.items() if value}


@pytest.mark.parametrize(
    ("settings", "asked", "name", "is_captured"),
    [
        ({}, None, "cmpl-1-0", False),
        ({}, ASKED, "cmpl-1-0", True),
        ({"spec": {"hidden_states": [1]}}, None, "cmpl-1-0", True),
        ({"spec": {"hidden_states": [1]}}, None, BEAM, False),
        ({"spec": {"hidden_states": [1]}, "captures": "forbid"}, None, "cmpl-1-0", False),
        ({}, ASKED, BEAM, True),
    ],
)
def test_requests_are_captured_that_ask_or_by_default(
    monkeypatch: pytest.MonkeyPatch, settings: Any, asked: str | None, name: str, is_captured: bool
) -> None:
    """Not where captures are forbidden, nor vLLM's own requests for beams."""
    server = Server(monkeypatch, **settings)
    fields = asyncio.run(server.run(asked, name))
    if is_captured:
        assert fields["vllm_tap"]["choices"] == [{"prompt": 0, "completion": 0, "positions": [[0, 4]]}]
        assert server.lives.specs == [Spec(hidden_states=[1])]
        counted = server.counted()
        assert {**counted, "bytes": 0} == {"requests": 1, "completed": 1, "rows": 4, "bytes": 0}
    else:
        assert fields is None
        assert server.counted() == {}


@pytest.mark.parametrize(("reader", "num_asked"), [("", 1), ("here", 2), ("in another process", 2)])
def test_rows_are_taken_with_each_token_while_somebody_reads(
    monkeypatch: pytest.MonkeyPatch, reader: str, num_asked: int
) -> None:
    """Otherwise at its end, if that comes before its rest is over."""
    server, results = Server(monkeypatch), []
    opened = server.results.open

    def begin_to_read(key: str, names: Any, **options: Any) -> Any:
        result = opened(key, names, **options)
        if reader == "in another process":
            result.asked = time.monotonic()
        results.append(result)
        return result

    monkeypatch.setattr(server.results, "open", begin_to_read)
    given = server.llm.generate

    async def run() -> None:
        params = SimpleNamespace(extra_args={"vllm_tap": ASKED}, n=1, output_kind=SimpleNamespace(name="CUMULATIVE"))
        captures.current.set(captures.Call("", ""))
        outputs = given(PROMPT, params, "cmpl-1-0")
        frames = results[0].read()
        reading = asyncio.create_task(anext(frames)) if reader == "here" else None
        await asyncio.sleep(0)  # it waits for the first frame
        async for _ in outputs:
            await asyncio.sleep(0.01)
        if reading is not None:
            await reading
        assert server.lives.num_asked == num_asked
        await frames.aclose()
        assert not results[0]._num_readers

    asyncio.run(run())


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (
            {"vllm_tap": ["hidden_states"]},
            "is a Spec as JSON text, such as '{\"hidden_states\": .*, got \\['hidden_states'\\]",
        ),
        ({"vllm_tap": 5}, "is a Spec as JSON text, .*, got 5"),
        ({"vllm_tap": "hidden_states=[1]"}, "is a Spec as JSON text, .*: Expecting value"),
        ({"vllm_tap": ""}, "is a Spec as JSON text, .*: Expecting value"),
        ({"vllm_tap": '{"hiden_states": [1]}'}, "no field 'hiden_states'. Did you mean 'hidden_states'"),
        ({"vllmtap": ASKED}, "has 'vllmtap'. Did you mean 'vllm_tap'"),
        ({"vllm-Tap": ASKED}, "has 'vllm-Tap'. Did you mean 'vllm_tap'"),
        ({"vllm_ap": ASKED}, "has 'vllm_ap'. Did you mean 'vllm_tap'"),
        ({"vllm_taps": ASKED}, "has 'vllm_taps'. Did you mean 'vllm_tap'"),
    ],
)
def test_a_wrong_wish_is_refused_with_what_is_right(monkeypatch: pytest.MonkeyPatch, extra: Any, says: str) -> None:
    """With 400, before anything runs; arguments of others are left alone."""
    server = Server(monkeypatch)
    given = SimpleNamespace(extra_args=extra, n=1, output_kind=SimpleNamespace(name="CUMULATIVE"))

    async def run(params: Any) -> None:
        assert [output async for output in server.llm.generate(PROMPT, params, "cmpl-1-0")]

    with pytest.raises(fastapi.HTTPException, match=says) as refused:
        asyncio.run(run(given))
    assert refused.value.status_code == 400
    given.extra_args = {"tap": 1, "other": "x", "vllm_map": "y"}
    asyncio.run(run(given))
    assert server.counted() == {"refusals": 1}


def test_rows_of_a_name_that_is_taken_are_refused_by_the_name_that_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the one that vLLM made of it."""
    server = Server(monkeypatch)

    async def run() -> None:
        for _ in range(2):
            captures.current.set(captures.Call("", "mine"))
            params = SimpleNamespace(extra_args={"vllm_tap": ASKED}, n=1, output_kind=SimpleNamespace(name="DELTA"))
            assert [output async for output in server.llm.generate(PROMPT, params, "cmpl-mine-0")]

    with pytest.raises(fastapi.HTTPException, match="rows of a request 'mine' already") as refused:
        asyncio.run(run())
    assert refused.value.status_code == 409


@pytest.mark.parametrize(
    ("spec", "num_rows"),
    [
        ({}, 3),
        ({"positions": "last"}, 1),
        ({"positions": [0, -1]}, 2),
        ({"positions": "all", "reduce": "mean"}, 7),
    ],
)
def test_a_request_begins_where_the_workers_have_room_for_it(
    monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any], num_rows: int
) -> None:
    """For its prompt, of which rows are taken with the first token, or for all that stays there to its end."""
    server = Server(monkeypatch)
    asyncio.run(server.run(json.dumps({"hidden_states": [1], "positions": "all", **spec})))
    assert server.lives.room[0] == num_rows
    assert set(server.lives.room[1:]) == {0}
    assert "stalls" not in server.counted()


@pytest.mark.parametrize("leaves", [False, True])
def test_a_wait_for_room_is_counted(monkeypatch: pytest.MonkeyPatch, leaves: bool) -> None:
    """From its begin on, and its time in the end, also where the client leaves."""
    server = Server(monkeypatch)
    server.lives.stall.clear()

    async def run() -> None:
        task = asyncio.create_task(server.run(ASKED))
        while not server.lives.room:
            await asyncio.sleep(0)
        assert (server.counted()["stalls"], "stalled_seconds" in server.counted()) == (1, False)
        await asyncio.sleep(0.01)
        task.cancel() if leaves else server.lives.stall.set()
        await asyncio.wait([task])
        assert 0.01 <= server.counted()["stalled_seconds"] < 5

    asyncio.run(run())


def test_a_forbidden_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 403, and counted."""
    server = Server(monkeypatch, captures="forbid")
    with pytest.raises(fastapi.HTTPException, match="takes no captures") as refused:
        asyncio.run(server.run(ASKED))
    assert refused.value.status_code == 403
    assert server.counted() == {"refusals": 1}


def test_a_request_goes_to_an_engine_that_can_capture_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least busy one that has a place for its Spec, or the one that it asks for."""
    lives = [Lives(engine=number, length=4 * (number == 2)) for number in range(3)]
    lives[0].num_requests = 2
    server = Server(monkeypatch, *lives, max_specs=4)
    params = SimpleNamespace(extra_args={"vllm_tap": ASKED}, n=1, output_kind=SimpleNamespace(name="DELTA"))

    async def run(**options: Any) -> int:
        captures.current.set(captures.Call("", ""))
        assert [output async for output in server.llm.generate(PROMPT, params, "cmpl-1-0", **options)]
        server.results.delete("", "cmpl-1")
        (engine,) = (one.engine for one in lives if one.specs)
        lives[engine].specs.clear()
        assert server.options == {"data_parallel_rank": engine}
        return int(engine)

    assert asyncio.run(run()) == 1
    assert asyncio.run(run(data_parallel_rank=0)) == 0
    for rank, says in {
        2: "4 different Specs are captured now",
        3: "rank 3 captures nothing: ask for one of 0, 1, 2, or for none",
    }.items():
        with pytest.raises(fastapi.HTTPException, match=says):
            asyncio.run(run(data_parallel_rank=rank))
    lives[0].num_requests, lives[1].num_requests = 1, 2
    assert asyncio.run(run()) == 0


@pytest.mark.parametrize(
    ("request_id", "name"),
    [
        ("cmpl-abc-0", "cmpl-abc"),
        ("chatcmpl-a-b", "chatcmpl-a-b"),
        ("resp_abc_0", "resp_abc"),
        ("resp_a_b_12", "resp_a_b"),
    ],
)
def test_rows_are_read_by_the_id_of_the_reply(monkeypatch: pytest.MonkeyPatch, request_id: str, name: str) -> None:
    """Not by that of a prompt or a turn of it."""
    server = Server(monkeypatch)
    asyncio.run(server.run(ASKED, request_id))
    assert server.results.peek("", name) is not None


@pytest.mark.parametrize(("kind", "key", "is_inline", "is_kept"), [
    ("FINAL_ONLY", "", True, False), ("FINAL_ONLY", "mine", True, True), ("DELTA", "", False, True),
])  # fmt: skip
def test_small_results_are_inline_where_a_reply_carries_them(
    monkeypatch: pytest.MonkeyPatch, kind: str, key: str, is_inline: bool, is_kept: bool
) -> None:
    """Streams do not."""
    server = Server(monkeypatch, inline_bytes=4096)
    handle = asyncio.run(server.run(ASKED, kind=kind, key=key))["vllm_tap"]
    assert (("data" in handle), len(server.results)) == (is_inline, int(is_kept))


def test_the_default_goes_into_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a request asks for does not; nothing waits to be read."""
    given = {"spec": {"hidden_states": [1], "positions": "prompt"}, "hidden_states_folder": str(tmp_path)}
    server = Server(monkeypatch, **given)
    fields = asyncio.run(server.run(None))
    assert Path(fields["hidden_states_path"]).parent == tmp_path
    assert len(server.results) == 0
    counted = server.counted()
    assert (counted["completed"], counted["rows"], counted["bytes"]) == (1, 3, 24)
    assert "hidden_states_path" not in asyncio.run(server.run(ASKED))
    assert len(server.results) == 1


def test_what_fails_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens come without rows; a capture that cannot begin is refused; a client that leaves is an abort."""
    server = Server(monkeypatch, Lives(TransportError("it broke")))
    assert asyncio.run(server.run(ASKED))["vllm_tap"]["error"] == "it broke"
    assert server.counted() == {"requests": 1, "failures": 1}

    server = Server(monkeypatch, Lives(start_error=EngineUnsupportedError("it cannot")))
    with pytest.raises(fastapi.HTTPException) as refused:
        asyncio.run(server.run(ASKED))
    assert refused.value.status_code == 503
    assert server.counted() == {"refusals": 1}

    server = Server(monkeypatch)

    async def leave() -> None:
        params = SimpleNamespace(extra_args={"vllm_tap": ASKED}, n=1, output_kind=SimpleNamespace(name="DELTA"))
        captures.current.set(captures.Call("", ""))
        async with contextlib.aclosing(server.llm.generate(PROMPT, params, "cmpl-1-0")) as outputs:
            await anext(outputs)

    asyncio.run(leave())
    assert server.counted() == {"requests": 1, "aborts": 1}


@pytest.mark.parametrize("error", [None, TransportError("it broke"), RuntimeError("a fault")])
def test_tokens_do_not_wait_for_rows_but_for_the_last(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """Rows that come meanwhile are asked for once at a time; what goes wrong with them is told at the end."""
    lives = Lives(error)
    lives.is_crowded = True
    server = Server(monkeypatch, lives)

    async def run() -> Any:
        lives.blocked = asyncio.Event()
        captures.current.set(captures.Call("", ""))
        params = SimpleNamespace(
            extra_args={"vllm_tap": ASKED}, n=1, output_kind=SimpleNamespace(name="CUMULATIVE"), max_tokens=5
        )
        outputs = server.llm.generate(PROMPT, params, "cmpl-1-0")
        first = await asyncio.wait_for(anext(outputs), 20)
        assert not first.finished
        last = asyncio.create_task(anext(outputs))
        await asyncio.sleep(0.01)
        assert lives.num_asked == 1
        assert not last.done()
        lives.blocked.set()
        return (await asyncio.wait_for(last, 20)).kv_transfer_params["vllm_tap"]

    handle = asyncio.run(run())
    assert (str(error) in handle["error"]) if error else ("error" not in handle)
    assert lives.num_asked == (1 if error else 2)
    assert server.counted()["failures" if error else "completed"] == 1


def test_letters_that_no_encoding_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under whatever key: vLLM would fail when it sends them to the engine."""
    server = Server(monkeypatch)
    for extra in ({"other": "\ud800"}, {"\ud800": 1}, {"other": ["a", "\ud800"]}):
        params = SimpleNamespace(extra_args=extra, n=1, output_kind=SimpleNamespace(name="DELTA"))
        with pytest.raises(fastapi.HTTPException, match="no text") as refused:
            server.llm.generate(PROMPT, params, "cmpl-1-0")
        assert refused.value.status_code == 400
    params = SimpleNamespace(extra_args={"other": [object(), "text"]}, n=1, output_kind=SimpleNamespace(name="DELTA"))
    server.llm.generate(PROMPT, params, "cmpl-1-0")
