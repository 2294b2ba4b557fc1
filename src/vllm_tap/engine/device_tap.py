"""The tap's operator on CUDA tensors: what happens when a layer passes its rows by. Runs in the worker process."""

from __future__ import annotations

import torch

from vllm_tap.engine import kernel
from vllm_tap.engine.device_rows import STREAM_NUMBERS, DeviceRows
from vllm_tap.engine.tap import LIBRARY, REGISTRY, Tap, flat
from vllm_tap.errors import CaptureError

_by_pointer: dict[int, Tap] = {}


def _tap_cuda(hidden: torch.Tensor, residual: torch.Tensor | None, control: torch.Tensor) -> None:
    tap = _by_pointer.get(control.data_ptr()) or _find(control)
    rows: DeviceRows = (tap or REGISTRY[-1]).rows  # type: ignore[assignment]
    if rows.refusal:
        return
    try:
        if tap is None:
            raise CaptureError("a tap's control word was cloned by the compiler: report this model")
        hidden, residual = flat(hidden), flat(residual)  # type: ignore[assignment]
        if torch.cuda.is_current_stream_capturing():
            _record(tap, rows, hidden, residual)
        else:
            _pass(tap, rows, hidden, residual)
    except Exception as error:
        # The model's forward pass goes on, whatever becomes of the capture.
        rows.fail(error)


def _record(tap: Tap, rows: DeviceRows, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Put the kernel into the graph that is being captured."""
    assert tap.dtype is not None
    kernel.launch_tap(rows, hidden, residual, *_place(tap, rows), tap.dtype, ahead=True)
    rows.switch.note(tap.index, torch.cuda.current_stream(hidden.device).cuda_stream)


def _pass(tap: Tap, rows: DeviceRows, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Learn what the tap sees, and launch the kernel if these rows are wanted now."""
    if not tap.width or tap.keep_probe:
        tap.observe(hidden, residual)
        assert tap.dtype is not None
        # Now, because nothing can be compiled or loaded while a stream is captured.
        kernel.warm(rows, hidden, residual, *_place(tap, rows), tap.dtype)
    if rows.active and rows.sink is not None and rows.sink.wants(tap):
        assert tap.dtype is not None
        address = rows.sink.address_for(tap)
        place = _place(tap, rows)
        kernel.launch_tap(rows, hidden, residual, *place, tap.dtype, address=address, chosen=rows.chosen)
        if address:
            rows.sink.send_plane(tap)


def _place(tap: Tap, rows: DeviceRows) -> tuple[int, int]:
    return tap.index - rows.first_tap, STREAM_NUMBERS[tap.stream]


def _find(control: torch.Tensor) -> Tap | None:
    tap = next((t for t in REGISTRY if t.control.data_ptr() == control.data_ptr()), None)
    if tap is not None:
        _by_pointer[control.data_ptr()] = tap
    return tap


def install() -> None:
    """Register the CUDA implementation of the tap, once per process."""
    if not _by_pointer and not _installed:
        LIBRARY.impl("tap", _tap_cuda, "CUDA")
        _installed.append(True)


_installed: list[bool] = []
