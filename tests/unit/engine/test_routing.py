"""What is said of routers, without an engine: vLLM's own router for processors, and ones that say something wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from routing import follow, in_order
from vllm_tap.engine.model.residual import NO_ROWS
from vllm_tap.engine.model.routing import confirm
from vllm_tap.frame.routing import UNKNOWN, Routing, summary
from vllm_tap.vllm.experts import Experts, read_routing

NUM_EXPERTS = 16
LOGITS = torch.randn(64, NUM_EXPERTS, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(NUM_EXPERTS, generator=torch.Generator().manual_seed(2)) * 0.2

SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {"renormalize": False},
    "softmax, renormalized": {},
    "bias and factor that it leaves out": {"e_score_correction_bias": BIAS, "routed_scaling_factor": 2.5},
    "groups": {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2},
    "groups, bias, factor": {
        "use_grouped_topk": True,
        "num_expert_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "e_score_correction_bias": BIAS,
        "routed_scaling_factor": 2.5,
    },
    "one group with a bias": {
        "use_grouped_topk": True,
        "num_expert_group": 1,
        "topk_group": 1,
        "renormalize": False,
        "scoring_func": "sigmoid",
        "e_score_correction_bias": BIAS,
    },
}


def experts(router: Any) -> Experts:
    """Return experts with this router and nothing else."""
    return Experts(SimpleNamespace(routed_scaling_factor=1.0), router, NUM_EXPERTS, NUM_EXPERTS, False, "")


def router_of(**settings: Any) -> Any:
    """Return vLLM's router for processors; versions before 0.32 have none."""
    module = pytest.importorskip("vllm.model_executor.layers.fused_moe.router.cpu_router")
    return module.CPURouter(top_k=4, global_num_experts=NUM_EXPERTS, **settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_experts_follow_from_what_is_stated(settings: dict[str, Any]) -> None:
    """The router's own choice is confirmed; ids are exactly, weights to rounding, what follows from the statement."""
    router = router_of(**settings)
    weights, ids = router.select_experts(torch.zeros(len(LOGITS), 8), LOGITS)
    routing = confirm(read_routing(experts(router)), LOGITS, ids, weights)
    assert routing.checked
    found_ids, found_weights = in_order(ids, weights)
    expected_ids, expected_weights = follow(routing, LOGITS)
    assert torch.equal(found_ids, expected_ids)
    # Both in float32, with the exponentials divided by another sum: a few roundings (6e-8) of a weight below 2.5.
    torch.testing.assert_close(found_weights, expected_weights, rtol=0, atol=1e-6)


STATED = Routing(
    scoring="sigmoid", num_chosen=4, renormalized=True, bias=tuple(BIAS.tolist()), num_groups=4, num_chosen_groups=2,
    scale=2.5,
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"scoring": "softmax"},
        {"scoring": "sqrtsoftplus"},
        {"renormalized": False},
        {"bias": ()},
        {"bias": tuple((-BIAS).tolist())},
        {"num_groups": 1, "num_chosen_groups": 1},
        {"num_chosen_groups": 1},
        {"num_groups": 8},
        {"scale": 1.0},
    ],
    ids=str,
)
def test_a_wrong_statement_becomes_unknown(change: dict[str, Any]) -> None:
    """Whatever a router would state wrongly, nothing is said instead."""
    ids, weights = follow(STATED, LOGITS)
    assert confirm(STATED, LOGITS, ids, weights).checked
    found = confirm(msgspec.structs.replace(STATED, **change), LOGITS, ids, weights)
    assert found.scoring == UNKNOWN
    assert "do not follow from the logits" in found.reason


@pytest.mark.parametrize(
    "change",
    [
        {"bias": (0.0,) * 5},
        {"num_groups": 3},
        {"num_groups": 16},
        {"num_chosen_groups": 5},
        {"scoring": "tanh"},
        {"num_chosen": 5},
    ],
    ids=str,
)
def test_a_statement_without_a_meaning_becomes_unknown(change: dict[str, Any]) -> None:
    """Settings that do not fit the rows are no error and no statement."""
    found = confirm(msgspec.structs.replace(STATED, **change), LOGITS, *follow(STATED, LOGITS))
    assert found.scoring == UNKNOWN
    assert "fit" in found.reason


def test_scores_rounded_to_bfloat16_are_confirmed() -> None:
    """Routers that score in bfloat16, and so choose differently among near equals, are not taken for others."""
    rounded = torch.logit(LOGITS.sigmoid().bfloat16().float())
    assert not torch.equal(follow(STATED, rounded)[1], follow(STATED, LOGITS)[1])
    assert confirm(STATED, LOGITS, *follow(STATED, rounded)).checked


def test_ids_that_cannot_be_become_unknown() -> None:
    """Padding marked by -1, an expert twice, numbers of replicas: no statement."""
    ids, weights = follow(STATED, LOGITS)
    for wrong in (ids.clone().fill_(-1), ids[:, :1].expand(-1, 4), ids + NUM_EXPERTS):
        assert confirm(STATED, LOGITS, wrong, weights).scoring == UNKNOWN


def test_rows_without_values_say_nothing_yet() -> None:
    """Equal logits for all experts, as padding has them, neither confirm nor refute; other rows beside them do."""
    zeros = torch.zeros_like(LOGITS)
    ids, weights = follow(STATED, zeros)
    assert confirm(STATED, zeros, ids, weights).reason == NO_ROWS
    mixed = torch.cat([zeros, LOGITS])
    assert confirm(STATED, mixed, *follow(STATED, mixed)).checked


class CPURouter(SimpleNamespace):
    """Something that vLLM might call so one day."""


class OtherRouter(SimpleNamespace):
    """A router of a name that is not known."""


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (OtherRouter(scoring_func="softmax", top_k=2, renormalize=True), "OtherRouter is not a router"),
        (CPURouter(scoring_func="softmax", top_k=2), "no attribute 'renormalize'"),
        (CPURouter(custom_routing_function=print), "a function of the model chooses"),
        (CPURouter(_hash_indices_table=torch.zeros(4)), "looked up by token id"),
        (CPURouter(bias_vl=torch.zeros(4)), "image tokens"),
        (CPURouter(eplb_state=object()), "replicas"),
        (CPURouter(num_fused_shared_experts=1), "shared experts"),
        (None, "NoneType is not a router"),
    ],
)
def test_a_router_that_does_not_state_it_is_unknown(router: Any, reason: str) -> None:
    """Missing attributes, other classes and other ways of choosing give a reason, not an error."""
    found = read_routing(experts(router))
    assert found.scoring == UNKNOWN
    assert reason in found.reason
    assert str(found) == f"unknown: {found.reason}"


def test_statements_in_words() -> None:
    """One line says all of it; layers are named only where they differ."""
    text = (
        "sigmoid, plus a bias to choose by, the 2 highest of 4 groups, by their two highest experts, "
        "the 4 highest experts, scores of the chosen over their sum, times 2.5"
    )
    checked = msgspec.structs.replace(STATED, checked=True)
    assert str(checked) == repr(checked) == text
    assert str(STATED) == f"{text} (as vLLM's router states it; no rows have confirmed it)"
    plain = Routing(scoring="softmax", num_chosen=2, output_scale=3.0, checked=True)
    assert str(plain) == "softmax, the 2 highest experts, scores of the chosen; what the experts return, times 3"
    assert summary({1: checked, 0: checked}) == text
    assert summary({3: plain, 1: checked, 0: checked}) == f"layers 0 to 1: {text}; layers 3 to 3: {plain}"
