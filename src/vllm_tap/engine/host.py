"""Every place where this package hooks into vLLM or looks inside it. Nothing else imports vLLM.

Runs in all of vLLM's processes (`install`) and in its workers (the rest). `assumptions` lists each name that is used,
with the reason and the versions it was read from; `require` refuses by that name where it is not there.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from vllm_tap import __version__
from vllm_tap.engine.assumptions import REQUESTS, V1_ROWS, V2_ROWS, Assumption, why
from vllm_tap.engine.rows import Batch
from vllm_tap.errors import EngineUnsupportedError
from vllm_tap.frame.messages import Rank
from vllm_tap.labels import KEY, NO_TAPS, Mark, read_mark

if TYPE_CHECKING:
    from vllm_tap.engine.worker import TapWorker

logger = logging.getLogger("vllm_tap")

OLDEST: Final = (0, 26)
NEWEST: Final = (0, 33)

GRAPH_VERSION: Final = 1
"""Part of vLLM's compile cache key: rises whenever the taps in the graph change."""

RPC_METHODS: Final = ("open", "start", "finish", "stop", "fetch", "release", "status", "profile")
"""Methods of `TapWorker` that clients reach through `collective_rpc("vllm_tap_<name>")`."""

LEGACY_METHODS: Final = (
    "enable_hidden_states_capture",
    "disable_hidden_states_capture",
    "get_captured_hidden_states",
    "clear_hidden_states",
    "get_hidden_states_debug_info",
    "enable_moe_router_logits_capture",
    "disable_moe_router_logits_capture",
    "get_moe_router_logits",
    "clear_moe_router_logits",
    "get_moe_debug_info",
)
"""Methods of `LegacyTapWorker`, reached by their own names."""

NORM_NAMES: Final = ("norm", "final_layernorm", "ln_f", "norm_f", "final_layer_norm", "embedding_norm", "final_norm")
"""What the owner of the decoder layers calls its final norm, over all model files of 0.32."""

NOT_TEXT: Final = ("visual", "vision", "image", "audio", "speech")


def require(owner: Any, name: str) -> Any:
    """Return an attribute of a vLLM object that `assumptions` lists, or refuse with its name.

    Raises:
        EngineUnsupportedError: This vLLM does not have it.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        kind = owner if inspect.isclass(owner) or inspect.ismodule(owner) else type(owner)
        raise EngineUnsupportedError(
            f"vLLM {vllm_version()} has no {kind.__module__}.{kind.__qualname__}.{name}, which is needed {why(name)}. "
            f"This package was made for vLLM {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}."
        ) from None


def require_fields(entries: Iterable[Assumption]) -> None:
    """Refuse where a class lacks fields that only its instances have: no step of the engine may fail for one.

    Raises:
        EngineUnsupportedError: The first that is missing.
    """
    for entry in entries:
        module, _, name = entry.owner.rpartition(".")
        kind: Any = getattr(import_module(module), name)
        declared = {field for base in kind.__mro__ for field in vars(base).get("__annotations__", ())}
        for field in entry.names:
            if field not in declared:
                require(kind, field)


def enabled() -> bool:
    """Tell whether the engine that is being configured gets taps."""
    return os.environ.get("VLLM_TAP", "1") != "0"


def vllm_version() -> str:
    """Return vLLM's version as it states it."""
    import vllm

    return str(vllm.__version__)


def check_version() -> None:
    """Refuse versions of vLLM from before the hook points that this module uses.

    Raises:
        EngineUnsupportedError: Too old.
    """
    release = tuple(int(part) for part in vllm_version().split("+")[0].split(".")[:2] if part.isdigit())
    if release and release < OLDEST:
        raise EngineUnsupportedError(f"vLLM {vllm_version()} is older than {OLDEST[0]}.{OLDEST[1]}: upgrade vLLM.")


# ---------------------------------------------------------------------------------------------------- every process


def install() -> None:
    """Hook into vLLM's classes, once per process.

    Raises:
        EngineUnsupportedError: vLLM does not look as expected; nothing has been changed.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    if hasattr(WorkerBase, "vllm_tap_open"):
        return
    check_version()
    create_config = require(EngineArgs, "create_engine_config")
    init_device = require(WorkerWrapperBase, "init_device")
    EngineArgs.create_engine_config = _keyed(create_config)
    WorkerWrapperBase.init_device = _watched(init_device)
    for name in RPC_METHODS:
        setattr(WorkerBase, f"vllm_tap_{name}", _rpc(name))
    for name in LEGACY_METHODS:
        if not hasattr(WorkerBase, name):
            setattr(WorkerBase, name, _rpc(name))


def _keyed(create_config: Callable[..., Any]) -> Callable[..., Any]:
    """Put a key into `additional_config`: it tells the workers to install taps.

    vLLM hashes it, so that a cached graph without taps is never served to an engine with them.
    """

    @functools.wraps(create_config)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        extra = self.additional_config
        if isinstance(extra, dict) and enabled():
            self.additional_config = {**extra, KEY: {"graph": GRAPH_VERSION, "version": __version__}}
        return create_config(self, *args, **kwargs)

    return create_engine_config


def _watched(init_device: Callable[..., Any]) -> Callable[..., Any]:
    """Install the taps after the weights are loaded and before anything is profiled, compiled or captured."""

    @functools.wraps(init_device)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = init_device(self, *args, **kwargs)
        worker, load_model = self.worker, self.worker.load_model

        @functools.wraps(load_model)
        def load_and_tap(*args: Any, **kwargs: Any) -> Any:
            loaded = load_model(*args, **kwargs)
            extra = worker.vllm_config.additional_config
            if isinstance(extra, dict) and KEY in extra:
                from vllm_tap.engine.legacy_calls import LegacyTapWorker

                worker.vllm_tap = LegacyTapWorker.install(worker)
            return loaded

        worker.load_model = load_and_tap
        return result

    return wrapper


def _rpc(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        tap_worker: TapWorker | None = getattr(self, "vllm_tap", None)
        if tap_worker is None:
            raise RuntimeError(f"{NO_TAPS}: it was made with VLLM_TAP=0 or with an additional_config that is no dict")
        return getattr(tap_worker, name)(*args)

    return method


# -------------------------------------------------------------------------------------------------------- the model


class Model(NamedTuple):
    """Where the taps go."""

    layers: dict[int, torch.nn.Module]
    num_layers: int
    final_norm: torch.nn.Module | None
    is_first_stage: bool
    is_last_stage: bool


def find_model(worker: Any) -> Model:
    """Find the decoder layers that this worker holds, by structure.

    Raises:
        EngineUnsupportedError: No decoder layers, or a configuration in which rows cannot be told apart.
    """
    runner = worker.model_runner
    _refuse_config(worker.vllm_config)
    model = require(runner, "get_model")()
    if hasattr(model, "get_language_model"):
        model = model.get_language_model()
    num_layers = int(getattr(runner.model_config.hf_text_config, "num_hidden_layers", 0))
    owner, layers = _decoder(model, num_layers)
    from vllm.distributed import get_pp_group

    group = get_pp_group()
    held = {index: layer for index, layer in enumerate(layers) if type(layer).__name__ != "PPMissingLayer"}
    norm = next((getattr(owner, name) for name in NORM_NAMES if isinstance(getattr(owner, name, None), _Module)), None)
    return Model(held, num_layers, norm, group.is_first_rank, group.is_last_rank)


_Module = torch.nn.Module


def _refuse_config(config: Any) -> None:
    parallel, cache, compilation = config.parallel_config, config.cache_config, config.compilation_config
    reasons = {
        "microbatching (enable_dbo) runs the model on slices of the batch": getattr(parallel, "enable_dbo", False)
        or getattr(parallel, "num_ubatches", 1) > 1,
        "prefill context parallelism splits the rows of a request over ranks": getattr(
            parallel, "prefill_context_parallel_size", 1
        )
        > 1,
        "kv_sharing_fast_prefill drops rows in the later layers": getattr(cache, "kv_sharing_fast_prefill", False),
        "the sequence parallelism pass (enable_sp) splits the rows between norms": bool(
            getattr(compilation.pass_config, "enable_sp", False)
        ),
        "sequence-parallel experts (enable_expert_parallel with tensor and data parallelism) split the rows of a step "
        "over ranks": getattr(parallel, "use_sequence_parallel_moe", False),
        "enable_adaptive_verification decides on the device which request a row belongs to": getattr(
            config.speculative_config, "enable_adaptive_verification", False
        ),
    }
    for reason, met in reasons.items():
        if met:
            raise EngineUnsupportedError(f"{reason}: turn it off to capture.")


def _decoder(model: torch.nn.Module, num_layers: int) -> tuple[torch.nn.Module, torch.nn.ModuleList]:
    """Find the list of decoder layers: its owner has start_layer and end_layer in all of vLLM's own model files."""
    plain = []
    for name, module in model.named_modules():
        for _, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == num_layers > 0:
                if hasattr(module, "start_layer") and hasattr(module, "end_layer"):
                    return module, child
                if not any(word in name for word in NOT_TEXT):
                    plain.append((name, module, child))
    if not plain:
        raise EngineUnsupportedError(
            f"{type(model).__name__} has no list of {num_layers} decoder layers: this model cannot be tapped."
        )
    # An encoder of text is the model only where nothing decodes, as in BERT.
    _, owner, layers = min(plain, key=lambda found: ("encoder" in found[0], len(found[0])))
    return owner, layers


def read_rank(worker: Any) -> Rank:
    """Return where this worker stands in the engine."""
    from vllm.distributed import get_pp_group, get_tp_group

    tp, pp = get_tp_group(), get_pp_group()
    return Rank(worker.rank, tp.rank_in_group, tp.world_size, pp.rank_in_group, pp.world_size)


def runs_in_step(worker: Any) -> bool:
    """Tell whether every forward pass of this worker has to meet one of other engines, as in data parallel ones."""
    return bool(getattr(worker.vllm_config.parallel_config, "data_parallel_size", 1) > 1)


# ------------------------------------------------------------------------------------------------------- the runner


class Recorder:
    """What a runner reports to; `TapWorker` implements it."""

    def scheduled(self, request_id: str) -> None:
        """A request, captured or not, is scheduled for the first time."""

    def meet(self, request_id: str, mark: Mark, prompt_len: int) -> None:
        """A captured request is scheduled for the first time."""

    def arm(self, batch: Batch) -> None:
        """The inputs of a forward pass are on the device."""

    def drain(self) -> None:
        """The forward pass has been launched."""

    def sampled(self) -> None:
        """The copy of the sampled tokens to the host has been queued."""

    def disarm(self) -> None:
        """A forward pass without requests is about to run."""


def runner_name(runner: Any) -> str:
    """Return "V1" or "V2"."""
    return "V2" if hasattr(runner, "prepare_inputs") else "V1"


def watch_runner(runner: Any, recorder: Recorder) -> None:
    """Let the recorder see every step of the runner, in the order meet, arm, forward, drain, sampled.

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
            recorder.disarm()
            return execute(scheduler_output, *args, **kwargs)
        for new in scheduler_output.scheduled_new_reqs:
            _meet(new, recorder)
        result = execute(scheduler_output, *args, **kwargs)
        recorder.drain()
        return result

    @functools.wraps(dummy_run)
    def _dummy_run(*args: Any, **kwargs: Any) -> Any:
        recorder.disarm()
        return dummy_run(*args, **kwargs)

    runner.execute_model, runner._dummy_run = execute_model, _dummy_run
    runner.sample_tokens = _after(sample, lambda _: recorder.sampled())


def _after(function: Callable[..., Any], then: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then(result)
        return result

    return wrapper


def _meet(new: Any, recorder: Recorder) -> None:
    recorder.scheduled(new.req_id)
    sampling = new.sampling_params
    pooling = getattr(new, "pooling_params", None)
    extra = sampling.extra_args if sampling is not None else getattr(pooling, "extra_kwargs", None)
    mark = read_mark(extra)
    if mark is not None:
        recorder.meet(new.req_id, mark, len(new.prompt_token_ids or ()))


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


# ------------------------------------------------------------------------------------------------ forward functions


def tap_outputs(owner: Any, then: Callable[[Any], None], method: str = "forward") -> None:
    """Call `then` with what a method returns, inside whatever graph it is compiled into."""
    function = require(owner, method)

    @functools.wraps(function)
    def tapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then(result)
        return result

    setattr(owner, method, tapped)


def tap_inputs(owner: Any, names: tuple[str, ...], then: Callable[..., None], method: str = "forward") -> None:
    """Call `then` with the named arguments of a method (None where absent) before it runs."""
    function = require(owner, method)
    places = [_place(function, name) for name in names]

    @functools.wraps(function)
    def tapped(*args: Any, **kwargs: Any) -> Any:
        then(*[_argument(args, kwargs, name, place) for name, place in zip(names, places, strict=True)])
        return function(*args, **kwargs)

    setattr(owner, method, tapped)


def _place(function: Callable[..., Any], name: str) -> int:
    parameters = list(inspect.signature(function).parameters)
    return parameters.index(name) if name in parameters else -1


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, place: int) -> Any:
    if name in kwargs:
        return kwargs[name]
    return args[place] if 0 <= place < len(args) else None


def graph_rows(worker: Any) -> int:
    """Return the most rows of a step that may run in a captured CUDA graph."""
    return int(getattr(worker.vllm_config.compilation_config, "max_cudagraph_capture_size", 0) or 0)


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
