"""Lets data parallel engines exchange rows of experts on a CPU: two collectives that vLLM has for GPUs only.

Tests only. Python imports this module by its name when it starts, in every process that has this folder in PYTHONPATH;
`data_parallel_environment` in tests/runners.py puts it there.
"""

import importlib.abc
import importlib.util
import sys
from typing import Any

OWNER = "vllm.distributed.device_communicators.cpu_communicator"


def all_gatherv(self: Any, inputs: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Return the rows of all ranks, which may have different numbers of them."""
    import torch

    if not isinstance(inputs, torch.Tensor):
        return [all_gatherv(self, one, dim, sizes) for one in inputs]
    assert dim == 0
    sizes = sizes or [len(inputs)] * self.world_size
    padded = inputs.new_zeros(max(sizes), *inputs.shape[1:])
    padded[: len(inputs)] = inputs
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(self: Any, inputs: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Return this rank's rows of the sum over all ranks."""
    import torch

    assert dim == 0
    sizes = sizes or [len(inputs) // self.world_size] * self.world_size
    total = inputs.clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    return total.split(sizes)[self.rank_in_group].contiguous()


class Finder(importlib.abc.MetaPathFinder):
    """Adds the collectives to vLLM's class as soon as its module has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != OWNER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.CpuCommunicator.all_gatherv = all_gatherv
            module.CpuCommunicator.reduce_scatterv = reduce_scatterv

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
