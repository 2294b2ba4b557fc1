"""Steps of a model under captures on a simulated CUDA device, and what has to come out of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from simulated_cuda import SimulatedCuda
from vllm_tap.engine.capture.session import Session
from vllm_tap.engine.cuda import backend, operator
from vllm_tap.engine.cuda import sink as device_sink
from vllm_tap.engine.cuda.deferred_experts import DeferredExperts
from vllm_tap.engine.cuda.rows import DeviceRows
from vllm_tap.engine.cuda.tapped_graph import GraphCopy
from vllm_tap.engine.model.tap import Tap
from vllm_tap.errors import DeviceError
from vllm_tap.frame import layout as blocks
from vllm_tap.frame import messages
from vllm_tap.labels import NUM_LABELS, Mark
from vllm_tap.transport.segment.pool import SegmentPool
from vllm_tap.vllm.runner import Batch

MAX_TOKENS = 20
GRAPH_TOKENS = 4
EXPERTS = ("router_logits", "expert_ids", "expert_weights")
REQUESTS = {"a": 11, "b": 5, "c": 7, "other": 6}
"""Prompt lengths; "other" is not captured."""

CAPTURED = ("a", "b", "c")

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


class Place(NamedTuple):
    """What a tap of the model sees."""

    stream: str
    layer: int
    width: int
    dtype: torch.dtype
    has_residual: bool


LLAMA = [Place("hidden_states", layer, 24, torch.bfloat16, True) for layer in range(3)]
BLOCKS = [
    Place(stream, 0, 24, torch.bfloat16, stream == "hidden_states")
    for stream in ("attention_output", "mlp_output", "hidden_states")
]
"""One layer, and what its blocks add."""

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
FOUR_ROUTERS = [place._replace(layer=place.layer + 2 * n) for n in range(2) for place in ROUTER]


class StepLock:
    """The lock that each step of an engine holds."""

    def __init__(self) -> None:
        self.is_held = False

    def __enter__(self) -> None:
        assert not self.is_held
        self.is_held = True

    def __exit__(self, *_: object) -> None:
        self.is_held = False


class Model:
    """Layers that make random tensors in buffers that all of them share, and pass them by their taps."""

    def __init__(
        self, cuda: SimulatedCuda, places: list[Place], joins_experts: bool = True, keeps_tensors: bool = False
    ) -> None:
        self.cuda, self.places, self.joins_experts, self.keeps_tensors = cuda, places, joins_experts, keeps_tensors
        self.step_lock = StepLock()
        self.rows = DeviceRows(MAX_TOKENS + 8, 64, cuda.device, lambda: 0, self.step_lock)
        self.rows.experts = DeferredExperts(self.rows, 2 * GRAPH_TOKENS)
        self.taps = {
            (place.stream, place.layer): Tap(place.stream, place.layer, self.rows, cuda.device, place.dtype)
            for place in places
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
            operator._tap_experts_cuda(*[hidden for hidden, _ in tensors], control)  # type: ignore[call-arg]
        else:
            operator._tap_cuda(*tensors[0], control)

    def _make(self, place: Place, number: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Memory serves again in the next layer, unless somebody holds it.
        spare = self._buffers.setdefault((place.width, place.dtype, number), [])
        free = next((pair for pair in spare if not self.is_held(pair[0])), None)
        if free is None:
            free = [torch.zeros(MAX_TOKENS, place.width, dtype=place.dtype, device=self.cuda.device) for _ in range(2)]
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
            self._graphs[num_tokens] = [
                self.cuda.captured(self.rows.switch, functools.partial(run, num_tokens)) for run in runs
            ]

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
            on_create=backend.register_segment,
            on_close=backend.unregister_segment,
        )
        self.positions = torch.zeros(MAX_TOKENS, dtype=torch.int64, device=cuda.device)
        self.token_ids = torch.zeros(MAX_TOKENS, dtype=torch.int32, device=cuda.device)
        self.random = np.random.default_rng(0)
        self.expected: list[Expected] = []  # of the capture that began last
        self._expected: dict[Session, list[Expected]] = {}
        self._taken: dict[Session, list[str]] = {}

    def start(
        self,
        staging: str = "staged",
        positions: str = "all",
        leave_out: int = 0,
        leave_out_last: int = 0,
        generates: bool = True,
        num_drafts: int = 0,
        budget_bytes: int = 8 << 20,
        requests: Sequence[str] = CAPTURED,
        spill: messages.Spill | None = None,
    ) -> Session:
        """Start a capture of all layers, or of all but the first some and the last some, beside those under way."""
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
            budget_bytes=budget_bytes,
            staging=staging,
            expected_rows=0,
            spill=spill,
        )
        sizes = device_sink.Sizes(MAX_TOKENS, GRAPH_TOKENS, 1 + num_drafts)
        sink = device_sink.DeviceSink(streams, self.model.taps, {}, self.model.rows, self.pool, sizes, staging)
        session = Session(start, 0, streams, sink, self.pool.open_account(budget_bytes))
        for sample, (request_id, prompt_len) in enumerate(REQUESTS.items()):
            if request_id in requests:
                session.meet(request_id, Mark("x", sample, 1), prompt_len, generates)
        self.expected = self._expected[session] = []
        return session

    def step(
        self,
        session: Session | Sequence[Session],
        requests: dict[str, int],
        sends: bool = True,
        computed: Sequence[int] | None = None,
    ) -> None:
        """Run a step of so many tokens of each request, at random positions or behind `computed` ones of each.

        Under one capture, or several.
        """
        sessions = [session] if isinstance(session, Session) else session
        lengths = np.array(list(requests.values()))
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        before = np.array(self.random.integers(0, 12, len(requests)) if computed is None else computed, np.int32)
        positions = np.concatenate([first + np.arange(n) for first, n in zip(before, lengths, strict=True)])
        token_ids = self.random.integers(0, 1 << 17, len(positions))
        self.positions[: len(positions)] = torch.from_numpy(positions)
        self.token_ids[: len(positions)] = torch.from_numpy(token_ids)
        waits = self.cuda.num_host_waits
        for each in sessions:
            each.before_forward(Batch(list(requests), starts, before, self.positions, self.token_ids))
        self.model.run(len(positions))
        for each in sessions:
            each.after_forward()
        for each in sessions if sends else ():
            each.after_sampling()
        may_wait = any(each.start.spill for each in sessions)
        assert may_wait or self.cuda.num_host_waits == waits, "the host waited in a step"
        for each in sessions:
            self._expect(each, requests, lengths, positions, token_ids)

    def _expect(self, session: Session, requests: dict[str, int], lengths: Any, positions: Any, token_ids: Any) -> None:
        """Keep what has to come out of a step for a capture."""
        met = self._taken.get(session, []) + [request.request_id for request in session._table]
        numbers = np.repeat([met.index(r) if r in met else -1 for r in requests], lengths)
        prompt_lens = np.repeat([REQUESTS[request_id] for request_id in requests], lengths)
        taken = np.repeat([request_id in met for request_id in requests], lengths)
        if session.start.positions == "last":
            taken &= positions == prompt_lens - 1
        if session.start.positions == "generated":
            taken &= positions >= prompt_lens
        if taken.any():
            labels = np.stack([numbers, positions, token_ids])[:, taken]
            rows = {place: made[: len(taken)][torch.from_numpy(taken)] for place, made in self.model.made.items()}
            self._expected[session].append(Expected(labels, rows))

    def finish(self, session: Session) -> None:
        """End the capture, and compare what came with what was made."""
        self._compare(session, session.finish(), self._expected[session])
        self.abandon(session)

    def take(self, session: Session) -> Callable[[], None]:
        """Have the capture let go of its rows; return a function that waits for them, and compares them."""
        descriptor, settling, _ = session.begin_take()
        expected, self._expected[session] = self._expected[session], []
        self._taken.setdefault(session, []).extend(request.request_id for request in descriptor.requests)

        def end() -> None:
            settling.wait()
            settling.check()
            self._compare(session, descriptor, expected)
            for chunk in descriptor.chunks:
                self.pool.release(chunk.block_id)

        return end

    def _compare(self, session: Session, descriptor: messages.Descriptor, made: list[Expected]) -> None:
        """Compare rows that have come with those that were made."""
        table = descriptor.table()
        assert len(table) == len(made)
        for (chunk, labels, num_rows), expected in zip(table.tolist(), made, strict=True):
            segment = self.pool.segment(descriptor.chunks[chunk].segment_id)
            placed = blocks.layout(labels, num_rows, session.streams)
            self.cuda.host_access(segment.address + labels, placed.end - labels, False, "client")
            found = np.frombuffer(segment.view, np.int32, NUM_LABELS * num_rows, labels).reshape(NUM_LABELS, -1)
            np.testing.assert_array_equal(found, expected.labels)
            for stream, begin in zip(session.streams, placed.streams, strict=True):
                shape = len(stream.layers), num_rows, stream.width
                rows = torch.frombuffer(
                    bytearray(segment.view) if segment.is_file else segment.view,
                    dtype=getattr(torch, stream.dtype),
                    count=int(np.prod(shape)),
                    offset=begin,
                ).view(shape)
                for layer, plane in zip(stream.layers, rows, strict=True):
                    assert torch.equal(plane, expected.rows[stream.name, layer].cpu()), (stream.name, layer)

    def has_failed(self, session: Session, match: str) -> None:
        """Make sure that a capture ends with an error of the driver's, and that the next one is right."""
        with pytest.raises(DeviceError, match=match):
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
        session.release()


def copies_of(engine: Engine) -> list[GraphCopy]:
    """Return the graphs with taps that this engine has beside PyTorch's."""
    return [copy for copies in engine.model.rows.switch._copies.values() for copy in copies]


def num_running(engine: Engine) -> int:
    """Return how many taps are enabled in graphs of a step."""
    before = engine.cuda.num_launches
    engine.model.run(len(DECODE))
    return engine.cuda.num_launches - before
