"""Hidden states, MoE router logits and routed experts out of a running vLLM engine. Importing starts nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_tap.legacy.install import offer_vllm_hidden_states

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vllm_tap.client.async_tap import AsyncTap
    from vllm_tap.client.capture import capture
    from vllm_tap.client.dataset_writer import DatasetWriter
    from vllm_tap.client.http_tap import HttpTap
    from vllm_tap.client.record import record
    from vllm_tap.client.recording import Recording
    from vllm_tap.client.result import Capture, LayerMap, RowLabels, Sample
    from vllm_tap.client.tap import RowBlock, Stream, Tap
    from vllm_tap.errors import (
        BudgetError,
        CaptureError,
        DatasetDamagedError,
        DatasetError,
        DescriptorError,
        DeviceError,
        EngineDiedError,
        EngineUnsupportedError,
        LayerError,
        PluginNotLoadedError,
        PositionError,
        RowsMissingError,
        SpecError,
        TapError,
        TransportError,
    )
    from vllm_tap.positions import Positions
    from vllm_tap.spec import Spec
    from vllm_tap.store.dataset import Dataset, open_dataset
    from vllm_tap.vllm.frontend import shutdown

__all__ = [
    "AsyncTap",
    "BudgetError",
    "Capture",
    "CaptureError",
    "Dataset",
    "DatasetDamagedError",
    "DatasetError",
    "DatasetWriter",
    "DescriptorError",
    "DeviceError",
    "EngineDiedError",
    "EngineUnsupportedError",
    "HttpTap",
    "LayerError",
    "LayerMap",
    "PluginNotLoadedError",
    "PositionError",
    "Positions",
    "Recording",
    "RowBlock",
    "RowLabels",
    "RowsMissingError",
    "Sample",
    "Spec",
    "SpecError",
    "Spill",
    "Stream",
    "Tap",
    "TapError",
    "TransportError",
    "__version__",
    "capture",
    "open_dataset",
    "record",
    "shutdown",
]

_HOMES = {
    "AsyncTap": "vllm_tap.client.async_tap",
    "capture": "vllm_tap.client.capture",
    "Capture": "vllm_tap.client.result",
    "Dataset": "vllm_tap.store.dataset",
    "DatasetWriter": "vllm_tap.client.dataset_writer",
    "HttpTap": "vllm_tap.client.http_tap",
    "LayerMap": "vllm_tap.client.result",
    "Positions": "vllm_tap.positions",
    "Recording": "vllm_tap.client.recording",
    "RowBlock": "vllm_tap.client.tap",
    "RowLabels": "vllm_tap.client.result",
    "Sample": "vllm_tap.client.result",
    "Spec": "vllm_tap.spec",
    "Spill": "vllm_tap.client.bounds",
    "Stream": "vllm_tap.client.tap",
    "Tap": "vllm_tap.client.tap",
    "open_dataset": "vllm_tap.store.dataset",
    "record": "vllm_tap.client.record",
    "shutdown": "vllm_tap.vllm.frontend",
    **{name: "vllm_tap.errors" for name in __all__ if name.endswith("Error")},
}


offer_vllm_hidden_states()


def __getattr__(name: str) -> Any:
    # torch is loaded with the client, on first use: importing this package must stay cheap in every vLLM process.
    if name not in _HOMES:
        raise AttributeError(f"module 'vllm_tap' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
