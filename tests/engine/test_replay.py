"""Replay records against vLLM's own routed experts, and against what its routers returned, bit for bit.

vLLM has its own with the V2 runner alone: the whole of it runs in Triton's interpreter, in a process beside the tests.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.engines import FULL_MATRIX
from runners import v2_environment

pytestmark = pytest.mark.engine

PROGRAM = """
import sys
from pathlib import Path

import numpy as np
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from engine.engines import Engine, greedy, prompts
from vllm_tap import Positions, Spec
from vllm_tap.interchange import envelopes, replay

LAYERS = int(sys.argv[2])
returned = []
select = BaseRouter._select_experts


def remembered(router, *args, **fields):
    weights, ids = select(router, *args, **fields)
    returned.extend(row.tobytes() for row in np.ascontiguousarray(weights.float().numpy()))
    return weights, ids


def compare(result, at=None):
    # All of a record, or its rows from a position on, against what vLLM itself returns.
    for index, (sample, output) in enumerate(zip(result, result.outputs, strict=True)):
        record = replay(sample) if at is None else replay(sample, start=at)
        theirs = output.outputs[0].routed_experts
        begin = record.start if len(theirs) > len(record.ids) else 0
        ours = envelopes.vllm(record)
        assert ours.dtype == theirs.dtype, (ours.dtype, theirs.dtype)
        assert ours.shape == theirs[begin:].shape, (ours.shape, theirs.shape, begin)
        assert ours.tobytes() == np.ascontiguousarray(theirs[begin:]).tobytes(), index
        assert len(record.expert_layers) == LAYERS
        yield record


BaseRouter._select_experts = remembered
engine = Engine(Path(sys.argv[1]), enforce_eager=True, block_size=32, enable_return_routed_experts=True)
spec = Spec(routed_experts="all")
# Prompts in chunks of 64 tokens, several in a step.
given = prompts([3, 150, 70, 17])
result = engine.capture(given, spec)
seen = set(returned)
for record in compare(result):
    for layer in record.expert_layers:
        assert {row.tobytes() for row in record.weights[:, layer]} <= seen
# Another time, when vLLM reads prompts from the prefix cache and their experts from its own store.
plain = engine.llm.generate(given, greedy(), use_tqdm=False)
assert max(output.num_cached_tokens for output in plain) >= 64
for record, output in zip(compare(engine.capture(given, spec)), plain, strict=True):
    assert envelopes.vllm(record).tobytes() == output.outputs[0].routed_experts.tobytes()
# The second turn of a conversation: the first one is in the cache, and its rows are in the record of that turn.
first = result.outputs[1]
turn = [*first.prompt_token_ids, *first.outputs[0].token_ids, 7, 8, 9]
start = len(result[1])
later = Spec(routed_experts="all", positions=Positions.prompt(start) | Positions.generated())
second = engine.capture([{"prompt_token_ids": turn}], later)
assert second.outputs[0].num_cached_tokens >= 128, second.outputs[0].num_cached_tokens
(record,) = compare(second, start)
whole = np.concatenate([replay(result[1]).ids, record.ids])
assert envelopes.vllm(replay(engine.capture([{"prompt_token_ids": turn}], spec)[0])).tobytes() == whole.tobytes()
# A Spec for each prompt: those with experts have records beside those with other rows.
mixed = engine.capture(given, [spec, Spec(hidden_states=[1]), spec, Spec(hidden_states=[0], routed_experts="all")])
for index in (0, 2, 3):
    assert replay(mixed[index]).ids.tobytes() == replay(result[index]).ids.tobytes()
engine.close()
"""


@pytest.mark.parametrize(("family", "num_layers"), [("glm4_moe", 3), *([("qwen3_moe", 4)] if FULL_MATRIX else [])])
def test_ids_are_those_that_vllm_returns(tiny_model: Callable[..., Path], tmp_path: Path, family, num_layers):
    """Over all decoder layers, the first of which is dense; with the prefix cache, over two turns, per request.

    Weights are the bits that the routers returned.
    """
    log = tmp_path / "log"
    environment = v2_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", PROGRAM, str(tiny_model(family)), str(num_layers)]
    done = subprocess.run(command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, log.read_text()
