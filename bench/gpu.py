#!/usr/bin/env python3
"""Measure captures against the plain engine on a GPU: one process, two engines in turn, medians.

    python bench/gpu.py --models MODELS --shape llama-8b --out results.json
    python bench/gpu.py --smoke --plan short        # the same lines on a CPU engine with a tiny model, a minute

`python bench/gpu_models.py MODELS` writes a config.json for each shape; weights are dummies. The plain engine runs
without the plugin (VLLM_TAP=0), the other one idle and capturing; every round runs all arms once, on the same prompts.
Plans `least`, `decode`, `prefill`, `short`, `full` and `router` measure ratios, `brief` what short captures take beyond
an idle engine; `parts` says where a capture's time goes, with one engine and no ratios; `tp2` measures two
tensor-parallel ranks, on two GPUs; `memory` what an engine holds while nobody captures; `host` what steps that read
prompts ask of the host; `bad` what a capture does when budgets, memory or clients fail; `document` the example of the
old interface over one rank and more.
`--eager` compares rows with those of an eager engine, `--parts` adds where a capture's time goes, `--forwards` when its
forward passes run, `--timeline` where the device's time goes in a step, `--extract` vLLM's own extraction.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_bad import run_bad
from gpu_document import EXAMPLE, run_document
from gpu_eager import check_against_eager
from gpu_extract import measure_extract
from gpu_forwards import measure_forwards, show_forwards
from gpu_host import run_host
from gpu_memory import run_memory
from gpu_parts import measure_parts, show_parts
from gpu_ratios import ALL, FEW, PLANS, ROUTER, Plan, Ratios, show
from gpu_setting import FAMILIES, WORKLOADS, Report, Setting, rates, start_engine, stop_engine
from gpu_timeline import arguments, measure_timeline, show_timeline
from gpu_tp import run_tp2

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
"""What engines run with unless told otherwise; vLLM is imported where the first one starts."""


def run_ratios(setting: Setting, report: Report, args: argparse.Namespace, plan: Plan) -> bool:
    """Run a plan of ratios, and what was asked for beside it."""
    measured = rates(setting)
    # The engine with taps first: the second takes its memory share beside it.
    more = arguments() if args.timeline is not None else {}
    pairs = [
        (start_engine(setting, True, **more), None if args.no_plain else start_engine(setting, False, **more))
        for _ in range(args.pairs)
    ]
    tapped, plain = pairs[0]
    ratios = Ratios(setting, [(first or second, second) for second, first in pairs])
    facts = ratios.check()
    print(f"# {json.dumps(facts)}", flush=True)
    if args.eager:
        facts["eager"] = check_against_eager(setting, tapped)
        print(f"# against an eager engine: {json.dumps(facts['eager'])}", flush=True)
    report.put(plain="engine without the plugin" if plain else "idle engine", rates_gb_per_s=measured, checks=facts)
    report.put(pairs=args.pairs)
    rows: list[dict[str, Any]] = []
    for name, specs, rounds in plan:
        new = ratios.measure(name, specs, rounds, args.stagings)
        show(new)
        rows += new
        report.put(rows=rows)
    parts: list[dict[str, Any]] = []
    if args.parts is not None:
        parts = measure_parts(setting, tapped, measured["d2h"], args.parts)
        report.put(parts=parts)
    forwards: list[dict[str, Any]] = []
    if args.forwards is not None:
        for begin in args.forwards or ["prefill 64"]:
            forwards += measure_forwards(setting, tapped, begin)
        report.put(forwards=forwards)
    timeline: list[dict[str, Any]] = []
    if args.timeline is not None:  # last: the profiler stays in the worker's way once it has been started
        timeline = measure_timeline(
            setting, plain, tapped, [ROUTER] if args.plan == "router" else [ALL, *FEW], args.timeline
        )
        report.put(timeline=timeline)
    num_layers = tapped.llm_engine.model_config.hf_text_config.num_hidden_layers
    del ratios
    for llm in (tapped, *(llm for pair in pairs[1:] for llm in pair if llm)):
        stop_engine(llm)
    if args.extract:
        try:
            rows += measure_extract(setting, plain, num_layers)
        except Exception as error:  # what has been measured is worth printing without it
            print(f"# extract_hidden_states failed: {type(error).__name__}: {error}", flush=True)
        report.put(rows=rows)
    if plain:
        stop_engine(plain)
    print()
    show(rows)
    show_parts(parts)
    show_forwards(forwards)
    show_timeline(timeline)
    same = facts["sample-layers"] == facts["equal prompts, equal rows"] == facts["staged equals direct"]
    fit = facts["sample-layers of experts"] == facts["experts of the highest scores"]
    return same and fit and facts.get("eager", {"fine": True})["fine"]


def planned(args: argparse.Namespace) -> Plan:
    """Return the plan, or what was asked for of it.

    Raises:
        ValueError: It has nothing whose name begins like this.
    """
    plan = PLANS.get(args.plan, [])
    for begin in args.only or ():
        if not any(name.startswith(begin) for name, _, _ in plan):
            raise ValueError(f"--plan {args.plan} has no workload that begins with {begin!r}")
    return [line for line in plan if args.only is None or line[0].startswith(tuple(args.only))]


def require_device_and_model(model: Path) -> None:
    """Make sure that engines can start.

    Raises:
        ValueError: There is no CUDA device, or no such model.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device: --smoke runs the same lines with a tiny model on the CPU")
    if not (model / "config.json").is_file():
        raise ValueError(
            f"{model} has no config.json: python bench/gpu_models.py {model.parent} writes those of all shapes"
        )


def memory_of_each(args: argparse.Namespace) -> float:
    """Return the share of the device's memory that every engine takes, as asked for or what all of them fit with.

    Raises:
        ValueError: More was asked for than there is.
    """
    side_by_side = args.plan in PLANS and not args.apart
    num_engines = args.pairs * (1 if args.no_plain else 2) if side_by_side else 1
    if args.memory is None:
        return 0.88 if args.plan == "document" else min(0.4, 0.84 / num_engines)
    if num_engines * args.memory > 1:
        raise ValueError(
            f"--memory {args.memory} is too much for {num_engines} engines side by side: give each at most "
            f"{1 / num_engines:.2f}, or ask for fewer --pairs"
        )
    return args.memory


def workloads(begin: str) -> str:
    """Return what names of workloads begin with.

    Raises:
        argparse.ArgumentTypeError: None does.
    """
    if not any(name.startswith(begin) for name in WORKLOADS):
        raise argparse.ArgumentTypeError(f"no workload begins with {begin!r}: there are {', '.join(WORKLOADS)}")
    return begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(os.environ.get("MODELS", "models")))
    parser.add_argument("--shape", default="llama-8b", choices=list(FAMILIES))
    parser.add_argument("--plan", default="full", choices=[*PLANS, "bad", "memory", "host", "document"])
    parser.add_argument(
        "--only", type=workloads, nargs="+", metavar="WORKLOAD", help="measure these of the plan's workloads"
    )
    parser.add_argument("--stagings", nargs="+", default=["auto"])
    parser.add_argument("--eager", action="store_true", help="compare rows with those of an eager engine")
    parser.add_argument(
        "--parts",
        type=workloads,
        nargs="?",
        const="",
        metavar="WORKLOAD",
        help="say where the time of a capture goes, in all or in one",
    )
    parser.add_argument(
        "--forwards",
        type=workloads,
        nargs="*",
        metavar="WORKLOAD",
        help="say when forward passes run, plain and captured; by default of 64 prompts that are read",
    )
    parser.add_argument(
        "--timeline",
        type=workloads,
        nargs="?",
        const="",
        metavar="WORKLOAD",
        help="say where the device's time goes in a step",
    )
    parser.add_argument("--extract", action="store_true", help="measure vLLM's own extract_hidden_states too")
    parser.add_argument("--no-plain", action="store_true", help="compare with the idle engine; starts one engine less")
    parser.add_argument(
        "--pairs", type=int, default=1, choices=range(1, 5), help="engines of each kind, whose rounds take turns"
    )
    parser.add_argument("--apart", action="store_true", help="tp2: one engine after the other, always a plain one too")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, one round, one engine at a time")
    parser.add_argument(
        "--memory",
        type=float,
        help="share of the device for each engine; by default 0.4, or less where more than two run",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="document: tensor parallel ranks")
    parser.add_argument("--seconds", type=float, default=530, help="document: for all of it")
    parser.add_argument("--engine", type=json.loads, default={}, help="more engine arguments, as JSON")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.plan == "parts":
        args.parts = args.parts or ""
    if args.smoke or args.plan == "parts":
        args.no_plain = True
    if args.plan == "document":
        args.shape = EXAMPLE
    try:
        plan = planned(args)
        memory = memory_of_each(args)
        if not args.smoke:
            require_device_and_model(args.models / args.shape)
    except ValueError as error:
        parser.error(str(error))
    for name, value in {**ENVIRONMENT, **({"VLLM_CPU_KVCACHE_SPACE": "1"} if args.smoke else {})}.items():
        os.environ.setdefault(name, value)
    setting = Setting(args.models, args.shape, args.smoke, memory, args.engine, args.out)
    report = Report(setting, args)
    if args.plan == "tp2":
        report.put(rates_gb_per_s=rates(setting))
        fine = run_tp2(setting, report, args, plan)
    elif args.plan == "bad":
        fine = run_bad(setting, report)
    elif args.plan == "memory":
        fine = run_memory(setting, report)
    elif args.plan == "host":
        fine = run_host(setting, report)
    elif args.plan == "document":
        fine = run_document(setting, report, args.ranks, args.seconds)
    else:
        fine = run_ratios(setting, report, args, plan)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
