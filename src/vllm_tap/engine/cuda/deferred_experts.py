"""Tensors of experts, held while a CUDA graph is captured for one kernel that takes many layers. Worker process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch

from vllm_tap.engine.cuda.expert_kernel import SOURCE_WORDS, can_gather, launch_gather_experts, launch_tap_experts
from vllm_tap.engine.cuda.kernel import MAX_GROUPS
from vllm_tap.engine.cuda.rows import DeviceRows
from vllm_tap.engine.model.tap import REGISTRY, Tap
from vllm_tap.streams import NUMBERS

MAX_GRAPHS: Final = 128
"""Graphs of the whole model that `DeferredExperts` has room for; by default, vLLM captures 51 sizes."""

MAX_HELD_BYTES: Final = 256 << 10
"""Most memory that a graph of no rows might hold; one of half as many rows as the largest graph holds half of it.

PyTorch takes memory for graphs by 2 MiB, and the graph of most rows decides how much: what smaller ones leave unused
may be held there. With Qwen3-30B-A3B they took no more with this limit, 2 MiB more with 512 KiB, and with 256 KiB
for graphs of all sizes (one H200).
"""


class Layer(NamedTuple):
    """The taps of a layer's experts, and what passed them: logits [T, E], expert ids and weights [T, K]."""

    taps: Sequence[Tap]
    tensors: Sequence[torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Memory of the graph."""
        return sum(tensor.nbytes for tensor in self.tensors)


class DeferredExperts:
    """Places of the tensors of a model's experts in its graphs.

    Cost: 4 KiB of the device for each layer, as long as the model is there.

    Args:
        rows: What the kernels read.
        graph_rows: Rows of the largest graph.
    """

    def __init__(self, rows: DeviceRows, graph_rows: int) -> None:
        self._rows, self._graph_rows = rows, graph_rows
        self._sources: torch.Tensor | None = None
        self._num_sources = 0

    def make_room(self) -> None:
        """Take the memory that `hold` needs; while a graph is captured, its own is all that there is to take.

        That serves other graphs too: what is to last may not lie there.
        """
        if self._sources is None:
            num_layers = sum(tap.keeps_tensors for tap in REGISTRY[self._rows.first_tap :])
            shape = MAX_GRAPHS * num_layers, SOURCE_WORDS
            self._sources = torch.zeros(shape, dtype=torch.int64, device=self._rows.device)

    def hold(self, taps: Sequence[Tap], tensors: Sequence[torch.Tensor]) -> bool:
        """Hold what passes the taps of a layer's experts while a graph is captured; return whether it is held.

        Nothing may write to the tensors for as long as somebody holds them.
        """
        switch = self._rows.switch
        held, new = switch.held, Layer(taps, tensors)
        most_bytes = MAX_HELD_BYTES * (1 - len(tensors[0]) / self._graph_rows) if self._graph_rows else 0
        if self._sources is None or self._num_sources + len(held) >= len(self._sources) or not can_gather(tensors):
            return False
        if new.nbytes > most_bytes:
            return False
        if sum(layer.nbytes for layer in (*held, new)) > most_bytes:
            switch.serve_held()
        return switch.hold(new)

    def serve(self, held: Sequence[Layer]) -> Callable[[], None]:
        """Put one kernel for all held layers into the graph that is being captured.

        Layers whose tensors are alike share one. Where these lie is written by what is returned, when the capture has
        ended.
        """
        alike: dict[object, list[Layer]] = {}
        for layer in held:
            form = *dtypes(layer.taps), *((tensor.shape, tensor.stride(), tensor.dtype) for tensor in layer.tensors)
            alike.setdefault(form, []).append(layer)
        launched = [(self.launch(layers), torch.tensor(self._words(layers))) for layers in alike.values()]

        def write() -> None:
            for sources, words in launched:
                if sources is not None:
                    sources.copy_(words)

        return write

    def launch_layer(self, taps: Sequence[Tap], tensors: Sequence[torch.Tensor]) -> None:
        """Put the kernel for one layer into the graph that is being captured."""
        self.launch([Layer(taps, tensors)])

    def launch(self, layers: Sequence[Layer]) -> torch.Tensor | None:
        """Put the kernel for layers that are alike into the graph that is being captured.

        Returns:
            Where it will look for their tensors; None if there is one layer, whose tensors it knows.
        """
        rows, (taps, tensors) = self._rows, layers[0]
        stream, outs = NUMBERS[taps[0].stream], dtypes(taps)
        sources = None
        if len(layers) == 1:
            index = taps[0].index - rows.first_tap
            launch_tap_experts(rows.tables, tensors, index, stream, outs, ahead=True, num_groups=MAX_GROUPS)
        else:
            assert self._sources is not None
            sources = self._sources[self._num_sources :][: len(layers)]
            self._num_sources += len(layers)
            launch_gather_experts(rows.tables, tensors, sources, stream, outs, num_groups=MAX_GROUPS)
        capturing = torch.cuda.current_stream(rows.device).cuda_stream
        rows.switch.note([tap.index for layer in layers for tap in layer.taps], capturing, len(tensors[0]))
        return sources

    def _words(self, layers: Sequence[Layer]) -> list[list[int]]:
        first = self._rows.first_tap
        return [[layer.taps[0].index - first, *(tensor.data_ptr() for tensor in layer.tensors)] for layer in layers]


def dtypes(taps: Sequence[Tap]) -> list[torch.dtype]:
    """Return the dtypes of rows of taps that have seen some."""
    return [tap.dtype for tap in taps if tap.dtype is not None]
