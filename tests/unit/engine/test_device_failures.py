"""What a simulated CUDA device refuses: the capture ends with the reason, and nothing else does."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest

from simulated_cuda import SimulatedCuda
from simulated_engine import DECODE, LLAMA, ROUTER, STEPS, Engine, Model, Place
from vllm_tap.engine.cuda import kernel
from vllm_tap.engine.cuda import sink as device_sink
from vllm_tap.errors import BudgetError, CaptureError, DeviceError, EngineUnsupportedError


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
    assert not any(group.active for group in engine.model.rows.groups)
    with pytest.raises(CaptureError, match=rf"{last.stream}\[{last.layer}\] passed 15 rows in a step of at least 16"):
        session.finish()
    session.close()


def test_taps_for_which_the_tables_have_no_room_are_refused(cuda: SimulatedCuda) -> None:
    """Before anything is taken: what lies behind the tables on the device is not ours."""
    engine = Engine(cuda, LLAMA)
    rows = engine.model.rows
    rows.tables.table = rows.tables.table[: len(LLAMA) - 1]
    with pytest.raises(
        EngineUnsupportedError,
        match=f"tap {len(LLAMA)} of this model is one too many: there is room for {len(LLAMA) - 1}",
    ):
        engine.start()
    assert (rows.staging_bytes, rows.groups) == (0, [])
    session = engine.start(leave_out_last=1)
    engine.step(session, STEPS[0])
    engine.finish(session)


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


@pytest.mark.parametrize("rests", [False, True])
def test_a_tap_that_a_step_missed_is_an_error(cuda: SimulatedCuda, rests: bool) -> None:
    """A step that skips a layer would leave old bytes in its plane: no rows are handed over."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    engine.step(session, STEPS[0])
    if rests:
        session.on_idle()
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
    with pytest.raises(DeviceError, match="failed: CUDA_ERROR_INVALID_VALUE"):
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
            with pytest.raises(DeviceError, match="failed: CUDA_ERROR_INVALID_VALUE"):
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
