"""Requests of the client to a `vllm.LLM`: parameters, and to generate or to embed. Client process."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import InvalidStateError
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final, NamedTuple

from vllm_tap.errors import EngineDiedError, SpecError
from vllm_tap.spec import nearest
from vllm_tap.transport import threads
from vllm_tap.vllm.refused import Handed, is_death, told_by_length, told_in

WATCH_SECONDS: Final = 0.1
"""Seconds after which a call that waits looks whether the engine is still there."""

IN_CORE: Final = "uni"
"""vLLM's name for one worker that runs in the process of the engine core."""

FIRST_STEP_SECONDS: Final = 0.005
"""An engine prepares its first step in so long, if its process has nothing else to do."""

POOLING_TASKS: Final = ("embed", "classify", "token_embed", "token_classify")
"""Tasks of models that pool; a model may have several, of which the first is its own unless vLLM says otherwise."""

STEPS_BETWEEN: Final = 16
"""After so many outputs, what the engine has generated is read: 0.3 ms of one wait for 256 requests."""


def require_llm(llm: Any) -> None:
    """Refuse what is no offline engine.

    Raises:
        SpecError: It is something else.
    """
    if not all(hasattr(llm, name) for name in ("collective_rpc", "model_config", "llm_engine")):
        raise SpecError(
            f"expected a vllm.LLM, got {type(llm).__name__}: start one with vllm.LLM(model). For an AsyncLLM "
            "use vllm_tap.AsyncTap, for a server `vllm-tap serve`."
        )


def shutdown(llm: Any) -> None:
    """End an engine's processes now, and wait until they are gone; without a call they end with the `llm` object.

    vLLM has no public call for that. Results stay readable. Any number of calls do no harm.

    Args:
        llm: A `vllm.LLM`. Requests that wait in it are lost, and it takes no more.

    Raises:
        SpecError: It is something else.
    """
    require_llm(llm)
    llm.llm_engine.engine_core.shutdown()


def require_no_others(llm: Any, advice: str) -> None:
    """Refuse an engine in which requests wait: vLLM would return their outputs among ours, and nobody takes them.

    Raises:
        SpecError: There are some.
        EngineDiedError: The engine core has ended, with or without them.
    """
    if getattr(getattr(llm.llm_engine.engine_core, "resources", None), "engine_dead", False):
        raise EngineDiedError("the engine has ended. See its log, and start a new LLM.")
    waiting = len(unfinished(llm))
    if waiting:
        raise SpecError(
            f"{waiting} requests that were added before wait in this engine, and their outputs would be lost. Take "
            f"these first (llm.wait_for_completion()), or {advice}."
        )


def pools(llm: Any) -> bool:
    """Tell whether an engine embeds rather than generates."""
    return getattr(llm.model_config, "runner_type", "generate") == "pooling"


def new_params(llm: Any, fields: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Any:
    """Return sampling or pooling parameters with copies of these fields, of which nobody else holds anything.

    Args:
        llm: A `vllm.LLM`.
        fields: By name.
        defaults: Those of fields that are not given, instead of vLLM's own.

    Raises:
        SpecError: A field that they do not have.
    """
    kind = _params_kind(llm)
    known = [name for name in kind.__annotations__ if not name.startswith("_")]
    for name in fields:
        if name not in known:
            raise SpecError(f"{kind.__name__} has no field {name!r}.{nearest(name, known)}")
    return kind(**copy.deepcopy({**(defaults or {}), **fields}))


def default_fields(llm: Any) -> dict[str, Any]:
    """Return the fields by which `llm.generate(prompts)` samples that differ from those of plain `SamplingParams`.

    They come from the model's generation_config.json, unless the engine was started with another.
    """
    if pools(llm):
        return {}
    plain, given = _params_kind(llm)(), llm.get_default_sampling_params()
    names = [name for name in type(plain).__annotations__ if not name.startswith("_")]
    return {name: getattr(given, name) for name in names if getattr(given, name) != getattr(plain, name)}


def pooling_task(llm: Any, params: Any) -> str:
    """Return the task of pooling parameters, or the model's own.

    Raises:
        SpecError: A task that this engine does not have, or was not started for.
    """
    supported = tuple(llm.supported_tasks)
    asked = getattr(params, "task", None)
    if asked is not None and asked not in supported:
        tasks = [task for task in supported if task in POOLING_TASKS]
        raise SpecError(f"this engine has no pooling task {asked!r}: it has {', '.join(tasks) or 'none'}.")
    own = getattr(llm, "pooling_task", None)
    if asked is not None and own not in (None, asked):
        raise SpecError(
            f"this engine was started for the pooling task {own!r}, and vLLM runs no other in it: start it with "
            f"pooler_config=PoolerConfig(task={asked!r})."
        )
    first = next((task for task in POOLING_TASKS if task in supported), POOLING_TASKS[0])
    return str(asked or own or first)


def _one_task(llm: Any, params: Sequence[Any]) -> str:
    tasks = sorted({pooling_task(llm, given) for given in params})
    if len(tasks) > 1:
        raise SpecError(
            f"pooling tasks {', '.join(tasks)} in one call: vLLM takes one. Capture them one after another."
        )
    return tasks[0]


def require_chat(llm: Any) -> None:
    """Refuse conversations where this engine takes none.

    Raises:
        SpecError: It pools, or this vLLM queues none.
    """
    if pools(llm):
        raise SpecError(
            "this engine pools, and vLLM takes no conversations there: render them with "
            "llm.get_tokenizer().apply_chat_template, if its tokenizer has a chat template, and pass what that returns."
        )
    if not hasattr(llm, "enqueue_chat"):
        raise SpecError(
            "this vLLM has no LLM.enqueue_chat: render conversations with llm.get_tokenizer().apply_chat_template, and "
            "pass the token ids."
        )


def output_kind(llm: Any) -> Any:
    """Return the class of outputs of `llm.embed` or `llm.classify`; None for other tasks than theirs."""
    name = {"embed": "EmbeddingRequestOutput", "classify": "ClassificationRequestOutput"}
    return getattr(sys.modules["vllm"], name.get(pooling_task(llm, None), ""), None)


def require_params(llm: Any, params: Any) -> None:
    """Refuse parameters that this engine does not take.

    Raises:
        SpecError: They are of another kind.
    """
    kind = _params_kind(llm)
    if not isinstance(params, kind):
        raise SpecError(f"sampling_params of this engine are vllm.{kind.__name__}, got {type(params).__name__}.")


def _params_kind(llm: Any) -> Any:
    # The caller holds an LLM, so vLLM is loaded; this package does not import it outside the engine.
    vllm = sys.modules["vllm"]
    return vllm.PoolingParams if pools(llm) else vllm.SamplingParams


def call(llm: Any, method: str, args: tuple[Any, ...]) -> list[Any]:
    """Call a method of all workers and return what they return.

    Raises:
        EngineDiedError: The engine core has ended.
    """
    with watched(llm):
        return list(llm.collective_rpc(method, args=args))


def generate(
    llm: Any,
    prompts: list[Any],
    params: list[Any],
    use_tqdm: Any,
    lora_request: Any = None,
    *,
    chat: Mapping[str, Any] | None = None,
    queued: Callable[[], None] = lambda: None,
    tokens: Callable[[Sequence[list[int]]], None] = lambda lists: None,
    computed: Callable[[], None] = lambda: None,
    interrupted: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Run prompts through an engine and return its outputs in the order of the prompts.

    Args:
        llm: A `vllm.LLM`.
        prompts: As it takes them.
        params: Sampling or pooling parameters, one for each prompt.
        use_tqdm: A progress bar, as `LLM.generate` takes it.
        lora_request: The same.
        chat: If the prompts are conversations, what `LLM.chat` takes beside them.
        queued: Called before the wait for outputs, where vLLM allows behind the queueing of the prompts. If it raises,
            they are aborted.
        tokens: Called now and then while the engine computes, with lists of token ids that will come back in the
            outputs, of prompts and of what they generate; the latter grow. Not called for an engine that embeds.
        computed: Called when the engine has ended the last of the prompts, before vLLM has made outputs of them; not
            called where it is vLLM that ends one, such as at a stop string.
        interrupted: Called before the prompts are aborted, where something else than an error ended the wait for them.

    Raises:
        SpecError: vLLM refuses a prompt.
        EngineDiedError: The engine died on the way.
    """
    others = set(unfinished(llm))
    try:
        with watched(llm):
            if pools(llm):
                queued()
                options = {"use_tqdm": use_tqdm, "lora_request": lora_request}
                with told_by_length(llm, prompts):
                    outputs = llm.encode(prompts, pooling_params=params, pooling_task=_one_task(llm, params), **options)
            else:
                with _first_step_first(llm), _adding(llm, handed := Handed(prompts)):
                    enqueue(llm, handed, params, chat, {"lora_request": lora_request, "use_tqdm": use_tqdm})
                queued()
                mine = set(unfinished(llm)) - others
                read = functools.partial(tokens, _token_lists(llm, mine))
                read()
                with _outputs_watched(llm, mine, read, computed):
                    outputs = llm.wait_for_completion(use_tqdm=use_tqdm)
    except Exception as error:
        if is_death(error):
            raise EngineDiedError("the engine died while it generated. See its log, and start a new LLM.") from error
        _abort(llm, others)
        raise
    except BaseException:
        interrupted()
        # Ctrl-C leaves requests in the engine; the next call would run them on and return their outputs among its own.
        _abort(llm, others)
        raise
    # vLLM returns requests that were queued before among these, in the order of arrival: ours are the last.
    return list(outputs)[-len(prompts) :]


def enqueue(llm: Any, prompts: list[Any], params: list[Any], chat: Mapping[str, Any] | None, options: Any) -> None:
    """Queue prompts, or conversations with what `LLM.chat` takes beside them, in an engine that generates."""
    if chat is None:
        llm.enqueue(prompts, params, **options)
    else:
        llm.enqueue_chat(prompts, params, **chat, **options)


@contextmanager
def watched(llm: Any) -> Iterator[None]:
    """End a wait for outputs or replies when the engine core dies.

    vLLM waits on for the reply to a call, and for outputs if the core had no last word.
    """
    core = llm.llm_engine.engine_core
    resources, outputs = getattr(core, "resources", None), getattr(core, "outputs_queue", None)
    if resources is None or outputs is None:  # the engine runs in this process
        yield
        return
    done = threading.Event()

    def watch() -> None:
        # Again and again: the wait may begin just after the death was seen.
        while not done.wait(WATCH_SECONDS):
            if getattr(resources, "engine_dead", False):
                death = EngineDiedError("the engine core died before it answered. Start a new LLM.")
                outputs.put_nowait(death)
                for reply in list(getattr(core, "utility_results", {}).values()):
                    with suppress(InvalidStateError):  # it has come after all
                        reply.set_exception(death)

    if not threads.is_ending():
        threads.start_bare(watch, stop=done.set)
    try:
        yield
    finally:
        done.set()


@contextmanager
def _adding(llm: Any, prompts: Handed) -> Iterator[None]:
    """Count prompts that an engine takes during the block, and name the one that it refuses."""
    add_request = llm.llm_engine.add_request

    def counted(*args: Any, **options: Any) -> Any:
        request_id = add_request(*args, **options)
        prompts.num_taken += 1
        return request_id

    with _replaced(llm.llm_engine, "add_request", counted), told_in(prompts):
        yield


@contextmanager
def _first_step_first(llm: Any) -> Iterator[None]:
    """Let the engine prepare its first step before it gets requests that this step has no room for.

    Where the worker runs in the engine core's process, they share the interpreter with the thread that receives: while
    requests come one after another, the first step is prepared in 8 ms instead of 4, and the device waits (64 prompts
    of 1000 tokens, H200). Elsewhere nothing is done.
    """
    core, config = llm.llm_engine.engine_core, llm.llm_engine.vllm_config
    if config.parallel_config.distributed_executor_backend != IN_CORE:
        yield
        return
    add_request, room = core.add_request, config.scheduler_config.max_num_batched_tokens

    def paced(request: Any) -> None:
        nonlocal room
        if room <= 0:
            time.sleep(FIRST_STEP_SECONDS)
            room = math.inf
        room -= len(request.prompt_token_ids or ())
        add_request(request)

    with _replaced(core, "add_request", paced):
        yield


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Put a function in the place of a method for a while."""
    of_instance = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if of_instance is None:
            delattr(owner, name)  # that of the class again
        else:
            setattr(owner, name, of_instance)


@contextmanager
def _outputs_watched(
    llm: Any, request_ids: set[str], now_and_then: Callable[[], None], at_last: Callable[[], None]
) -> Iterator[None]:
    """Call a function now and then before a wait for outputs, and one when the core says it has ended these requests.

    The latter is called once, as soon as the last of them has come.
    """
    core = llm.llm_engine.engine_core
    get_output = core.get_output
    steps = itertools.count(1)

    def watched() -> Any:
        if next(steps) % STEPS_BETWEEN == 0:
            now_and_then()
        outputs = get_output()
        if request_ids:
            request_ids.difference_update([output.request_id for output in outputs.outputs if output.finished])
            if not request_ids:
                at_last()
        return outputs

    with _replaced(core, "get_output", watched):
        yield


@contextmanager
def ticking(llm: Any, seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call a function every so many seconds while an engine computes, in the thread that waits for its outputs.

    Also while no output comes, where the engine runs in another process.
    """
    core = llm.llm_engine.engine_core
    get_output, arrived = core.get_output, getattr(core, "outputs_queue", None)
    due = time.monotonic() + seconds

    def waited() -> Any:
        nonlocal due
        while True:
            is_there = arrived is None or _holds_some(arrived, due - time.monotonic())
            if time.monotonic() >= due:
                call()
                due = time.monotonic() + seconds
            if is_there:
                return get_output()

    with _replaced(core, "get_output", waited):
        yield


def _holds_some(arrived: queue.Queue[Any], timeout_s: float) -> bool:
    """Wait until something lies in a queue; tell whether it does."""
    with arrived.not_empty:
        return bool(arrived.not_empty.wait_for(lambda: arrived.queue, timeout=max(timeout_s, 0)))


@contextmanager
def interruptible(llm: Any, interruption: Any, finished: dict[int, Any]) -> Iterator[Callable[[], None]]:
    """Let Ctrl-C come between requests that are queued, and between steps or while one is waited for.

    Args:
        llm: A `vllm.LLM` without requests.
        interruption: Has the contexts `held` and `allowed`.
        finished: Takes the outputs by the number of their prompt, of the first call to `generate` in the block.

    Yields:
        A function that reads the outputs that have arrived by then, for `generate` to call before it aborts the rest:
        the engine may have ended requests while others were queued, or run ahead of its reader.
    """
    engine, core = llm.llm_engine, llm.llm_engine.engine_core
    add_request, step, get_output = engine.add_request, engine.step, core.get_output
    arrived = getattr(core, "outputs_queue", None)  # none where the step itself runs in `get_output`
    numbers: dict[str, int] = {}

    def added(request_id: str, *args: Any, **options: Any) -> Any:
        numbers.setdefault(request_id, len(numbers))
        with interruption.held():
            return add_request(request_id, *args, **options)

    def stepped() -> Any:
        with interruption.held():
            outputs = step()
            finished.update((numbers[output.request_id], output) for output in outputs if output.finished)
        return outputs

    def waited() -> Any:
        with interruption.allowed():
            return get_output()

    def read_arrived() -> None:
        for _ in range(0 if arrived is None else arrived.qsize()):
            stepped()

    with ExitStack() as stack:
        stack.enter_context(_replaced(engine, "add_request", added))
        stack.enter_context(_replaced(engine, "step", stepped))
        if arrived is not None:
            stack.enter_context(_replaced(core, "get_output", waited))
        yield read_arrived


class Progress(NamedTuple):
    """Progress of a request. `num_most` counts the tokens that it may generate, if it generates."""

    num_prompt: int
    num_generated: int
    num_most: int


def progress(llm: Any) -> dict[str, Any]:
    """Return the states of the requests in an engine, for `progress_of`."""
    return dict(llm.llm_engine.output_processor.request_states)


def progress_of(state: Any) -> Progress:
    """Return how far a request is, also when it has ended."""
    generated = getattr(state.detokenizer, "output_token_ids", ())
    return Progress(state.prompt_len, len(generated), state.max_tokens_param or 0)


def _token_lists(llm: Any, request_ids: set[str]) -> list[list[int]]:
    """Return the lists that will come back in the outputs of requests: of prompts, and of what they generate.

    The latter grow. Slow tokenizers keep a list of both, and its end comes back as another one.
    """
    states = [llm.llm_engine.output_processor.request_states[name] for name in request_ids]
    prompts = [state.prompt_token_ids for state in states]
    generated = [getattr(state.detokenizer, "token_ids", None) for state in states]
    return [ids for ids in prompts + generated if ids is not None]


def unfinished(llm: Any) -> list[str]:
    """Return the requests that wait in an engine or run."""
    return list(llm.llm_engine.output_processor.request_states)


def _abort(llm: Any, others: set[str]) -> None:
    """Abort the requests that are not among `others`."""
    mine = [request_id for request_id in unfinished(llm) if request_id not in others]
    if mine:
        llm.llm_engine.abort_request(mine, internal=True)
