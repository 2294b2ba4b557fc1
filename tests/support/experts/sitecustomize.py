"""Lets experts be shared out over ranks on a CPU, where vLLM lacks two collectives and a kernel that knows its share.

Tests only. Python imports this module by its name when it starts, in every process that has this folder in PYTHONPATH;
`expert_environment` in tests/support/runners.py puts it there.
"""

import functools
from typing import Any

from changes import when_imported


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


def add_collectives(module: Any) -> None:
    """Add what exchanges different numbers of rows."""
    module.CpuCommunicator.all_gatherv = all_gatherv
    module.CpuCommunicator.reduce_scatterv = reduce_scatterv


def add_shares(module: Any) -> None:
    """Let the kernel pass over experts of other ranks: their weights are zero, their numbers are of its own."""
    apply = module.CPUUnquantizedExperts.apply

    @functools.wraps(apply)
    def of_this_rank(self: Any, *args: Any, topk_weights: Any, topk_ids: Any, expert_map: Any, **others: Any) -> None:
        if expert_map is not None:
            local = expert_map[topk_ids.long()]
            topk_weights = topk_weights * (local >= 0)
            topk_ids = local.clamp(min=0).to(topk_ids.dtype)
        apply(self, *args, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=expert_map, **others)

    module.CPUUnquantizedExperts.apply = of_this_rank


when_imported(
    {
        "vllm.distributed.device_communicators.cpu_communicator": add_collectives,
        "vllm.model_executor.layers.fused_moe.experts.cpu_moe": add_shares,
    }
)
