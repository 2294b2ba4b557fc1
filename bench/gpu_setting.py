"""What all plans of bench/gpu.py share: engines, workloads, prompts, and the small CPU stand-in of --smoke."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKLOADS = {
    "prefill 1 x 1000": (1, 1000, 1),
    "prefill 64 x 1000": (64, 1000, 1),
    "prefill 16 x 8000": (16, 8000, 1),
    "decode 1 x (64 + 128)": (1, 64, 128),
    "decode 8 x (64 + 128)": (8, 64, 128),
    "decode 64 x (64 + 128)": (64, 64, 128),
    "decode 256 x (64 + 128)": (256, 64, 128),
    "cached 64 x (1000 + 128)": (64, 1000, 128),
    "brief 8 x (64 + 4)": (8, 64, 4),
    "brief 64 x (64 + 4)": (64, 64, 4),
}
Fields = dict[str, Any] | list[dict[str, Any]]
SPECS: dict[str, Fields] = {
    "all layers": {"hidden_states": "all"},
    "3 layers": {"hidden_states": [0, 15, -1]},
    "last position, all layers": {"hidden_states": "all", "positions": "last"},
    "last position, embeddings": {"embeddings": True, "positions": "last"},
    "router logits and experts": {"router_logits": "all", "routed_experts": "all"},
    "three streams, all layers": {"hidden_states": "all", "attention_output": "all", "mlp_output": "all"},
    "four captures of 8 layers": [{"hidden_states": list(range(8 * n, 8 * n + 8))} for n in range(4)],
}
"""Fields of what is captured; of several captures at once, each of as many prompts as the next."""

FAMILIES = {"llama-8b": "llama", "qwen3-30b-a3b": "qwen3_moe", "qwen3-vl-30b-a3b": "qwen3_moe"}
"""The tiny model of tests/support/models.py that stands in for a shape with --smoke."""

Workload = tuple[int, int, int]
"""(prompts, tokens of each, tokens to generate)."""


@dataclass
class Setting:
    """The command line, and what follows from it."""

    models: Path
    shape: str
    smoke: bool
    memory: float
    engine: dict[str, Any]
    out: Path | None
    random: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def budget_bytes(self) -> int:
        """Most bytes of rows of one capture."""
        return 256 << 20 if self.smoke else 56 << 30

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step."""
        return 64 if self.smoke else 8192

    @property
    def has_experts(self) -> bool:
        """Whether the model is a mixture of experts."""
        return self.shape != "llama-8b"

    @property
    def cuda(self) -> bool:
        """Whether there is a device to ask for its memory."""
        return not self.smoke

    def workload(self, name: str) -> Workload:
        """Return a workload; a small one of the same form with --smoke."""
        num_prompts, length, max_tokens = WORKLOADS[name]
        return (min(num_prompts, 6), max(length // 50, 4), min(max_tokens, 5)) if self.smoke else WORKLOADS[name]

    def spec(self, name: str) -> Fields:
        """Return the fields of a specification, or of several."""
        found = SPECS[name]
        if isinstance(found, list):
            return [{"hidden_states": [n]} for n in range(len(found))] if self.smoke else found
        return found | ({"hidden_states": [0, 2, -1]} if self.smoke and name == "3 layers" else {})

    def rounds(self, rounds: int) -> int:
        """Return how often to measure."""
        return 1 if self.smoke else rounds

    def prompts(self, workload: Workload) -> list[dict[str, Any]]:
        """Return fresh random prompts."""
        num_prompts, length, _ = workload
        most = 250 if self.smoke else 30000
        return [
            {"prompt_token_ids": [self.random.randrange(10, most) for _ in range(length)]} for _ in range(num_prompts)
        ]

    def arguments(self, **more: Any) -> dict[str, Any]:
        """Return the arguments of `vllm.LLM`."""
        if self.smoke:
            sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
            from models import ensure_model, fingerprint

            folder = ensure_model(Path(tempfile.gettempdir()) / f"vllm-tap-smoke-{fingerprint()}", FAMILIES[self.shape])
            small = {
                "enforce_eager": True,
                "max_model_len": 512,
                "max_num_batched_tokens": self.step_tokens,
                "max_num_seqs": 16,
            }
            return {"model": str(folder), "enable_prefix_caching": False, **small, **self.engine, **more}
        return {
            "model": str(self.models / self.shape),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": 8192,
            "max_num_batched_tokens": self.step_tokens,
            "gpu_memory_utilization": self.memory,
            "enable_prefix_caching": False,
            **self.engine,
            **more,
        }

    def free_bytes(self) -> int:
        """Return the free memory of device 0; 0 without one."""
        if not self.cuda:
            return 0
        import torch

        return int(torch.cuda.mem_get_info()[0])


def asking_ms(setting: Setting) -> list[float]:
    """Return what it takes to ask for the device's free memory, as the keeper of staging does: median and longest."""
    times = []
    for _ in range(21):
        begin = time.perf_counter()
        setting.free_bytes()
        times.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(times), max(times)]


def start_engine(setting: Setting, tapped: bool, **more: Any) -> Any:
    """Start an engine with or without the plugin."""
    from vllm import LLM

    os.environ["VLLM_TAP"] = "1" if tapped else "0"
    if setting.smoke:  # two CPU ranks want to be told their cores
        num_ranks = more.get("tensor_parallel_size", 1) * more.get("pipeline_parallel_size", 1)
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(cores[:num_ranks])
    begin = time.perf_counter()
    llm = LLM(**setting.arguments(**more))
    print(f"# {'tapped' if tapped else 'plain'} engine: {time.perf_counter() - begin:.0f} s", flush=True)
    return llm


def stop_engine(llm: Any) -> None:
    """End an engine and its processes; the caller drops its own references."""
    begin = time.perf_counter()
    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    print(f"# engine stopped: {time.perf_counter() - begin:.0f} s", flush=True)


def sampling(max_tokens: int) -> dict[str, Any]:
    """Return fields of `SamplingParams`: greedy, of a fixed length."""
    return {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "detokenize": False}


def generate(llm: Any, prompts: list[Any], max_tokens: int) -> tuple[float, list[list[int]]]:
    """Time plain generation, whose prompts are paced as those of a capture are."""
    from vllm import SamplingParams

    params = SamplingParams(**sampling(max_tokens))
    paced = pacing()(llm)
    begin = time.perf_counter()
    with paced:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - begin, [list(output.outputs[0].token_ids) for output in outputs]


def pacing() -> Any:
    """Return what lets a first step fill up before more requests come; captures do so, and so does plain generation."""
    try:
        from vllm_tap.vllm import frontend
    except ImportError:  # a tree of before, see gpu_table.py
        from vllm_tap.client import engine as frontend  # type: ignore[attr-defined, no-redef]
    return frontend._first_step_first


def capture(
    setting: Setting, llm: Any, prompts: list[Any], max_tokens: int, spec: Fields, **options: Any
) -> tuple[float, Any]:
    """Time a capture, or several at once, until the rows are in this process's hands."""
    import vllm_tap

    if isinstance(spec, dict):
        asked: Any = vllm_tap.Spec(**spec)
    else:
        asked = [vllm_tap.Spec(**spec[n * len(spec) // len(prompts)]) for n in range(len(prompts))]
    options = {"budget_bytes": setting.budget_bytes, "progress": False, **sampling(max_tokens), **options}
    begin = time.perf_counter()
    result = vllm_tap.capture(llm, prompts, asked, **options)
    return time.perf_counter() - begin, result


def status(llm: Any) -> list[dict[str, Any]]:
    """Return what every worker holds, by rank."""
    return sorted(llm.collective_rpc("vllm_tap_status"), key=lambda state: state["rank"])


def profile(llm: Any, kind: str) -> list[dict[str, list[float]]]:
    """Switch the workers' profile, and return what the one before collected."""
    return list(llm.collective_rpc("vllm_tap_profile", args=(kind,)))


def wait_idle(llm: Any, field: str = "staging_bytes", timeout_s: float = 90.0) -> float:
    """Wait until a field of every worker's status is zero or false; return the seconds that took."""
    begin = time.perf_counter()
    while any(state[field] for state in status(llm)):
        if time.perf_counter() - begin > timeout_s:
            raise TimeoutError(f"{field} is not over after {timeout_s} s: {status(llm)}")
        time.sleep(0.2)
    return time.perf_counter() - begin


def rates(setting: Setting) -> dict[str, float]:
    """Measure device-to-host and device copy rates in GB/s; device copies count bytes read and written."""
    import torch

    nbytes = 64 << 20 if setting.smoke else 1 << 30
    name = "cpu" if setting.smoke else "cuda"
    source = torch.empty(nbytes, dtype=torch.uint8, device=name)
    targets = {
        "d2h": torch.empty(nbytes, dtype=torch.uint8, pin_memory=setting.cuda),
        "device_copy": torch.empty_like(source),
    }
    times: dict[str, list[float]] = {label: [] for label in targets}
    for label, target in targets.items():
        for _ in range(7):
            synchronize(setting)
            begin = time.perf_counter()
            target.copy_(source, non_blocking=True)
            synchronize(setting)
            times[label].append(time.perf_counter() - begin)
    seconds = {label: statistics.median(values) for label, values in times.items()}
    measured = {"d2h": nbytes / seconds["d2h"] / 1e9, "device_copy": 2 * nbytes / seconds["device_copy"] / 1e9}
    del source, target, targets
    if setting.cuda:
        torch.cuda.empty_cache()
    print(f"# D2H {measured['d2h']:.1f} GB/s, device copy {measured['device_copy']:.0f} GB/s", flush=True)
    return measured


def synchronize(setting: Setting) -> None:
    """Wait for the device, if there is one."""
    if setting.cuda:
        import torch

        torch.cuda.synchronize()


class Report:
    """The results file, written anew after every part, so that a run that is cut short leaves what it had."""

    def __init__(self, setting: Setting, arguments: argparse.Namespace) -> None:
        import torch
        import vllm

        from vllm_tap.bench.machine import describe_command, describe_commit

        self._out = setting.out
        self.content: dict[str, Any] = {
            "machine": {
                "gpu": torch.cuda.get_device_name() if setting.cuda else "none (--smoke)",
                "cpus": os.cpu_count(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "vllm": vllm.__version__,
            },
            "command": describe_command(sys.argv),
            "commit": describe_commit(),
            "shape": setting.shape,
            "plan": arguments.plan,
        }

    def put(self, **parts: Any) -> None:
        """Add parts and write the file."""
        self.content.update(parts)
        if self._out:
            self._out.write_text(json.dumps(self.content, indent=1))
