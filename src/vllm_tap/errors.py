"""The exceptions that users catch. They are raised in the client process; workers send them over as plain data.

TapError
 +-- SpecError                 a Spec, a layer or a prompt list that cannot be
 |    +-- LayerError           a layer that the model or the capture does not have
 |    +-- PositionError        a position that a prompt or a completion does not have
 +-- EngineUnsupportedError    this engine, model or setting cannot be tapped
 |    +-- PluginNotLoadedError the workers did not load the plugin
 +-- CaptureError              a capture that started and could not be completed
 |    +-- RowsMissingError     rows that were asked for did not arrive
 |    +-- BudgetError          the memory for rows is full
 |    +-- EngineDiedError      the engine process ended
 |    +-- DeviceError          the driver of a GPU refused; a TransportError too
 +-- TransportError            memory or sockets between worker and client refused
 |    +-- DescriptorError      bytes from the other process that do not validate
 +-- DatasetError              a dataset that cannot be written or read
      +-- DatasetDamagedError  bytes of a dataset that do not validate
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TapError(Exception):
    """Base of every exception that this package raises on purpose.

    Identity (`layer`, `request_id`, `rank`, `path`, ...) is kept as attributes: nobody need parse messages.
    """

    def __init__(self, message: str, **identity: Any) -> None:
        super().__init__(message)
        self.identity = identity

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["identity"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}") from None


class SpecError(TapError, ValueError):
    """A specification, a prompt list or an argument that cannot be."""


class LayerError(SpecError, LookupError):
    """A layer that the model, or this capture, does not have."""


class PositionError(SpecError, LookupError):
    """A position that a prompt, or one of its completions, does not have.

    `sample`, `completion` and `prompt_len` say which is the first. Where the engine has computed already, `result` is
    the capture without the rows that cannot be, as `missing="skip"` returns it.
    """


class EngineUnsupportedError(TapError):
    """This engine, model or setting cannot be tapped; plain generation goes on."""


class PluginNotLoadedError(EngineUnsupportedError):
    """The engine's workers run without the plugin."""


class CaptureError(TapError):
    """A capture that started and could not be completed."""


class RowsMissingError(CaptureError):
    """Rows that were asked for did not arrive."""


class BudgetError(CaptureError, MemoryError):
    """The memory set aside for rows is full."""


class EngineDiedError(CaptureError):
    """The engine process ended while a capture or a call was under way."""


class TransportError(TapError):
    """Memory or sockets between worker and client were refused."""


class DeviceError(CaptureError, TransportError):
    """The driver of a GPU refused what a capture needs."""


class DescriptorError(TransportError, ValueError):
    """Bytes from the other process that do not validate."""


class DatasetError(TapError):
    """A dataset that cannot be written or read; what is sealed in it stays readable."""


class DatasetDamagedError(DatasetError, ValueError):
    """Bytes of a dataset that do not validate."""


BY_NAME: dict[str, type[TapError]] = {
    kind.__name__: kind
    for kind in (
        TapError,
        SpecError,
        LayerError,
        PositionError,
        EngineUnsupportedError,
        PluginNotLoadedError,
        CaptureError,
        RowsMissingError,
        BudgetError,
        EngineDiedError,
        TransportError,
        DeviceError,
        DescriptorError,
        DatasetError,
        DatasetDamagedError,
    )
}
"""Error classes by name, for turning a worker's reply back into the exception it stands for."""


@contextmanager
def counted_from(first: int) -> Iterator[None]:
    """Give samples that errors of the block name the numbers that they have behind so many others."""
    try:
        yield
    except TapError as error:
        sample = error.identity.get("sample")
        if first and isinstance(sample, int):
            error.args = (re.sub(rf"\b(prompt|sample) {sample}\b", rf"\1 {sample + first}", str(error), count=1),)
            error.identity["sample"] = sample + first
        raise
