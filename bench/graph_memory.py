#!/usr/bin/env python3
"""What the driver keeps of its memory for executable CUDA graphs that are gone.

    python bench/graph_memory.py        # some seconds, on a GPU

Graphs of 400 small kernels and of ten are made executable, launched and given up, twice each: the driver gives no
memory back, and takes none for the second time.
"""

from __future__ import annotations

import torch

from vllm_tap.engine.cuda import driver

CASES = (("400 kernels", 400, 20), ("10 kernels", 10, 700), ("400 kernels", 400, 20))


def held_mib() -> float:
    """Return what the device has given to this process beside PyTorch's memory, and to all others."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return float(total - free - torch.cuda.memory_reserved()) / 2**20


def captured(values: torch.Tensor, num_kernels: int) -> torch.cuda.CUDAGraph:
    """Return a graph that is not executable yet."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for _ in range(num_kernels):
            values.add_(1)
    return graph


def main() -> None:
    values = torch.zeros(4096, device="cuda")
    values.add_(1)
    stream = torch.cuda.current_stream().cuda_stream
    graphs = {num_kernels: captured(values, num_kernels) for _, num_kernels, _ in CASES}
    print(f"{held_mib():.1f} MiB before")
    for name, num_kernels, num_graphs in CASES:
        for _ in range(2):
            executables = [driver.instantiate(graphs[num_kernels].raw_cuda_graph()) for _ in range(num_graphs)]
            made = held_mib()
            for executable in executables:
                driver.check(driver.bare_launch()(executable, stream), "cuGraphLaunch")
            launched = held_mib()
            for executable in executables:
                driver.destroy_executable(executable)
            print(f"{num_graphs} x {name}: {made:.1f} MiB made, {launched:.1f} launched, {held_mib():.1f} given up")


if __name__ == "__main__":
    main()
