"""The old interface's own example at its size, over one rank and more. Part of bench/gpu.py (`--plan document`).

    router_logits, outputs = hs.get_moe_router_logits_generate(llm, prompts=["Long sequence..."], max_tokens=100)

Every layout of ranks is a process of its own with a time of its own: of the example's model those of `--ranks`, tensor
parallel; of Qwen3-30B-A3B with 16 layers pipeline and data parallel ones, as the GPUs allow. Plain generation (the same
engine, idle) and the call take turns on the same prompts. The stall is what the caller waits after the last forward
pass has ended on the device. Rows are compared with those of one GPU on a model of two layers of the same width, with
saved weights: dummy ones differ from layout to layout.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpu_models import IMAGE, MARKS, VISION_END, VISION_START, write_processor
from gpu_setting import Report, Setting, profile, rates, start_engine, stop_engine

EXAMPLE, OTHER = "qwen3-vl-30b-a3b", "qwen3-30b-a3b"
MAX_TOKENS = 100
ROUNDS, PROFILED = 5, 3
GOAL = 0.985
MOST_SECONDS = 240
"""Of one layout, of which an engine's start is half."""
IMAGE_MARK = MARKS[VISION_START] + MARKS[IMAGE] + MARKS[VISION_END]

NEAR, SHARE_NEAR = 0.05, 0.9
"""Ranks add up in another order, in bfloat16: a row may be off by so much of its layer's scale, root mean square. A
rounding may choose another expert, whose row is further off: so many rows must be near."""


class Layout(NamedTuple):
    """A model over ranks."""

    shape: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def name(self) -> str:
        """Return its name, as the table has it."""
        axes = {"TP": self.tensor, "PP": self.pipeline, "DP": self.data}
        return " x ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1) or "1 GPU"

    @property
    def num_gpus(self) -> int:
        """Return how many GPUs it takes."""
        return self.tensor * self.pipeline * self.data


def layouts(num_gpus: int, ranks: list[int]) -> list[Layout]:
    """Return the layouts that so many GPUs hold, the one with most ranks of the example first."""
    two = 2 if num_gpus >= 4 else 1
    others = [Layout(OTHER, two, 2), Layout(OTHER, two, 1, 2)] if num_gpus >= 2 else []
    most = [Layout(EXAMPLE, n) for n in sorted(ranks, reverse=True) if n <= num_gpus]
    return [*most[:1], *others, *most[1:]]


def run_document(setting: Setting, report: Report, ranks: list[int], seconds: float) -> bool:
    """Measure all layouts, print their tables last, and return whether rows agree and no layout failed."""
    begin = time.monotonic()
    num_gpus, most = (2, seconds) if setting.smoke else (_num_gpus(), MOST_SECONDS)
    report.put(rates_gb_per_s=_in_a_process(setting, {"do": "rates"}, [{}], 60)[0])
    found: list[dict[str, Any]] = []
    equal: dict[str, Any] = {}

    def left() -> float:
        return begin + seconds - time.monotonic()

    for number, layout in enumerate(layouts(num_gpus, ranks)):
        if setting.smoke and layout.data > 1:
            continue  # vLLM lacks collectives for it on a CPU
        if left() < 60:
            print(f"# no time left for {layout.shape}, {layout.name}", flush=True)
            break
        task = {"do": "measure", "layout": list(layout)}
        for rank, result in enumerate(_in_a_process(setting, task, _environments(layout), min(left(), most))):
            found.append({"shape": layout.shape, "layout": layout.name, "rank": rank, **result})
            _show(found[-1:])
        report.put(document=found)
        if number == 0 and num_gpus >= 2:
            equal = _rows_equal(setting, max(min(left(), most), 1))
            report.put(rows_equal=equal)
            print(f"# rows of two ranks and of one: {json.dumps(equal)}", flush=True)
    print()
    _show(found)
    print(f"rows of two ranks against one: {json.dumps(equal)}")
    failed = [f"{row['layout']}: {row['failed'][-300:]}" for row in found if "failed" in row]
    print("\n".join(["FAILED", *failed]) if failed else "no layout failed")
    return not failed and bool(equal.get("fine", num_gpus < 2))


def _num_gpus() -> int:
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def _environments(layout: Layout) -> list[dict[str, str]]:
    """Return the environment of each data-parallel engine."""
    if layout.data == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"VLLM_DP_SIZE": str(layout.data), "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": str(port)}
    return [common | {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)} for rank in range(layout.data)]


def _in_a_process(
    setting: Setting, task: dict[str, Any], environments: list[dict[str, str]], timeout_s: float
) -> list[dict[str, Any]]:
    """Run a task in processes of its own, one for each environment; what fails or takes too long says so."""
    words = [sys.executable, __file__, json.dumps({**task, "setting": _plain(setting)})]
    processes, deadline = [], time.monotonic() + timeout_s
    for environment in environments:
        out, log = Path(tempfile.mkstemp(".json")[1]), tempfile.TemporaryFile("w+")  # noqa: SIM115
        process = subprocess.Popen(
            [*words, str(out)], stdout=log, stderr=log, env=os.environ | environment, start_new_session=True
        )
        processes.append((process, out, log))
    results = []
    for process, out, log in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 1))
        ended = process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if ended == 0 and out.stat().st_size:
            results.append(json.loads(out.read_text()))
        else:
            log.seek(0)
            text = log.read()
            print(f"# FAILED {task} (status {ended}):\n{text[-3000:]}", flush=True)
            results.append({"failed": f"status {ended}: {text[-1500:]}"})
    return results


def _plain(setting: Setting) -> dict[str, Any]:
    return {"models": str(setting.models), "smoke": setting.smoke, "memory": setting.memory, "engine": setting.engine}


# ------------------------------------------------------------------------------------------------ in a layout's process


def measure(setting: Setting, layout: Layout) -> dict[str, Any]:
    """Start an engine of a layout, and time its cases; what a rank copies comes last."""
    begin = time.perf_counter()
    llm = _start(setting, layout, _folder(setting, layout.shape))
    started, rows = time.perf_counter() - begin, []
    for name, prompts in _cases(setting, layout):
        for stream in ("hidden states", "router logits"):
            rows.append({"case": name, "stream": stream, **_turns(llm, stream, prompts, setting)})
            print(rows[-1], flush=True)
    result = {"start_seconds": started, "cases": rows, "ranks": _copies(llm, _cases(setting, layout)[-1][1])}
    if layout.data > 1:
        time.sleep(3)  # the others may be in a step that this one has a part in
    stop_engine(llm)
    return result


def _start(setting: Setting, layout: Layout, folder: Path, **more: Any) -> Any:
    arguments: dict[str, Any] = {"tensor_parallel_size": layout.tensor, "pipeline_parallel_size": layout.pipeline}
    if setting.smoke:
        return start_engine(setting, True, model=str(folder), **(arguments | more))
    if layout.shape == EXAMPLE:
        arguments |= {"skip_tokenizer_init": False, "max_model_len": 9000}
        arguments |= {"limit_mm_per_prompt": {"image": 1, "video": 0}}
    else:
        arguments |= {"hf_overrides": {"num_hidden_layers": 16}}
    return start_engine(setting, True, model=str(folder), **(arguments | more))


def _folder(setting: Setting, shape: str) -> Path:
    if setting.smoke:
        return Path(setting.arguments()["model"])
    folder = setting.models / shape
    if shape == EXAMPLE and not (folder / "tokenizer.json").is_file():
        write_processor(folder)
    return folder


def _cases(setting: Setting, layout: Layout) -> list[tuple[str, list[Any]]]:
    """Return names and prompts; a character of a text is a token. The last case has 64 prompts."""
    small = 40 if setting.smoke else 1
    if layout.shape == OTHER or setting.smoke:
        cases = [("1 x 1000", setting.prompts((1, 1000 // small, 1)))]
        return [*cases, ("64 x 1000", setting.prompts((64 // (8 if setting.smoke else 1), 1000 // small, 1)))]
    text = "".join(chr(setting.random.randrange(97, 123)) for _ in range(8000))
    return [
        ("1 x 1000", [text[:1000]]),
        ("1 x 8000", [text]),
        ("image of 1200 x 900", [{"prompt": f"{IMAGE_MARK} what is it?", "multi_modal_data": {"image": _picture()}}]),
        ("64 x 500", ["".join(setting.random.sample(text, 500)) for _ in range(64)]),
    ]


def _picture() -> Any:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8))


def _call(llm: Any, stream: str, prompts: list[Any]) -> Any:
    """Make the example's call, or that of its sibling."""
    import easysteer.hidden_states as hs

    if stream == "hidden states":
        return hs.get_all_hidden_states_generate(llm, prompts=prompts, max_tokens=MAX_TOKENS)
    return hs.get_moe_router_logits_generate(llm, prompts=prompts, max_tokens=MAX_TOKENS)


def _generate(llm: Any, prompts: list[Any]) -> Any:
    from vllm import SamplingParams

    return llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS), use_tqdm=False)


def _turns(llm: Any, stream: str, prompts: list[Any], setting: Setting) -> dict[str, Any]:
    """Let plain generation and the call take turns; return seconds, and the stalls of some turns more."""
    arms = {"plain": functools.partial(_generate, llm, prompts), "call": functools.partial(_call, llm, stream, prompts)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    stalls: dict[str, list[float]] = {name: [] for name in arms}
    nbytes = 0
    for number in range(-1, setting.rounds(ROUNDS)):
        for name, run in arms.items():
            begin = time.perf_counter()
            result = run()
            if number >= 0:
                times[name].append(time.perf_counter() - begin)
            if name == "call":
                nbytes = sum(rows.nbytes for rows in _tensors(result[0]))
            del result
    for _ in range(setting.rounds(PROFILED)):
        for name, run in arms.items():
            profile(llm, "forward")
            result = run()
            ended = time.perf_counter()
            last = max(max(rank.get("ends at") or rank["drain at"]) for rank in profile(llm, ""))
            stalls[name].append((ended - last) * 1e3)
            del result
    median = {name: statistics.median(values) for name, values in times.items()}
    paired = [a / b for a, b in zip(times["plain"], times["call"], strict=True)]
    return {
        "plain_s": median["plain"],
        "call_s": median["call"],
        "ratio": median["plain"] / median["call"],
        "paired": statistics.median(paired),
        "stall_ms": {name: statistics.median(values) for name, values in stalls.items()},
        "bytes": nbytes,
        "all": times,
    }


def _tensors(found: Any) -> Iterator[Any]:
    if isinstance(found, dict):
        found = list(found.values())
    for one in found:
        if isinstance(one, list | dict):
            yield from _tensors(one)
        else:
            yield one


def _copies(llm: Any, prompts: list[Any]) -> list[dict[str, float]]:
    """Return of each rank the bytes that left its device in one call, and at what rate while copies ran."""
    _call(llm, "hidden states", prompts)
    profile(llm, "dma")
    result = _call(llm, "hidden states", prompts)
    del result
    found = []
    for figures in profile(llm, ""):
        nbytes, busy = sum(figures.get("copy_bytes", [])), sum(figures.get("copy_seconds", []))
        found.append({"bytes": nbytes, "gb_per_s": nbytes / busy / 1e9 if busy else 0.0})
    return found


# ------------------------------------------------------------------------------------------------ rows of one and two


def _rows_equal(setting: Setting, timeout_s: float) -> dict[str, Any]:
    """Compare the rows of prompts over two tensor-parallel ranks, and two stages, with those of one GPU."""
    with tempfile.TemporaryDirectory() as folder:
        deadline = time.monotonic() + timeout_s
        made = _in_a_process(setting, {"do": "weights", "folder": folder}, [{}], timeout_s)[0]
        if "failed" in made:
            return {"fine": False, **made}
        files = {}
        for name, layout in {"one": Layout(EXAMPLE), "TP 2": Layout(EXAMPLE, 2), "PP 2": Layout(EXAMPLE, 1, 2)}.items():
            files[name] = f"{folder}/{name}.pt"
            task = {"do": "rows", "layout": list(layout), "folder": folder, "out": files[name]}
            result = _in_a_process(setting, task, [{}], max(deadline - time.monotonic(), 1))[0]
            if "failed" in result:
                return {"fine": False, name: result["failed"][-500:]}
        found = {
            name: _in_a_process(setting, {"do": "compare", "files": [files["one"], files[name]]}, [{}], 60)[0]
            for name in ("TP 2", "PP 2")
        }
    return {**found, "fine": all(part.get("fine", False) for part in found.values())}


def save_weights(setting: Setting, folder: Path) -> dict[str, Any]:
    """Write a model of two layers of the example's width, with random weights, as published checkpoints have them."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = json.loads((setting.models / EXAMPLE / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    config["vision_config"] |= {"depth": 2, "deepstack_visual_indexes": [0, 1]}
    if setting.smoke:
        config["text_config"] |= {"num_experts": 8, "hidden_size": 256, "moe_intermediate_size": 64}
        config["vision_config"] |= {"out_hidden_size": 256}
    (folder / "config.json").write_text(json.dumps(config))
    parsed = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cpu" if setting.smoke else "cuda"):
        model = transformers.AutoModelForImageTextToText.from_config(parsed, dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 1.0 if weight.shape[0] > 100_000 else weight.shape[-1] ** -0.5)
    weights = {
        name: (weight.transpose(-1, -2) if ".experts." in name and weight.ndim == 3 else weight).contiguous().cpu()
        for name, weight in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_processor(folder)
    return {"bytes": (folder / "model.safetensors").stat().st_size}


def save_rows(setting: Setting, layout: Layout, folder: Path, out: Path) -> dict[str, Any]:
    """Capture the rows of prompts from the saved model, and write them to a file."""
    import torch

    from vllm_tap import Spec, capture

    given = [prompt["prompt_token_ids"] for prompt in setting.prompts((8, 10 if setting.smoke else 400, 1))]
    more: dict[str, Any] = {
        "load_format": "auto",
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 0, "video": 0},
    }
    llm = _start(setting, layout, folder, **more)
    spec = Spec(hidden_states="all", router_logits="all", embeddings=True, final_hidden_states=True)
    result = capture(llm, given, spec, max_tokens=1, temperature=0.0, progress=False)
    rows = {
        f"{stream} {layer}": result.rows(stream, layer).clone() for stream, of in result.layers.items() for layer in of
    }
    torch.save(rows, out)
    stop_engine(llm)
    return {"rows": len(next(iter(rows.values())))}


def compare_rows(one: str, other: str) -> dict[str, Any]:
    """Return for each stream and layer the median and the share of rows that are near."""
    import torch

    first, second = torch.load(one), torch.load(other)
    found: dict[str, Any] = {"same keys": list(first) == list(second), "tolerance": NEAR, "places": {}}
    fine = found["same keys"]
    for place, expected in first.items():
        rows, exact = second[place].float(), expected.float()
        off = (rows - exact).square().mean(-1).sqrt() / exact.square().mean().sqrt()
        near = float((off < NEAR).float().mean())
        found["places"][place] = [round(float(off.median()), 5), round(near, 4)]
        fine = fine and near >= SHARE_NEAR
    return {**found, "fine": fine}


def _show(found: list[dict[str, Any]]) -> None:
    for row in found:
        head = f"{row['shape']:18s} {row['layout']:14s} engine {row['rank']}"
        for case in row.get("cases", []):
            stall = "  ".join(f"{name} {value:.1f}" for name, value in case["stall_ms"].items())
            below = "" if case["ratio"] >= GOAL else " BELOW"
            print(
                f"{head} {case['case']:20s} {case['stream']:14s} plain {case['plain_s']:.4f} s"
                f"  call {case['call_s']:.4f} s  ratio {case['ratio']:.4f} (paired {case['paired']:.4f}){below}"
                f"  after the last pass, ms: {stall}  {case['bytes'] / 1e9:.3f} GB",
                flush=True,
            )
        for rank, copies in enumerate(row.get("ranks", [])):
            print(f"{head} rank {rank}: {copies['bytes'] / 1e9:.3f} GB at {copies['gb_per_s']:.1f} GB/s", flush=True)
        if "start_seconds" in row:
            print(f"{head} started in {row['start_seconds']:.0f} s", flush=True)


def main() -> None:
    """Do one task of a plan, in this process."""
    task, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    given = task["setting"]
    shape = task.get("layout", [EXAMPLE])[0]
    setting = Setting(Path(given["models"]), shape, given["smoke"], given["memory"], given["engine"], None)
    layout = Layout(*task.get("layout", [EXAMPLE]))
    if task["do"] == "rates":
        result: dict[str, Any] = rates(setting)
    elif task["do"] == "measure":
        result = measure(setting, layout)
    elif task["do"] == "weights":
        result = save_weights(setting, Path(task["folder"]))
    elif task["do"] == "rows":
        result = save_rows(setting, layout, Path(task["folder"]), Path(task["out"]))
    else:
        result = compare_rows(*task["files"])
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
