"""Names of vLLM's inside that are taken for granted: `facts` asks here why, docs/vllm-support.md is rendered from here.

Runs in every process; imports nothing of vLLM.
"""

from __future__ import annotations

from typing import Final, NamedTuple

VERSIONS: Final = ("0.26.0", "0.32.0", "0.33.0")
"""Versions of vLLM whose source was read; `support` finds each name below in it."""

REFUSED: Final = "capturing is refused by this name; generation goes on"
CONFIG: Final = "taken as off"


class Assumption(NamedTuple):
    """Names of one class or module of vLLM.

    Attributes:
        owner: Module or class that defines them, by its whole path.
        names: Attributes, methods, functions or classes.
        why: What they are needed for: "it is needed ...".
        absent: What happens in a version without them.
        versions: Those that have them.
    """

    owner: str
    names: tuple[str, ...]
    why: str
    absent: str = REFUSED
    versions: tuple[str, ...] = VERSIONS


class Part(NamedTuple):
    """Assumptions that one part of the work rests on."""

    title: str
    assumptions: tuple[Assumption, ...]


_RUNNERS: Final = "vllm.v1.worker.gpu_model_runner.GPUModelRunner", "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
_ROUTERS: Final = "vllm.model_executor.layers.fused_moe.router"
_UNLOADED: Final = "the plugin changes nothing; capturing is refused, generation goes on"
_FAILS: Final = "engines do not start while the plugin is loaded"
_KEY: Final = "to key the compile cache: a cached graph without taps must never be served"
_NO_CLIENT: Final = "a call to capture raises; plain generation goes on"
_NO_ROWS: Final = "there, ids and weights are refused because no forward pass brought any"
_ASIDE: Final = "to let taps of experts run beside the model in CUDA graphs, where nothing overwrites what they read"
_IN_LINE: Final = "the model waits for them"
_SETTINGS: Final = ("top_k", "renormalize", "scoring_func")
_NOT_READ: Final = '`Capture.routing` says "unknown" and the reason'


def _of_both(names: str, why: str, absent: str = REFUSED) -> tuple[Assumption, ...]:
    """Return an assumption of the V1 and the V2 runner."""
    return tuple(Assumption(runner, tuple(names.split()), why, absent) for runner in _RUNNERS)


V1_ROWS: Final = (
    Assumption(
        _RUNNERS[0], ("input_batch", "query_start_loc", "positions", "input_ids"), "to label the rows of a step"
    ),
    Assumption(
        "vllm.v1.worker.gpu_input_batch.InputBatch", ("num_reqs", "req_ids", "num_computed_tokens_cpu"),
        "to label the rows of a step",
    ),
)  # fmt: skip
"""Attributes of the V1 runner and of its batch, which are there when a model has been loaded."""

V2_ROWS: Final = Assumption(
    "vllm.v1.worker.gpu.input_batch.InputBatch",
    ("req_ids", "query_start_loc_np", "num_computed_tokens_np", "positions", "input_ids"),
    "to label the rows of a step",
)

REQUESTS: Final = (
    Assumption(
        "vllm.v1.core.sched.output.SchedulerOutput",
        ("scheduled_new_reqs", "finished_req_ids", "total_num_scheduled_tokens"),
        "to meet captured requests and let go of them, and to see that the engine has nothing more to compute",
    ),
    Assumption(
        "vllm.v1.core.sched.output.NewRequestData",
        ("req_id", "prompt_token_ids", "sampling_params", "pooling_params"), "to meet captured requests",
    ),
    Assumption(
        "vllm.sampling_params.SamplingParams", ("extra_args", "max_tokens", "skip_reading_prefix_cache"),
        "to mark captured requests, and to have all their rows computed",
    ),
    Assumption(
        "vllm.pooling_params.PoolingParams", ("extra_kwargs", "skip_reading_prefix_cache"),
        "to mark captured requests, and to have all their rows computed",
    ),
)  # fmt: skip

PARTS: Final = (
    Part(
        "Every process",
        (
            Assumption("vllm", ("__version__",), "to name the version", _UNLOADED),
            Assumption("vllm.engine.arg_utils.EngineArgs", ("create_engine_config",), _KEY, _UNLOADED),
            Assumption("vllm.engine.arg_utils.EngineArgs", ("additional_config",), _KEY, _FAILS),
            Assumption(
                "vllm.v1.worker.worker_base.WorkerWrapperBase", ("init_device",), "to find the model when it is loaded",
                _UNLOADED,
            ),
            Assumption(
                "vllm.v1.worker.worker_base.WorkerWrapperBase", ("worker",), "to find the model when it is loaded",
                _FAILS,
            ),
            Assumption(
                "vllm.v1.worker.worker_base.WorkerBase", ("load_model", "rank"),
                "to put taps in after the weights are loaded and before anything is compiled", _FAILS,
            ),
            Assumption(
                "vllm.v1.worker.worker_base.WorkerBase", ("device", "vllm_config", "model_runner"), "to find the model",
            ),
        ),
    ),
    Part(
        "The model",
        (
            *_of_both("get_model model_config", "to find the model"),
            Assumption(
                "vllm.model_executor.models.interfaces.SupportsMultiModal", ("get_language_model",),
                "to find the decoder of a model that takes more than text", "the whole model is searched",
            ),
            Assumption(
                "vllm.config.model.ModelConfig", ("hf_text_config",), "to know the number of decoder layers",
            ),
            Assumption(
                "vllm.model_executor.models.utils", ("PPMissingLayer",),
                "to tell layers of other pipeline stages", "all layers of all stages are tapped, and captures fail",
            ),
            Assumption(
                "vllm.distributed.parallel_state", ("get_pp_group", "get_tp_group"), "to know the ranks",
            ),
            Assumption(
                "vllm.distributed.parallel_state.GroupCoordinator",
                ("rank_in_group", "world_size", "is_first_rank", "is_last_rank"), "to know the ranks",
            ),
            Assumption(
                "vllm.model_executor.layers.attention_layer_base.AttentionLayerBase", ("get_kv_cache_spec",),
                "to tell decoder layers, which keep something of the tokens before, from other lists",
                "the list of as many layers as the configuration says is taken, or capturing is refused",
            ),
            Assumption(
                "vllm.model_executor.models.llama.LlamaModel", ("start_layer", "end_layer"),
                "to choose between lists of layers", "the one with most weights is taken",
            ),
            Assumption("torch.nn.Module", ("forward",), "to tap what decoder layers and the final norm return"),
            Assumption(
                "vllm.model_executor.layers.linear.LinearBase", ("quant_method",),
                "to find blocks with matrices where these are kept elsewhere", "`mlp_output` is refused",
            ),
            Assumption(
                "vllm.model_executor.models.granite.GraniteDecoderLayer", ("residual_multiplier",),
                "to capture what blocks add behind the layer's scale", "it does not add up, and is refused",
            ),
            Assumption(
                "vllm.config.compilation.PassConfig", ("fuse_allreduce_rms",),
                "to put no tap between what the compiler makes one kernel of", "that stays two kernels",
            ),
        ),
    ),
    Part(
        "Settings under which rows cannot be told apart",
        (
            Assumption(
                "vllm.config.parallel.ParallelConfig",
                ("enable_dbo", "num_ubatches", "prefill_context_parallel_size", "use_sequence_parallel_moe"),
                "to refuse slices of the batch and split requests", CONFIG,
            ),
            Assumption(
                "vllm.config.parallel.ParallelConfig", ("data_parallel_size",),
                "to leave forward passes to requests where engines run in step", "taken as one",
            ),
            Assumption(
                "vllm.config.cache.CacheConfig", ("kv_sharing_fast_prefill",), "to refuse layers that see fewer rows",
                CONFIG,
            ),
            Assumption(
                "vllm.config.compilation.PassConfig", ("enable_sp",), "to refuse rows split between norms", CONFIG,
                ("0.26.0",),
            ),
            Assumption(
                "vllm.config.compilation.CompilationConfig", ("pass_config",), "to refuse rows split between norms",
            ),
            Assumption(
                "vllm.config.speculative.SpeculativeConfig", ("enable_adaptive_verification",),
                "to refuse drafts whose place in the batch the device alone knows", CONFIG, ("0.32.0", "0.33.0"),
            ),
            Assumption(
                "vllm.config.speculative.SpeculativeConfig", ("num_speculative_tokens",),
                "to make CUDA graphs for the next step while the device is busy", "some are made in a step",
            ),
            Assumption(
                "vllm.config.compilation.CompilationConfig", ("max_cudagraph_capture_size",),
                "to know which steps run in CUDA graphs", "no step is taken to",
            ),
            Assumption(
                "vllm.v1.worker.gpu_worker.Worker", ("peak_activation_memory",),
                "to leave the engine's steps the memory that they may take", "staging may take all that is free",
            ),
        ),
    ),
    Part(
        "A step",
        (
            *_of_both("execute_model", "to see the steps"),
            *_of_both("_dummy_run", "to tell dummy runs from real ones"),
            *_of_both("sample_tokens", "to see when the tokens of a step are on their way"),
            *_of_both("capture_model", "to switch taps in CUDA graphs"),
            *_of_both("max_num_tokens", "to know how many rows a step can have"),
            Assumption(_RUNNERS[0], ("_prepare_inputs",), "to see the rows of a step"),
            *V1_ROWS,
            Assumption(
                "vllm.v1.utils.CpuGpuBuffer", ("np", "gpu"), "to label the rows of a step",
                "captures fail, and requests with them",
            ),
            Assumption(
                _RUNNERS[1], ("prepare_inputs",),
                "to see the rows of a step, and to tell the V2 runner from the V1 runner", "the runner is taken for V1",
            ),
            V2_ROWS,
        ),
    ),
    Part(
        "Requests",
        (
            *REQUESTS,
            Assumption(
                "vllm.v1.core.kv_cache_manager.KVCacheManager", ("get_computed_blocks", "coordinator"),
                "to let captured requests read the prefix cache up to their first wanted position",
                "requests whose first wanted position comes before the last one of the prompt skip the cache",
            ),
            Assumption(
                "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator", ("find_longest_cache_hit",),
                "to let captured requests read the prefix cache up to their first wanted position",
                "requests whose first wanted position comes before the last one of the prompt skip the cache",
            ),
            Assumption(
                "vllm.v1.engine.parallel_sampling.ParentRequest", ("get_child_info",),
                "to tell completions of one prompt apart: their requests are named `{index}_{parent}`",
                "captures with n > 1 fail, rows missing",
            ),
            Assumption(
                "vllm.v1.engine.input_processor.InputProcessor", ("assign_request_id",),
                "to tell which request an output names: inside it is `{name}-{random}`", "captures fail, rows missing",
            ),
        ),
    ),
    Part(
        "The user's process",
        (
            Assumption(
                "vllm.entrypoints.llm.LLM",
                ("collective_rpc", "enqueue", "wait_for_completion", "llm_engine", "model_config"),
                "to call the workers and to generate", _NO_CLIENT,
            ),
            Assumption(
                "vllm.entrypoints.llm.LLM", ("enqueue_chat",), "to capture conversations",
                "conversations are refused: pass their token ids",
            ),
            Assumption(
                "vllm.renderers.base.BaseRenderer", ("render_chat_async", "default_chat_tok_params"),
                "to capture conversations from an `AsyncLLM`", "`AsyncTap` refuses conversations: pass their token ids",
            ),
            Assumption(
                "vllm.entrypoints.llm.LLM", ("get_default_sampling_params",),
                "to sample as the model's generation_config.json says", "captures without sampling_params fail",
            ),
            Assumption(
                "vllm.entrypoints.pooling.offline.PoolingOfflineMixin", ("supported_tasks", "pooling_task"),
                "to find the task of a model that pools", "the first task that the engine has is taken",
            ),
            Assumption(
                "vllm.entrypoints.pooling.offline.PoolingOfflineMixin", ("encode",), "to embed",
                "captures of embedding models fail",
            ),
            Assumption(
                "vllm.config.model.ModelConfig", ("runner_type",), "to tell whether an engine embeds",
                "engines are taken to generate",
            ),
            Assumption(
                "vllm.config.model.ModelConfig", ("is_encoder_decoder",),
                "to send no prompt without an encoder's input", "encoder-decoders may compute NaN after it",
            ),
            Assumption(
                "vllm.config.model.ModelConfig", ("max_model_len",), "to send a prompt that fits",
                "engines whose first rows tell nothing cannot be captured from",
            ),
            Assumption(
                "vllm.sampling_params.SamplingParams", ("skip_clone",),
                "to have parameters that are copied already taken as they are", "vLLM copies them once more",
            ),
            Assumption(
                "vllm.config.model.ModelConfig", ("get_num_experts",),
                "to refuse a model whose experts were not found", "router logits of the former interface fail",
            ),
            Assumption(
                "vllm.outputs.EmbeddingRequestOutput", ("from_base",), "to return what `LLM.embed` returns",
                "the embedding functions of the former interface fail",
            ),
            Assumption(
                "vllm.config.model.ModelConfig", ("get_vocab_size", "skip_tokenizer_init"),
                "to choose tokens of prompts", "`vllm-tap verify` fails",
            ),
            Assumption(
                "vllm.v1.engine.llm_engine.LLMEngine",
                ("engine_core", "output_processor", "abort_request", "vllm_config"),
                "to abort what an interrupted call leaves behind, and to see an engine die", _NO_CLIENT,
            ),
            Assumption(
                "vllm.v1.engine.llm_engine.LLMEngine", ("step", "add_request"),
                "to keep what is finished when `vllm-tap capture` is interrupted", "`vllm-tap capture` fails",
            ),
            Assumption(
                "vllm.v1.engine.output_processor.RequestState", ("prompt_len", "max_tokens_param"),
                "to say how many rows will come", "a capture with a progress bar fails",
            ),
            Assumption(
                "vllm.v1.engine.detokenizer.IncrementalDetokenizer", ("output_token_ids",),
                "to say how many rows will come", "a capture with a progress bar fails",
            ),
            Assumption(
                "vllm.v1.engine.core_client.EngineCoreClient", ("add_request", "get_output"),
                "to let the first step begin before more requests come, and to end a capture with the last output",
                _NO_CLIENT,
            ),
            Assumption(
                "vllm.v1.engine.core_client.EngineCoreClient", ("shutdown",),
                "to end an engine before its object goes", "`vllm_tap.shutdown` fails",
            ),
            Assumption(
                "vllm.config.scheduler.SchedulerConfig", ("max_num_batched_tokens",),
                "to let the first step begin before more requests come", _NO_CLIENT,
            ),
            Assumption(
                "vllm.config.parallel.ParallelConfig", ("distributed_executor_backend",),
                "to let the first step begin before more requests come", _NO_CLIENT,
            ),
            Assumption(
                "vllm.v1.engine.EngineCoreOutput", ("request_id", "finished"), "to end a capture with the last output",
                _NO_CLIENT,
            ),
            Assumption(
                "vllm.v1.engine.EngineCoreOutputs", ("outputs",), "to end a capture with the last output", _NO_CLIENT,
            ),
            Assumption(
                "vllm.v1.engine.output_processor.OutputProcessor", ("request_states",),
                "to abort what an interrupted call leaves behind", _NO_CLIENT,
            ),
            Assumption(
                "vllm.v1.engine.output_processor.RequestState", ("prompt_token_ids", "detokenizer"),
                "to read tokens while the engine computes", _NO_CLIENT,
            ),
            Assumption(
                "vllm.v1.engine.core_client.BackgroundResources", ("engine_dead",), "to see an engine die",
                "a call to a dead engine waits forever",
            ),
            Assumption(
                "vllm.v1.engine.core_client.MPClient", ("resources",), "to see an engine die",
                "a capture on an engine that dies waits forever",
            ),
            Assumption(
                "vllm.v1.engine.core_client.SyncMPClient", ("outputs_queue",), "to see an engine die",
                "a capture on an engine that dies waits forever",
            ),
            Assumption(
                "vllm.v1.engine.core_client.MPClient", ("utility_results",), "to end a call to an engine that dies",
                "it waits forever",
            ),
            Assumption(
                "vllm.v1.engine.core_client.MPClient", ("core_engines",),
                "to know how many data parallel engines an `AsyncLLM` has", "captures from several fail, rows missing",
            ),
            Assumption(
                "vllm.v1.engine.core_client.AsyncMPClient", ("_call_utility_async",),
                "to call the workers of each of several data parallel engines", "captures from several fail",
            ),
        ),
    ),
    Part(
        "Experts",
        (
            Assumption(
                "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner", ("_maybe_dispatch", "moe_config"),
                "to tap the router logits: every model's pass here once, before any rank gets others' rows",
                "layers are taken to have no experts",
            ),
            Assumption(
                "vllm.model_executor.layers.fused_moe.config.FusedMoEConfig", ("num_experts",),
                "to tap the router logits",
            ),
            Assumption(
                "vllm.model_executor.layers.fused_moe.config.FusedMoEConfig", ("num_logical_experts",),
                "to tell experts from their replicas", "router logits are refused where there are replicas",
            ),
            Assumption(
                "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner",
                ("do_naive_dispatch_combine", "_fse_fuse_gate"),
                "to refuse rows of other ranks, and to leave out columns of shared experts", CONFIG,
            ),
            Assumption(
                "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner", ("router", "routed_experts"),
                "to tap the experts that are chosen", "ids and weights of experts are refused",
            ),
            Assumption(
                "vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts", ("quant_method",),
                "to know where a kernel chooses by itself", _NO_ROWS,
            ),
            Assumption(
                f"{_ROUTERS}.fused_moe_router.FusedMoERouter", ("select_experts",),
                "to tap the experts that are chosen", "ids and weights of experts are refused",
            ),
            Assumption(
                "vllm.model_executor.layers.fused_moe.fused_moe_method_base.FusedMoEMethodBase", ("is_monolithic",),
                "to know where a kernel chooses by itself, and refuse ids and weights with that reason",
                _NO_ROWS,
            ),
            Assumption(
                "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner", ("gate",), _ASIDE, _IN_LINE,
            ),
            Assumption(
                "vllm.model_executor.layers.fused_moe.fused_moe_method_base.FusedMoEMethodBase", ("moe_kernel",),
                _ASIDE, _IN_LINE,
            ),
            Assumption(
                "vllm.model_executor.layers.fused_moe.modular_kernel.FusedMoEKernel", ("fused_experts",), _ASIDE,
                _IN_LINE,
            ),
        ),
    ),
    Part(
        "How routers choose",
        (
            Assumption(f"{_ROUTERS}.base_router.BaseRouter", _SETTINGS[:1], "to say how a router chooses", _NOT_READ),
            Assumption(
                f"{_ROUTERS}.fused_topk_router.FusedTopKRouter", _SETTINGS[1:], "to say how a router chooses", _NOT_READ
            ),
            Assumption(
                f"{_ROUTERS}.fused_topk_bias_router.FusedTopKBiasRouter",
                (*_SETTINGS[1:], "e_score_correction_bias", "routed_scaling_factor", "_hash_indices_table",
                 "num_fused_shared_experts"),
                "to say how a router chooses", _NOT_READ,
            ),
            Assumption(
                f"{_ROUTERS}.grouped_topk_router.GroupedTopKRouter",
                (*_SETTINGS[1:], "num_expert_group", "topk_group", "e_score_correction_bias", "routed_scaling_factor",
                 "num_fused_shared_experts"),
                "to say how a router chooses", _NOT_READ,
            ),
            Assumption(
                f"{_ROUTERS}.cpu_router.CPURouter",
                (*_SETTINGS[1:], "use_grouped_topk", "num_expert_group", "topk_group", "e_score_correction_bias",
                 "routed_scaling_factor", "custom_routing_function", "_hash_indices_table"),
                "to say how a router chooses", _NOT_READ, ("0.32.0", "0.33.0"),
            ),
            Assumption(
                f"{_ROUTERS}.fused_moe_router.FusedMoERouter", ("eplb_state",),
                "to say nothing where load balancing changes the ids", "the ids themselves tell",
            ),
            Assumption(
                f"{_ROUTERS}.fused_moe_router.FusedMoERouter", ("bias_vl",),
                "to say nothing where image tokens are routed by another bias", "taken as none", ("0.32.0", "0.33.0"),
            ),
            Assumption(
                "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner", ("routed_scaling_factor",),
                "to say what the experts' output is multiplied by", "taken as 1",
            ),
        ),
    ),
)  # fmt: skip

_WHY: Final = {name: entry.why for part in PARTS for entry in part.assumptions for name in entry.names}


def why(name: str) -> str:
    """Return what an attribute of vLLM is needed for."""
    return _WHY[name]
