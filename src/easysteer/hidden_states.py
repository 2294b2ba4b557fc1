"""`easysteer.hidden_states` over vllm-tap, for code written against it; the user's process. See `vllm_tap.legacy`.

A module in a folder without `__init__.py`: a real `easysteer` package is found first wherever it is installed, and its
`hidden_states` package goes before this file even in the same folder.
"""

from vllm_tap.legacy.capture_result import CaptureResult, capture
from vllm_tap.legacy.experts import analyze_expert_usage
from vllm_tap.legacy.hidden_states import (
    HiddenStatesCaptureGenerate,
    HiddenStatesCaptureV1,
    MoERouterLogitsCaptureGenerate,
    MoERouterLogitsCaptureV1,
    get_all_hidden_states,
    get_all_hidden_states_generate,
    get_moe_router_logits,
    get_moe_router_logits_generate,
)

__all__ = [
    "CaptureResult",
    "HiddenStatesCaptureGenerate",
    "HiddenStatesCaptureV1",
    "MoERouterLogitsCaptureGenerate",
    "MoERouterLogitsCaptureV1",
    "analyze_expert_usage",
    "capture",
    "get_all_hidden_states",
    "get_all_hidden_states_generate",
    "get_moe_router_logits",
    "get_moe_router_logits_generate",
]
