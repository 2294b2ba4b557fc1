"""Gives engines on a CPU the backend of those on CUDA, on a simulated device; see simulated_cuda.py.

Tests only. Python imports this module by its name when it starts, in every process that has this folder in PYTHONPATH;
`simulated_environment` in tests/support/runners.py puts it there.
"""

import contextlib
import functools
import os
import runpy
from pathlib import Path
from typing import Any

from changes import when_imported

_for_ever = contextlib.ExitStack()


def simulate(worker: Any) -> None:
    """Let the worker of this process take a simulated device for its own."""
    from simulated_cuda import simulated_cuda
    from vllm_tap.engine.capture.session import Session
    from vllm_tap.engine.cuda import kernel, operator
    from vllm_tap.engine.cuda.backend import DeviceBackend
    from vllm_tap.engine.model import tap
    from vllm_tap.errors import CaptureError

    cuda = _for_ever.enter_context(simulated_cuda())
    tap._is_eager_cpu = lambda control: False
    tap.LIBRARY.impl("tap", operator._tap_cuda, "CPU", allow_override=True)
    tap.LIBRARY.impl("tap_experts", operator._tap_experts_cuda, "CPU", allow_override=True)
    worker.choose_backend = DeviceBackend
    kernel.LARGE_ROWS = 4  # a program of many rows takes the interpreter no longer than one of one row
    finish = Session.finish

    @functools.wraps(finish)
    def finish_in_order(self: Any) -> Any:
        descriptor = finish(self)
        if cuda.conflicts:
            raise CaptureError(f"accesses without an order: {cuda.conflicts[:4]}")
        return descriptor

    Session.finish = finish_in_order


if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    runpy.run_path(str(Path(__file__).parents[1] / "interpreter" / "sitecustomize.py"))
when_imported({"vllm_tap.engine.worker": simulate})
