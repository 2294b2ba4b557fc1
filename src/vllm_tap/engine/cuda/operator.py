"""The tap's operator on CUDA tensors: what happens when a layer passes its rows by. Runs in the worker process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vllm_tap.engine.cuda import kernel
from vllm_tap.engine.cuda.deferred_experts import dtypes
from vllm_tap.engine.cuda.expert_kernel import launch_tap_experts, warm_experts
from vllm_tap.engine.cuda.group import DeviceGroup
from vllm_tap.engine.cuda.rows import DeviceRows
from vllm_tap.engine.model.tap import LIBRARY, REGISTRY, Tap, expert_taps, flat, require_rows
from vllm_tap.errors import CaptureError
from vllm_tap.streams import NUMBERS

_by_pointer: dict[int, Tap] = {}


def _tap_cuda(hidden: torch.Tensor, residual: torch.Tensor | None, control: torch.Tensor) -> None:
    _guarded(control, lambda tap, rows: _pass(tap, rows, flat(hidden), flat(residual)))  # type: ignore[arg-type]


def _tap_experts_cuda(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, control: torch.Tensor) -> None:
    _guarded(control, lambda tap, rows: _pass_experts(expert_taps(tap), rows, (logits, ids, weights)))


def _guarded(control: torch.Tensor, run: Callable[[Tap, DeviceRows], None]) -> None:
    """Do something with a tap; the model's forward pass goes on, whatever becomes of the capture."""
    tap = _by_pointer.get(control.data_ptr()) or _find(control)
    rows: DeviceRows = (tap or REGISTRY[-1]).rows  # type: ignore[assignment]
    if rows.refusal:
        return
    try:
        if tap is None:
            raise CaptureError("a tap's control word was cloned by the compiler: report this model")
        run(tap, rows)
    except Exception as error:
        rows.fail(error)


def _pass(tap: Tap, rows: DeviceRows, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Put the kernel into the graph that is being captured; else launch it if these rows are wanted now."""
    place = _place(tap, rows)
    if torch.cuda.is_current_stream_capturing():
        assert tap.dtype is not None
        kernel.launch_tap(rows.tables, hidden, residual, *place, tap.dtype, ahead=True, num_groups=kernel.MAX_GROUPS)
        rows.switch.note((tap.index,), torch.cuda.current_stream(hidden.device).cuda_stream, len(hidden))
        return
    _learn(tap, rows, hidden, residual)
    for group in rows.groups:
        _for(group, lambda group: _take(tap, group, place, hidden, residual))


def _for(group: DeviceGroup, take: Callable[[DeviceGroup], None]) -> None:
    """Do something for a capture that takes rows of this step; what goes wrong is the end of that one alone."""
    if not group.active:
        return
    try:
        take(group)
    except Exception as error:
        group.fail(error)


def _take(
    tap: Tap, group: DeviceGroup, place: tuple[int, int], hidden: torch.Tensor, residual: torch.Tensor | None
) -> None:
    """Launch the kernel for the rows that a capture takes of a tap."""
    if group.sink is None or not group.sink.wants(tap):
        return
    require_rows(tap, group, hidden, residual)

    def write(address: int) -> None:
        assert tap.dtype is not None
        kernel.launch_tap(group.tables, hidden, residual, *place, tap.dtype, address=address, chosen=group.chosen)

    if group.sink.goes_by_planes(tap):
        group.sink.send_plane(tap, write)
    else:
        write(0)


def _learn(tap: Tap, rows: DeviceRows, hidden: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Learn what a tap sees, and compile for it the first time; return whether it is that."""
    is_first = not tap.width
    if is_first or tap.keep_probe:
        tap.observe(hidden, residual)
    if is_first:
        assert tap.dtype is not None
        # Now, because nothing can be compiled or loaded while a stream is captured, nor launched while the tap is on.
        kernel.warm(rows.tables, hidden, residual, *_place(tap, rows), tap.dtype)
    return is_first


def _pass_experts(taps: Sequence[Tap], rows: DeviceRows, tensors: Sequence[torch.Tensor]) -> None:
    """Do for the three taps of a layer's experts, with one kernel, what `_pass` does for one."""
    place = _place(taps[0], rows)
    if torch.cuda.is_current_stream_capturing():
        assert rows.experts is not None
        if not taps[0].keeps_tensors or not rows.experts.hold(taps, tensors):
            rows.experts.launch_layer(taps, tensors)
        return
    if any([_learn(tap, rows, tensor, None) for tap, tensor in zip(taps, tensors, strict=True)]):
        if taps[0].keeps_tensors and rows.experts is not None:
            rows.experts.make_room()
        warm_experts(rows.tables, tensors, *place, dtypes(taps))
    for group in rows.groups:
        _for(group, lambda group: _take_experts(taps, rows, group, tensors))


def _take_experts(taps: Sequence[Tap], rows: DeviceRows, group: DeviceGroup, tensors: Sequence[torch.Tensor]) -> None:
    """Launch one kernel for what a capture takes of a layer's experts, unless planes of it leave one by one."""
    if group.sink is None:
        return
    wanted = [tap for tap in taps if group.sink.wants(tap)]
    for tap, tensor in zip(taps, tensors, strict=True):
        if tap in wanted:
            require_rows(tap, group, tensor)
    if any(group.sink.goes_by_planes(tap) for tap in wanted):
        for tap, tensor in zip(taps, tensors, strict=True):
            _take(tap, group, _place(tap, rows), tensor, None)
    elif wanted:
        place = _place(taps[0], rows)
        launch_tap_experts(group.tables, tensors, *place, dtypes(taps), chosen=group.chosen)


def _place(tap: Tap, rows: DeviceRows) -> tuple[int, int]:
    return tap.index - rows.first_tap, NUMBERS[tap.stream]


def _find(control: torch.Tensor) -> Tap | None:
    tap = next((t for t in REGISTRY if t.control.data_ptr() == control.data_ptr()), None)
    if tap is not None:
        _by_pointer[control.data_ptr()] = tap
    return tap


def install() -> None:
    """Register the CUDA implementation of the tap, once per process."""
    if not _by_pointer and not _installed:
        LIBRARY.impl("tap", _tap_cuda, "CUDA")
        LIBRARY.impl("tap_experts", _tap_experts_cuda, "CUDA")
        _installed.append(True)


_installed: list[bool] = []
