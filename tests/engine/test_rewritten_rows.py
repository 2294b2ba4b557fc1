"""Positions that go through the model more than once: drafts that are rejected, requests that are preempted.

Runs in the test process, beside one eager Llama engine with speculative decoding and too few blocks of key-value cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.engines import TRANSPORTS, Engine, References, compare, prompts
from vllm_tap import Positions, Spec, Tap

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

EVERY_THIRD = Positions.prompt(-9, -2) | Positions.generated(1, None, 3)

STREAMS = {"hidden_states": "all", "embeddings": True, "final_hidden_states": True}


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """An engine that drafts three tokens a step, and whose 20 blocks hold 640 tokens."""
    engine = Engine(
        tiny_model("llama"),
        enforce_eager=True,
        listens=True,
        disable_log_stats=False,
        block_size=32,
        num_gpu_blocks_override=20,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        },
    )
    yield engine
    engine.close()


@pytest.fixture
def known(references: Callable[[str], References]) -> References:
    """Hugging Face's forward passes of the engine's model."""
    return references("llama")


def every_third(prompt_len: int, num_rows: int) -> list[int]:
    """Positions of `EVERY_THIRD`, by Python's own slices."""
    everything = list(range(num_rows))
    return everything[:prompt_len][-9:-2] + everything[prompt_len:][1::3]


def count(engine: Engine, name: str) -> int:
    """Return one of vLLM's own counters."""
    return next(metric.value for metric in engine.llm.get_metrics() if metric.name == f"vllm:{name}")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_of_rejected_drafts_are_not_kept(engine, known, transport):
    """A position whose draft was rejected has the row of the token that came to stand there."""
    names = ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
    drafted, accepted = (count(engine, name) for name in names)
    repeating = [{"prompt_token_ids": prompt["prompt_token_ids"] * 4} for prompt in prompts([6] * 4)]
    result = engine.capture(repeating, Spec(**STREAMS), max_tokens=40, transport=transport)
    compare(result, known)
    drafted, accepted = (count(engine, name) - was for name, was in zip(names, (drafted, accepted), strict=True))
    assert drafted > accepted > 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_of_preempted_requests_are_complete(engine, known, transport):
    """Requests that lost their cache and were computed again have each row once, and right."""
    before = count(engine, "num_preemptions")
    result = engine.capture(prompts([60] * 12), Spec(**STREAMS), max_tokens=60, transport=transport)
    compare(result, known)
    assert count(engine, "num_preemptions") > before


@pytest.mark.parametrize("lengths", [[24] * 4, [60] * 12], ids=["drafts", "preemption"])
def test_positions_that_are_chosen_are_found_among_what_was_rewritten(engine, known, lengths):
    """The host counts drafts that may be rejected, and a request that begins again has other steps."""
    spec = Spec(hidden_states=[1, 3], positions=EVERY_THIRD)
    names = "num_preemptions", "spec_decode_num_draft_tokens"
    before = [count(engine, name) for name in names]
    unit = [{"prompt_token_ids": (prompt["prompt_token_ids"][:6] * 10)[: lengths[0]]} for prompt in prompts(lengths)]
    result = engine.capture(unit, spec, max_tokens=60)
    compare(result, known, every_third)
    preempted, drafted = (count(engine, name) - was for name, was in zip(names, before, strict=True))
    assert drafted > 0
    assert preempted > 0 or len(lengths) < 12
    means = {n: sample.hidden_states[3].mean(0) for n, sample in enumerate(result)}
    reduced = Spec(hidden_states=[3], positions=EVERY_THIRD, reduce="mean")
    for sample in Tap(engine.llm).stream(unit, reduced, max_tokens=60, temperature=0.0, ignore_eos=True):
        torch.testing.assert_close(sample.hidden_states[3][0], means[sample.index], rtol=1e-3, atol=1e-4)
