"""Captures on a simulated CUDA device: all bytes are as the model made them, in whatever order the device works."""

from __future__ import annotations

import functools
import gc
import itertools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from simulated_cuda import HOST_CALL, INVALID_VALUE, SimulatedCuda, simulated_cuda
from vllm_tap.engine import cuda as cuda_calls
from vllm_tap.engine import device_backend, device_rows, device_sink, device_tap, graphs, held_experts, kernel
from vllm_tap.engine import session as session_module
from vllm_tap.engine.device_rows import DeviceRows
from vllm_tap.engine.graph_forms import MOST_FORMS, GraphCopy
from vllm_tap.engine.profile import DmaProfile
from vllm_tap.engine.ring import Ring
from vllm_tap.engine.rows import Batch
from vllm_tap.engine.session import Session
from vllm_tap.engine.slab import LINGER_SECONDS, SlabKeeper
from vllm_tap.engine.tap import Tap
from vllm_tap.errors import BudgetError, CaptureError, EngineUnsupportedError, TransportError
from vllm_tap.frame import layout as blocks
from vllm_tap.frame import messages
from vllm_tap.labels import NUM_LABELS, Mark
from vllm_tap.transport.pool import SegmentPool

CPU = torch.device("cpu")
MAX_TOKENS = 20
GRAPH_TOKENS = 4
EXPERTS = ("router_logits", "expert_ids", "expert_weights")
REQUESTS = {"a": 11, "b": 5, "c": 7, "other": 6}
"""Prompt lengths; "other" is not captured."""


class Place(NamedTuple):
    """What a tap of the model sees."""

    stream: str
    layer: int
    width: int
    dtype: torch.dtype
    has_residual: bool


LLAMA = [Place("hidden_states", layer, 24, torch.bfloat16, True) for layer in range(3)]
ROUTER = [
    place
    for layer in range(2)
    for place in (
        Place("hidden_states", layer, 16, torch.float16, layer == 0),
        Place("router_logits", layer, 5, torch.float32, False),
        Place("expert_ids", layer, 2, torch.uint8, False),
        Place("expert_weights", layer, 2, torch.float32, False),
    )
]


class Model:
    """Layers that make random tensors in buffers that all of them share, and pass them by their taps."""

    def __init__(
        self, cuda: SimulatedCuda, places: list[Place], joins_experts: bool = True, keeps_tensors: bool = False
    ) -> None:
        self.cuda, self.places, self.joins_experts, self.keeps_tensors = cuda, places, joins_experts, keeps_tensors
        self.step_lock = StepLock()
        self.rows = DeviceRows(MAX_TOKENS + 8, 2 * GRAPH_TOKENS, 64, CPU, lambda: 0, self.step_lock)
        self.taps = {
            (place.stream, place.layer): Tap(place.stream, place.layer, self.rows, CPU, place.dtype) for place in places
        }
        self.made: dict[tuple[str, int], torch.Tensor] = {}
        self._random = torch.Generator().manual_seed(0)
        for tap in self.taps.values():
            tap.keeps_tensors = keeps_tensors
        self._buffers: dict[Any, list[list[torch.Tensor]]] = {}
        self._graphs: dict[int, list[Any]] = {}
        self.forward(1)  # the taps learn shapes

    def forward(self, num_tokens: int) -> None:
        """Run all layers, and what comes after them."""
        for run in self.parts():
            run(num_tokens)
        self.cuda.run(lambda: None)

    def parts(self) -> list[Callable[[int], None]]:
        """Return what runs one after the other: the experts of a layer are one part, any other place is another."""
        found: dict[tuple[bool, str, int], list[Place]] = {}
        for place in self.places:
            is_expert = self.joins_experts and place.stream in EXPERTS
            found.setdefault((is_expert, "" if is_expert else place.stream, place.layer), []).append(place)
        return [functools.partial(self._part, places) for places in found.values()]

    def _part(self, places: list[Place], num_tokens: int) -> None:
        tensors = [self._make(place, number, num_tokens) for number, place in enumerate(places)]
        control = self.taps[places[0].stream, places[0].layer].control
        if len(places) > 1:
            device_tap._tap_experts_cuda(*[hidden for hidden, _ in tensors], control)
        else:
            device_tap._tap_cuda(*tensors[0], control)

    def _make(self, place: Place, number: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Memory serves again in the next layer, unless somebody holds it.
        spare = self._buffers.setdefault((place.width, place.dtype, number), [])
        free = next((pair for pair in spare if not self.is_held(pair[0])), None)
        if free is None:
            free = [torch.zeros(MAX_TOKENS, place.width, dtype=place.dtype) for _ in range(2)]
            spare.append(free)
        hidden, residual = (buffer[:num_tokens] for buffer in free)

        def work() -> None:
            for buffer in (hidden, residual):
                # Whole numbers, whose sums are exact: Triton's interpreter does not round to bfloat16 as devices do.
                buffer.copy_(torch.randint(100, buffer.shape, generator=self._random))
            self.made[place.stream, place.layer] = hidden + residual if place.has_residual else hidden.clone()

        self.cuda.run(work, tensors=(hidden, residual))
        return hidden, residual if place.has_residual else None

    def is_held(self, buffer: torch.Tensor) -> bool:
        """Tell whether the rows hold memory for the end of the graph that is being captured."""
        held = [tensor for layer in self.rows.switch.held for tensor in layer.tensors]
        return any(tensor.data_ptr() == buffer.data_ptr() for tensor in held)

    def capture_graphs(self, in_pieces: bool = False) -> None:
        """Record for each small number of tokens that is a power of two a graph, or one for each layer."""
        for num_tokens in (1, 2, GRAPH_TOKENS):
            runs = self.parts() if in_pieces else [self.forward]
            self._graphs[num_tokens] = [self._captured(run, num_tokens) for run in runs]

    def _captured(self, run: Callable[[int], None], num_tokens: int) -> Any:
        with self.rows.switch.keeping():
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            run(num_tokens)
            graph.capture_end()
            return graph

    def run(self, num_tokens: int) -> None:
        """Run a step as vLLM does: a padded graph if it is small, else the layers one by one."""
        padded = next((size for size in self._graphs if size >= num_tokens), 0)
        if padded:
            for graph in self._graphs[padded]:
                graph.replay()
        else:
            self.forward(num_tokens)


class Expected(NamedTuple):
    """The rows of one step: labels [3, R], and of every place [R, width]."""

    labels: np.ndarray[Any, Any]
    rows: dict[tuple[str, int], torch.Tensor]


class Engine:
    """Runs steps of a model under a session, and keeps what has to come out."""

    def __init__(
        self,
        cuda: SimulatedCuda,
        places: list[Place],
        in_pieces: bool = False,
        joins_experts: bool = True,
        keeps_tensors: bool = False,
    ) -> None:
        self.cuda = cuda
        self.model = Model(cuda, places, joins_experts, keeps_tensors)
        self.model.capture_graphs(in_pieces)
        self.pool = SegmentPool(
            8 << 20,
            shared=False,
            segment_bytes=2 << 20,
            on_create=device_backend.register_segment,
            on_close=device_backend.unregister_segment,
        )
        self.positions = torch.zeros(MAX_TOKENS, dtype=torch.int64)
        self.token_ids = torch.zeros(MAX_TOKENS, dtype=torch.int32)
        self.random = np.random.default_rng(0)
        self.expected: list[Expected] = []

    def start(
        self,
        staging: str = "staged",
        positions: str = "all",
        leave_out: int = 0,
        leave_out_last: int = 0,
        generates: bool = True,
        num_drafts: int = 0,
    ) -> Session:
        """Start a capture of all layers, or of all but the first some and the last some."""
        places = self.model.places[leave_out : len(self.model.places) - leave_out_last]
        names = dict.fromkeys(place.stream for place in places)
        streams = []
        for name in names:
            mine = [place for place in places if place.stream == name]
            dtype = str(mine[0].dtype).removeprefix("torch.")
            streams.append(blocks.Stream(name, dtype, mine[0].width, tuple(place.layer for place in mine)))
        start = messages.Start(
            capture_id="x",
            streams={stream.name: stream.layers for stream in streams},
            positions=positions,
            residual="",
            shared=False,
            clients={},
            budget_bytes=8 << 20,
            staging=staging,
            expected_rows=0,
        )
        rows = self.model.rows
        sizes = device_sink.Sizes(MAX_TOKENS, GRAPH_TOKENS, 1 + num_drafts)
        sink = device_sink.DeviceSink(streams, self.model.taps, rows, self.pool, sizes, staging)
        session = Session(start, 0, streams, sink, self.pool, rows)
        for sample, (request_id, prompt_len) in enumerate(REQUESTS.items()):
            if request_id != "other":
                session.meet(request_id, Mark("x", sample, 1), prompt_len, generates)
        self.expected = []
        return session

    def step(
        self, session: Session, requests: dict[str, int], sends: bool = True, computed: Sequence[int] | None = None
    ) -> None:
        """Run a step of so many tokens of each request, at random positions or behind `computed` ones of each."""
        lengths = np.array(list(requests.values()))
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        before = np.array(self.random.integers(0, 12, len(requests)) if computed is None else computed, np.int32)
        positions = np.concatenate([first + np.arange(n) for first, n in zip(before, lengths, strict=True)])
        token_ids = self.random.integers(0, 1 << 17, len(positions))
        self.positions[: len(positions)] = torch.from_numpy(positions)
        self.token_ids[: len(positions)] = torch.from_numpy(token_ids)
        waits = self.cuda.num_host_waits
        session.arm(Batch(list(requests), starts, before, self.positions, self.token_ids))
        self.model.run(len(positions))
        session.drain()
        if sends:
            session.send()
        assert self.cuda.num_host_waits == waits, "the host waited in a step"
        numbers = np.repeat([list(REQUESTS).index(request_id) for request_id in requests], lengths)
        prompt_lens = np.repeat([REQUESTS[request_id] for request_id in requests], lengths)
        taken = np.repeat([request_id != "other" for request_id in requests], lengths)
        if session.start.positions == "last":
            taken &= positions == prompt_lens - 1
        if session.start.positions == "generated":
            taken &= positions >= prompt_lens
        if taken.any():
            labels = np.stack([numbers, positions, token_ids])[:, taken]
            rows = {place: made[: len(taken)][torch.from_numpy(taken)] for place, made in self.model.made.items()}
            self.expected.append(Expected(labels, rows))

    def finish(self, session: Session) -> None:
        """End the capture, and compare what came with what was made."""
        descriptor = session.finish()
        table = descriptor.table()
        assert len(table) == len(self.expected)
        for (chunk, labels, num_rows), expected in zip(table.tolist(), self.expected, strict=True):
            segment = self.pool.segment(descriptor.chunks[chunk].segment_id)
            placed = blocks.layout(labels, num_rows, session.streams)
            self.cuda.host_access(segment.address + labels, placed.end - labels, False, "client")
            found = np.frombuffer(segment.view, np.int32, NUM_LABELS * num_rows, labels).reshape(NUM_LABELS, -1)
            np.testing.assert_array_equal(found, expected.labels)
            for stream, begin in zip(session.streams, placed.streams, strict=True):
                shape = len(stream.layers), num_rows, stream.width
                rows = torch.frombuffer(
                    segment.view, dtype=getattr(torch, stream.dtype), count=int(np.prod(shape)), offset=begin
                ).view(shape)
                for layer, plane in zip(stream.layers, rows, strict=True):
                    assert torch.equal(plane, expected.rows[stream.name, layer]), (stream.name, layer)
        self.abandon(session)

    def has_failed(self, session: Session, match: str) -> None:
        """Make sure that a capture ends with an error of the driver's, and that the next one is right."""
        with pytest.raises(TransportError, match=match):
            session.finish()
        self.abandon(session)
        session = self.start()
        self.step(session, DECODE)
        self.finish(session)

    def idles_and_captures(self) -> None:
        """Run idle steps and captures in turn, and compare what came with what was made."""
        for _ in range(2):
            self.model.run(3)
            session = self.start()
            for step in STEPS[:7]:
                self.step(session, step)
            self.finish(session)

    def abandon(self, session: Session) -> None:
        """Close a session, and free what it filled."""
        session.close()
        for block_id in session.block_ids:
            self.pool.release(block_id)


def copies_of(engine: Engine) -> list[GraphCopy]:
    """Return the graphs with taps that this engine has beside PyTorch's."""
    return [copy for copies in engine.model.rows.switch._copies.values() for copy in copies]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedCuda]:
    """A device whose limits are low, so that small steps go all ways."""
    monkeypatch.setattr(device_sink, "MIN_STAGED_ROWS", GRAPH_TOKENS)
    monkeypatch.setattr(graphs, "FEW_TAPS", 1)
    monkeypatch.setattr(kernel, "LARGE_ROWS", GRAPH_TOKENS)
    monkeypatch.setattr(kernel, "MOST_ROWS", 8)
    monkeypatch.setattr(SlabKeeper, "_start", lambda _: None)
    monkeypatch.setattr(device_tap, "_by_pointer", {})
    with simulated_cuda() as cuda:
        yield cuda


DECODE = {"a": 1, "b": 1, "c": 1}
STEPS = [
    {"a": 11, "b": 5},
    DECODE,
    DECODE,
    {"other": 6, "c": 7},
    {"a": 1, "other": 1, "b": 1},
    {"other": 1},
    DECODE | {"other": 2},
    {"a": 1, "b": 18},
    {"b": 1, "c": 2},
    DECODE,
    DECODE,
    {"c": 20},
    {"a": 4},
    {"a": 5},
    DECODE,
]


@pytest.mark.parametrize("places", [LLAMA, ROUTER], ids=["llama", "router"])
@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("way", ["staged", "step by step", "ring", "direct"])
def test_rows_are_what_the_model_made_whatever_runs_first(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, places: list[Place], way: str, in_pieces: bool
) -> None:
    """Steps in graphs and outside, of few and many rows, and another capture: all bytes right, nothing unordered."""
    if way == "ring":
        monkeypatch.setattr(device_sink, "WIDE_PLANE_BYTES", 1)
    if way == "step by step":
        monkeypatch.setattr(device_sink, "BURST_BYTES", 1)
        monkeypatch.setattr(device_rows, "SMALL_BYTES", 0)
    engine = Engine(cuda, places, in_pieces)
    for steps in (STEPS, STEPS[:2]):
        session = engine.start("direct" if way == "direct" else "staged")
        for step in steps:
            engine.step(session, step)
        engine.finish(session)
    assert cuda.conflicts == []
    assert (cuda.num_copies == 0) == (way == "direct")


@pytest.mark.parametrize("leave_out", [1, 2, 3])
def test_experts_in_part(cuda: SimulatedCuda, leave_out: int) -> None:
    """One kernel serves logits, ids and weights of a layer; of one layer only some are wanted here."""
    engine = Engine(cuda, ROUTER)
    session = engine.start(leave_out=leave_out)
    before = cuda.num_launches
    engine.step(session, DECODE)
    engine.step(session, {"a": 6, "b": 5})
    assert cuda.num_launches - before == 2 * 3
    engine.finish(session)
    assert cuda.conflicts == []


FOUR_ROUTERS = [place._replace(layer=place.layer + 2 * n) for n in range(2) for place in ROUTER]


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("large", [False, True], ids=["row by row", "several rows a program"])
@pytest.mark.parametrize(("leave_out", "num_taps"), [(0, 4 + 1), (1, 3 + 1), (2, 3 + 1), (4, 3 + 1), (5, 2 + 1)])
def test_one_kernel_at_the_end_of_a_graph_takes_the_experts_of_all_layers(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, leave_out: int, num_taps: int, large: bool, in_pieces: bool
) -> None:
    """Where what they made can be held until there; beside it, each layer has a tap of its hidden states."""
    if large:
        monkeypatch.setattr(kernel, "LARGE_ROWS", 1)
    engine = Engine(cuda, FOUR_ROUTERS, in_pieces, keeps_tensors=True)
    session = engine.start(leave_out=leave_out)
    for step in STEPS[:7]:
        engine.step(session, step)
    assert {executable.num_taps for executable in cuda.executables.values()} == ({0, 1} if in_pieces else {num_taps})
    engine.finish(session)
    assert cuda.conflicts == []
    assert engine.model.rows.switch.held == []


@pytest.mark.parametrize(("num_layers", "num_taps"), [(0, 4 + 4), (1, 4 + 4), (2, 4 + 2), (3, 4 + 2), (4, 4 + 1)])
def test_no_more_is_held_than_the_engine_can_spare(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, num_layers: int, num_taps: int
) -> None:
    """Where the layers of a graph hold more, a kernel in the middle takes those before it.

    A graph of half as many rows as the largest, as the one here, holds half of what one of no rows might.
    """
    row_bytes = sum(place.width * place.dtype.itemsize for place in ROUTER[1:4])
    monkeypatch.setattr(held_experts, "MAX_HELD_BYTES", 2 * GRAPH_TOKENS * row_bytes * num_layers)
    engine = Engine(cuda, FOUR_ROUTERS, keeps_tensors=True)
    session = engine.start()
    for step in STEPS[:7]:
        engine.step(session, step)
    assert max(executable.num_taps for executable in cuda.executables.values()) == num_taps
    engine.finish(session)


def test_layers_whose_experts_differ_share_no_kernel(cuda: SimulatedCuda) -> None:
    """As of a model with more experts in some layers: two are of one kind here, and captured; two of another."""
    others = [place._replace(width=3) for place in FOUR_ROUTERS if place.layer < 2 and place.stream in EXPERTS]
    places = [next((o for o in others if o[:2] == place[:2]), place) for place in FOUR_ROUTERS]
    engine = Engine(cuda, places, keeps_tensors=True)
    (whole,) = {len(graph.taps) for graph in cuda.graphs.values() if graph.taps}
    assert whole == 4 + 2
    session = engine.start(leave_out=8)
    for step in STEPS[:5]:
        engine.step(session, step)
    assert {executable.num_taps for executable in cuda.executables.values()} == {2 + 1}
    engine.finish(session)


@pytest.mark.parametrize("why", ["memory serves again", "a row starts anywhere", "no room"])
def test_experts_are_taken_layer_by_layer_where_they_cannot_be_held(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """As where a compiled graph made the logits, or a tensor is a part of another that starts at any address."""
    if why == "a row starts anywhere":
        monkeypatch.setattr(held_experts, "can_gather", lambda _: False)
    if why == "no room":
        monkeypatch.setattr(held_experts, "MAX_GRAPHS", 0)
    engine = Engine(cuda, ROUTER, keeps_tensors=why != "memory serves again")
    session = engine.start()
    engine.step(session, DECODE)
    assert {executable.num_taps for executable in cuda.executables.values()} == {2 + 2}
    engine.finish(session)


def test_a_kernel_that_cannot_be_put_at_the_end_of_a_graph_ends_captures_alone(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine starts and runs; who wants to capture is told."""

    def fails(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(held_experts, "launch_gather_experts", fails)
    engine = Engine(cuda, ROUTER, keeps_tensors=True)
    assert "no such kernel" in engine.model.rows.refusal
    engine.model.run(3)


@pytest.mark.parametrize("places", [LLAMA, ROUTER], ids=["llama", "router"])
def test_rows_may_be_kept_to_be_looked_at_while_they_are_captured(cuda: SimulatedCuda, places: list[Place]) -> None:
    """As where the first rows did not tell how a router chooses: nothing else is done in such a step."""
    engine = Engine(cuda, places)
    session = engine.start()
    taps = engine.model.taps.values()
    for tap in taps:
        tap.keep_probe = tap.keep_one_probe = True
    before = cuda.num_launches
    engine.step(session, STEPS[0])
    launched = cuda.num_launches - before
    assert all(tap.probe is not None and not tap.keep_probe for tap in taps)
    engine.step(session, STEPS[0])
    assert cuda.num_launches - before == 2 * launched
    engine.finish(session)
    assert cuda.conflicts == []


@pytest.mark.parametrize("places", [LLAMA, ROUTER], ids=["llama", "router"])
def test_a_layer_that_leaves_rows_out_ends_the_capture_alone(cuda: SimulatedCuda, places: list[Place]) -> None:
    """Outside graphs, where the kernel would read past the end of the tensor; the model runs on."""
    engine = Engine(cuda, places)
    session = engine.start()
    make, last = engine.model._make, places[-1]
    engine.model._make = (
        lambda place, *rest: (  # type: ignore[method-assign]
            tuple(x if x is None else x[:-1] for x in make(place, *rest)) if place == last else make(place, *rest)
        )
    )
    engine.step(session, STEPS[0])
    assert not engine.model.rows.active
    with pytest.raises(CaptureError, match=rf"{last.stream}\[{last.layer}\] passed 15 rows in a step of at least 16"):
        session.finish()
    session.close()


def test_experts_that_are_tapped_one_by_one(cuda: SimulatedCuda) -> None:
    """As where a router may change the logits that it is given."""
    engine = Engine(cuda, ROUTER, joins_experts=False)
    session = engine.start()
    for step in STEPS[:5]:
        engine.step(session, step)
    engine.finish(session)
    assert cuda.conflicts == []


@pytest.mark.parametrize("places", [LLAMA, ROUTER], ids=["llama", "router"])
def test_a_step_leaves_the_device_in_one_copy(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, places: list[Place]
) -> None:
    """Labels and all planes of all streams lie in the staging as they will in the segment."""
    monkeypatch.setattr(device_sink, "BURST_BYTES", 1)
    engine = Engine(cuda, places)
    session = engine.start()
    for number, step in enumerate(STEPS[:5], 1):
        engine.step(session, step)
        assert cuda.num_copies == number
    engine.finish(session)


@pytest.mark.parametrize(
    ("places", "burst_steps", "chunk_steps", "sent"),
    [
        (LLAMA, 3, 64, [3, 6, 9, 12]),
        (LLAMA, 64, 5, [5, 10]),
        (LLAMA, 64, 64, []),
        (ROUTER, 64, 64, []),
    ],
)
def test_small_steps_leave_the_device_together(
    cuda: SimulatedCuda,
    monkeypatch: pytest.MonkeyPatch,
    places: list[Place],
    burst_steps: int,
    chunk_steps: int,
    sent: list[int],
) -> None:
    """As many as a burst or their piece of the segment has room for; the last ones when the capture ends."""
    monkeypatch.setattr(session_module, "STEPS_PER_CHUNK", chunk_steps)
    monkeypatch.setattr(device_sink, "DEPTHS", ((2, 16),))
    engine = Engine(cuda, places)
    session = engine.start()
    step_bytes = blocks.block_bytes(len(DECODE), session.streams)
    monkeypatch.setattr(device_sink, "BURST_BYTES", burst_steps * step_bytes)
    found = []
    for number in range(1, 14):
        before = cuda.num_copies
        engine.step(session, DECODE)
        found += [number] * (cuda.num_copies - before)
    assert found == sent
    engine.finish(session)
    assert cuda.num_copies == len(sent) + 1
    assert cuda.conflicts == []


@pytest.mark.parametrize("seed", range(6))
def test_bursts_of_any_steps_carry_what_the_model_made(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Runs of the same requests and changes of them, in bursts and pieces of segments of any length."""
    choose = random.Random(seed)
    monkeypatch.setattr(session_module, "STEPS_PER_CHUNK", choose.randint(1, 9))
    monkeypatch.setattr(device_sink, "BURST_BYTES", choose.choice([1, 1000, 4000, 1 << 20]))
    monkeypatch.setattr(device_sink, "DEPTHS", ((2, choose.randint(1, 4)),))
    engine = Engine(cuda, choose.choice([LLAMA, ROUTER]))
    session = engine.start()
    for _ in range(8):
        requests = choose.sample(sorted(REQUESTS), choose.randint(1, 4))
        step = {request_id: choose.choice([1, 1, 1, 4]) for request_id in requests}
        for _ in range(choose.randint(1, 4)):
            engine.step(session, step, sends=choose.random() < 0.9)
            if choose.random() < 0.1:
                engine.model.rows.clear()
    engine.finish(session)
    assert cuda.conflicts == []


def test_a_dummy_run_between_steps_of_the_same_requests_writes_nothing(cuda: SimulatedCuda) -> None:
    """What the device was told of the step before is told again, also after it was told that nothing is wanted."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    for _ in range(3):
        engine.step(session, DECODE)
        engine.model.rows.clear()
        before = cuda.num_launches
        engine.model.run(len(DECODE))
        assert cuda.num_launches == before
        engine.step(session, DECODE)
    engine.finish(session)
    assert cuda.conflicts == []


def test_few_rows_of_a_large_step_take_few_programs(cuda: SimulatedCuda) -> None:
    """Outside graphs, kernels look at the chosen rows alone."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    before = cuda.num_programs
    engine.step(session, {"other": 18, "c": 2})
    assert cuda.num_programs - before == 2 * len(LLAMA)
    engine.finish(session)


def test_taps_in_graphs_run_only_in_steps_with_rows(cuda: SimulatedCuda) -> None:
    """Steps that have none replay a graph without taps; a row that comes later is not missed."""
    engine = Engine(cuda, LLAMA)
    session = engine.start(positions="generated")
    for computed, runs in ((0, 0), (12, len(LLAMA)), (0, 0), (0, 0), (12, len(LLAMA))):
        before = cuda.num_launches
        engine.step(session, {"a": 3}, computed=[computed])
        assert cuda.num_launches - before == runs
    engine.finish(session)
    assert cuda.conflicts == []


def test_a_graph_that_cannot_be_made_ends_the_capture_alone(cuda: SimulatedCuda) -> None:
    """The step runs without taps; the client is told why its rows are missing, and the next capture is right."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    cuda.instances_left = 0
    engine.step(session, DECODE)
    cuda.instances_left = sys.maxsize
    with pytest.raises(TransportError, match="cuGraphInstantiate failed: CUDA_ERROR_INVALID_VALUE"):
        session.finish()
    session.close()
    session = engine.start()
    engine.step(session, DECODE)
    engine.finish(session)


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("edits", [0, 1, 2, 4])
def test_a_driver_that_refuses_to_edit_graphs_leaves_taps_in_them(
    cuda: SimulatedCuda, caplog: pytest.LogCaptureFixture, edits: int, in_pieces: bool
) -> None:
    """The engine starts all the same, idle steps write nothing, and captures are right."""
    cuda.edits_left = edits
    engine = Engine(cuda, LLAMA, in_pieces)
    assert "taps stay in a CUDA graph while nobody captures" in caplog.text
    engine.idles_and_captures()
    assert cuda.conflicts == []


@pytest.mark.parametrize("missing", ["raw_cuda_graph", "_cuda_getCurrentRawStream"])
def test_a_pytorch_that_does_not_let_graphs_be_edited_leaves_taps_in_them(
    cuda: SimulatedCuda, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """One without what is needed of it: the engine starts all the same, and captures are right."""
    owner = torch.cuda.CUDAGraph.__mro__[1] if missing == "raw_cuda_graph" else torch._C
    with monkeypatch.context() as patch, caplog.at_level("INFO", "vllm_tap"):
        patch.delattr(owner, missing)
        engine = Engine(cuda, LLAMA)
    assert "CUDA graphs cannot be edited here" in caplog.text
    engine.idles_and_captures()
    assert cuda.conflicts == []


def test_graphs_that_are_thrown_away_leave_nothing_behind(cuda: SimulatedCuda) -> None:
    """The V1 runner captures some first, to see how much memory they take; the driver gives their handles to others."""
    model = Model(cuda, LLAMA)
    thrown_away = torch.cuda.CUDAGraph(keep_graph=True)
    thrown_away.capture_begin()
    model.forward(2)
    thrown_away.capture_end()
    handle = thrown_away.raw_cuda_graph()
    del cuda.graphs[handle]
    cuda.handles = itertools.chain([handle], cuda.handles)
    model.capture_graphs()
    assert handle in cuda.graphs
    before = cuda.num_launches
    model.run(1)
    assert cuda.num_launches == before


@pytest.mark.parametrize("case", ["kernels", "no kernels", "refused"])
def test_kernels_after_taps_start_early_where_that_is_allowed(cuda: SimulatedCuda, case: str) -> None:
    """Only kernels can, only where a driver can say so, and not the last: the end of a graph awaits all taps."""
    if case == "no kernels":
        cuda.kind_of_work = HOST_CALL
    if case == "refused":
        cuda.cuGraphRemoveDependencies_v2 = lambda *_: INVALID_VALUE  # type: ignore[method-assign]
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    engine.step(session, DECODE)
    assert {executable.num_early for executable in cuda.executables.values()} == {2 if case == "kernels" else 0}
    engine.finish(session)
    assert cuda.conflicts == []


def test_a_graph_is_kept_for_a_few_sets_of_taps(cuda: SimulatedCuda) -> None:
    """Captures of other layers get graphs of their own, made once as long as they are not too many."""
    engine = Engine(cuda, [Place("hidden_states", layer, 24, torch.bfloat16, True) for layer in range(6)])

    def made_by(leave_out: int) -> int:
        before = max(cuda.executables, default=0)
        session = engine.start(leave_out=leave_out)
        engine.step(session, DECODE, computed=[12] * len(DECODE))
        engine.finish(session)
        assert len(cuda.executables) <= 2 * MOST_FORMS
        return sum(executable > before for executable in cuda.executables)

    # Each time that of the step, and that of the next smaller size.
    assert [made_by(leave_out) for leave_out in (0, 1, 2, 3, 1, 0)] == [2, 2, 2, 2, 0, 0]
    num_graphs = len(cuda.graphs)
    assert [made_by(leave_out) for leave_out in (4, 3, 0, 0)] == [2, 0, 2, 0]
    assert len(cuda.graphs) == num_graphs
    engine.model.rows.slabs.tidy(time.monotonic() + LINGER_SECONDS)
    assert not cuda.executables, "made for captures, and kept when the staging memory has gone"
    assert [made_by(leave_out) for leave_out in (0, 0)] == [2, 0]


def test_graphs_are_made_while_the_device_is_busy(cuda: SimulatedCuda) -> None:
    """For the step that follows, and then for one of fewer rows; a step that finds its own does not wait.

    Not while prompts have tokens left: the step that follows has no use for any.
    """
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    for step, computed, ready in (
        ({"a": 6, "b": 5}, (0, 0), set()),
        ({"a": 5, "b": 1}, (6, 5), {2}),
        ({"a": 1, "b": 1}, (11, 6), {2, 1}),
        ({"a": 1, "b": 1, "c": 3}, (12, 7, 0), {2, 1}),
        ({"a": 1, "b": 1, "c": 4}, (13, 8, 3), {4, 2, 1}),
        ({"a": 1, "b": 1, "c": 1}, (14, 9, 7), {4, 2, 1}),
    ):
        engine.step(session, step, computed=computed)
        assert {copy.num_rows for copy in copies_of(engine) if copy._forms} == ready
        assert len(cuda.executables) == len(ready)
    engine.finish(session)
    assert cuda.conflicts == []


def test_graphs_that_are_gone_hide_none_that_are_there(cuda: SimulatedCuda) -> None:
    """Those of another size may be captured anew: the next larger one is made ahead nevertheless."""
    engine = Engine(cuda, LLAMA)
    sizes = sorted({copy.num_rows for copy in copies_of(engine)})
    smallest, gone, next_one = sizes[:3]
    engine.model._graphs = {size: graphs for size, graphs in engine.model._graphs.items() if size != gone}
    gc.collect()
    session = engine.start()
    engine.step(session, DECODE)
    for copy in copies_of(engine):
        copy.forget()
    switch = engine.model.rows.switch
    switch._prepared = 0, frozenset()
    while switch.prepare(gone):
        pass
    assert {copy.num_rows for copy in copies_of(engine) if copy._forms} == {smallest, next_one}
    engine.finish(session)


def test_graphs_that_are_made_ahead_have_room_for_drafts(cuda: SimulatedCuda) -> None:
    """A step has more than one token of each request."""
    engine = Engine(cuda, LLAMA)
    session = engine.start(num_drafts=1)
    engine.step(session, {"a": 6, "b": 5}, computed=[5, 0])
    assert {copy.num_rows for copy in copies_of(engine) if copy._forms} == {4}
    engine.finish(session)


@pytest.mark.parametrize(("positions", "generates"), [("last", True), ("all", False)])
def test_no_graphs_are_made_ahead_for_captures_of_prompts(cuda: SimulatedCuda, positions: str, generates: bool) -> None:
    """Steps of generated tokens have no rows for them, or there are none."""
    engine = Engine(cuda, LLAMA)
    session = engine.start(positions=positions, generates=generates)
    engine.step(session, {"a": 11}, computed=[0])
    assert len(engine.expected) == 1
    assert not cuda.executables
    engine.finish(session)


def test_a_graph_that_cannot_be_made_ahead_is_made_when_it_is_needed(cuda: SimulatedCuda) -> None:
    """Nothing is said before that: the step that needs it tells the client what is wrong, if it still is."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    cuda.instances_left = 0
    engine.step(session, {"a": 11})
    cuda.instances_left = sys.maxsize
    engine.step(session, DECODE)
    engine.finish(session)
    assert cuda.conflicts == []


def test_a_step_whose_tokens_are_still_being_sampled_is_sent_with_the_next(cuda: SimulatedCuda) -> None:
    """Nothing is lost where a runner begins a step before it has reported that the one before was sampled."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    for step in STEPS[:4]:
        engine.step(session, step, sends=False)
    engine.finish(session)
    assert cuda.conflicts == []


def test_only_rows_that_are_asked_for_are_written(cuda: SimulatedCuda) -> None:
    """The last position of each prompt: most steps have none, some have one among many tokens."""
    engine = Engine(cuda, LLAMA)
    session = engine.start(positions="last")
    for _ in range(2):
        for step in STEPS[:7]:
            engine.step(session, step)
    assert 0 < len(engine.expected) < 14
    engine.finish(session)
    assert cuda.conflicts == []


def test_taps_in_graphs_run_only_for_their_layers_and_only_while_somebody_captures(cuda: SimulatedCuda) -> None:
    """Those of other taps are taken out of a graph, and all of them once it is idle."""
    engine = Engine(cuda, LLAMA)
    assert num_running(engine) == 0
    for leave_out in (1, 0, 2):
        session = engine.start(leave_out=leave_out)
        before = cuda.num_launches
        engine.step(session, DECODE)
        assert cuda.num_launches - before == len(LLAMA) - leave_out
        engine.finish(session)
        assert num_running(engine) == 0


def test_taps_of_pieces_that_were_on_stay_until_a_pause(cuda: SimulatedCuda) -> None:
    """What nobody wants ends at once, and writes nothing; to disable it, and enable it again, would take longer."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    num_taps = len(LLAMA)
    found = [num_running(engine)]
    for leave_out in (2, 1, 2, 0, 1):
        session = engine.start(leave_out=leave_out)
        engine.step(session, DECODE)
        engine.finish(session)
        found.append(num_running(engine))
    assert found == [0, num_taps - 2, num_taps - 1, num_taps - 1, num_taps, num_taps]
    engine.idles_and_captures()
    engine.model.rows.slabs.tidy(time.monotonic() + LINGER_SECONDS)
    assert num_running(engine) == 0
    engine.idles_and_captures()


def num_running(engine: Engine) -> int:
    """Return how many taps are enabled in graphs of a step."""
    before = engine.cuda.num_launches
    engine.model.run(len(DECODE))
    return engine.cuda.num_launches - before


@pytest.mark.parametrize("places", [LLAMA, ROUTER], ids=["llama", "router"])
@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
def test_a_capture_without_the_last_taps_of_the_one_before_gets_its_own_rows_alone(
    cuda: SimulatedCuda, places: list[Place], in_pieces: bool
) -> None:
    """In graphs that have taps of both, and outside: what the device knew of the last taps is gone."""
    engine = Engine(cuda, places, in_pieces)
    for leave_out_last in (0, 1, len(places) - 1, 0):
        session = engine.start(leave_out_last=leave_out_last)
        for step in STEPS[:3]:
            engine.step(session, step)
        engine.finish(session)
        first = engine.model.rows.first_tap
        on = [place - first for place in session._sink._place_of]
        table = engine.model.rows.table[:, 0]
        assert (table >= 0).nonzero().flatten().tolist() == sorted(on)
    assert cuda.conflicts == []


def test_taps_for_which_the_tables_have_no_room_are_refused(cuda: SimulatedCuda) -> None:
    """Before anything is taken: what lies behind the tables on the device is not ours."""
    engine = Engine(cuda, LLAMA)
    rows = engine.model.rows
    rows.table = rows.table[: len(LLAMA) - 1]
    with pytest.raises(
        EngineUnsupportedError,
        match=f"tap {len(LLAMA)} of this model is one too many: there is room for {len(LLAMA) - 1}",
    ):
        engine.start()
    assert (rows.staging_bytes, rows.sink) == (0, None)
    session = engine.start(leave_out_last=1)
    engine.step(session, STEPS[0])
    engine.finish(session)


def test_a_rank_without_a_layer_of_the_capture_ships_nothing(cuda: SimulatedCuda) -> None:
    """Where ranks share the layers out, one may have none: no rows, and no labels that no tap would write."""
    engine = Engine(cuda, LLAMA)
    session = engine.start(leave_out=len(LLAMA))
    for step in STEPS[:3]:
        engine.step(session, step)
    descriptor = session.finish()
    assert (descriptor.blocks, descriptor.chunks, session.num_rows) == (b"", (), 0)
    assert len(descriptor.requests) == 3
    session.close()


def test_a_capture_that_is_dropped_leaves_nothing_on_its_way(cuda: SimulatedCuda) -> None:
    """Blocks of an abandoned capture are free for the next one at once."""
    engine = Engine(cuda, LLAMA)
    for _ in range(2):
        session = engine.start()
        engine.step(session, STEPS[0])
        engine.step(session, DECODE, sends=False)
        session.close()
        for block_id in session.block_ids:
            engine.pool.release(block_id)
    session = engine.start()
    engine.step(session, STEPS[0])
    engine.finish(session)
    assert cuda.conflicts == []


def test_a_thread_that_has_not_used_the_device_drops_a_capture(cuda: SimulatedCuda) -> None:
    """As when the socket of a client that was killed closes: the driver asks for a context that the thread lacks."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    engine.step(session, DECODE)
    errors = []

    def drop() -> None:
        try:
            with engine.model.rows.on_stream():
                session.close()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()
    assert errors == []
    for block_id in session.block_ids:
        engine.pool.release(block_id)
    session = engine.start()
    engine.step(session, DECODE)
    engine.finish(session)
    assert cuda.conflicts == []


@pytest.mark.parametrize("staging", ["staged", "direct"])
def test_all_is_on_its_way_when_the_engine_rests(cuda: SimulatedCuda, staging: str) -> None:
    """Without a wait; nothing is left to queue for the end. More steps may come all the same."""
    engine = Engine(cuda, LLAMA)
    session = engine.start(staging)
    for _ in range(2):
        for step in STEPS[:3]:
            engine.step(session, step)
        num_copies, waits = cuda.copies_left, cuda.num_host_waits
        session.rest()
        assert cuda.num_host_waits == waits
        assert num_copies - cuda.copies_left == (2 if staging == "staged" else 1), "rows and counts"
        num_copies = cuda.copies_left
        session.rest()
    engine.finish(session)
    assert cuda.copies_left == num_copies
    assert cuda.conflicts == []


@pytest.mark.parametrize("rests", [False, True])
def test_copies_are_timed_by_the_clock_of_the_device(cuda: SimulatedCuda, rests: bool) -> None:
    """Every copy by itself; behind the request for rows, only what was not queued before. No event is left behind."""
    engine = Engine(cuda, LLAMA)
    copy = cuda_calls.copy_to_host
    profile = DmaProfile()
    num_events = 0
    for _ in range(3):
        num_events = len(cuda.events)
        session = engine.start()
        for step in STEPS[:5]:
            engine.step(session, step)
        if rests:
            session.rest()
        engine.finish(session)
    assert len(cuda.events) == num_events
    figures = profile.stop()
    nbytes = figures["copy_bytes"]
    assert len(nbytes) == cuda.num_copies
    assert sum(nbytes) == cuda.now_ns
    np.testing.assert_allclose(figures["copy_seconds"], np.array(nbytes) / 1e9, rtol=1e-3)
    last = 0.0 if rests else nbytes[-1] / 1e9
    np.testing.assert_allclose(figures["after_forward"], [last] * 3, rtol=1e-3)
    assert figures["copying_after_forward"] == figures["after_forward"]
    assert cuda_calls.copy_to_host is copy
    session = engine.start("direct")
    engine.step(session, DECODE)
    engine.finish(session)
    assert profile.figures == figures


@pytest.mark.parametrize("rests", [False, True])
def test_a_tap_that_a_step_missed_is_an_error(cuda: SimulatedCuda, rests: bool) -> None:
    """A step that skips a layer would leave old bytes in its plane: no rows are handed over."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    engine.step(session, STEPS[0])
    if rests:
        session.rest()
    engine.model.places = LLAMA[:-1]
    engine.model._graphs = {}
    engine.step(session, DECODE)
    with pytest.raises(
        CaptureError, match=r"1 taps saw another number of steps than the 2 .*hidden_states\[2\] with 1"
    ):
        session.finish()


def test_a_full_device_refuses_staging_or_goes_without(cuda: SimulatedCuda, caplog: pytest.LogCaptureFixture) -> None:
    """ "staged" says how much is missing; "auto" writes to host memory, and says so."""
    engine = Engine(cuda, LLAMA)
    cuda.free_bytes = 2048
    with pytest.raises(BudgetError, match="of GPU memory") as caught:
        engine.start("staged")
    assert caught.value.identity["needed_bytes"] > caught.value.identity["free_bytes"] == 2048
    session = engine.start("auto")
    assert "Going on with direct writes" in caplog.text
    for step in STEPS[:3]:
        engine.step(session, step)
    engine.finish(session)
    assert cuda.num_copies == 0
    assert cuda.conflicts == []


@pytest.mark.parametrize("way", ["step by step", "ring"])
@pytest.mark.parametrize("copies", [0, 1, 2])
def test_a_copy_that_fails_ends_the_capture_and_nothing_else(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, way: str, copies: int
) -> None:
    """In a forward pass or behind it: the model goes on, the client is told, the next capture is right."""
    if way == "ring":
        monkeypatch.setattr(device_sink, "WIDE_PLANE_BYTES", 1)
    else:
        monkeypatch.setattr(device_sink, "BURST_BYTES", 1)
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    cuda.copies_left = copies
    for step in STEPS[:3]:
        engine.step(session, step)
    cuda.copies_left = sys.maxsize
    with pytest.raises(TransportError, match="failed: CUDA_ERROR_INVALID_VALUE"):
        session.finish()
    engine.abandon(session)
    session = engine.start()
    for step in STEPS[:3]:
        engine.step(session, step)
    engine.finish(session)
    assert cuda.conflicts == []


def test_a_last_copy_that_fails_ends_the_capture(cuda: SimulatedCuda) -> None:
    """One that leaves when the client asks for the rows: it gets none of them, and the next capture is right."""
    engine = Engine(cuda, LLAMA)
    for copies in (0, sys.maxsize):
        session = engine.start()
        engine.step(session, DECODE)
        engine.step(session, DECODE)
        cuda.copies_left = copies
        if copies:
            engine.finish(session)
        else:
            with pytest.raises(TransportError, match="failed: CUDA_ERROR_INVALID_VALUE"):
                session.finish()
            cuda.copies_left = sys.maxsize
            engine.abandon(session)
    assert cuda.conflicts == []


def test_host_memory_that_cannot_be_pinned_ends_the_capture(cuda: SimulatedCuda) -> None:
    """A limit of the system on locked memory: the client is told, generation goes on."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    cuda.pins_left = 0
    engine.step(session, STEPS[0])
    assert cuda.last_error == 0, "PyTorch would find it after the engine's next kernel"
    with pytest.raises(BudgetError, match=r"bytes of host memory cannot be pinned \(cudaHostRegister: 2\)"):
        session.finish()
    session.close()


@pytest.mark.parametrize("few_taps", [0, 1], ids=["copies", "switched"])
def test_several_pieces_of_a_step_may_fail(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, few_taps: int) -> None:
    """As where the device has no room to make them executable: that ends the capture, and the next one is right."""
    monkeypatch.setattr(graphs, "FEW_TAPS", few_taps)
    engine = Engine(cuda, LLAMA, in_pieces=True)
    session = engine.start()
    cuda.edits_left = cuda.instances_left = 0
    engine.step(session, DECODE)
    cuda.edits_left = cuda.instances_left = sys.maxsize
    engine.has_failed(session, "failed")


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
def test_a_graph_that_cannot_be_launched_is_left_to_pytorch(cuda: SimulatedCuda, in_pieces: bool) -> None:
    """The step goes through the model as without a capture, which ends, and the next one is right."""
    engine = Engine(cuda, LLAMA, in_pieces)
    session = engine.start()
    engine.step(session, DECODE)
    before = {place: rows.clone() for place, rows in engine.model.made.items()}
    cuda.graphs_left = 0
    engine.step(session, DECODE)
    cuda.graphs_left = sys.maxsize
    for place, rows in engine.model.made.items():
        assert not torch.equal(rows, before[place]), f"{place} was not computed"
    engine.has_failed(session, "cuGraphLaunch failed")


@pytest.mark.parametrize("edits", [0, 1])
def test_taps_of_pieces_that_cannot_be_enabled_end_the_capture_alone(cuda: SimulatedCuda, edits: int) -> None:
    """The rest of them are enabled when the next capture begins."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    assert engine.model.rows.switch.complete_pieces(lambda: True)
    session = engine.start()
    cuda.edits_left = edits
    engine.step(session, DECODE)
    cuda.edits_left = sys.maxsize
    engine.has_failed(session, "cuGraphNodeSetEnabled failed")


def test_taps_of_pieces_that_cannot_be_disabled_stay(cuda: SimulatedCuda, caplog: pytest.LogCaptureFixture) -> None:
    """The engine says so once; they are right, and only slower."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    session = engine.start()
    engine.step(session, DECODE)
    engine.finish(session)
    cuda.edits_left = 1
    engine.model.rows.switch.forget()
    cuda.edits_left = sys.maxsize
    assert caplog.text.count("taps stay in a CUDA graph while nobody captures: cuGraphNodeSetEnabled failed") == 1
    assert num_running(engine) == len(LLAMA) - 1
    engine.idles_and_captures()
    engine.model.rows.switch.forget()
    assert num_running(engine) == 0


def num_with_taps(cuda: SimulatedCuda) -> int:
    """Return how many executable graphs have taps, switched on or off."""
    return sum(executable.num_taps > 0 for executable in cuda.executables.values())


def test_pieces_have_no_taps_until_a_capture_wants_these(cuda: SimulatedCuda) -> None:
    """An engine from which nobody captures holds no memory for them; what was made for captures is made once."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    held = len(cuda.executables), len(cuda.graphs)

    engine.model.run(len(DECODE))
    found = [num_with_taps(cuda)]
    for leave_out in (2, 2, 0, 1):
        session = engine.start(leave_out=leave_out)
        engine.step(session, DECODE)
        engine.finish(session)
        assert (len(cuda.executables), len(cuda.graphs)) == held
        found.append(num_with_taps(cuda))
    assert found == [0, len(LLAMA) - 2, len(LLAMA) - 2, len(LLAMA), len(LLAMA)]


def test_pieces_are_made_ready_in_a_pause(cuda: SimulatedCuda) -> None:
    """After a capture, for all sizes of steps and all taps: no later step waits for them. A busy device gets none."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    switch = engine.model.rows.switch
    session = engine.start(leave_out=2)
    engine.step(session, DECODE)
    assert not switch.complete_pieces(lambda: True), "while somebody captures"
    engine.finish(session)
    before = num_with_taps(cuda)
    assert before == len(LLAMA) - 2
    for num_made in (0, 2):
        quiet = iter([True] * (num_made + 1) + [False])
        assert not switch.complete_pieces(lambda quiet=quiet: next(quiet))
        assert num_with_taps(cuda) == before + num_made
    assert switch.complete_pieces(lambda: True)
    assert num_with_taps(cuda) == sum(map(len, engine.model._graphs.values()))
    launches = cuda.num_launches
    engine.model.run(1)
    assert cuda.num_launches == launches, "taps are disabled until a capture wants them"
    made = max(cuda.executables)
    for leave_out in (0, 1):
        session = engine.start(leave_out=leave_out)
        for step in (DECODE, {"a": 1}, {"a": 1, "b": 1}):
            engine.step(session, step)
        engine.finish(session)
    assert max(cuda.executables) == made


class StepLock:
    """The lock that each step of an engine holds."""

    def __init__(self) -> None:
        self.is_held = False

    def __enter__(self) -> None:
        assert not self.is_held
        self.is_held = True

    def __exit__(self, *_: object) -> None:
        self.is_held = False


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
def test_what_is_executable_changes_between_steps_alone(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, in_pieces: bool
) -> None:
    """What another thread makes ready or gives up, a step may be about to launch."""
    engine = Engine(cuda, LLAMA, in_pieces)
    session = engine.start(leave_out=1)
    engine.step(session, DECODE)
    engine.finish(session)
    lock, calls = engine.model.step_lock, list[bool]()

    def watched(call: Callable[..., int], *args: Any) -> int:
        calls.append(lock.is_held)
        return call(*args)

    for name in ("cuGraphInstantiateWithFlags", "cuGraphNodeSetEnabled", "cuGraphExecDestroy"):
        monkeypatch.setattr(cuda, name, functools.partial(watched, getattr(cuda, name)))
    switch = engine.model.rows.switch
    switch.forget()
    assert len(calls) == 2  # two copies, or two pieces
    assert switch.complete_pieces(lambda: True)
    num_pieces = sum(map(len, engine.model._graphs.values())) if in_pieces else 2
    assert len(calls) == 2 + 3 * (num_pieces - 2)
    assert all(calls)


def test_pieces_are_made_ready_when_the_staging_memory_goes(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some seconds after the last capture, and later where the engine goes on; from an engine without one, never."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    rows = engine.model.rows
    engine.model.run(1)
    assert not rows.slabs.tidy(time.monotonic() + 2 * LINGER_SECONDS)
    assert num_with_taps(cuda) == 0
    engine.start().close()
    monkeypatch.setattr(rows, "is_quiet", lambda: False)
    assert rows.slabs.tidy(time.monotonic() + LINGER_SECONDS)
    assert (rows.staging_bytes, rows.is_preparing, num_with_taps(cuda)) == (0, True, 0)
    monkeypatch.setattr(rows, "is_quiet", lambda: True)
    assert not rows.slabs.tidy(time.monotonic())
    assert not rows.is_preparing
    assert num_with_taps(cuda) == len(cuda.executables)


@pytest.mark.parametrize(("limit", "allowed", "num_left_on"), [("instances_left", 1, 0), ("edits_left", 0, 1)])
def test_pieces_that_cannot_be_made_ready_wait_for_a_capture(
    cuda: SimulatedCuda, caplog: pytest.LogCaptureFixture, limit: str, allowed: int, num_left_on: int
) -> None:
    """The engine goes on with what it has, and captures are right."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    setattr(cuda, limit, allowed)
    with caplog.at_level("INFO", "vllm_tap"):
        assert engine.model.rows.switch.complete_pieces(lambda: True), "there is no use in trying again and again"
    setattr(cuda, limit, sys.maxsize)
    assert caplog.text.count("made ready when a capture wants them") == 1
    launches = cuda.num_launches
    for num_rows in engine.model._graphs:
        engine.model.run(num_rows)
    assert cuda.num_launches - launches == num_left_on
    session = engine.start()
    engine.step(session, DECODE)
    engine.finish(session)


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
def test_copies_of_graphs_go_with_these(cuda: SimulatedCuda, in_pieces: bool) -> None:
    """An engine may go while they are still kept for the next capture; a graph may be captured for a look alone."""
    engine = Engine(cuda, LLAMA, in_pieces)
    session = engine.start()
    engine.step(session, DECODE)
    engine.finish(session)
    assert cuda.executables
    before = len(cuda.graphs)
    num_copies = len(engine.model._graphs)
    engine.model._graphs.clear()
    gc.collect()
    assert not cuda.executables
    if not in_pieces:  # a piece is no copy
        assert len(cuda.graphs) <= before - num_copies
    assert engine.model.rows.switch.prepare(1)
    engine.model.rows.switch.forget()


def test_a_graph_that_could_not_be_given_up_is_not_launched_again(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two executable forms the driver destroys one, and refuses the other."""
    engine = Engine(cuda, LLAMA)
    for leave_out in (1, 0):
        session = engine.start(leave_out=leave_out)
        engine.step(session, DECODE)
        engine.finish(session)
    copy = next(copy for copy in copies_of(engine) if len(copy._forms) == 2)
    destroy, refusals = SimulatedCuda.cuGraphExecDestroy, iter([False, True])
    monkeypatch.setattr(
        SimulatedCuda, "cuGraphExecDestroy", lambda *args: 1 if next(refusals, False) else destroy(*args)
    )
    with pytest.raises(TransportError, match="cuGraphExecDestroy failed"):
        copy.forget()
    session = engine.start()
    engine.step(session, DECODE)
    engine.finish(session)


def test_rows_whose_elements_lie_apart_are_refused(cuda: SimulatedCuda) -> None:
    """The kernels read what lies side by side; other bytes would come under right labels."""
    engine = Engine(cuda, LLAMA)
    make = engine.model._make

    def turned(*args: Any) -> Any:
        hidden, residual = make(*args)
        return hidden.t().contiguous().t(), residual

    session = engine.start()
    engine.model._make = turned  # type: ignore[method-assign]
    engine.step(session, STEPS[0])
    with pytest.raises(CaptureError, match=r"\[\[16, 24\], \[16, 24\]\] .* strides \[\(1, 16\), \(24, 1\)\]"):
        session.finish()
    session.close()


def test_a_kernel_that_does_not_run_here_is_a_refusal(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device that Triton cannot compile for: the model runs as if there were no taps."""

    def warm(*_: Any) -> None:
        raise RuntimeError("no such architecture")

    monkeypatch.setattr(kernel, "warm", warm)
    model = Model(cuda, LLAMA)
    model.capture_graphs()
    model.run(3)
    assert model.rows.refusal == ("the taps' kernels do not run on this device (RuntimeError: no such architecture)")
    assert caplog.text.count("plain generation goes on") == 1


@pytest.mark.parametrize("way", ["staged", "ring"])
def test_staging_is_smaller_where_memory_is_short(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Room for one step at a time is enough: steps wait for the copies of the one before, on the device."""
    if way == "ring":
        monkeypatch.setattr(device_sink, "WIDE_PLANE_BYTES", 1)
    engine = Engine(cuda, LLAMA)
    rows = engine.model.rows
    engine.start().close()
    usual = rows.staging_bytes
    rows.slabs.tidy(time.monotonic() + LINGER_SECONDS)
    assert rows.staging_bytes == 0
    cuda.free_bytes = usual - 1
    session = engine.start()
    assert usual / 2 <= rows.staging_bytes < usual
    for step in STEPS:
        engine.step(session, step)
    engine.finish(session)
    assert cuda.conflicts == []


# ------------------------------------------------------------------------------------- what the simulation would notice


def broken_capture(cuda: SimulatedCuda, steps: list[dict[str, int]]) -> list[str]:
    """Run a capture whose order was broken, and return what is unordered; its bytes may still be right."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    for step in steps:
        engine.step(session, step)
    engine.finish(session)
    return cuda.conflicts


def test_reusing_staging_without_waiting_is_noticed(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tap that overwrites what a copy may still read."""
    take = Ring.take

    def forgetful(self: Ring, size: int, stream: Any) -> int:
        self._busy.clear()
        return take(self, size, stream)

    monkeypatch.setattr(Ring, "take", forgetful)
    assert any("kernel _tap" in c and "from the device" in c for c in broken_capture(cuda, [{"c": 20}] * 3))


def test_memory_that_serves_again_too_early_is_noticed(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that makes its tensors where those of another are held until the end of the graph."""
    monkeypatch.setattr(Model, "is_held", lambda *_: False)
    engine = Engine(cuda, FOUR_ROUTERS, keeps_tensors=True)
    session = engine.start()
    engine.step(session, DECODE)
    with pytest.raises(AssertionError, match="router_logits"):
        engine.finish(session)


def test_a_copy_that_does_not_wait_for_the_forward_pass_is_noticed(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that may read before the taps have written."""
    monkeypatch.setattr(cuda_calls.Event, "hold", lambda *_: None)
    assert any("from the device" in c and "kernel _tap" in c for c in broken_capture(cuda, [DECODE]))


def test_rows_that_are_handed_over_too_early_are_noticed(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that reads before the last copy has ended."""
    monkeypatch.setattr(cuda_calls.Event, "synchronize", lambda _: None)
    assert any(c.startswith("client on host") for c in broken_capture(cuda, [DECODE]))
