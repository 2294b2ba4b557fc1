"""The tap: an operator in the model's compiled graph that takes chosen rows of a tensor.

Runs in the worker process. The operator mutates its control word, so that no compiler drops or reorders it; what
changes from step to step (destination, rows, on or off) is data beside the graph, never part of it. One compiled or
captured graph therefore serves every capture and costs next to nothing when idle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

import torch

from vllm_tap.errors import CaptureError

ADD: Final = 0  # the row is hidden + residual
FIRST: Final = 1  # the row is hidden alone: the layer returns the whole stream in its first item

PROBE_ROWS: Final = 16
GATHER_ABOVE: Final = 4  # runs; above this many, one gather is cheaper than a copy per run


class Run(NamedTuple):
    """A contiguous piece of the batch: rows `source` to `source + num_rows` become rows `target` and following."""

    source: int
    target: int
    num_rows: int


class Probe:
    """The first rows that went through a tap, kept to find out what the tensors mean.

    `number` is that of the forward pass, `order` that of the call among all that were observed.
    """

    def __init__(self, hidden: torch.Tensor, residual: torch.Tensor | None, number: int = 0, order: int = 0) -> None:
        self.number, self.order = number, order
        self.hidden = hidden[:PROBE_ROWS].clone()
        self.residual = None if residual is None else residual[:PROBE_ROWS].clone()


class Group:
    """The rows of the current step that one capture takes. Empty between its steps.

    Attributes:
        num_tokens: Rows that a tensor has at least, if all of the step's are in it.
        failure: What went wrong in a tap of the step.
    """

    def __init__(self) -> None:
        self.runs: Sequence[Run] = ()
        self.sources: torch.Tensor | None = None
        self.num_tokens = 0
        self.failure: Exception | None = None

    def fail(self, error: Exception) -> None:
        """Take note of what went wrong in a tap, and skip every row; the model's forward pass goes on."""
        self.failure = self.failure or error
        self.clear()

    def clear(self) -> None:
        """Make every tap skip every row of this capture."""
        self.runs, self.sources = (), None


G = TypeVar("G", bound=Group)


class Rows(Generic[G]):
    """The rows of the current step, for all taps of one engine.

    Attributes:
        groups: Of each capture under way what it takes.
        num_passes: Forward passes that have ended, dummy ones among them.
        num_observed: Calls of taps that were observed.
    """

    def __init__(self) -> None:
        self.groups: list[G] = []
        self.num_passes = self.num_observed = 0

    @property
    def num_graph_nodes(self) -> int:
        """Kernels of taps in captured graphs, where they are switched off while idle."""
        return 0

    @property
    def staging_bytes(self) -> int:
        """Device memory that captures hold now."""
        return 0

    @property
    def is_preparing(self) -> bool:
        """True while pauses of the engine are used to make ready what steps of captures would wait for."""
        return False

    def clear(self) -> None:
        """Make every tap skip every row."""
        for group in self.groups:
            group.clear()


class Plane:
    """Place to which a tap of a CPU engine writes the rows of one capture in a step: a tensor [num_rows, width].

    Attributes:
        is_written: Whether rows have passed the tap in this step.
    """

    def __init__(self, rows: torch.Tensor, mode: int) -> None:
        self._rows, self._mode = rows, mode
        self.is_written = False

    def write(self, group: Group, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Write the rows that a group takes; one pass over them, in the dtype of the model's own add."""
        if self._mode == FIRST:
            residual = None
        runs = group.runs
        if len(runs) > GATHER_ABOVE:
            assert group.sources is not None
            hidden = hidden.index_select(0, group.sources)
            residual = None if residual is None else residual.index_select(0, group.sources)
            runs = (Run(0, 0, len(hidden)),)
        for source, target, num_rows in runs:
            out = self._rows[target : target + num_rows]
            rows = hidden[source : source + num_rows]
            if residual is None:
                out.copy_(rows)
            else:
                torch.add(rows, residual[source : source + num_rows], out=out)
        self.is_written = True


class Tap:
    """One place in the model where rows can be taken.

    `width` and `dtype` are those of the rows, learned from the first forward pass unless given. `seen` holds the dtypes
    of the tensors that came first, which those after them must have. `planes` says on a CPU engine where the rows of
    the current step go, for each capture that takes some here. `keeps_tensors`: what it sees in a forward pass stays as
    it is for as long as somebody holds it.
    """

    def __init__(
        self, stream: str, layer: int, rows: Rows[Any], device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        self.stream, self.layer, self.rows = stream, layer, rows
        self.width = 0
        self.dtype = dtype
        self.seen: tuple[torch.dtype, torch.dtype | None] | None = None
        self.keep_probe = False
        self.keep_one_probe = False
        self.keeps_tensors = False
        self.probe: Probe | None = None
        self.planes: dict[Group, Plane] = {}
        self.index = len(REGISTRY)
        REGISTRY.append(self)
        # Of its own storage: graph inputs that share one would be cloned.
        self.control = torch.tensor([self.index], dtype=torch.int64, device=device)

    def observe(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Learn width and dtype, and keep a probe if asked to."""
        if not self.width:
            self.width, self.seen = hidden.shape[-1], _dtypes(hidden, residual)
        self.rows.num_observed += 1
        if self.dtype is None:
            self.dtype = hidden.dtype if residual is None else torch.result_type(hidden, residual)
        if self.keep_probe:
            # The last call counts: a model may use its final norm on the embeddings too.
            self.probe = Probe(hidden, residual, self.rows.num_passes, self.rows.num_observed)
            self.keep_probe = not self.keep_one_probe


Taps = Mapping[tuple[str, int], Tap]
"""Taps of a model by stream and layer."""

REGISTRY: Final[list[Tap]] = []
"""All taps of this process, by the index in their control words."""

LIBRARY = torch.library.Library("vllm_tap", "FRAGMENT")
LIBRARY.define("tap(Tensor hidden, Tensor? residual, Tensor(a!) control) -> ()")
LIBRARY.define("tap_experts(Tensor logits, Tensor ids, Tensor weights, Tensor(a!) control) -> ()")


def flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return rows as [T, D]."""
    # The Transformers backend of vLLM runs its layers on [1, T, D].
    return tensor if tensor is None or tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def expert_taps(first: Tap) -> list[Tap]:
    """Return the taps of a layer's logits, expert ids and weights, which were made one after the other."""
    return REGISTRY[first.index : first.index + 3]


def _dtypes(hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.dtype, torch.dtype | None]:
    return hidden.dtype, None if residual is None else residual.dtype


def require_rows(tap: Tap, group: Group, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> None:
    """Refuse a tensor that does not have all rows of the step, or other rows than those that went through before.

    Raises:
        CaptureError: It has fewer, or they are of another width or dtype.
    """
    seen = _dtypes(hidden, residual)
    if hidden.shape[-1] != tap.width or (hidden.is_floating_point() and seen != tap.seen):
        now, before = (*seen, hidden.shape[-1]), (*(tap.seen or ()), tap.width)
        raise CaptureError(
            f"{tap.stream}[{tap.layer}] passed rows of (dtype, that of a residual, width) {now}, and {before} before: "
            "the model has changed since it was loaded. Start a new engine."
        )
    if len(hidden) < group.num_tokens:
        raise CaptureError(
            f"{tap.stream}[{tap.layer}] passed {len(hidden)} rows in a step of at least {group.num_tokens}: this "
            "model leaves rows out in some layers, and the rest cannot be told apart. Capture layers before that one, "
            "and report the model."
        )


def _pass_cpu(tap: Tap, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
    try:
        if not tap.width or tap.keep_probe:
            tap.observe(hidden, residual)
    except Exception as error:
        for group in tap.planes:
            group.fail(error)
    for group, plane in tap.planes.items():
        _write(tap, group, plane, hidden, residual)


def _write(tap: Tap, group: Group, plane: Plane, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
    if not group.runs:
        return
    try:
        require_rows(tap, group, hidden, residual)
        plane.write(group, hidden, residual)
    except Exception as error:
        group.fail(error)


def _tap_cpu(hidden: torch.Tensor, residual: torch.Tensor | None, control: torch.Tensor) -> None:
    _pass_cpu(REGISTRY[int(control)], flat(hidden), flat(residual))  # type: ignore[arg-type]


def _tap_experts_cpu(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, control: torch.Tensor) -> None:
    for place, rows in zip(expert_taps(REGISTRY[int(control)]), (logits, ids, weights), strict=True):
        _pass_cpu(place, rows, None)


def _fake(*_: torch.Tensor | None) -> None:
    return None


LIBRARY.impl("tap", _tap_cpu, "CPU")
LIBRARY.impl("tap_experts", _tap_experts_cpu, "CPU")
for _name in ("tap", "tap_experts"):
    torch.library.register_fake(f"vllm_tap::{_name}", _fake, lib=LIBRARY)


def tap(hidden: torch.Tensor, residual: torch.Tensor | None, control: torch.Tensor) -> None:
    """Pass rows by a tap. Call it where the model runs; compilers keep it, in place and in order.

    Args:
        hidden: Tensor [T, D] or [1, T, D].
        residual: Tensor of the same shape, to be added, or None.
        control: The tap's control word.
    """
    if _is_eager_cpu(control):
        _tap_cpu(hidden, residual, control)
    else:
        torch.ops.vllm_tap.tap(hidden, residual, control)


def tap_experts(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, control: torch.Tensor) -> None:
    """Pass the rows of a layer's experts by their three taps at once.

    Args:
        logits: Tensor [T, E].
        ids: Tensor [T, K] of integers, `weights` of the same shape.
        control: The control word of the tap of the logits; those of ids and weights were made next.
    """
    if _is_eager_cpu(control):
        _tap_experts_cpu(logits, ids, weights, control)
    else:
        torch.ops.vllm_tap.tap_experts(logits, ids, weights, control)


def _is_eager_cpu(control: torch.Tensor) -> bool:
    """Tell whether a CPU's model runs uncompiled: PyTorch's dispatcher would cost more than an idle tap."""
    return control.is_cpu and not torch.compiler.is_compiling()
