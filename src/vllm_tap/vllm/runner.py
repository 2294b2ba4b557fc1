"""vLLM's worker and its model runner: every step as it sees it, its place in the engine, its limits. Worker process."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_tap.frame.messages import Rank
from vllm_tap.labels import Mark, read_mark
from vllm_tap.vllm.assumptions import REQUESTS, V1_ROWS, V2_ROWS
from vllm_tap.vllm.facts import require, require_fields
from vllm_tap.vllm.frames import with_room


class Batch(NamedTuple):
    """One step as the runner sees it. Flat rows are tokens, request after request.

    `starts` [num_reqs + 1] and `num_computed` [num_reqs] are the host's values; `positions` and `token_ids` are the
    runner's own tensors [>= num_tokens] on the device, which under asynchronous scheduling alone are exact.
    """

    request_ids: list[str]
    starts: npt.NDArray[np.int32]
    num_computed: npt.NDArray[np.int32]
    positions: torch.Tensor
    token_ids: torch.Tensor


def read_rank(worker: Any) -> Rank:
    """Return where this worker stands in the engine."""
    from vllm.distributed import get_pp_group, get_tp_group

    tp, pp = get_tp_group(), get_pp_group()
    return Rank(worker.rank, tp.rank_in_group, tp.world_size, pp.rank_in_group, pp.world_size)


def runs_in_step(worker: Any) -> bool:
    """Tell whether every forward pass of this worker has to meet one of other engines, as in data parallel ones."""
    return bool(getattr(worker.vllm_config.parallel_config, "data_parallel_size", 1) > 1)


def takes_tokens_alone(worker: Any) -> bool:
    """Tell whether a prompt of tokens is whole.

    To an encoder-decoder it is not. Without an encoder's input, attention to nothing makes NaN. It stays in the
    key-value cache's blocks, and reaches the request that takes them next.
    """
    return not getattr(worker.vllm_config.model_config, "is_encoder_decoder", False)


class Recorder:
    """Receiver of what a runner reports; `TapWorker` implements it.

    Attributes:
        lock: Held during each step, and around what other threads ask of the recorder.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def expect(self, marks: Sequence[Mark]) -> None:
        """Captured requests are about to be scheduled for the first time; the lock is not held."""

    def scheduled(self, request_id: str) -> None:
        """A request, captured or not, is scheduled for the first time."""

    def meet(self, request_id: str, mark: Mark, prompt_len: int, generates: bool) -> None:
        """A captured request is scheduled for the first time; `generates` says whether more than one token."""

    def ended(self, request_ids: Iterable[str]) -> None:
        """Requests, captured or not, have ended; none of their rows will come."""

    def arm(self, batch: Batch) -> None:
        """The inputs of a forward pass are on the device."""

    def drain(self) -> None:
        """The forward pass has been launched."""

    def sampled(self) -> None:
        """The copy of the sampled tokens to the host has been queued."""

    def rest(self) -> None:
        """A step had no tokens: what was asked of the engine has been launched, and it waits for the next requests."""

    def disarm(self) -> None:
        """A forward pass without requests is about to run."""


def runner_name(runner: Any) -> str:
    """Return "V1" or "V2"."""
    return "V2" if hasattr(runner, "prepare_inputs") else "V1"


def watch_runner(runner: Any, recorder: Recorder) -> None:
    """Let the recorder see every step of the runner, as meet, arm, forward, drain, sampled; and rest, without tokens.

    Raises:
        EngineUnsupportedError: The runner does not look as expected; it has not been changed.
    """
    execute = require(runner, "execute_model")
    dummy_run = require(runner, "_dummy_run")
    sample = require(runner, "sample_tokens")
    require_fields(REQUESTS)
    if runner_name(runner) == "V2":
        require_fields([V2_ROWS])
        prepare = runner.prepare_inputs
        runner.prepare_inputs = _after(prepare, lambda batch: recorder.arm(_batch_v2(batch)))
    else:
        for owner, entry in zip((runner, runner.input_batch), V1_ROWS, strict=True):
            for name in entry.names:
                require(owner, name)
        prepare = require(runner, "_prepare_inputs")
        runner._prepare_inputs = _after(prepare, lambda _: recorder.arm(_batch_v1(runner)))

    @functools.wraps(execute)
    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # The V2 runner sends its dummy runs through execute_model(..., dummy_run=True).
        if kwargs.get("dummy_run", False) or (runner_name(runner) == "V2" and len(args) > 1 and args[1]):
            with recorder.lock:
                recorder.disarm()
                return execute(scheduler_output, *args, **kwargs)
        met = [(new, _read_mark(new)) for new in scheduler_output.scheduled_new_reqs]
        recorder.expect([mark for _, mark in met if mark is not None])
        with recorder.lock:
            if scheduler_output.finished_req_ids:
                recorder.ended(scheduler_output.finished_req_ids)
            for new, mark in met:
                recorder.scheduled(new.req_id)
                if mark is not None:
                    recorder.meet(new.req_id, mark, len(new.prompt_token_ids or ()), _generates(new))
            result = execute(scheduler_output, *args, **kwargs)
            recorder.drain()
            if not scheduler_output.total_num_scheduled_tokens:
                recorder.rest()
            return result

    @functools.wraps(dummy_run)
    def _dummy_run(*args: Any, **kwargs: Any) -> Any:
        with recorder.lock:
            recorder.disarm()
            return dummy_run(*args, **kwargs)

    @functools.wraps(sample)
    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        result = sample(*args, **kwargs)
        with recorder.lock:
            recorder.sampled()
        return result

    runner.execute_model, runner._dummy_run, runner.sample_tokens = with_room(execute_model), _dummy_run, sample_tokens


def _after(function: Callable[..., Any], then: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then(result)
        return result

    return wrapper


def _read_mark(new: Any) -> Mark | None:
    sampling = new.sampling_params
    pooling = getattr(new, "pooling_params", None)
    return read_mark(sampling.extra_args if sampling is not None else getattr(pooling, "extra_kwargs", None))


def _generates(new: Any) -> bool:
    return new.sampling_params is not None and getattr(new.sampling_params, "max_tokens", None) != 1


def _batch_v1(runner: Any) -> Batch:
    batch = runner.input_batch
    num_reqs = batch.num_reqs
    return Batch(
        request_ids=batch.req_ids[:num_reqs],
        starts=runner.query_start_loc.np[: num_reqs + 1],
        num_computed=batch.num_computed_tokens_cpu[:num_reqs],
        positions=runner.positions,
        token_ids=runner.input_ids.gpu,
    )


def _batch_v2(batch: Any) -> Batch:
    return Batch(
        request_ids=batch.req_ids,
        starts=batch.query_start_loc_np,
        num_computed=batch.num_computed_tokens_np,
        positions=batch.positions,
        token_ids=batch.input_ids,
    )


def run_dummy(runner: Any) -> None:
    """Run the model once on a few dummy rows, for what the taps learn from it."""
    runner._dummy_run(min(16, runner.max_num_tokens))


def max_rows(worker: Any) -> int:
    """Return the most rows of a step."""
    return int(worker.model_runner.max_num_tokens)


def graph_rows(worker: Any) -> int:
    """Return the most rows of a step that may run in a captured CUDA graph."""
    return int(getattr(worker.vllm_config.compilation_config, "max_cudagraph_capture_size", 0) or 0)


def request_rows(worker: Any) -> int:
    """Return the most rows that a request has in a step that reads no prompt: the last token, and drafts."""
    return 1 + int(getattr(worker.vllm_config.speculative_config, "num_speculative_tokens", 0) or 0)


def step_headroom(worker: Any) -> int:
    """Return how many bytes of device memory the engine's steps may take that PyTorch does not hold already.

    vLLM measures the most that activations take when it starts; what PyTorch keeps for them counts as held.
    """
    peak = int(getattr(worker, "peak_activation_memory", 0) or 0)
    held = torch.cuda.memory_reserved(worker.device) - torch.cuda.memory_allocated(worker.device)
    return max(peak - held, 0)


def around_capture(runner: Any, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Run the capture of CUDA graphs inside a context."""
    capture_model = require(runner, "capture_model")

    @functools.wraps(capture_model)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with context():
            return capture_model(*args, **kwargs)

    runner.capture_model = wrapper
