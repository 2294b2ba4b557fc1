"""Calls to workers through their sockets, and what their replies and failures mean. Client process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from vllm_tap.errors import CaptureError, EngineDiedError, PluginNotLoadedError, TransportError
from vllm_tap.frame import messages
from vllm_tap.transport.calls import Caller
from vllm_tap.transport.tcp.address import is_network
from vllm_tap.vllm.names import ENGINE_IS_GONE

GONE: Final = "the engine is gone: a worker closed its connection. Start a new LLM."
SILENT: Final = (
    "a worker on a network sends nothing: it stands still, or its host cannot be reached. Capture later, or start "
    "a new LLM."
)
LOST: Final = (
    "the connection to a worker over a network has ended. Capture again, or start a new LLM if the engine has ended."
)

T = TypeVar("T", bound=messages.Message)


def greeted(callers: Sequence[Caller]) -> list[messages.Hello]:
    """Return what each worker says of itself."""
    greeting = [messages.encode(messages.Greet())] * len(callers)
    return expect(messages.Hello, exchange(callers, greeting)(), "Greet")


def exchange(callers: Sequence[Caller], calls: Sequence[bytes]) -> Callable[[], list[messages.Reply]]:
    """Send each of some workers its call; return a function that waits for the replies."""
    with _engine_is_gone():
        sent = [(caller, caller.send(data)) for caller, data in zip(callers, calls, strict=True)]

    received: list[bytes] = []  # kept when the wait is interrupted and taken up again

    def replies() -> list[messages.Reply]:
        with _engine_is_gone():
            for caller, number in sent[len(received) :]:
                received.append(caller.receive(number))
        return [messages.decode_reply(reply) for reply in received]

    return replies


@contextlib.contextmanager
def _engine_is_gone() -> Iterator[None]:
    try:
        yield
    except TransportError as error:
        raise EngineDiedError(_what_ended(error)) from error


def _what_ended(error: TransportError) -> str:
    if isinstance(error.__cause__, TimeoutError):
        return SILENT
    return LOST if is_network(str(error.identity.get("path", ""))) else GONE


def expect(kind: type[T], replies: list[messages.Reply], name: str) -> list[T]:
    """Return the replies to a call if all are what was expected; raise the first failure."""
    for reply in replies:
        if isinstance(reply, messages.Failure):
            raise reply.exception()
        if not isinstance(reply, kind):
            raise CaptureError(f"expected {kind.__name__} as the reply to {name}, got {type(reply).__name__}")
    return replies  # type: ignore[return-value]


def explain(error: Exception) -> Exception:
    """Turn what vLLM raised for a call into an error that says what to do."""
    text = f"{type(error).__name__}: {error}"
    if "vllm_tap_open" in text:
        return PluginNotLoadedError("install vllm-tap in the environment that the engine runs in")
    if any(word in text for word in ENGINE_IS_GONE):
        return EngineDiedError(f"the engine died during a call ({text}). Start a new LLM.")
    return CaptureError(f"a call to the workers failed: {text}")


def not_loaded(reason: str) -> PluginNotLoadedError:
    """Return what to raise where the workers have no taps; of what this process can see, the reason is better."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "vllm_tap" not in allowed.split(","):
        reason = f"VLLM_PLUGINS={allowed!r} does not name it: add vllm_tap to the list, or unset it"
    elif os.environ.get("VLLM_TAP") == "0":
        reason = "VLLM_TAP=0 switches it off: unset it"
    return PluginNotLoadedError(f"the engine's workers did not load the vllm-tap plugin. {reason}, and restart.")
