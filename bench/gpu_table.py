#!/usr/bin/env python3
"""Print the README's table in ten minutes: captures against the plain engine, of this source tree or of several.

    bash bench/gpu.sh python3 bench/gpu_table.py --out table.json
    ... --tree before=build/before --tree after=.     # a change: both trees take turns within every round
    ... --more                                        # several streams, several captures, a warm prefix cache
    python bench/gpu_table.py --smoke                 # on CPU engines with tiny models, two minutes

Every engine is a process of its own: one without the plugin, and one for each tree. A round runs every arm once, in
random order, on the same fresh prompts, plain ones paced as captures are. The table names the rounds and their spread.
Of Qwen3-30B-A3B 16 of the 48 layers run, so that the engines fit side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from gpu_ratios import beyond
from gpu_tree import lay_out

HERE = Path(__file__).parent
GIB = 1 << 30
IDLE = "idle"


class Line(NamedTuple):
    """A workload and what is captured from it (`idle`: nothing); most rounds, and its share of the time."""

    workload: str
    specs: tuple[str, ...]
    rounds: int
    share: float


class Group(NamedTuple):
    """Lines of one model, and the memory that its engines take for keys and values."""

    shape: str
    kv_bytes: int
    engine: dict[str, Any]
    share: float
    lines: tuple[Line, ...]


ALL, ROUTER, LAST = "all layers", "router logits and experts", "last position, all layers"
THREE, FOUR = "three streams, all layers", "four captures of 8 layers"
GROUPS = (
    Group(
        "llama-8b",
        13 * GIB // 2,
        {},
        0.65,
        (
            Line("decode 8 x (64 + 128)", (IDLE, ALL), 25, 0.4),
            Line("decode 256 x (64 + 128)", (ALL,), 11, 0.3),
            Line("prefill 64 x 1000", (ALL,), 11, 0.3),
        ),
    ),
    Group(
        "qwen3-30b-a3b",
        2 * GIB,
        {"hf_overrides": {"num_hidden_layers": 16}},
        0.35,
        (Line("decode 8 x (64 + 128)", (IDLE, ROUTER), 25, 1.0),),
    ),
)
MORE = (
    Group(
        "llama-8b",
        10 * GIB,
        {"enable_prefix_caching": True},
        1.0,
        (
            Line("decode 8 x (64 + 128)", (ALL, THREE), 25, 0.3),
            Line("decode 256 x (64 + 128)", (THREE, FOUR), 9, 0.3),
            Line("prefill 64 x 1000", (THREE,), 7, 0.2),
            Line("cached 64 x (1000 + 128)", (LAST,), 9, 0.2),
        ),
    ),
)
"""Several streams, several captures, and a warm prefix cache: --more."""

SINCE_STREAMS = (THREE, FOUR, LAST)
"""Of several trees, the last alone is asked for these."""

FEWEST_ROUNDS = 3
HOST_SECONDS = 20
"""Kept back for the host's part of a step, which is asked for last."""


class Engine:
    """A process of bench/gpu_arm.py, and what it answers."""

    def __init__(self, name: str, site: Path | None, words: Sequence[str], tapped: bool) -> None:
        self.name, self.tapped = name, tapped
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # read when the process has failed
        path = os.pathsep.join(filter(None, [str(site or ""), os.environ.get("PYTHONPATH", "")]))
        # Compiled graphs of its own: engines that start at once would write the same files.
        cache = tempfile.mkdtemp(prefix="vllm-cache-")
        command = [sys.executable, str(HERE / "gpu_arm.py"), *words, *(["--tapped"] if tapped else [])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            env=os.environ | {"PYTHONPATH": path, "VLLM_CACHE_ROOT": cache},
            start_new_session=True,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command, and wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        return self.answer(60)

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """Wait for an answer.

        Raises:
            RuntimeError: None has come in time, or the process has ended; with the end of what it printed.
        """
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._log.seek(0)
            tail = self._log.read()[-4000:]
            raise RuntimeError(f"engine {self.name} gave no answer in {timeout_s:.0f} s; it printed last:\n{tail}")
        return dict(json.loads(line))

    def stop(self) -> None:
        """End the process and all that it has started."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write('{"do": "stop"}\n')
                self._process.wait(10)
            except (OSError, subprocess.TimeoutExpired):
                pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def measure(group: Group, engines: list[Engine], deadline: float, smoke: bool) -> Iterator[dict[str, Any]]:
    """Run all lines of a group in rounds until their time is over; yield the rows of each line."""
    draw = random.Random(0)
    shares = sum(line.share for line in group.lines)
    for line in group.lines:
        end = time.monotonic() + (deadline - time.monotonic()) * line.share / shares
        shares -= line.share
        times: dict[str, list[float]] = {}
        sizes: dict[str, int] = {}
        arms = [
            (engine, spec)
            for engine in engines
            for spec in (line.specs if engine.tapped else ("plain",))
            if engine is engines[-1] or spec not in SINCE_STREAMS
        ]
        for number in range(-1, 1 if smoke else line.rounds):
            if number >= FEWEST_ROUNDS and time.monotonic() > end:
                break
            draw.shuffle(arms)
            for engine, spec in arms:
                name = "plain" if spec == "plain" else f"{engine.name}: {spec}"
                do = "generate" if spec in ("plain", IDLE) else "capture"
                found = engine.ask(do, workload=line.workload, seed=number, spec=spec)
                sizes[name] = found.get("bytes", 0)
                if number >= 0:
                    times.setdefault(name, []).append(found["seconds"])
        for name in sorted(times):
            yield row_of(group, line.workload, name, times, sizes[name])


def row_of(group: Group, workload: str, name: str, times: dict[str, list[float]], nbytes: int) -> dict[str, Any]:
    """Return a row of the table: medians, and the ratios to the plain engine within the rounds with their quartiles."""
    plain, mine = times["plain"], times[name]
    paired = sorted(a / b for a, b in zip(plain, mine, strict=True))
    quarter = len(paired) // 4
    more, error = beyond(mine, plain)
    return {
        "shape": group.shape + (" (16 layers)" if "hf_overrides" in group.engine else ""),
        "workload": workload,
        "arm": name,
        "rounds": len(mine),
        "seconds": statistics.median(mine),
        "ratio": statistics.median(plain) / statistics.median(mine),
        "paired": statistics.median(paired),
        "quartiles": [paired[quarter], paired[-1 - quarter]],
        "beyond_plain_ms": [more, error],
        "bytes": nbytes,
        "all": mine,
    }


def run_group(group: Group, args: argparse.Namespace, sites: dict[str, Path | None], seconds: float) -> dict[str, Any]:
    """Start the engines of a group at once, measure, and end them; what fails is in the result."""
    words = ["--models", str(args.models), "--shape", group.shape]
    words += ["--smoke"] if args.smoke else []
    more = {} if args.smoke else {"kv_cache_memory_bytes": group.kv_bytes, **group.engine}
    words += ["--engine", json.dumps(more)]
    result: dict[str, Any] = {"shape": group.shape, "start_seconds": {}, "rows": [], "host": {}}
    begin = time.monotonic()
    engines = [Engine("plain", next(iter(sites.values())), words, False)]
    engines += [Engine(name, site, words, True) for name, site in sites.items()]
    try:
        for engine in engines:
            started = engine.answer(max(begin + args.start_seconds - time.monotonic(), 1))
            print(f"# {group.shape}, {engine.name}: {json.dumps(started)}", flush=True)
            result["start_seconds"][engine.name] = round(started["start_seconds"])
        for row in measure(group, engines, begin + seconds - HOST_SECONDS, args.smoke):
            result["rows"].append(row)
            show([row])
        for engine in engines[1:]:
            workload, specs = group.lines[0].workload, group.lines[0].specs
            spec = next(spec for spec in specs if spec in (ALL, ROUTER))
            result["host"][engine.name] = engine.ask("host", workload=workload, seed=0, spec=spec)
    except RuntimeError as error:
        result["failed"] = str(error)
        print(f"# FAILED {group.shape}: {error}", flush=True)
    finally:
        for engine in engines:
            engine.stop()
    return result


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows of the table."""
    for row in rows:
        low, high = row["quartiles"]
        more, error = row["beyond_plain_ms"]
        print(
            f"{row['shape']:25s} {row['workload']:24s} {row['arm']:36s} {row['rounds']:3d} rounds "
            f"{row['seconds']:7.4f} s  ratio {row['ratio']:.4f}  paired {row['paired']:.4f} ({low:.4f} to {high:.4f})  "
            f"beyond plain {more:+.2f} +- {error:.2f} ms  {row['bytes'] / 1e9:.2f} GB",
            flush=True,
        )


def show_host(machine: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Print the line of this host: what it is, how long engines start, and its part of a step."""
    print(f"host: {machine['cpu']}, {machine['cores']} cores, {machine['gpu']}")
    for group in groups:
        starts = ", ".join(f"{name} {seconds} s" for name, seconds in group["start_seconds"].items())
        print(f"  {group['shape']}: engines started at once in {starts}")
        for name, host in group["host"].items():
            parts = "  ".join(f"{label} {value:.1f}" for label, value in host["step_us"].items())
            print(f"  {group['shape']}, {name}: host part of a step, us: {parts}")


def machine_of(smoke: bool) -> dict[str, Any]:
    """Return what the figures depend on."""
    from vllm_tap.bench.machine import describe_machine

    listed = "" if smoke else subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return describe_machine() | {"gpu": listed.partition(": ")[2].partition(" (")[0] or "none (--smoke)"}


def sites_of(trees: list[str]) -> dict[str, Path | None]:
    """Return where each tree can be imported from; None is what is installed."""
    sites: dict[str, Path | None] = {}
    for number, tree in enumerate(trees):
        name, _, folder = tree.partition("=")
        site = Path(tempfile.mkdtemp(prefix=f"tree-{number}-"))
        lay_out(Path(folder), site)
        sites[name] = site
    return sites or {"this": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(os.environ.get("MODELS", "models")))
    parser.add_argument(
        "--tree", action="append", default=[], metavar="NAME=FOLDER", help="with src/ and pyproject.toml"
    )
    parser.add_argument("--shapes", nargs="+", default=[group.shape for group in GROUPS])
    parser.add_argument("--more", action="store_true", help="several streams, several captures, a warm prefix cache")
    parser.add_argument("--seconds", type=float, default=500, help="for all of it")
    parser.add_argument("--start-seconds", type=float, default=170, help="for the start of the engines of a model")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU, one round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for name, value in {"VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `timeout` sends it: engines end, too
    begin, machine, sites = time.monotonic(), machine_of(args.smoke), sites_of(args.tree)
    results: list[dict[str, Any]] = []
    groups = [group for group in (MORE if args.more else GROUPS) if group.shape in args.shapes]
    shares = sum(group.share for group in groups)
    for group in groups:
        left = begin + args.seconds - time.monotonic()
        results.append(run_group(group, args, sites, left * group.share / shares))
        shares -= group.share
        if args.out:
            args.out.write_text(json.dumps({"machine": machine, "trees": args.tree, "groups": results}, indent=1))
    print()
    show([row for result in results for row in result["rows"]])
    show_host(machine, results)
    sys.exit(1 if any("failed" in result for result in results) else 0)


if __name__ == "__main__":
    main()
