"""Time of captures against the plain engine: rounds in which every arm runs once, medians. Part of bench/gpu.py."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gpu_setting import WORKLOADS, Setting, asking_ms, capture, generate, status, wait_idle

Plan = list[tuple[str, list[str], int]]
"""(workload, specs, rounds), one after another on the same engines; a spec may name its own staging."""

ALL = "all layers"
FEW = ["3 layers", "last position, all layers"]
ROUTER = "router logits and experts"
LAYERED = "hidden_states", "router_logits", "expert_ids", "expert_weights"

PLANS: dict[str, Plan] = {
    "parts": [],
    "least": [("decode 8 x (64 + 128)", [ALL], 1)],
    "short": [  # An arm differs by 0.3 to 0.9 % from round to round; most rounds where a goal is near.
        ("decode 8 x (64 + 128)", [ALL, *FEW], 15),
        ("decode 64 x (64 + 128)", [ALL, *FEW], 21),
        ("decode 256 x (64 + 128)", [ALL], 7),
        ("prefill 64 x 1000", [ALL, *FEW], 7),
        ("prefill 16 x 8000", [ALL], 9),
    ],
    "prefill": [("prefill 64 x 1000", [ALL, *FEW], 7)],
    "decode": [("decode 8 x (64 + 128)", [ALL, *FEW], 45), ("decode 64 x (64 + 128)", [ALL, *FEW], 21)],
    "profile": [
        ("decode 8 x (64 + 128)", [ALL, f"{ALL} / direct", *FEW], 7),
        ("decode 256 x (64 + 128)", [ALL], 5),
        ("prefill 64 x 1000", [ALL, *FEW], 5),
        ("prefill 16 x 8000", [ALL], 3),
    ],
    "full": [(name, [ALL, *FEW], 5) for name in WORKLOADS if not name.startswith("brief")],
    # What a capture costs however short it is: of longer ones, the rounds differ by more.
    "brief": [("brief 8 x (64 + 4)", [ALL, *FEW], 200), ("brief 64 x (64 + 4)", [ALL, *FEW], 80)],
    "router": [
        # A round's arms differ by up to 3 % either way: which experts random weights choose, and eight steps or nine.
        ("decode 8 x (64 + 128)", [ROUTER], 45),
        ("decode 256 x (64 + 128)", [ROUTER], 9),
        ("prefill 64 x 1000", [ROUTER], 45),
    ],
    "tp2": [
        ("prefill 64 x 1000", [ALL], 7),
        ("decode 8 x (64 + 128)", [ALL], 15),
        ("decode 256 x (64 + 128)", [ALL], 7),
    ],
}

ROUNDING = 1e-6
"""Of a score, relative: a few units of float32. Scores of dummy weights differ in the fifth digit and the sixth; of a
thousand rows that belong to other experts, one passes."""

WARM_PART = 4
"""Before an arm of prefill, one in so many prompts runs untimed on the same engine: prefill runs at the power limit of
the device, and one that has been at rest is faster at first, by 1 % of these workloads (one H100)."""

STEPS = (("steps", 0), ("queued_ms", 1), ("first_ms", 1), ("step_ms", 3), ("longest_ms", 1))
"""What the table says of the steps of an arm, with how many digits."""


class Ratios:
    """Pairs of engines, and the arms that are timed on them; without a plain one, the idle one stands for it.

    Every round is of one pair, the next round of the next: engines of a kind differ, too.
    """

    def __init__(self, setting: Setting, pairs: Sequence[tuple[Any, Any]]) -> None:
        self.setting, self._pairs = setting, list(pairs)
        self.plain, self.tapped = self._pairs[0]

    def check(self) -> dict[str, Any]:
        """Check rows before timing: equal prompts give equal rows, staged and direct captures the same bytes.

        Of experts, also that the chosen ones are those of the highest scores: bytes of another layer's would not be.
        """
        import torch

        setting = self.setting
        long = 40 if setting.smoke else 700
        prompts = setting.prompts((2, long, 1)) + setting.prompts((2, 64 if not setting.smoke else 8, 1))
        prompts = [*prompts, *prompts]
        generate(self.tapped, prompts, 16)  # an engine's first requests take memory of their own
        free = [setting.free_bytes()]
        spec = {"hidden_states": "all", "embeddings": True, "final_hidden_states": True}
        if setting.has_experts:
            spec |= {"router_logits": "all", "routed_experts": "all"}
        staged = capture(setting, self.tapped, prompts, 16, spec, staging="staged")[1]
        free.append(setting.free_bytes())
        direct = capture(setting, self.tapped, prompts, 16, spec, staging="direct")[1]
        places = [(stream, layer) for stream in LAYERED for layer in staged.layers.get(stream, ())]
        equal = staged_direct = finite = chosen = 0
        for i, sample in enumerate(staged):
            twin, other = staged[(i + 4) % 8], direct[i]
            for stream, layer in places:
                rows = getattr(sample, stream)[layer]
                prompt = slice(0, len(prompts[i]["prompt_token_ids"]))
                equal += torch.equal(rows[prompt], getattr(twin, stream)[layer][prompt])
                staged_direct += torch.equal(rows, getattr(other, stream)[layer])
                finite += bool(rows.isfinite().all() and rows.abs().amax(-1).min() > 0)
            chosen += sum(fits(sample, layer) for layer in staged.layers.get("expert_ids", ()))
        begin = [time.perf_counter()]
        for _ in range(21):
            held = status(self.tapped)
            begin.append(time.perf_counter())
        linger = wait_idle(self.tapped)
        wait_idle(self.tapped, "is_preparing")
        free.append(setting.free_bytes())
        workload = setting.workload("decode 8 x (64 + 128)")
        cold = [capture(setting, self.tapped, setting.prompts(workload), workload[2], spec)[0] for _ in range(3)]
        return {
            "sample-layers": 8 * len(places),
            "equal prompts, equal rows": equal,
            "staged equals direct": staged_direct,
            "finite and not zero": finite,
            "sample-layers of experts": 8 * len(staged.layers.get("expert_ids", ())),
            "experts of the highest scores": chosen,
            "conventions": staged.conventions,
            "call_ms": statistics.median(b - a for a, b in itertools.pairwise(begin)) * 1e3,
            "staging_mib": (free[0] - free[1]) / 2**20,
            "held_idle_mib": (free[0] - free[2]) / 2**20,
            "asking_for_free_memory_ms": asking_ms(setting),
            "staging_lingers_s": linger,
            "first_captures_ms": [seconds * 1e3 for seconds in cold],
            "status": held,
        }

    def measure(self, name: str, specs: list[str], rounds: int, stagings: list[str]) -> list[dict[str, Any]]:
        """Run all arms of a workload in turn."""
        setting = self.setting
        times: dict[str, list[float]] = {}
        steps: dict[str, list[dict[str, float]]] = {}
        parts: dict[str, list[dict[str, float]]] = {}
        sizes: dict[str, int] = {}
        capacities: dict[str, list[float]] = {}
        arms = ["plain"] if self.plain is self.tapped else ["plain", "idle"]
        for spec in specs:
            arms += [spec] if " / " in spec else [f"{spec} / {staging}" for staging in stagings]
        for round_number in range(-len(self._pairs), setting.rounds(rounds)):
            self.plain, self.tapped = self._pairs[round_number % len(self._pairs)]
            prompts = setting.prompts(setting.workload(name))
            setting.random.shuffle(arms)
            for arm in arms:
                if setting.workload(name)[2] == 1:
                    generate(self._engine(arm), prompts[: len(prompts) // WARM_PART], 1)
                with self._steps(arm) as outputs:
                    seconds, result = self._run(arm, prompts, setting.workload(name)[2])
                if result is not None:
                    sizes[arm] = result.num_bytes
                if round_number >= 0:
                    times.setdefault(arm, []).append(seconds)
                    steps.setdefault(arm, []).append(step_times(outputs))
                    if result is not None:
                        parts.setdefault(arm, []).append(dict(result.seconds))
                        capacities.setdefault(arm, []).append(status(self.tapped)[0]["capacity_bytes"] / 1e9)
                del result
        rows = summarise(name, times, parts, sizes)
        for row in rows:
            row["segments_gb"] = capacities.get(row["arm"], [])
            row["steps"] = steps[row["arm"]]
        return rows

    def _engine(self, arm: str) -> Any:
        return self.plain if arm == "plain" else self.tapped

    @contextmanager
    def _steps(self, arm: str) -> Iterator[list[float]]:
        """Collect times: the beginning, when all prompts are queued, when the outputs of each step arrive here."""
        core = self._engine(arm).llm_engine.engine_core
        get_output, arrivals = core.get_output, [time.perf_counter()]

        def watched() -> Any:
            if len(arrivals) == 1:
                arrivals.append(time.perf_counter())
            outputs = get_output()
            if outputs.outputs:
                arrivals.append(time.perf_counter())
            return outputs

        core.get_output = watched
        try:
            yield arrivals
        finally:
            del core.get_output

    def _run(self, arm: str, prompts: list[Any], max_tokens: int) -> tuple[float, Any]:
        if arm in ("plain", "idle"):
            return generate(self._engine(arm), prompts, max_tokens)[0], None
        spec, staging = arm.split(" / ")
        return capture(self.setting, self.tapped, prompts, max_tokens, self.setting.spec(spec), staging=staging)


def fits(sample: Any, layer: int) -> bool:
    """Tell whether no expert has a higher score than one that was chosen, in any row, up to the rounding of scores."""
    scores, ids = sample.router_logits[layer].float().softmax(-1), sample.expert_ids[layer].long()
    highest = scores.topk(ids.shape[1]).values.amin(1)
    return bool((scores.gather(1, ids).amin(1) >= highest * (1 - ROUNDING)).all())


def step_times(times: list[float]) -> dict[str, float]:
    """Return the number of steps, the times until prompts are queued and the first step is done, and a step's.

    `longest_ms` is of the second half, in which no prompts are read: far above the median, something paused there.
    """
    begin, queued, *arrivals = times
    between = [b - a for a, b in itertools.pairwise(arrivals)]
    return {
        "steps": len(arrivals),
        "queued_ms": (queued - begin) * 1e3,
        "first_ms": (arrivals[0] - begin) * 1e3,
        "step_ms": statistics.median(between) * 1e3 if between else 0.0,
        "longest_ms": max(between[len(between) // 2 :], default=0.0) * 1e3,
        "all_ms": sum(between) * 1e3,
    }


def summarise(
    name: str, times: dict[str, list[float]], parts: dict[str, list[dict[str, float]]], sizes: dict[str, int]
) -> list[dict[str, Any]]:
    """Return a row per arm; `ratio` is that of medians, `paired` the median over rounds of the ratio within a round.

    `beyond_idle_ms` is how much longer than the idle engine an arm takes, in the mean, and the standard error of that.
    """
    plain = statistics.median(times["plain"])
    rows = []
    for arm in sorted(times):
        median = statistics.median(times[arm])
        mine = parts.get(arm, [])
        rows.append(
            {
                "workload": name,
                "arm": arm,
                "seconds": median,
                "ratio": plain / median,
                "paired": statistics.median(a / b for a, b in zip(times["plain"], times[arm], strict=True)),
                "beyond_idle_ms": beyond(times[arm], times.get("idle", times["plain"])),
                "all": times[arm],
                "generate": [p["generate"] for p in mine],
                "bytes": sizes.get(arm, 0),
                "parts": {key: statistics.median(p[key] for p in mine) for key in mine[0]} if mine else {},
            }
        )
    return rows


def beyond(times: list[float], idle: list[float]) -> tuple[float, float]:
    """Return the mean difference of two arms within a round and its standard error, in milliseconds."""
    more = [(a - b) * 1e3 for a, b in zip(times, idle, strict=True)]
    return statistics.mean(more), standard_error(more)


def standard_error(values: list[float]) -> float:
    """Return the standard error of a mean; 0 of one value, of which nothing is known."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    for row in rows:
        parts = " ".join(f"{key} {value * 1e3:.1f}" for key, value in row["parts"].items() if key != "generate")
        steps = "/".join(
            f"{statistics.median(s[key] for s in row['steps']):.{digits}f}" for key, digits in STEPS if "steps" in row
        )
        more = "  beyond idle {:.2f} +- {:.2f} ms".format(*row["beyond_idle_ms"]) if "beyond_idle_ms" in row else ""
        print(
            f"{row['workload']:26s} {row['arm']:42s} {row['seconds']:8.4f} s  ratio {row['ratio']:.4f} "
            f"(paired {row['paired']:.4f}) {row['bytes'] / 1e9:7.2f} GB  steps {steps}  {parts}{more}",
            flush=True,
        )
