"""Surroundings in which a CPU runs what is for GPUs: the V2 runner, experts shared out, scheduling ahead, CUDA taps.

Runs in the test process.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def python_path(*folders: str | Path) -> str:
    """Return the PYTHONPATH of a process that imports helpers of tests, with folders beside this file in front."""
    paths = [*(HERE / folder for folder in folders), HERE, HERE.parent, os.environ.get("PYTHONPATH")]
    return os.pathsep.join(str(path) for path in paths if path)


def v2_environment() -> dict[str, str]:
    """Return the environment of a process whose engines use the V2 runner, in Triton's interpreter.

    It has to be there when the process starts; see interpreter/sitecustomize.py.
    """
    return os.environ | {"VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": python_path("interpreter")}


def simulated_environment(runner: str) -> dict[str, str]:
    """Return the environment of a process whose engines capture as on CUDA, on a simulated device."""
    runs_v2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"} if runner == "V2" else {}
    return os.environ | runs_v2 | {"PYTHONPATH": python_path("simulated")}


def expert_environment(num_ranks: int) -> dict[str, str]:
    """Return the environment of a process whose engine may share experts out over ranks."""
    return os.environ | {
        "PYTHONPATH": python_path("experts"),
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(num_ranks))),
    }


def data_parallel_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the environment of a process whose engine is one of several that hold a model with experts together."""
    return expert_environment(num_ranks) | {
        "VLLM_DP_RANK": str(rank),
        "VLLM_DP_RANK_LOCAL": str(rank),
        "VLLM_DP_SIZE": str(num_ranks),
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": str(port),
    }


@contextmanager
def asynchronous_scheduling() -> Iterator[None]:
    """Let engines that start in this context schedule a step before they have the tokens of the last.

    vLLM would turn that off on a CPU, which gains nothing by it.
    """
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.__dict__["check_and_update_config"]

    @functools.wraps(original.__func__)
    def check_and_update_config(cls: Any, config: Any) -> None:
        original.__func__(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = original
