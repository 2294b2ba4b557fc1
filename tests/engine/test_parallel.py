"""Captures from engines of two ranks: tensor parallel and pipeline parallel, against Hugging Face.

Runs in the test process, beside one engine at a time. Its two workers have a core each.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine.engines import DENSE, TRANSPORTS, Engine, References, compare, prompts, sequence, surroundings
from engine.test_experts import check_record
from vllm_tap import Spec, record
from vllm_tap.errors import EngineDiedError
from vllm_tap.interchange import replay

pytestmark = pytest.mark.engine

DEATH_S = 15.0


class Case(NamedTuple):
    """A model and how it is spread."""

    family: str
    axis: str
    spec: Spec

    def __str__(self) -> str:
        return f"{self.family}-{self.axis}"


CASES = [
    Case("llama", "tensor", Spec(**DENSE)),
    Case("glm4_moe", "pipeline", Spec(**DENSE, router_logits="all")),
    Case("qwen3_moe", "tensor", Spec(**DENSE, router_logits="all")),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """A model and how it is spread."""
    return request.param


@pytest.fixture(scope="module")
def engine(case: Case, tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """An eager engine of two ranks."""
    with surroundings({"VLLM_CPU_OMP_THREADS_BIND": "0|1"}):
        engine = Engine(tiny_model(case.family), enforce_eager=True, listens=True, **{f"{case.axis}_parallel_size": 2})
    yield engine
    engine.close()


@pytest.fixture
def known(case: Case, references: Callable[[str], References]) -> References:
    """Hugging Face's forward passes of the engine's model."""
    return references(case.family)


def test_every_row_is_that_of_hugging_face(case, engine, known):
    """Rows of all layers are joined from the ranks that hold them, by every transport."""
    for transport in TRANSPORTS:
        result = engine.capture(prompts(), case.spec, transport=transport)
        compare(result, known)
        assert {layer for layers in result.layers.values() for layer in layers} == {0, 1, 2, 3}
    if case.spec.router_logits:
        check_records(engine.capture(prompts(), Spec(routed_experts="all")), known)


def check_records(result: Any, known: References) -> None:
    """Check that records have the experts of all decoder layers, whichever stage chose them."""
    for sample, output in zip(result, result.outputs, strict=True):
        record = replay(sample)
        assert record.ids.shape[1] == 4
        check_record(record.ids, record.weights, known.choices_of(sequence(output)), result.routing)


def test_ranks_share_the_layers(case, engine):
    """Each rank ships rows: none of them is shipped twice, and none of the ranks ships all."""
    result = engine.capture(prompts(), Spec(hidden_states="all"))
    used = [state["used_bytes"] for state in engine.status()]
    assert len(used) == 2
    assert 0 < min(used) <= max(used) < 1.5 * min(used)
    assert len(result) == len(prompts())


def test_each_rank_writes_its_layers(case, engine, tmp_path):
    """A dataset of the workers' is that of the client, byte for byte."""
    files = []
    for writers in ("client", "workers"):
        folder = tmp_path / writers
        record(engine.llm, prompts([30, 7]), case.spec, folder, writers=writers, max_tokens=4, temperature=0)
        files.append({one.relative_to(folder): one.read_bytes() for one in folder.glob("*/*.safetensors")})
    assert files[0] == files[1]
    assert len(files[0]) > 8


def test_layers_of_one_rank_need_no_other(engine, known):
    """A layer that only one rank ships arrives complete while the other ships nothing."""
    for layer in range(4):
        spec = Spec(hidden_states=[layer], positions="prompt")
        compare(engine.capture(prompts([30, 7]), spec), known, prompt_positions)


def prompt_positions(prompt_len: int, num_rows: int) -> list[int]:
    """Positions of the prompt."""
    return list(range(prompt_len))


@pytest.mark.timeout(60, func_only=True)
def test_a_killed_rank_is_an_error(case, engine, known):
    """Last, for it ends the engine: rows outlive a rank that is killed, and the next capture raises in bounded time."""
    result = engine.capture(prompts(), case.spec)
    os.kill(engine.status()[1]["pid"], signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(EngineDiedError, match="new LLM"):
        engine.capture(prompts(), case.spec)
    assert time.monotonic() - begin < DEATH_S
    compare(result, known)
