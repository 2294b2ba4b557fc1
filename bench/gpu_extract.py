"""The same workloads through vLLM's own `extract_hidden_states` and its file connector. Part of bench/gpu.py."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_ratios import summarise
from gpu_setting import Setting, generate, sampling, start_engine, stop_engine

WORKLOADS = [("decode 8 x (64 + 128)", 3), ("decode 256 x (64 + 128)", 2), ("prefill 64 x 1000", 2)]
ROOM_BYTES = 40 << 30
"""256 x 191 rows of 33 layers are 13 GB, 64 x 1000 rows 17 GB; the files of a round are gone before the next."""


def measure_extract(setting: Setting, plain: Any, num_layers: int) -> list[dict[str, Any]]:
    """Return rows like those of the captures: states of all layers, read back from files, against the plain engine.

    `plain` may be None: then the extracting engine alone is timed, and its ratio is to itself.
    """
    with tempfile.TemporaryDirectory(dir=_folder(), prefix="vllm-tap-extract-") as folder:
        more = _arguments(folder, num_layers)
        if setting.smoke:
            _check_arguments(setting, more)
            return []
        llm = start_engine(setting, False, **more)
        rows = []
        for name, rounds in WORKLOADS:
            rows += _measure(setting, plain, llm, name, setting.rounds(rounds), num_layers)
        stop_engine(llm)
    return rows


def _check_arguments(setting: Setting, more: dict[str, Any]) -> None:
    """Have vLLM read the arguments; its connector copies by CUDA streams, so no such engine starts on a CPU."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(**setting.arguments(**more, max_num_batched_tokens=512)).create_engine_config()
    assert config.speculative_config.method == "extract_hidden_states"
    print("# extract_hidden_states: arguments are right; its connector needs CUDA, so nothing was measured", flush=True)


def _folder() -> str:
    """Return memory if there is enough of it in /dev/shm, else the default place."""
    shm = Path("/dev/shm")
    return str(shm) if shm.is_dir() and shutil.disk_usage(shm).free > ROOM_BYTES else tempfile.gettempdir()


def _arguments(folder: str, num_layers: int) -> dict[str, Any]:
    # Layer number n is the stream before layer n, that is after layer n - 1; the model's own number is the last.
    layers = list(range(1, num_layers + 1))
    return {
        "enable_chunked_prefill": False,
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}},
        },
        "kv_transfer_config": {
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": folder},
        },
    }


def _measure(setting: Setting, plain: Any, llm: Any, name: str, rounds: int, num_layers: int) -> list[dict[str, Any]]:
    workload = setting.workload(name)
    times: dict[str, list[float]] = {"plain": [], "extract_hidden_states": []}
    sizes: dict[str, int] = {}
    for round_number in range(-1, rounds):
        prompts = setting.prompts(workload)
        seconds, sizes["extract_hidden_states"] = _extract(llm, prompts, workload[2], num_layers)
        if round_number >= 0:
            times["extract_hidden_states"].append(seconds)
            times["plain"].append(seconds if plain is None else generate(plain, prompts, workload[2])[0])
    return summarise(name, times, {}, sizes)


def _extract(llm: Any, prompts: list[Any], max_tokens: int, num_layers: int) -> tuple[float, int]:
    """Return the seconds until all states are tensors in this process, and their bytes."""
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as connector

    begin = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(**sampling(max_tokens)), use_tqdm=False)
    paths = [output.kv_transfer_params["hidden_states_path"] for output in outputs]
    states = [_load(connector, path) for path in paths]
    seconds = time.perf_counter() - begin
    for prompt, state in zip(prompts, states, strict=True):
        rows, layers = state.shape[:2]
        assert layers == num_layers, f"{layers} layers came, {num_layers} were asked for"
        assert rows >= len(prompt["prompt_token_ids"]), f"{rows} rows for {len(prompt['prompt_token_ids'])} tokens"
    nbytes = sum(state.nbytes for state in states)
    for path in paths:
        Path(path).unlink(missing_ok=True)
        Path(path + ".lock").unlink(missing_ok=True)
    return seconds, nbytes


def _load(connector: Any, path: str) -> Any:
    if hasattr(connector, "load_hidden_states"):
        return connector.load_hidden_states(path)["hidden_states"]
    from safetensors.torch import load_file

    return load_file(path)["hidden_states"]
