"""The offer of a worker: its streams and their conventions, how routers choose, and its share of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from msgspec import structs

from vllm_tap.engine.model.install import ModelTaps
from vllm_tap.engine.model.residual import NO_ROWS
from vllm_tap.engine.model.stack import by_shape
from vllm_tap.engine.model.tap import PROBE_ROWS
from vllm_tap.engine.servers import Addresses
from vllm_tap.frame import messages
from vllm_tap.frame.layout import Stream
from vllm_tap.frame.routing import Routing
from vllm_tap.transport.tcp.address import host_id
from vllm_tap.vllm import facts
from vllm_tap.vllm import runner as vllm_runner


def refused(worker: Any, reason: str) -> messages.Hello:
    """Return what a worker says that cannot capture."""
    return messages.Hello(
        rank=vllm_runner.read_rank(worker),
        pid=os.getpid(),
        engine=facts.vllm_version(),
        runner=vllm_runner.runner_name(worker.model_runner),
        device=worker.device.type,
        num_layers=0,
        streams=(),
        residual="",
        reasons={},
        routing={},
        wants_rows=0,
        address="",
        calls="",
        host=host_id().hex(),
        refusal=reason,
    )


def hello(worker: Any, taps: ModelTaps, addresses: Addresses) -> messages.Hello:
    """Return what a worker says of itself, as far as the forward passes until now have shown."""
    verdict, reasons, routing = taps.residual(), taps.reasons(), taps.routing()
    wants_rows = (
        verdict.wants_rows or taps.wants_rows or any(found.reason == NO_ROWS for found in routing.values())
    )  # fmt: skip
    return structs.replace(
        refused(worker, ""),
        num_layers=taps.num_layers,
        streams=tuple(_streams(taps, reasons)),
        residual=verdict.convention,
        reasons=reasons,
        routing=share_of(worker, routing),
        routing_version=taps.routers.version,
        wants_rows=_eager_rows(worker) if wants_rows and vllm_runner.takes_tokens_alone(worker) else 0,
        may_change=wants_rows or taps.may_change,
        **addresses._asdict(),
    )


def pass_dummy_rows(worker: Any, taps: ModelTaps) -> None:
    """Have the taps learn shapes, if they have seen nothing yet.

    Not in data parallel engines, which run in step: a forward pass of one alone waits for the others. There, and where
    dummy rows tell nothing, the client sends a request.
    """
    if not taps.seen and not vllm_runner.runs_in_step(worker):
        vllm_runner.run_dummy(worker.model_runner)


def share_of_streams(worker: Any, taps: ModelTaps, start: messages.Start) -> Iterable[Stream]:
    """Choose the layers that this rank ships: tensor-parallel ranks hold the same rows and share the layers out."""
    rank = vllm_runner.read_rank(worker)
    mine = {
        (stream, layer): tap
        for (stream, layer), tap in taps.by_place.items()
        if layer in start.streams.get(stream, ()) and layer % rank.tp_size == rank.tp_rank
    }
    for (stream, dtype, width), layers in by_shape(mine).items():
        yield Stream(stream, dtype, width, tuple(layers))


def share_of(worker: Any, routing: dict[int, Routing]) -> dict[int, Routing]:
    """Return what this rank says: tensor-parallel ranks share the layers out as they do their rows."""
    rank = vllm_runner.read_rank(worker)
    return {layer: found for layer, found in routing.items() if layer % rank.tp_size == rank.tp_rank}


def _streams(taps: ModelTaps, reasons: dict[str, str]) -> Iterable[messages.StreamInfo]:
    conventions = taps.conventions()
    places = {place: tap for place, tap in taps.by_place.items() if tap.width and place[0] not in reasons}
    for (stream, dtype, width), numbers in by_shape(places).items():
        yield messages.StreamInfo(stream, dtype, width, tuple(numbers), conventions[stream])


def _eager_rows(worker: Any) -> int:
    """Return of how many tokens a step is that replays no CUDA graph, in which taps learn nothing."""
    graph_rows = vllm_runner.graph_rows(worker) if worker.device.type == "cuda" else 0
    return max(graph_rows + 1, PROBE_ROWS)
