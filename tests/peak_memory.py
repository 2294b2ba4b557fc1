"""Peak memory of worker and client while twenty times the budget goes through a CPU engine.

`python tests/peak_memory.py wait|spill|capture [BUDGET IN MIB]` prints what segments, files and both processes took at
most. It fails where segments, or a process beyond what it grows by without a capture, grew by more than the budget and
a tenth. What a process has of files counts as their cache. Allocators of the engine differ by some 20 MiB from run to
run, so a tenth of the budget must be more than that. An engine on CPUs keeps what it has compiled for a size of step
(oneDNN), hundreds of MiB in all: steps of many sizes run first, without a capture.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent / "support"))

import surroundings  # noqa: F401
import vllm_tap
from engine.engines import Engine, prompts
from memory import held
from models import ensure_model
from vllm_tap import Spec, Spill, Tap

TIMES = 20
SPEC = Spec(hidden_states="all", attention_output="all", mlp_output="all", embeddings=True, final_hidden_states=True)
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
LENGTH = 500
STEPS = 6000
"""Requests of as many lengths, before anything is measured."""

POLL_SECONDS = 0.05


class Watch:
    """Peaks of some processes while a block runs, beyond what they had before without the segments of rows."""

    def __init__(self, pids: dict[str, int], segment_bytes: int) -> None:
        self._pids = pids
        self._before = {name: held(pid) for name, pid in pids.items()}
        self._before["worker"] -= segment_bytes
        self.grown = dict.fromkeys(pids, 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            for name, pid in self._pids.items():
                self.grown[name] = max(self.grown[name], held(pid) - self._before[name])

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def main(how: str, mebibytes: str = "256") -> None:
    """Run one way of it."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            ensure_model(Path(folder), "llama"), enforce_eager=True, max_model_len=1024, max_num_batched_tokens=2048
        )
        run(engine, how, int(mebibytes) << 20)
        engine.close()


def run(engine: Engine, how: str, budget: int) -> None:
    """Warm an engine up, then measure."""
    num_bytes = engine.capture(prompts([LENGTH]), SPEC).num_bytes
    given = prompts([LENGTH] * (TIMES * budget // num_bytes + 1))
    lengths = np.random.default_rng(0).integers(1, 1000, STEPS).tolist()
    engine.generate(prompts(lengths), **GREEDY)
    list(Tap(engine.llm).stream(given[:16], SPEC, budget_bytes=budget, **GREEDY))
    (state,) = engine.status()
    with Watch({"worker": state["pid"]}, 0) as plain:
        engine.generate(given, **GREEDY)
    (state,) = engine.status()
    most, total = {"capacity_bytes": 0, "spilled_bytes": 0}, 0
    spill = Spill(most_bytes=TIMES * 2 * budget)
    with Watch({"worker": state["pid"], "client": psutil.Process().pid}, state["capacity_bytes"]) as watch:
        if how == "capture":
            samples: Any = engine.capture(given, SPEC, budget_bytes=budget, on_full=spill)
        else:
            on_full = spill if how == "spill" else "wait"
            samples = Tap(engine.llm).stream(given, SPEC, budget_bytes=budget, on_full=on_full, **GREEDY)
        for number, sample in enumerate(samples):
            total += sum(sample.hidden_states[layer].nbytes for layer in range(4))
            if number % 8 == 0:
                (state,) = engine.status()
                most = {name: max(value, state[name]) for name, value in most.items()}
    print(f"{how}: {vllm_tap.__version__}, {len(given)} prompts, {len(given) * num_bytes / 2**20:.0f} MiB of rows")
    print(
        f"budget {budget >> 20} MiB; segments {most['capacity_bytes'] / 2**20:.1f}, files {most['spilled_bytes'] >> 20}"
    )
    watch.grown["worker"] -= plain.grown["worker"]
    print(", ".join(f"{name} grew by {grown / 2**20:.1f} MiB" for name, grown in watch.grown.items()), end=", ")
    print(f"without a capture the worker by {plain.grown['worker'] / 2**20:.1f}")
    assert total
    assert max(most["capacity_bytes"], *watch.grown.values()) <= budget * 1.1


if __name__ == "__main__":
    main(*sys.argv[1:])
