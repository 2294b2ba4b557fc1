"""What the client asks of a `vllm.LLM`: parameters, and to generate or to embed. Client process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from vllm_tap.errors import EngineDiedError, SpecError
from vllm_tap.spec import nearest

WATCH_SECONDS: Final = 0.1
"""How often a call that waits looks whether the engine is still there."""


def pools(llm: Any) -> bool:
    """Tell whether an engine embeds rather than generates."""
    return getattr(llm.model_config, "runner_type", "generate") == "pooling"


def new_params(llm: Any, fields: dict[str, Any]) -> Any:
    """Return sampling or pooling parameters with these fields.

    Raises:
        SpecError: A field that they do not have.
    """
    # The caller holds an LLM, so vLLM is loaded; this package does not import it outside the engine.
    vllm = sys.modules["vllm"]
    kind = vllm.PoolingParams if pools(llm) else vllm.SamplingParams
    known = [name for name in kind.__annotations__ if not name.startswith("_")]
    for name in fields:
        if name not in known:
            raise SpecError(f"{kind.__name__} has no field {name!r}.{nearest(name, known)}")
    return kind(**fields)


def call(llm: Any, method: str, args: tuple[Any, ...]) -> list[Any]:
    """Call a method of all workers and return what they return.

    vLLM 0.26 to 0.33 waits for the reply of such a call even when the engine core has died meanwhile, so the call waits
    in a thread of its own and this one watches the engine.

    Raises:
        EngineDiedError: The engine core has ended.
    """
    resources = getattr(llm.llm_engine.engine_core, "resources", None)
    if resources is None:  # the engine runs in this process
        return list(llm.collective_rpc(method, args=args))
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((llm.collective_rpc(method, args=args), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name=f"vllm-tap-{method}", daemon=True)
    thread.start()
    while not outcome:
        thread.join(WATCH_SECONDS)
        if not outcome and getattr(resources, "engine_dead", False):
            raise EngineDiedError(f"the engine core died before it answered {method}. Start a new LLM.")
    replies, error = outcome[0]
    if error is not None:
        raise error
    return list(replies)


def generate(llm: Any, prompts: list[Any], params: list[Any], use_tqdm: Any, lora_request: Any = None) -> list[Any]:
    """Run prompts through an engine and return its outputs in the order of the prompts.

    Raises:
        EngineDiedError: The engine died on the way.
    """
    others = set(_unfinished(llm))
    options = {"use_tqdm": use_tqdm, "lora_request": lora_request}
    try:
        with _watched(llm):
            if pools(llm):
                outputs = llm.encode(prompts, pooling_params=params, pooling_task="embed", **options)
            else:
                outputs = llm.generate(prompts, params, **options)
    except Exception as error:
        if type(error).__name__ == "EngineDeadError":
            raise EngineDiedError("the engine died while it generated. See its log, and start a new LLM.") from error
        _abort(llm, others)
        raise
    except BaseException:
        # Ctrl-C leaves requests in the engine; the next call would run them on and return their outputs among its own.
        _abort(llm, others)
        raise
    # vLLM returns requests that were queued before among these, in the order of arrival: ours are the last.
    return list(outputs)[-len(prompts) :]


@contextmanager
def _watched(llm: Any) -> Iterator[None]:
    """End a wait for outputs when the engine core dies: vLLM 0.26 to 0.33 may wait on, if the core had no last word."""
    core = llm.llm_engine.engine_core
    resources, outputs = getattr(core, "resources", None), getattr(core, "outputs_queue", None)
    if resources is None or outputs is None:  # the engine runs in this process
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            if getattr(resources, "engine_dead", False):
                outputs.put_nowait(EngineDiedError("the engine core died."))
                return

    thread = threading.Thread(target=watch, name="vllm-tap-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _unfinished(llm: Any) -> list[str]:
    return list(llm.llm_engine.output_processor.request_states)


def _abort(llm: Any, others: set[str]) -> None:
    """Abort the requests that are not among `others`."""
    mine = [request_id for request_id in _unfinished(llm) if request_id not in others]
    if mine:
        llm.llm_engine.abort_request(mine, internal=True)
